"""Groups of timesteps that share one activation range (docs/method.md, section 3).

`assign` solves the initial grouping exactly: a table of the quantization error of every timestep
under every candidate range turns it into a shortest path (contiguous groups) followed by k-medians
(free groups). The differentiable search then starts from it, see search.start.

Legend: S calibrated timesteps, C candidate ranges, G groups, N sampled values.
"""

import math

import torch

from ..core.affine import range_to_scale
from ..core.settings import MOST_BITS
from .quantizer import LearnedQuantizer
from .statistics import Statistics
from .weights import ERROR_POWER

TOLERATED_LOSS = 0.01  # of a tensor's error, that groups which are left out may cost
HEADROOM = 1.5  # how far beyond the largest value a range of more than MOST_BITS reaches
SHARED_RANGE = 16.0  # timesteps whose extremes differ by more do not share one of these ranges
FEWEST_CANDIDATES, MOST_CANDIDATES = 20, 40  # of the lowest and of the highest value each
VALUES_AT_ONCE = 1 << 16  # of the table: its passes stay in the cache
CANDIDATE_STEP = 1.13  # factor from one to the next, as far as the number of them allows


def candidate_ranges(
    stats: Statistics, symmetric: bool, unsigned: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidate (low, high), each (C,): a grid between the tightest and the widest timestep."""

    def grid(extremes: torch.Tensor) -> torch.Tensor:
        """Geometric grid over magnitudes, from 0.3 times the smallest to the largest."""
        magnitude = extremes.abs()
        top = magnitude.max()
        if top <= 0:
            return torch.zeros(1)
        bottom = torch.maximum(magnitude.min() * 0.3, top * 1e-3)
        steps = 1 + math.ceil(math.log(float(top / bottom)) / math.log(CANDIDATE_STEP))
        count = min(max(steps, FEWEST_CANDIDATES), MOST_CANDIDATES)
        return torch.logspace(float(bottom.log10()), float(top.log10()), count)

    low, high = stats.low.clamp(max=0), stats.high.clamp(min=0)
    if symmetric:
        both = grid(torch.maximum(-low, high))
        return -both, both
    highs = grid(high)
    if unsigned:
        return torch.zeros_like(highs), highs
    lows = -grid(low)
    return lows.repeat_interleave(len(highs)), highs.repeat(len(lows))


def error_table(
    stats: Statistics,
    low: torch.Tensor,
    high: torch.Tensor,
    bits: int | torch.Tensor,
    symmetric: bool,
    power: float = 2.0,
) -> torch.Tensor:
    """Mean |x - x_hat|^power of each timestep under each candidate range (S, C), really
    quantized; bits: one number, or one for each timestep (S,)."""
    bits = torch.as_tensor(bits).expand(len(stats.low))
    table = torch.empty(len(bits), len(low))
    for count in bits.unique().tolist():
        scale, zero_point = range_to_scale(low, high, count, symmetric)
        top = 2**count - 1
        x = stats.values[bits == count]  # (timesteps, N)
        rows = []
        at_once = max(1, VALUES_AT_ONCE // x.numel())
        for s, z in zip(scale.split(at_once), zero_point.split(at_once), strict=True):
            s, z = s.view(-1, 1, 1), z.view(-1, 1, 1)
            difference = (x / s).round_().clamp_(-z, top - z).mul_(s).sub_(x)
            rows.append(
                (difference.square_() if power == 2 else difference.abs_().pow_(power)).mean(2)
            )
        table[bits == count] = torch.cat(rows).T
    return table


def contiguous_groups(table: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Optimal split of the timesteps into `groups` runs: (group of timestep (S,), candidate of
    group (G,)).

    Minimises the summed error by dynamic programming over run ends; each run takes its best
    candidate.
    """
    timesteps = len(table)
    groups = min(groups, timesteps)
    prefix = torch.cat([torch.zeros(1, table.shape[1]), table.cumsum(0)])  # (S+1, C)
    cost = torch.full((timesteps + 1, timesteps + 1), float("inf"))
    choice = torch.zeros(timesteps + 1, timesteps + 1, dtype=torch.long)
    for end in range(1, timesteps + 1):
        run = prefix[end] - prefix[:end]  # (end, C): runs start..end-1
        cost[:end, end], choice[:end, end] = run.min(dim=1)
    best = torch.full((groups + 1, timesteps + 1), float("inf"))
    best[0, 0] = 0.0
    start_of = torch.zeros(groups + 1, timesteps + 1, dtype=torch.long)
    for g in range(1, groups + 1):
        total = best[g - 1][:, None] + cost  # (start, end)
        best[g], start_of[g] = total.min(dim=0)
    group_of_timestep = torch.zeros(timesteps, dtype=torch.long)
    candidates = torch.zeros(groups, dtype=torch.long)
    end = timesteps
    for g in range(groups, 0, -1):
        start = int(start_of[g, end])
        group_of_timestep[start:end] = g - 1
        candidates[g - 1] = choice[start, end]
        end = start
    return group_of_timestep, candidates


def refine(
    table: torch.Tensor, group_of_timestep: torch.Tensor, candidates: torch.Tensor, rounds: int = 10
) -> tuple[torch.Tensor, torch.Tensor]:
    """k-medians over candidate ranges from a start: groups need not be contiguous any more."""
    candidates = candidates.clone()
    for _ in range(rounds):
        new = table[:, candidates].argmin(dim=1)
        for g in range(len(candidates)):
            members = table[new == g]
            if len(members):
                candidates[g] = members.sum(0).argmin()
        if torch.equal(new, group_of_timestep):
            break
        group_of_timestep = new
    return group_of_timestep, candidates


Solution = tuple[float, torch.Tensor, torch.Tensor]  # cost, group_of_timestep, candidate of group


def cheapest_groups(
    table: torch.Tensor, groups: int, free: bool, bits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest groups that lose no more than TOLERATED_LOSS beside `groups` of them.

    A group that is worth nothing would only take samples from the others. free: groups need not be
    contiguous. bits (S,): of the timesteps; those of a group are the same.
    """
    kinds = bits.unique().tolist()
    best: dict[int, Solution] = {0: (0.0, torch.zeros(len(table), dtype=torch.long), bits[:0])}
    for done, kind in enumerate(kinds, 1):
        rows = bits == kind
        most = groups - (len(kinds) - 1)
        new: dict[int, Solution] = {}
        for own in _groupings(table[rows], most, free):
            for before, (cost, group_of_timestep, chosen) in best.items():
                total = before + len(own[2])
                if total > groups - (len(kinds) - done):
                    continue
                if total not in new or cost + own[0] < new[total][0]:
                    group_of_timestep = group_of_timestep.clone()
                    group_of_timestep[rows] = own[1] + before
                    new[total] = cost + own[0], group_of_timestep, torch.cat([chosen, own[2]])
        best = new
    found = [best[count] for count in sorted(best)]
    limit = found[-1][0] * (1 + TOLERATED_LOSS)
    # Costs that are not finite fit no limit: the search will report them.
    return next((f[1:] for f in found if f[0] <= limit), found[-1][1:])


def _groupings(table: torch.Tensor, groups: int, free: bool) -> list[Solution]:
    """The best solution with each number of groups, of timesteps of the same bits."""
    found = []
    for count in range(1, min(groups, len(table)) + 1):
        group_of_timestep, chosen = contiguous_groups(table, count)
        if free:
            group_of_timestep, chosen = refine(table, group_of_timestep, chosen)
        cost = table[torch.arange(len(table)), chosen[group_of_timestep]].sum()
        found.append((float(cost), group_of_timestep, chosen))
    return found


def uniform_groups(table: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Equal runs of timesteps (the grouping of TFMQ-DM), each with its best candidate."""
    timesteps = len(table)
    groups = min(groups, timesteps)
    group_of_timestep = torch.arange(timesteps) * groups // timesteps
    candidates = torch.stack([table[group_of_timestep == g].sum(0).argmin() for g in range(groups)])
    return group_of_timestep, candidates


def _wide_ranges(stats: Statistics) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds (G,) of ranges around 0 and the group of each timestep (S,). All timesteps share one
    range but where states grow along the trajectory until small ones would have few codes left."""
    largest = torch.maximum(-stats.low, stats.high).clamp(min=1e-6)
    level = ((largest.max() / largest).log() / math.log(SHARED_RANGE)).floor()
    _, group_of_timestep = level.unique(return_inverse=True)
    groups = range(int(group_of_timestep.max()) + 1)
    bound = torch.stack([largest[group_of_timestep == g].max() for g in groups])
    return HEADROOM * bound, group_of_timestep


def assign(
    quantizer: LearnedQuantizer,
    stats: Statistics,
    groups: int,
    search: str,
    scale: str,
    weight: torch.Tensor | None = None,
    bits: torch.Tensor | None = None,
) -> None:
    """Sets the quantizer's ranges and groups from the statistics.

    weight (S,): how much an error at each calibrated timestep matters; None: all alike. bits (S,):
    of each of them; None: those of the quantizer. Both count where groups are searched.

    search: none (one range by the error over all samples, with ERROR_POWER) |
    uniform | dp (optimal runs) | kmeans or differentiable (free groups; the differentiable search
    goes on from there). scale: mse | minmax (without a search of the clipping).
    """
    if quantizer.bits > MOST_BITS:  # codes abound: ranges with room to spare, so that nothing clips
        bound, group_of_timestep = _wide_ranges(stats)
        quantizer.set_ranges(-bound, bound, group_of_timestep)
        return
    if scale == "minmax":
        low, high = stats.low, stats.high
        if search == "none":
            groups = 1
        group_of_timestep = torch.arange(len(low)) * min(groups, len(low)) // len(low)
        count = int(group_of_timestep.max()) + 1
        quantizer.set_ranges(
            torch.stack([low[group_of_timestep == g].min() for g in range(count)]),
            torch.stack([high[group_of_timestep == g].max() for g in range(count)]),
            group_of_timestep,
        )
        return
    symmetric = quantizer.symmetric
    low, high = candidate_ranges(stats, symmetric, quantizer.unsigned)
    power = ERROR_POWER if search == "none" else 2.0
    bits = torch.full(stats.low.shape, quantizer.bits) if bits is None else bits
    table = error_table(stats, low, high, bits, symmetric, power)
    if search == "none":
        group_of_timestep = torch.zeros(len(table), dtype=torch.long)
        chosen = (stats.weight @ table).argmin()[None]
    elif search == "uniform":
        group_of_timestep, chosen = uniform_groups(table, groups)
    else:
        # Relative to each timestep's own best range, however large its activations are.
        table = table / table.min(dim=1, keepdim=True).values.clamp(min=1e-20)
        weighted = table if weight is None else table * (weight / weight.mean())[:, None]
        group_of_timestep, chosen = cheapest_groups(weighted, groups, search != "dp", bits)
        quantizer.group_error = table[:, chosen].to(quantizer.log_scale.device)
    of_groups = torch.full(chosen.shape, quantizer.bits)  # also of groups without a timestep
    of_groups[group_of_timestep] = bits
    quantizer.set_ranges(low[chosen], high[chosen], group_of_timestep, of_groups)
