"""The settings of every part, and the presets that name a method (METHOD sections 1 and 5).

A preset only changes defaults: each key can be overridden alone, so that each part can be ablated.
The five methods share layer coverage and weight granularity, so a comparison is one of methods.
"""

from dataclasses import dataclass, field, replace
from typing import Any


def choice(default: str, *values: str) -> Any:
    """A string field with a closed list of values, which a config loader can check."""
    return field(default=default, metadata={"choices": values})


def bounded(default: Any, low: float, high: float) -> Any:
    """A numeric field with inclusive bounds."""
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True)
class WeightSettings:
    bits: int = bounded(4, 2, 8)
    scale: str = choice("mse", "mse", "minmax")
    rounding: str = choice("adaround", "nearest", "gptq", "adaround")


@dataclass(frozen=True)
class ActivationSettings:
    """bits: of all steps, with step_bits the most that one has; groups: quantizers per tensor that
    the timesteps share; search: how they are assigned."""

    bits: int = bounded(8, 2, 8)
    # Fewer bits among which each step takes the lowest that its noise allows (PTQD, precision.py).
    step_bits: tuple[int, ...] = bounded((), 2, 7)
    groups: int = bounded(8, 1, 255)
    search: str = choice("differentiable", "differentiable", "kmeans", "dp", "uniform", "none")
    scale: str = choice("mse", "mse", "minmax", "percentile")
    symmetric: bool = False  # ranges around zero everywhere, as PTQ4DM has them
    learned: bool = True  # learn scales and zero points with the reconstruction (LSQ)
    softmax_bits: int = bounded(8, 2, 8)
    # Codes of attention probabilities: one scale for all rows, relative to each row's largest
    # value (layers.py, QuantMatMul), or powers of two.
    softmax: str = choice("uniform", "uniform", "row", "log2")


@dataclass(frozen=True)
class SearchSettings:
    """Differentiable search of the groups (METHOD 5.2) with active timesteps (5.3)."""

    rounds: int = bounded(24, 1, 1_000_000)
    batch_size: int = bounded(16, 1, 4096)
    accumulate: int = bounded(1, 1, 4096)  # parts of that batch, one after the other: less memory
    lr_logits: float = bounded(0.2, 0.0, 10.0)
    lr_scale: float = bounded(1e-2, 0.0, 10.0)
    entropy: float = bounded(0.8, 0.0, 1000.0)  # lambda
    exploration: float = bounded(1.5, 0.0, 1000.0)  # eta of the count bonus
    error_weight: float = bounded(1.0, 0.0, 1000.0)  # rho; 0 is the paper's rule
    temperature: float = bounded(0.1, 1e-3, 1.0)  # annealed from 1 to this


@dataclass(frozen=True)
class ReconstructSettings:
    """Block-wise reconstruction (METHOD 5.4), then end-to-end steps on the eps error."""

    iterations: int = bounded(200, 0, 10_000_000)  # per unit
    batch_size: int = bounded(16, 1, 4096)
    lr_rounding: float = bounded(0.1, 0.0, 10.0)
    lr_scale: float = bounded(1e-3, 0.0, 10.0)
    regulariser: float = bounded(0.01, 0.0, 1000.0)
    # Half of the samples see full-precision inputs of the unit, the others quantized ones (QDrop).
    # The release of Q-Diffusion has quantized ones alone; eps errors were lower so here as well.
    mixed_inputs: bool = False
    # At most as many as show each sample phases.learn.MOST_VIEWS times.
    finetune_iterations: int = bounded(0, 0, 10_000_000)
    finetune_batch_size: int = bounded(16, 1, 4096)
    accumulate: int = bounded(1, 1, 4096)  # parts of that batch, one after the other: less memory
    progressive: bool = False  # end-to-end steps also see states of the quantized sampler
    # End-to-end steps see and weigh most the steps whose errors move the final image most: else
    # the last steps, which move it least, make most of the loss.
    weigh_steps: bool = False


@dataclass(frozen=True)
class QuantSettings:
    method: str = choice("tinydm", "tinydm", "qdiffusion", "ptqd", "ptq4dm", "minmax")
    weight: WeightSettings = WeightSettings()
    activation: ActivationSettings = ActivationSettings()
    search: SearchSettings = SearchSettings()
    reconstruct: ReconstructSettings = ReconstructSettings()
    edge_bits: int = bounded(8, 2, 8)  # weights of the first and last layer
    edge_activation_bits: int = bounded(16, 2, 16)  # their inputs; 16 run as two 8-bit products
    time_bits: int = bounded(8, 2, 8)  # layers of the timestep alone, when cached
    # Computed once per timestep; or quantized as other layers are: by the method's own rounding,
    # or by AdaRound (reconstruct.iterations) over all timesteps of the sampling schedule (TFMQ-DM).
    time_embedding: str = choice("cached", "cached", "reconstructed", "quantized")
    split_skip: bool = True
    equivalent_scaling: bool = False  # of input channels, see equivalent.py
    quantize_matmuls: bool = True
    correction: str = choice("none", "none", "ptqd", "drift")  # correction.py, drift.py


@dataclass(frozen=True)
class CalibrationSettings:
    """samples: tuples (x_t, t); they come from `trajectories` full-precision trajectories."""

    samples: int = bounded(1024, 1, 10_000_000)
    trajectories: int = bounded(64, 1, 1_000_000)
    timesteps: str = choice("active", "active", "uniform", "normal", "all")
    bins: int = bounded(50, 1, 255)  # calibrated timesteps at most
    batch_size: int = bounded(16, 1, 4096)
    seed: int = bounded(0, 0, 2**63 - 1)
    memory_gb: float = bounded(4.0, 0.01, 10_000.0)


PTQ4DM_BITS = 8  # of the weights in its paper


def preset(
    method: str, weight_bits: int = WeightSettings.bits
) -> tuple[QuantSettings, CalibrationSettings]:
    """Defaults of a method. Raises ValueError for an unknown name.

    weight_bits: PTQ4DM's paper has 8-bit weights and rounds them to nearest. With fewer bits it
    would be no better than min-max, so that its rounding is learned there (AdaRound), as
    re-implementations do that report 4 bits.
    """
    base, calibration = QuantSettings(), CalibrationSettings()
    if method == "tinydm":
        # End-to-end steps instead of block-wise ones: they reach more in less time.
        learned = replace(
            base.reconstruct,
            iterations=0,
            finetune_iterations=500,
            finetune_batch_size=8,
            weigh_steps=True,
            lr_scale=5e-3,
        )
        return replace(
            base,
            weight=replace(base.weight, rounding="gptq"),
            activation=replace(base.activation, softmax="row"),
            equivalent_scaling=True,
            reconstruct=learned,
            correction="drift",
        ), calibration
    plain = replace(
        base,
        method=method,
        activation=replace(base.activation, groups=1, search="none"),
    )
    if method in ("qdiffusion", "ptqd"):
        correction = "ptqd" if method == "ptqd" else "none"
        return replace(plain, correction=correction), replace(calibration, timesteps="uniform")
    unlearned = replace(
        plain,
        weight=replace(plain.weight, rounding="nearest"),
        activation=replace(plain.activation, learned=False),
        split_skip=False,
    )
    if method == "ptq4dm":
        rounding = "nearest" if weight_bits >= PTQ4DM_BITS else "adaround"
        return replace(
            unlearned,
            weight=replace(unlearned.weight, rounding=rounding),
            activation=replace(unlearned.activation, symmetric=True),
        ), replace(calibration, timesteps="normal")
    if method == "minmax":
        return replace(
            unlearned,
            weight=replace(unlearned.weight, scale="minmax"),
            activation=replace(unlearned.activation, scale="minmax"),
        ), replace(calibration, timesteps="uniform")
    raise ValueError(f"unknown method '{method}' (tinydm, qdiffusion, ptqd, ptq4dm or minmax)")
