"""Block-wise reconstruction: AdaRound and learned activation scales (docs/method.md, section 5).

The residual units are taken in the order of execution, in chunks whose full-precision inputs and
outputs, recorded in one pass, fit the memory limit. The inputs behind the quantized prefix are
those of the units as reconstructed so far (prefix.py). A unit learns to give the full-precision
output from those inputs. It keeps what it learned only if the error fell on held-out trajectories:
samples of one trajectory are alike, also those of different steps.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..core.settings import ReconstructSettings
from ..runtime.denoiser import QuantDenoiser
from .finite import finite_loss
from .layers import CalibLayer, CalibTimestepLayer
from .prefix import Prefix
from .quantizer import LearnedQuantizer
from .states import CalibrationStates

HELD_OUT_SHARE = 1 / 8  # of the trajectories: they judge instead of teach; 0: all of them do both


@dataclass
class Record:
    """Calls of one unit, sample by sample along axis 0: inputs behind the quantized prefix, and the
    full-precision output."""

    inputs: list[torch.Tensor]
    output: torch.Tensor


def unit_names(
    model: QuantDenoiser, declared: tuple[str, ...], apart: Sequence[str] = ()
) -> list[str]:
    """Units to reconstruct: the declared ones that hold layers, then every layer outside them.

    Layers of the timestep alone are left out when they are cached: they are not quantized on the
    input side and their weights keep more bits. So are those `apart`, see `reconstruct`.
    """
    modules = dict(model.denoiser.named_modules())
    done = {id(modules[name]) for name in apart}
    units = [n for n in declared if _trainable(modules[n], done)]
    for name, module in modules.items():
        if isinstance(module, CalibLayer) and not any(
            name == u or name.startswith(f"{u}.") for u in units
        ):
            parent = modules[name.rpartition(".")[0]]
            if not isinstance(parent, CalibTimestepLayer) and id(module) not in done:
                units.append(name)
    return units


def _trainable(unit: nn.Module, done: set[int]) -> list[CalibLayer]:
    """The layers of a unit whose rounding is learned: all but cached ones of the timestep alone and
    those with their id in `done`."""
    inside = {id(m.layer) for m in unit.modules() if isinstance(m, CalibTimestepLayer)} | done
    return [m for m in unit.modules() if isinstance(m, CalibLayer) and id(m) not in inside]


def hold_out(
    states: CalibrationStates, tuples: torch.Tensor, share: float, generator: torch.Generator
) -> tuple[torch.Tensor, int]:
    """The samples (n, 2) in random order, the judges last, and the number of these: all samples of
    a share of the trajectories, of one at least. A single trajectory has judges alone.

    Both halves of a guided call start from the same noise and count as one trajectory.
    """
    order = tuples[torch.randperm(len(tuples), generator=generator)]
    if share == 0:
        return order, 0
    starts = states.x[0].flatten(1).unique(dim=0, return_inverse=True)[1]  # (N,)
    mine = starts[order[:, 1]]
    there = mine.unique()
    chosen = there[torch.randperm(len(there), generator=generator)]
    judges = torch.isin(mine, chosen[: max(1, int(len(there) * share))])
    return torch.cat([order[~judges], order[judges]]), int(judges.sum())


@torch.no_grad()
def _record(
    run: Callable, roots: dict[str, nn.Module], batches: Iterator
) -> dict[str, torch.Tensor]:
    """Runs the batches and keeps the units' outputs on the CPU."""
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in roots}

    def hook_of(name: str):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            kept[name].append(output.detach().cpu())

        return hook

    handles = [unit.register_forward_hook(hook_of(name)) for name, unit in roots.items()]
    try:
        for x, t, _, conditioning in batches:
            run(x, t.to(x.device), **conditioning)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(outputs) for name, outputs in kept.items()}


def _chunks(names: list[str], sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    total = 0
    for name in names:
        if chunk and total + sizes[name] > limit:
            yield chunk
            chunk, total = [], 0
        chunk.append(name)
        total += sizes[name]
    if chunk:
        yield chunk


def _seed_of(seed: int, name: str) -> int:
    value = seed
    for character in name:
        value = (value * 1000003 + ord(character)) % (2**63)
    return value


@dataclass(frozen=True)
class Reconstruction:
    """The units of a model that are reconstructed, in place, and how.

    denoiser: full precision. tuples (n, 2) of the states. units: their names, in the order of
    execution. learn_scales: those of the activations as well. memory_gb: for recorded calls. seed:
    the random numbers of a unit depend on it and its name only. apart: layers that keep what they
    have, though units hold them. held_out: see hold_out.
    """

    denoiser: nn.Module
    model: QuantDenoiser
    states: CalibrationStates
    tuples: torch.Tensor
    units: list[str]
    settings: ReconstructSettings
    learn_scales: bool
    memory_gb: float
    seed: int
    apart: Sequence[str] = ()
    held_out: float = HELD_OUT_SHARE

    def run(
        self,
        on_unit: Callable[[str, float, float], None] = lambda name, before, after: None,
        on_chunk: Callable[[], None] = lambda: None,
        finished: frozenset[str] = frozenset(),
    ) -> None:
        """on_unit(name, error before, error after) follows each unit, on_chunk() each chunk of
        them; an interrupted run goes on behind it when it is given the names of the units that are
        `finished`, and ends as an uninterrupted one. Raises DivergenceError."""
        states, size = self.states, self.settings.batch_size
        by_seed = torch.Generator().manual_seed(self.seed)
        order, judges = hold_out(states, self.tuples, self.held_out, by_seed)

        def batches() -> Iterator:
            for start in range(0, len(order), size):
                yield states.gather(order[start : start + size])

        originals = {n: self.denoiser.get_submodule(n) for n in self.units}
        probe = _record(self.denoiser, originals, iter([states.gather(order[:1])]))
        sizes = {n: 4 * len(order) * probe[n].numel() for n in self.units}
        half = int(self.memory_gb * 2**29)  # of the memory, for these; the other for the prefix
        prefix = Prefix(self.model, half)
        t_all = torch.tensor([states.timesteps[k] for k in order[:, 0].tolist()])
        for chunk in _chunks(self.units, sizes, half):
            inside = {n: self.model.denoiser.get_submodule(n) for n in chunk}
            if finished.issuperset(chunk):
                for name in chunk:
                    prefix.finish(name, inside[name])
                continue
            full = _record(self.denoiser, {n: originals[n] for n in chunk}, batches())
            for name in chunk:
                record = Record(prefix.inputs(inside[name], batches()), full.pop(name))
                before, after = self._learn(name, record, t_all, judges)
                prefix.finish(name, inside[name])
                on_unit(name, before, after)
            on_chunk()

    def _learn(
        self, name: str, record: Record, t_all: torch.Tensor, judges: int
    ) -> tuple[float, float]:
        """Returns the held-out error of a unit before and after; restores the start if it did not
        fall. t_all (n,): timesteps of the record; judges: its last rows, or 0 where all of them
        judge."""
        model, settings = self.model, self.settings
        unit = model.denoiser.get_submodule(name)
        done = {id(model.denoiser.get_submodule(other)) for other in self.apart}
        layers = _trainable(unit, done)
        generator = torch.Generator().manual_seed(_seed_of(self.seed, name))
        device = next(unit.parameters()).device
        teach = len(t_all) - judges
        if teach < 1 or settings.iterations == 0:
            return 0.0, 0.0
        first = teach if judges else 0  # of those that judge

        def call(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            model.context.set(t_all[index], device)
            arguments = [a[index].to(device) for a in record.inputs]
            return unit(*arguments), record.output[index].to(device)

        @torch.no_grad()
        def judge() -> float:
            total = 0.0
            for start in range(first, len(t_all), settings.batch_size):
                index = torch.arange(start, min(start + settings.batch_size, len(t_all)))
                out, target = call(index)
                total += float((out - target).square().sum())
            return total / record.output[first:].numel()

        before = judge()
        scale_of_loss = 1.0 / max(before, 1e-12)
        saved = {k: v.clone() for k, v in unit.state_dict().items()}
        for p in model.parameters():
            p.requires_grad_(False)
        latents = [layer.quantizer.latent for layer in layers]
        alphas = [layer.quantizer.start_rounding(layer.weight.detach()) for layer in layers]
        groups = [{"params": alphas, "lr": settings.lr_rounding}]
        if self.learn_scales:
            still = {
                id(m) for layer in unit.modules() if id(layer) in done for m in layer.modules()
            }
            scales = [
                q.log_scale.requires_grad_(True)
                for q in unit.modules()
                if isinstance(q, LearnedQuantizer) and id(q) not in still
            ]
            groups.append({"params": scales, "lr": settings.lr_scale})
        optimizer = torch.optim.Adam(groups)
        weights = sum(a.numel() for a in alphas)
        for i in range(settings.iterations):
            progress = i / settings.iterations
            index = torch.randint(teach, (min(settings.batch_size, teach),), generator=generator)
            out, target = call(index)
            loss = (out - target).square().mean() * scale_of_loss
            if progress >= 0.2:
                beta = 20 - 18 * (progress - 0.2) / 0.8
                loss = loss + settings.regulariser * 100 / weights * sum(
                    layer.quantizer.regulariser(beta) for layer in layers
                )
            finite_loss(loss, i, settings.iterations, f"{name}, ")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            for group, rate in zip(
                optimizer.param_groups, (settings.lr_rounding, settings.lr_scale), strict=False
            ):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * progress))
        for layer in layers:
            layer.quantizer.soft = False
        after = judge()
        if not after < before:
            for layer, latent in zip(layers, latents, strict=True):
                layer.quantizer.alpha, layer.quantizer.latent = None, latent
            unit.load_state_dict(saved)
            return before, before
        return before, after
