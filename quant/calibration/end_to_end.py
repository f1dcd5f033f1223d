"""End-to-end steps: the quantized denoiser learns to predict the full-precision noise.

The last phase of tinyDM, data-free. Weights move as latent codes with straight-through rounding,
activation scales by LSQ, biases and norms as they are. The loss is the eps error at calibration
samples, and then, in runs through the first sampling steps (runs.py), the error of the state that
these lead to.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..runtime.denoiser import QuantDenoiser
from .finite import finite_loss
from .layers import CalibLayer
from .quantizer import rate_of_scale, scale_groups
from .runs import RUN_RATE, Begin, Runs
from .sharing import Alone, Team, Tensors, add_gradients
from .states import CalibrationStates
from .wrapping import activation_quantizers, weight_layers

LR_LATENT = 0.006  # in codes: about a hundred steps move a weight from the middle to the next
LR_FLOAT = 1e-3  # biases and norms, at 4 bits; each bit more halves it
LR_ZERO_POINT = 0.02  # in codes


def parameter_groups(model: QuantDenoiser, lr_scale: float) -> list[dict]:
    """Makes the latent weights, unless they were restored, and marks what learns; returns the
    optimizer's groups."""
    groups: list[dict] = []
    taken = set()
    layers = [layer for _, layer in weight_layers(model)]
    for layer in layers:
        quantizer = layer.quantizer
        if quantizer.log_gain is None:
            quantizer.start_latent(layer.weight.detach())
        latent, log_gain = quantizer.latent, quantizer.log_gain
        assert latent is not None and log_gain is not None  # of start_latent
        layer.weight.data = latent.data  # has no use from here on: frees its memory
        groups.append({"params": [latent], "lr": LR_LATENT})
        rate = rate_of_scale(lr_scale, quantizer.bits)
        groups.append({"params": [log_gain], "lr": rate})
        taken.add(id(layer.weight))
    quantizers = [q for _, q in activation_quantizers(model)]
    groups += scale_groups(quantizers, lr_scale)
    asymmetric = [q for q in quantizers if not (q.symmetric or q.unsigned)]
    zero_points = [q.zero_point for q in asymmetric]
    zero_points += [q.shared_zero_point for q in asymmetric if q.groups > 1]
    groups.append({"params": zero_points, "lr": LR_ZERO_POINT})
    taken |= {id(p) for q in quantizers for p in q.parameters()}
    taken |= {id(p) for group in groups for p in group["params"]}
    floats = [p for p in model.parameters() if id(p) not in taken]
    fewest = min([q.bits for q in quantizers] + [layer.quantizer.bits for layer in layers])
    groups.append({"params": floats, "lr": rate_of_scale(LR_FLOAT, fewest)})
    for p in model.parameters():
        p.requires_grad_(False)
    for group in groups:
        for p in group["params"]:
            p.requires_grad_(True)
    return groups


# Shares of a batch's loss, each with its graph once it is called.
Shares = list[Callable[[], torch.Tensor]]


@dataclass(frozen=True)
class _Lesson:
    """Steps with one kind of loss, the sum of what `draw` gives for a batch."""

    iterations: int
    rate: float  # times the learning rates
    codes: bool  # whether weights learn other codes
    draw: Callable[[torch.Generator], Shares]


def finetune(
    model: QuantDenoiser,
    states: CalibrationStates,
    tuples: torch.Tensor,
    iterations: int,
    batch_size: int,
    lr_scale: float,
    generator: torch.Generator,
    on_iteration: Callable[[int, float], None] = lambda i, loss: None,
    step_weight: torch.Tensor | None = None,
    on_checkpoint: Callable[[dict[str, Any]], None] = lambda progress: None,
    progress: dict[str, Any] | None = None,
    accumulate: int = 1,
    team: Team | None = None,
    run_iterations: int = 0,
    begin: Begin | None = None,
) -> None:
    """Trains in place. tuples (n, 2) of the states. on_iteration(i, loss) is for progress.

    step_weight (S,) weighs the squared eps error of each sampling step: by its root a step is drawn
    more often, and by the root its error counts more. on_checkpoint(progress) comes after each
    iteration; an interrupted run goes on when it is given that `progress` beside the model's state
    of the moment.
    accumulate: parts of a batch, whose gradients are added up. team: processes that call it
    together, with the same arguments and equal models, and share the parts. run_iterations: steps
    behind the others that learn from runs, which `begin` makes. Raises DivergenceError.
    """
    total = iterations + run_iterations
    if total == 0:
        return
    of_samples = _of_samples(model, states, tuples, batch_size, step_weight, accumulate)
    lessons = [_Lesson(iterations, 1.0, True, of_samples)]
    if run_iterations:
        assert begin is not None
        runs = Runs(model, states, begin, step_weight)

        def draw(generator: torch.Generator) -> Shares:
            return of_samples(generator) + runs.draw(generator, accumulate)

        lessons.append(_Lesson(run_iterations, RUN_RATE, False, draw))
    groups = parameter_groups(model, lr_scale)
    start = 0 if progress is None else progress["iterations"]
    if progress is not None:
        generator.set_state(progress["generator"])
    layers = [layer for _, layer in weight_layers(model)]
    of_weights = {id(p) for layer in layers for p in layer.quantizer.parameters()}
    others = [p for group in groups for p in group["params"] if id(p) not in of_weights]
    before = 0  # iterations of the lessons before
    for lesson in lessons:
        learning = _learning(groups, layers, lesson.codes)
        rates = [group["lr"] for group in learning]
        optimizer = torch.optim.Adam(learning, betas=(0.9, 0.99), fused=True)
        if progress is not None and before < start < before + lesson.iterations:
            optimizer.load_state_dict(progress["optimizer"])
        for i in range(max(0, start - before), lesson.iterations):
            shares = lesson.draw(generator)
            optimizer.zero_grad(set_to_none=True)

            def backward(number: int, shares: Shares = shares) -> Tensors:
                loss = shares[number]()
                # Adam is scale free; this keeps tiny gradients above its epsilon.
                (loss * 100).backward()
                return {"loss": loss.detach()}

            with _weights_made_once(layers) as made:
                found = add_gradients(team or Alone(), len(shares), backward, [*made, *others])
            loss = torch.stack([values["loss"].to(states.device) for values in found]).sum()
            value = finite_loss(loss, before + i, total)
            warm = min(1.0, (i + 1) / (0.05 * lesson.iterations + 1))
            cosine = 0.5 * (1 + math.cos(math.pi * i / lesson.iterations))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * lesson.rate * warm * cosine
            optimizer.step()
            for layer in layers:
                layer.quantizer.clamp_latent()
            on_iteration(before + i, value)
            on_checkpoint(
                {
                    "iterations": before + i + 1,
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                }
            )
        optimizer.zero_grad(set_to_none=True)
        before += lesson.iterations
    for layer in layers:
        layer.quantizer.fix_scale()


def _learning(groups: list[dict], layers: Sequence[CalibLayer], codes: bool) -> list[dict]:
    """The groups that learn, for an optimizer of their own: all, or those without latent codes."""
    latents = {id(layer.quantizer.latent) for layer in layers}
    learning = []
    for group in groups:
        learns = codes or not any(id(p) in latents for p in group["params"])
        for p in group["params"]:
            p.requires_grad_(learns)
        if learns:
            learning.append(dict(group))
    return learning


def _of_samples(
    model: QuantDenoiser,
    states: CalibrationStates,
    tuples: torch.Tensor,
    batch_size: int,
    step_weight: torch.Tensor | None,
    accumulate: int,
) -> Callable[[torch.Generator], Shares]:
    """The eps error of single samples; see finetune."""
    root = None if step_weight is None else _balanced_root(step_weight, tuples)
    chances = torch.ones(len(tuples)) if root is None else _chances(root, tuples)

    def share(part: torch.Tensor) -> torch.Tensor:
        return _loss(model, states, part, root) * (len(part) / batch_size)

    def draw(generator: torch.Generator) -> Shares:
        index = tuples[torch.multinomial(chances, batch_size, True, generator=generator)]
        return [partial(share, part) for part in index.chunk(accumulate)]

    return draw


@contextmanager
def _weights_made_once(layers: Sequence[CalibLayer]) -> Iterator[list[torch.Tensor]]:
    """Quantizes the weights once for all parts of a batch. Yields them: what gradients they have in
    the end go on to what they were made of."""
    weights = [layer.quantizer(layer.weight) for layer in layers]
    made = [weight.detach().requires_grad_() for weight in weights]
    for layer, weight in zip(layers, made, strict=True):
        layer.made_weight = weight
    try:
        yield made
    finally:
        for layer in layers:
            layer.made_weight = None
    used = [i for i, weight in enumerate(made) if weight.grad is not None]
    torch.autograd.backward([weights[i] for i in used], [made[i].grad for i in used])


def _balanced_root(step_weight: torch.Tensor, tuples: torch.Tensor) -> torch.Tensor:
    """The root of the weights (S,), scaled to a mean of 1 over what is drawn."""
    root = step_weight.sqrt()
    drawn = (torch.bincount(tuples[:, 0], minlength=len(root)) > 0) * root
    return root * (drawn.sum() / drawn.square().sum())


def _chances(root: torch.Tensor, tuples: torch.Tensor) -> torch.Tensor:
    """How likely each tuple (n, 2) is drawn, (n,): a step as the root of its weight, however many
    samples it has."""
    alike = torch.bincount(tuples[:, 0], minlength=len(root))
    return (root / alike.clamp(min=1))[tuples[:, 0]]


def _loss(
    model: QuantDenoiser,
    states: CalibrationStates,
    index: torch.Tensor,
    step_weight: torch.Tensor | None,
) -> torch.Tensor:
    """Mean error of the predicted noise at the samples `index` (n, 2)."""
    x, t, eps, conditioning = states.gather(index)
    error = (model(x, t, **conditioning) - eps).square().flatten(1).mean(1)  # (n,)
    if step_weight is not None:
        error = error * step_weight[index[:, 0]].to(error.device)
    return error.mean()
