"""The settings of every part, and the presets that name a method (docs/method.md, section 9).

The defaults of the classes are tinyDM's. A preset only changes defaults: each key can be overridden
alone, so that each part can be ablated. The methods share layer coverage and weight granularity, so
that a comparison is one of methods.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

FEWEST_BITS, MOST_BITS = 2, 8  # of weights and activations; first and last layers' inputs have 16
QUALITIES = ("fast", "best")
BEST_FACTOR = 8  # iterations and steps of `best`, times those of `fast`
WEIGHTED_SEARCHES = ("differentiable", "kmeans", "dp")
METHODS = ("tinydm", "e2e", "e2e_plain", "qdiffusion", "ptqd", "tfmq", "apqdm", "ptq4dm", "minmax")


def setting(
    default: Any,
    doc: str,
    *,
    choices: Sequence[str] | None = None,
    within: tuple[float, float] | None = None,
) -> Any:
    """A field that a configuration can set: what it does, and the values that a loader accepts.

    within: inclusive bounds of a number, or of each number of a list.
    """
    metadata: dict[str, Any] = {"doc": doc}
    if choices is not None:
        metadata["choices"] = tuple(choices)
    if within is not None:
        metadata["range"] = within
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class WeightSettings:
    """Quantization of the weights."""

    bits: int = setting(4, "bits of the weights", within=(2, 8))
    average_bits: float | None = setting(
        None,
        "layers have bits of their own, by what their errors do to the image, and the file is as "
        "large as with this many in all of them; null: as many as `bits`; 0: each has `bits`",
        within=(0.0, 8.0),
    )
    scale: str = setting(
        "mse",
        "scale of each output channel: by a search of the clipping range, or of the full range",
        choices=("mse", "minmax"),
    )
    rounding: str = setting(
        "gptq",
        "to the nearest code, second-order (GPTQ), or learned block by block (AdaRound, with "
        "`quant.reconstruct.iterations`)",
        choices=("nearest", "gptq", "adaround"),
    )


@dataclass(frozen=True)
class ActivationSettings:
    """Quantization of the activations, and of attention's operands."""

    bits: int = setting(
        8, "bits of the activations, with bits_by_group in the mean of the steps", within=(2, 8)
    )
    groups: int = setting(
        8, "quantizers of a tensor at most, which the timesteps share", within=(1, 255)
    )
    search: str = setting(
        "differentiable",
        "how timesteps get their groups: learned; by their errors, in free groups (kmeans) or in "
        "runs (dp); in equal runs; or one group of all",
        choices=("differentiable", "kmeans", "dp", "uniform", "none"),
    )
    bits_by_group: bool = setting(
        True,
        "groups have bits of their own, more where errors move the image most, and `bits` in the "
        "mean of the sampling steps; with a search of the groups (but for equal runs) and weighted "
        "steps",
    )
    scale: str = setting(
        "mse", "ranges that lose least, or of the extremes", choices=("mse", "minmax")
    )
    symmetric: bool = setting(False, "ranges around zero everywhere (PTQ4DM)")
    learned: bool = setting(True, "scales learn with the block-wise reconstruction (LSQ)")
    softmax_bits: int = setting(
        8, "bits of attention probabilities, if more than the others have", within=(2, 8)
    )
    softmax: str = setting(
        "row",
        "attention probabilities with one scale for all rows, or relative to the largest value of "
        "each row",
        choices=("uniform", "row"),
    )


@dataclass(frozen=True)
class SearchSettings:
    """Differentiable search of the groups, with active timestep selection (docs/method.md, sections
    3 and 4)."""

    rounds: int = setting(24, "steps of the search", within=(1, 1_000_000))
    batch_size: int = setting(16, "samples of a step", within=(1, 4096))
    accumulate: int = setting(
        2, "parts of that batch, which processes share; the more, the less memory", within=(1, 4096)
    )
    lr_logits: float = setting(0.2, "learning rate of the assignment", within=(0.0, 10.0))
    lr_scale: float = setting(
        1e-2, "learning rate of the log-scales, of 4 bits; each bit more halves it", within=(0, 10)
    )
    entropy: float = setting(0.8, "lambda, weight of the assignment's entropy", within=(0.0, 1e3))
    exploration: float = setting(
        1.5, "eta, what a timestep that was seldom chosen gains", within=(0.0, 1e3)
    )
    error_weight: float = setting(
        8.0, "rho, weight of the eps error in the choice; 0 is the paper's rule", within=(0.0, 1e3)
    )
    temperature: float = setting(0.1, "of the softmax at the end; it begins at 1", within=(1e-3, 1))


@dataclass(frozen=True)
class ReconstructSettings:
    """Block-wise reconstruction (docs/method.md, section 5), then end-to-end steps on the eps error
    (section 6)."""

    iterations: int = setting(0, "of each block; 0: no blocks", within=(0, 10_000_000))
    batch_size: int = setting(16, "samples of a block's iteration", within=(1, 4096))
    lr_rounding: float = setting(0.1, "learning rate of the rounding", within=(0.0, 10.0))
    lr_scale: float = setting(
        5e-3, "learning rate of log-scales, of 4 bits; each bit more halves it", within=(0, 10)
    )
    regulariser: float = setting(
        0.01, "weight of the term that drives the rounding to 0 or 1", within=(0.0, 1e3)
    )
    finetune_iterations: int = setting(
        500,
        "end-to-end steps; at most as many as show each sample 10 times on average",
        within=(0, 10_000_000),
    )
    finetune_batch_size: int = setting(8, "samples of an end-to-end step", within=(1, 4096))
    accumulate: int = setting(
        2, "parts of that batch, which processes share; the more, the less memory", within=(1, 4096)
    )
    weigh_steps: bool = setting(
        True,
        "weigh most the timesteps whose errors move the final image most, in the search and in "
        "end-to-end steps, which draw them more often too",
    )


@dataclass(frozen=True)
class QuantSettings:
    """How a denoiser is quantized."""

    method: str = setting("tinydm", "preset of all other keys of this section", choices=METHODS)
    quality: str = setting(
        "fast",
        "best: a preset with eight times as many iterations and end-to-end steps",
        choices=QUALITIES,
    )
    weight: WeightSettings = WeightSettings()
    activation: ActivationSettings = ActivationSettings()
    search: SearchSettings = SearchSettings()
    reconstruct: ReconstructSettings = ReconstructSettings()
    first_last_bits: int = setting(
        8, "bits of the weights of the first and last layer", within=(2, 8)
    )
    first_last_activation_bits: int = setting(
        16, "bits of their inputs; 16 run as two 8-bit products", within=(2, 16)
    )
    time_bits: int = setting(
        8,
        "bits of the layers of the timestep alone, when cached; with weight.average_bits they may "
        "go to other layers",
        within=(2, 8),
    )
    time_embedding: str = setting(
        "cached",
        "layers of the timestep alone: computed once per timestep; or quantized as others are, by "
        "AdaRound over all timesteps of the schedule (TFMQ-DM) or by the method's own rounding",
        choices=("cached", "reconstructed", "quantized"),
    )
    split_skip: bool = setting(
        True, "two quantizers for an input that is a concatenation with a skip connection"
    )
    equivalent_scaling: bool = setting(True, "scale input channels before they are quantized")
    quantize_matmuls: bool = setting(True, "quantize the products of attention")
    correction: str = setting(
        "drift",
        "correction of the output: of the noise that a call adds (PTQD), or of the trajectory's "
        "drift",
        choices=("none", "ptqd", "drift"),
    )


def average_bits(settings: QuantSettings) -> float:
    """Mean bits of the weights that the layers share out; 0: none are shared out."""
    weight = settings.weight
    return weight.bits if weight.average_bits is None else weight.average_bits


def weighted_groups(settings: QuantSettings) -> bool:
    """Whether groups are searched with weights of the timesteps."""
    activation = settings.activation
    searched = activation.search in WEIGHTED_SEARCHES and activation.scale == "mse"
    return searched and settings.reconstruct.weigh_steps


def bits_by_group(settings: QuantSettings) -> bool:
    """Whether groups have bits of their own."""
    return settings.activation.bits_by_group and weighted_groups(settings)


@dataclass(frozen=True)
class CalibrationSettings:
    """What it is calibrated on."""

    samples: int = setting(1024, "samples (x_t, t) that learn", within=(1, 10_000_000))
    trajectories: int | None = setting(
        None,
        "full-precision trajectories that they come from; null: as many as have no sample twice at "
        "20 timesteps, for every rule alike; a number that is too small for the rule is refused",
        within=(1, 1_000_000),
    )
    timesteps: str = setting(
        "active",
        "which timesteps the samples are of: the most informative ones; 20 evenly spaced ones "
        "(Q-Diffusion); normally distributed ones (PTQ4DM); all alike",
        choices=("active", "uniform", "normal", "all"),
    )
    calibrated_timesteps: int = setting(
        50, "calibrated timesteps at most; others use the nearest of them", within=(1, 255)
    )
    batch_size: int = setting(16, "rows of a call without gradients", within=(1, 4096))
    seed: int = setting(0, "of the trajectories and of everything drawn", within=(0, 2**63 - 1))
    memory_gb: float = setting(
        4.0, "memory for a chunk of blocks' inputs and outputs", within=(0.01, 10_000.0)
    )


PTQ4DM_BITS = 8  # of the weights in its paper
# What the baselines reconstruct by blocks; tinyDM has end-to-end steps instead, which reach more in
# less time.
BLOCK_WISE = ReconstructSettings(
    iterations=200,
    lr_scale=5e-3,
    finetune_iterations=0,
    finetune_batch_size=16,
    weigh_steps=False,
)


def preset(
    method: str, weight_bits: int = WeightSettings.bits, quality: str = QuantSettings.quality
) -> tuple[QuantSettings, CalibrationSettings]:
    """Defaults of a method. Raises ValueError for an unknown name.

    weight_bits: PTQ4DM's paper has 8-bit weights and rounds them to nearest. With fewer bits it
    would be no better than min-max, so that its rounding is learned there (AdaRound), as
    re-implementations do that report 4 bits.
    quality: "best" learns BEST_FACTOR times as long as "fast", whatever the method.
    """
    if quality == "best":
        quant, calibration = preset(method, weight_bits)
        learn = quant.reconstruct
        longer = replace(
            learn,
            iterations=BEST_FACTOR * learn.iterations,
            finetune_iterations=BEST_FACTOR * learn.finetune_iterations,
        )
        return replace(quant, quality=quality, reconstruct=longer), calibration
    tinydm, calibration = QuantSettings(), CalibrationSettings()
    if method == "tinydm":
        return tinydm, calibration
    if method not in METHODS:
        raise ValueError(f"unknown method '{method}' ({', '.join(METHODS)})")
    plain = replace(
        tinydm,
        method=method,
        weight=replace(tinydm.weight, rounding="adaround", average_bits=0.0),
        activation=replace(
            tinydm.activation, groups=1, search="none", bits_by_group=False, softmax="uniform"
        ),
        reconstruct=BLOCK_WISE,
        equivalent_scaling=False,
        correction="ptqd" if method == "ptqd" else "none",
    )
    uniform = replace(calibration, timesteps="uniform")
    if method in ("qdiffusion", "ptqd"):
        return plain, uniform
    if method in ("e2e", "e2e_plain"):  # the control: the end-to-end steps on a plain quantizer
        return replace(
            plain,
            weight=replace(plain.weight, rounding="nearest"),
            reconstruct=tinydm.reconstruct,
            correction="drift" if method == "e2e" else "none",
        ), uniform
    if method == "tfmq":
        activation = replace(
            plain.activation, groups=8, search="uniform", scale="minmax", learned=False
        )
        return replace(plain, activation=activation, time_embedding="reconstructed"), uniform
    if method == "apqdm":
        activation = replace(plain.activation, groups=8, search="differentiable")
        search = replace(plain.search, error_weight=0.0)
        return replace(plain, activation=activation, search=search), calibration
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
    return replace(
        unlearned,
        weight=replace(unlearned.weight, scale="minmax"),
        activation=replace(unlearned.activation, scale="minmax"),
    ), uniform
