"""Differentiable search of the timestep groups, with active timestep selection.

See docs/method.md, sections 3 and 4; after APQ-DM (arXiv 2305.18723).

Every activation quantizer holds a softmax sigma over its G groups for every timestep; its output is
the mixture of the two likeliest groups. Minimised are the eps error against full precision,
relative to its start, and lambda times the mean entropy of sigma, while the temperature falls, so
that the assignment ends hard and taking the arg max changes little (the gap is reported).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..core.settings import MOST_BITS, SearchSettings
from ..runtime.denoiser import QuantDenoiser
from .finite import finite_loss
from .quantizer import LearnedQuantizer, scale_groups
from .sharing import Alone, Team, Tensors, add_gradients
from .states import CalibrationStates
from .timesteps import ActiveSelector, normalised_entropy, tuples_of_steps
from .wrapping import activation_quantizers

LOGITS_PER_EXCESS, LOWEST_LOGIT = 10.0, 4.0
BARRED = -1e4  # logit of groups of other bits than the timestep's
SMALLEST_ERROR, SMALLEST_SHARE = 1e-20, 1e-6


@dataclass
class SearchResult:
    """tuples (n, 2): the samples that were used; selector: its final scores; decided: share of
    (quantizer, timestep) with max sigma > 0.95 before the arg max; moved: share whose group
    changed; error_start, error_end: eps error at the first and last tenth of the rounds."""

    tuples: torch.Tensor
    selector: ActiveSelector
    decided: float
    moved: float
    error_start: float
    error_end: float


def start(quantizers: list[LearnedQuantizer]) -> list[nn.Parameter]:
    """Gives each quantizer its logits (S, G), from its error table.

    A group whose range costs a timestep a tenth more than its best one starts one unit of logit
    lower, so that sigma is undecided just where groups are nearly as good. Without a table the
    assigned group starts at LOWEST_LOGIT above the others. A timestep keeps its bits, so that their
    mean stays: groups of others are barred.
    """
    logits = []
    for q in quantizers:
        barred = q.group_bits[q.group_of_timestep][:, None] != q.group_bits  # (S, G)
        if q.group_error is None:
            value = torch.full(
                (len(q.group_of_timestep), q.groups), -LOWEST_LOGIT, device=q.log_scale.device
            )
            value.scatter_(1, q.group_of_timestep[:, None], 0.0)
        else:
            # Exact values have no error: the softmax over the one token of a class is always 1.
            error = q.group_error.clamp(min=SMALLEST_ERROR)
            best = error.masked_fill(barred, math.inf).amin(1, keepdim=True)
            value = (LOGITS_PER_EXCESS * (1 - error / best)).clamp(min=-LOWEST_LOGIT)
        q.logits = nn.Parameter(value.masked_fill(barred, BARRED))
        logits.append(q.logits)
    return logits


def take_most_likely(quantizers: list[LearnedQuantizer]) -> tuple[float, float]:
    """Takes the arg max of every sigma; returns (share decided, share moved), see SearchResult."""
    decided = moved = total = 0
    for q in quantizers:
        assert q.logits is not None  # of start
        sigma = torch.softmax(q.logits.detach() / q.temperature, dim=-1)
        best, group = sigma.max(dim=-1)
        decided += int((best > 0.95).sum())
        moved += int((group != q.group_of_timestep).sum())
        total += len(group)
        q.group_of_timestep, q.group_error, q.logits, q.temperature = group, None, None, 1.0
    return decided / max(total, 1), moved / max(total, 1)


def _errors(model: QuantDenoiser, states: CalibrationStates, index: torch.Tensor) -> torch.Tensor:
    """Mean squared eps error of each tuple (n, 2); (n,)."""
    x, t, eps, conditioning = states.gather(index)
    return (model(x, t, **conditioning) - eps).square().flatten(1).mean(1)


@torch.no_grad()
def _shared_errors(
    team: Team, model: QuantDenoiser, states: CalibrationStates, parts: Sequence[torch.Tensor]
) -> torch.Tensor:
    """_errors of all parts, one after the other."""
    shared = team.share(len(parts), lambda i: {"errors": _errors(model, states, parts[i])})
    return torch.cat([values["errors"].to(states.device) for values in shared])


def search(
    model: QuantDenoiser,
    states: CalibrationStates,
    settings: SearchSettings,
    generator: torch.Generator,
    importance: torch.Tensor,
    first_errors: torch.Tensor,
    on_round: Callable[[int, float], None] = lambda i, loss: None,
    team: Team | None = None,
) -> SearchResult:
    """Learns groups and scales of all activation quantizers together; weights stay as they are.

    Only quantizers with more than one group are searched; with one group everywhere the scales
    learn alone. importance (K,): how much an eps error at a sampling step matters;
    first_errors (K,): eps errors there before the search.
    on_round(i, loss) is for progress. team: processes that call it together, with the same
    arguments and equal models, and share the parts of a round. Raises DivergenceError.
    """
    team = team or Alone()
    # The inputs of the first and last layers have more bits: their ranges have room to spare.
    of_groups = [q for _, q in activation_quantizers(model) if q.bits <= MOST_BITS]
    quantizers = [q for q in of_groups if q.groups > 1]
    learned = quantizers or of_groups  # with one group everywhere: the scales alone
    selector = ActiveSelector(importance, settings.exploration, settings.error_weight)
    selector.error = first_errors.clone()
    if not learned:
        return SearchResult(torch.zeros(0, 2, dtype=torch.long), selector, 1.0, 0.0, 0.0, 0.0)
    logits = start(quantizers)
    groups: list[dict] = [{"params": logits, "lr": settings.lr_logits}] if logits else []
    groups += scale_groups(learned, settings.lr_scale)
    for p in model.parameters():
        p.requires_grad_(False)
    parameters = [p for group in groups for p in group["params"]]
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(groups, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    # A round has no more samples than there are.
    batch_size = min(settings.batch_size, len(states.timesteps) * states.trajectories)
    nearest_of_step = model.context.nearest(torch.tensor(states.timesteps))
    tuples, errors, normaliser = [], [], None
    for i in range(settings.rounds):
        progress = i / settings.rounds
        temperature = settings.temperature**progress
        for q in quantizers:
            q.temperature = temperature
        # What is drawn more often counts less, so that the loss stays that of the importance.
        shares = selector.shares().clamp(min=SMALLEST_SHARE)
        weight = importance / importance.mean() * shares.mean() / shares
        index = tuples_of_steps(selector.pick(batch_size), states.trajectories, generator)
        optimizer.zero_grad(set_to_none=True)
        parts = index.chunk(settings.accumulate)
        if normaliser is None:
            first = _shared_errors(team, model, states, parts)
            normaliser = (first * weight[index[:, 0]].to(first.device)).mean().clamp(min=1e-12)

        def backward(
            number: int,
            part_of: tuple[torch.Tensor, ...] = parts,
            weight: torch.Tensor = weight,
            normaliser: torch.Tensor = normaliser,
        ) -> Tensors:
            part = part_of[number]
            errors = _errors(model, states, part)
            loss = (errors * weight[part[:, 0]].to(errors.device)).sum()
            loss = loss / batch_size / normaliser
            loss.backward()
            return {"errors": errors.detach(), "loss": loss.detach()}

        found = add_gradients(team, len(parts), backward, parameters)
        loss = torch.stack([values["loss"].to(states.device) for values in found]).sum()
        value = finite_loss(loss, i, settings.rounds)
        if logits:
            sigma = [torch.softmax(p / temperature, dim=-1) for p in logits]
            entropy = torch.stack([normalised_entropy(s) for s in sigma])  # (L, S)
            loss = settings.entropy * entropy.mean()
            value += finite_loss(loss, i, settings.rounds)
            loss.backward()
            selector.entropy = entropy.detach().mean(0).cpu()[nearest_of_step]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.step()
        error = torch.cat([values["errors"].to(states.device) for values in found])
        selector.observe_error(index[:, 0], error.cpu())
        tuples.append(index)
        errors.append(float(error.mean()))
        on_round(i, value)
    decided, moved = take_most_likely(quantizers) if quantizers else (1.0, 0.0)
    tenth = max(1, len(errors) // 10)
    return SearchResult(
        torch.cat(tuples),
        selector,
        decided,
        moved,
        sum(errors[:tenth]) / tenth,
        sum(errors[-tenth:]) / tenth,
    )
