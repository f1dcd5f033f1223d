"""Second-order rounding: each weight's rounding error is made up by the weights still to come.

GPTQ (Frantar et al. 2023) on every layer, with H = X^T X of the layer's own quantized inputs X. The
codes move to the grid that the scale search chose; what later phases learn starts from them.

Each block of columns takes the codes that lose least on samples of other trajectories: rounded to
nearest, or by H with little or much damping. H itself cannot tell where it was learned by heart.

Memory is bounded: a wide layer's H is kept in diagonal blocks of whole input channels, and layers
are taken in passes over the samples, each pass as many as its share of memory holds. Layers of a
later pass see inputs that come through the rounded weights of the earlier ones. Where X has far
fewer rows than columns, X is kept in place of H, and nothing of the size of H is computed.

For layers of the timestep alone X has one row a timestep, so that this is the reconstruction of the
temporal features over the whole schedule (TFMQ-DM), in closed form.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..core.affine import per_channel
from ..runtime.denoiser import QuantDenoiser
from .layers import CalibLayer
from .sharing import Alone, Team, Tensors
from .states import CalibrationStates

ROWS_PER_SAMPLE = 64  # output positions that enter H, at most: a grid over the feature map
DAMPINGS = (0.01, 0.2)  # of the mean of H's diagonal: the more, the nearer to the nearest codes
DELAYED_COLUMNS = 128  # columns whose update of the rest is delayed
WIDEST_HESSIAN = 4608  # columns of a diagonal block of H: 512 channels of a 3 x 3 kernel
COLUMNS_PER_ROW = 8  # from so many on, X in place of H is quicker

Feedback = Callable[[int, int], torch.Tensor]
"""(start, end) -> F[:end, start:end]: column j loses F_ij times the error of column i before it."""


@dataclass(frozen=True)
class Hessian:
    """What a layer multiplies some columns of its weight with, as H = X^T X (N, N)."""

    value: torch.Tensor

    def squares(self) -> torch.Tensor:
        """Diagonal of H, (N,)."""
        return self.value.diagonal()

    def loss(self, error: torch.Tensor) -> float:
        """tr(E H E^T), error (O, N)."""
        return float(((error @ self.value) * error).sum())

    def feedback(self, order: torch.Tensor, damping: torch.Tensor) -> Feedback:
        """Of H + damping, for the columns in the given order (N,)."""
        h = self.value[order][:, order].double()
        h.diagonal().add_(damping)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        upper = torch.linalg.cholesky(inverse, upper=True)  # H^-1 = U^T U
        matrix = (upper / upper.diagonal()[:, None]).to(self.value.dtype)
        return lambda start, end: matrix[:end, start:end]


@dataclass(frozen=True)
class Rows:
    """The same as X (R, N) itself, of fewer rows than columns."""

    value: torch.Tensor

    def squares(self) -> torch.Tensor:
        """See Hessian."""
        return self.value.square().sum(0)

    def loss(self, error: torch.Tensor) -> float:
        """See Hessian."""
        return float((error @ self.value.T).square().sum())

    def feedback(self, order: torch.Tensor, damping: torch.Tensor) -> Feedback:
        """See Hessian. With P the inverse of damping + X X^T over the columns not rounded yet,
        column i has F_ij = -g x_j, g = P x_i / (1 - x_i P x_i); without it P has g (P x_i)^T more
        (Woodbury, Sherman and Morrison)."""
        x = self.value[:, order].double()
        square = x @ x.T  # (R, R)
        square.diagonal().add_(damping)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(square))
        gains = torch.empty_like(x.T)  # (N, R)
        for i, column in enumerate(x.T.contiguous()):
            seen = inverse @ column
            torch.div(seen, 1 - column @ seen, out=gains[i])
            inverse.addr_(gains[i], seen)
        gains, x = gains.to(self.value.dtype), x.to(self.value.dtype)
        return lambda start, end: -(gains[:end] @ x[:, start:end])


def compensated_layers(model: QuantDenoiser) -> dict[str, CalibLayer]:
    """All layers but grouped convolutions."""
    return {
        name: m
        for name, m in model.denoiser.named_modules()
        if isinstance(m, CalibLayer) and (not m.op.is_conv or m.op.groups == 1)
    }


def column_blocks(layer: CalibLayer) -> list[slice]:
    """Columns (I * kh * kw) in equal parts of whole input channels, none wider than WIDEST_HESSIAN
    unless one channel is."""
    channels, columns = layer.weight.shape[1], layer.weight[0].numel()
    taps = columns // channels
    parts = min(channels, -(-columns // WIDEST_HESSIAN))
    edges = [round(i * channels / parts) * taps for i in range(parts + 1)]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def keeps_rows(layer: CalibLayer, samples: int) -> bool:
    """Whether X of so many samples takes the place of H."""
    narrowest = min(block.stop - block.start for block in column_blocks(layer))
    return samples * ROWS_PER_SAMPLE * COLUMNS_PER_ROW <= narrowest


def kept_values(layer: CalibLayer, samples: int) -> int:
    """How many numbers X or the blocks of H have."""
    if keeps_rows(layer, samples):
        return samples * ROWS_PER_SAMPLE * layer.weight[0].numel()
    return sum((block.stop - block.start) ** 2 for block in column_blocks(layer))


def passes_of(
    layers: dict[str, CalibLayer], samples: int, limit: int
) -> list[dict[str, CalibLayer]]:
    """The layers in their order, in runs of which at most `limit` bytes are kept together, for the
    samples that teach and for those that judge."""
    runs: list[dict[str, CalibLayer]] = [{}]
    used = 0
    for name, layer in layers.items():
        size = 2 * 4 * kept_values(layer, samples)
        if runs[-1] and used + size > limit:
            runs.append({})
            used = 0
        runs[-1][name] = layer
        used += size
    return runs


def input_rows(layer: CalibLayer, x: torch.Tensor) -> torch.Tensor:
    """What the layer multiplies its weight with, at some output positions: (rows, I * kh * kw)."""
    op = layer.op
    if not op.is_conv:
        flat = x.reshape(-1, x.shape[-1])
        return flat[:: max(1, len(flat) // (ROWS_PER_SAMPLE * len(x)))]
    if isinstance(op.padding, str):
        raise ValueError(f"second-order rounding needs numbers as padding, not '{op.padding}'")
    kernel, stride, padding, dilation = (
        _two(v) for v in (layer.weight.shape[2:], op.stride, op.padding, op.dilation)
    )
    if x.dim() == 3:  # Conv1d: a unit height
        x = x.unsqueeze(2)
        padding = (0, padding[1])
    positions = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    side = ROWS_PER_SAMPLE if positions[0] == 1 else int(ROWS_PER_SAMPLE**0.5)
    step = tuple(s * max(1, p // side) for s, p in zip(stride, positions, strict=True))
    return F.unfold(x, kernel, dilation, padding, step).transpose(1, 2).flatten(0, 1)


def _two(value: tuple[int, ...]) -> tuple[int, int]:
    return (value[0], value[1]) if len(value) == 2 else (1, value[0])


@torch.no_grad()
def compensate(
    model: QuantDenoiser,
    states: CalibrationStates,
    tuples: torch.Tensor,
    judges: torch.Tensor,
    batch_size: int,
    memory_gb: float,
    on_layer: Callable[[str], None] = lambda name: None,
    team: Team | None = None,
) -> dict[str, float]:
    """Rounds the weights of all layers in place. tuples (n, 2): samples of the states for H, which
    takes at most half of memory_gb at a time (or one layer's); judges (m, 2): those for the
    choice, of other trajectories. team: processes that call it together, with the same arguments
    and equal models; each takes some of the layers, whose sums are those of one process.

    Returns tr(E H E^T) of the judges, relative to rounding to nearest, by layer name.
    """
    team, gains = team or Alone(), {}
    samples = max(len(tuples), len(judges))
    for layers in passes_of(compensated_layers(model), samples, int(memory_gb * 2**29)):
        hands = _dealt(layers, samples, team.world)

        def make(
            number: int, layers: dict[str, CalibLayer] = layers, hands: list[list[str]] = hands
        ) -> Tensors:
            mine = {name: layers[name] for name in hands[number]}
            of_rows = {name for name, layer in mine.items() if keeps_rows(layer, samples)}
            learned = _inputs(model, mine, of_rows, states, tuples, batch_size)
            judging = _inputs(model, mine, of_rows, states, judges, batch_size)
            values: Tensors = {}
            for name, layer in mine.items():
                codes, gain = _round_layer(layer, learned.pop(name), judging.pop(name))
                values[f"{name} gain"] = torch.tensor(gain, dtype=torch.float64)
                if codes is not None:
                    values[f"{name} codes"] = codes
                on_layer(name)
            return values

        for number, values in enumerate(list(team.share(len(hands), make))):
            for name in hands[number]:
                gains[name] = float(values[f"{name} gain"])
                codes = values.get(f"{name} codes")
                if codes is not None:
                    layers[name].quantizer.fix_codes(codes.to(layers[name].weight.device))
                if number != team.rank:
                    on_layer(name)
    return gains


def _dealt(layers: dict[str, CalibLayer], samples: int, hands: int) -> list[list[str]]:
    """The names of the layers in so many lists of about the same work; an empty one is left out."""
    work = {name: kept_values(layer, samples) for name, layer in layers.items()}
    lists: list[list[str]] = [[] for _ in range(hands)]
    for name in sorted(work, key=work.__getitem__, reverse=True):
        min(lists, key=lambda names: sum(work[n] for n in names)).append(name)
    return [names for names in lists if names]


def _inputs(
    model: QuantDenoiser,
    layers: dict[str, CalibLayer],
    of_rows: set[str],
    states: CalibrationStates,
    tuples: torch.Tensor,
    batch_size: int,
) -> dict[str, list[Hessian | Rows]]:
    """What goes into each block of columns by layer name, for the layers in `of_rows` as Rows. One
    pass over the samples; each call ends with the last of the layers."""
    hessians: dict[str, list[torch.Tensor]] = {}
    rows_of: dict[str, list[torch.Tensor]] = {name: [] for name in of_rows}
    missing: set[str] = set()  # in the current call

    def hook_of(name: str) -> Callable:
        def hook(module: CalibLayer, args: tuple) -> None:
            rows = input_rows(module, module.quantized_input(args[0]))
            parts = [rows[:, block] for block in column_blocks(module)]
            if name in of_rows:
                rows_of[name].append(rows)
            elif name in hessians:
                for square, part in zip(hessians[name], parts, strict=True):
                    square.addmm_(part.T, part)
            else:
                hessians[name] = [part.T @ part for part in parts]
            missing.discard(name)
            if not missing:
                raise _AllSeen

        return hook

    handles = [m.register_forward_pre_hook(hook_of(n)) for n, m in layers.items()]
    try:
        for start in range(0, len(tuples), batch_size):
            x, t, _, conditioning = states.gather(tuples[start : start + batch_size])
            missing.update(layers)
            with suppress(_AllSeen):
                model(x, t, **conditioning)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, list[Hessian | Rows]] = {
        name: [Hessian(square) for square in blocks] for name, blocks in hessians.items()
    }
    for name, parts in rows_of.items():
        rows = torch.cat(parts)
        found[name] = [Rows(rows[:, block]) for block in column_blocks(layers[name])]
    return found


class _AllSeen(Exception):
    """Ends a call of which nothing more is wanted."""


def _round_layer(
    layer: CalibLayer, learned: Sequence[Hessian | Rows], judging: Sequence[Hessian | Rows]
) -> tuple[torch.Tensor | None, float]:
    """(codes, loss). codes: shaped like the weight, or None where rounding to nearest is as good.
    loss: tr(E H E^T) of the judging samples, relative to rounding to nearest.

    learned, judging: what goes into the blocks of columns, of either samples, see column_blocks.
    """
    quantizer = layer.quantizer
    weight = layer.weight.detach()
    flat = weight.flatten(1) / per_channel(quantizer.scale, weight).flatten(1)  # in codes
    zero, top = quantizer.zero_point[:, None], 2**quantizer.bits - 1
    codes = torch.clamp(flat.round(), -zero, top - zero)  # to nearest
    before = after = 0.0
    for columns, inputs, judge in zip(column_blocks(layer), learned, judging, strict=True):
        part = flat[:, columns]
        candidates = [codes[:, columns]]
        candidates += [
            second_order_codes(part, inputs, -zero, top - zero, damping) for damping in DAMPINGS
        ]
        lost = [judge.loss((q - part) * quantizer.scale[:, None]) for q in candidates]
        best = min(range(len(lost)), key=lost.__getitem__)
        codes[:, columns] = candidates[best]
        before, after = before + lost[0], after + lost[best]
    found = (codes + zero).view_as(weight) if after < before else None
    return found, after / max(before, 1e-20)


def second_order_codes(
    weight: torch.Tensor,
    inputs: Hessian | Rows,
    low: torch.Tensor,
    high: torch.Tensor,
    damping: float,
) -> torch.Tensor:
    """weight (O, N) in units of its scale, low and high (O, 1) -> codes (O, N).

    Columns in the order of falling H_ii; what rounding a column loses is moved to those after it.
    """
    squares = inputs.squares()
    order = squares.argsort(descending=True)
    feedback = inputs.feedback(order, damping * squares.mean().clamp(min=1e-12))
    w = weight[:, order]
    errors, codes = torch.empty_like(w), torch.empty_like(w)
    for start in range(0, w.shape[1], DELAYED_COLUMNS):
        end = min(start + DELAYED_COLUMNS, w.shape[1])
        passed_on = feedback(start, end)  # (end, end - start)
        part = w[:, start:end] - errors[:, :start] @ passed_on[:start]
        for i in range(start, end):
            at = i - start
            codes[:, i] = torch.clamp(part[:, at : at + 1].round(), low, high)[:, 0]
            errors[:, i] = part[:, at] - codes[:, i]
            part[:, at + 1 :] -= errors[:, i : i + 1] * passed_on[i, at + 1 :]
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result
