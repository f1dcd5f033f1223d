"""End-to-end steps: the quantized denoiser learns to predict the full-precision noise.

The last phase of tinyDM. Weights move as latent codes with straight-through rounding, activation
scales by LSQ, biases and norms as they are; the loss is the eps error at calibration samples,
data-free.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..runtime.denoiser import QuantDenoiser
from .finite import finite_loss
from .layers import CalibLayer
from .quantizer import rate_of_scale, scale_groups
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


@dataclass(frozen=True)
class Plan:
    """How the steps go. accumulate: parts of a batch, whose gradients are added up.

    step_weight (K,) weighs the squared eps error of each sampling step: by its root a step is drawn
    more often, and by the root its error counts more.
    """

    iterations: int
    batch_size: int
    lr_scale: float
    accumulate: int = 1
    step_weight: torch.Tensor | None = None


@dataclass(frozen=True)
class EndToEnd:
    """The end-to-end steps of a model, in place. tuples (n, 2) of the states.

    team: processes that run it together, with the same arguments and equal models, and share the
    parts of a batch.
    """

    model: QuantDenoiser
    states: CalibrationStates
    tuples: torch.Tensor
    plan: Plan
    team: Team = field(default_factory=Alone)

    def run(
        self,
        generator: torch.Generator,
        on_iteration: Callable[[int, float], None] = lambda i, loss: None,
        on_checkpoint: Callable[[dict[str, Any]], None] = lambda progress: None,
        progress: dict[str, Any] | None = None,
    ) -> None:
        """on_iteration(i, loss) is for progress. on_checkpoint(progress) comes after each
        iteration; an interrupted run goes on when it is given that `progress` beside the model's
        state of the moment. Raises DivergenceError."""
        model, plan = self.model, self.plan
        if plan.iterations == 0:
            return
        groups = parameter_groups(model, plan.lr_scale)
        rates = [group["lr"] for group in groups]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
        start = 0
        if progress is not None:
            start = progress["iterations"]
            optimizer.load_state_dict(progress["optimizer"])
            generator.set_state(progress["generator"])
        root = None
        if plan.step_weight is not None:
            root = _balanced_root(plan.step_weight, self.tuples)
        chances = torch.ones(len(self.tuples)) if root is None else _chances(root, self.tuples)
        layers = [layer for _, layer in weight_layers(model)]
        for i in range(start, plan.iterations):
            drawn = torch.multinomial(chances, plan.batch_size, True, generator=generator)
            optimizer.zero_grad(set_to_none=True)
            value = finite_loss(self._backward(drawn, root, groups), i, plan.iterations)
            done = i / plan.iterations
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                warm = min(1.0, (i + 1) / (0.05 * plan.iterations + 1))
                group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * done))
            optimizer.step()
            for layer in layers:
                layer.quantizer.clamp_latent()
            on_iteration(i, value)
            on_checkpoint(
                {
                    "iterations": i + 1,
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                }
            )
        optimizer.zero_grad(set_to_none=True)
        for layer in layers:
            layer.quantizer.fix_scale()

    def _backward(
        self, drawn: torch.Tensor, root: torch.Tensor | None, groups: list[dict]
    ) -> torch.Tensor:
        """Leaves the gradients of a batch, the tuples with the numbers `drawn`; returns its loss.
        root (K,): weights of the samples' errors; groups: of all that learns."""
        parts = self.tuples[drawn].chunk(self.plan.accumulate)

        def backward(number: int) -> Tensors:
            part = parts[number]
            loss = _loss(self.model, self.states, part, root) * (len(part) / len(drawn))
            (loss * 100).backward()  # Adam is scale free; keeps tiny gradients above its epsilon
            return {"loss": loss.detach()}

        layers = [layer for _, layer in weight_layers(self.model)]
        of_all_parts = [] if _recomputes(self.model) else layers
        of_weights = {id(p) for layer in of_all_parts for p in layer.quantizer.parameters()}
        others = [p for group in groups for p in group["params"] if id(p) not in of_weights]
        with _weights_made_once(of_all_parts) as made:
            found = add_gradients(self.team, len(parts), backward, [*made, *others])
        return torch.stack([values["loss"].to(self.states.device) for values in found]).sum()


def _recomputes(model: QuantDenoiser) -> bool:
    """Whether blocks keep nothing for their gradients and compute it again (diffusers' attribute).
    They make their quantized weights again as well: those of the whole model, with gradients of
    their own, would be the largest part of its memory."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def _weights_made_once(layers: Sequence[CalibLayer]) -> Iterator[list[torch.Tensor]]:
    """Quantizes the weights once for all parts of a batch. Yields them: what gradients they have in
    the end go on to what they were made of."""
    weights = [layer.quantizer(layer.weight) for layer in layers]
    made = [weight.detach().requires_grad_() for weight in weights]
    for i, layer in enumerate(layers):
        layer.made_weight = made[i]
    try:
        yield made
    finally:
        for layer in layers:
            layer.made_weight = None
    while made:  # one by one, so that each one's memory is free for the gradients of the next
        weight, value = weights.pop(), made.pop()
        if value.grad is not None:
            torch.autograd.backward(weight, value.grad)


def _balanced_root(step_weight: torch.Tensor, tuples: torch.Tensor) -> torch.Tensor:
    """The root of the weights (K,), scaled to a mean of 1 over what is drawn."""
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
