"""The parts of tinyDM and what each is compared with (docs/ablations.md).

A variant is the preset with a few keys changed; a part that does not earn its place is dropped from
the preset. Variants that equal the preset share its cell.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """widest: most bits of the activations with which it is what its label says."""

    label: str
    overrides: tuple[str, ...]
    widest: int = 8


def _each(key: str, *values: object, name: str = "{}") -> tuple[Variant, ...]:
    """One variant for each value of a key."""
    return tuple(Variant(name.format(v), (f"{key}={v}",)) for v in values)


def _selection(samples: int) -> tuple[Variant, ...]:
    rules = {
        "uniform": ("calibration.timesteps=uniform",),
        "normal": ("calibration.timesteps=normal",),
        "all": ("calibration.timesteps=all",),
        "active, rho 0": ("calibration.timesteps=active", "quant.search.error_weight=0"),
        "active": ("calibration.timesteps=active",),
    }
    return tuple(
        Variant(f"{rule}, {samples} samples", (*keys, f"calibration.samples={samples}"))
        for rule, keys in rules.items()
    )


GROUPS = "quant.activation.groups"

PARTS: dict[str, tuple[Variant, ...]] = {
    "grouping": (
        *_each(GROUPS, 1, 2, 4, 8, 16, name="G = {}"),
        # As many groups as calibrated timesteps, to which the number is limited.
        Variant("per step", (f"{GROUPS}=255", "calibration.calibrated_timesteps=255")),
    ),
    "group_bits": _each("quant.activation.bits_by_group", "false", "true"),
    "assignment": _each("quant.activation.search", "uniform", "dp", "kmeans", "differentiable"),
    "entropy": (
        *_each("quant.search.entropy", "0.0", "0.8", name="lambda {}"),
        Variant("lambda 0.8, tau 1 throughout", ("quant.search.temperature=1.0",)),
    ),
    "timesteps": (*_selection(256), *_selection(512), *_selection(1024)),
    "time_embedding": (
        *_each("quant.time_embedding", "quantized", "cached"),
        # By AdaRound over all timesteps; "quantized" has the preset's own second-order rounding.
        Variant(
            "reconstructed, 200 iterations a layer",
            ("quant.time_embedding=reconstructed", "quant.reconstruct.iterations=200"),
        ),
    ),
    "rounding": (
        *_each("quant.weight.rounding", "nearest", "gptq"),
        Variant(
            "adaround, 200 iterations a block",
            ("quant.weight.rounding=adaround", "quant.reconstruct.iterations=200"),
        ),
    ),
    "layer_bits": (
        Variant("alike", ("quant.weight.average_bits=0",)),
        Variant("shared out, as the preset", ()),
    ),
    "equivalent_scaling": _each("quant.equivalent_scaling", "false", "true"),
    "end_to_end": (
        Variant("none", ("quant.reconstruct.finetune_iterations=0",)),
        Variant("as the preset", ()),
    ),
    "step_weights": _each("quant.reconstruct.weigh_steps", "false", "true"),
    "split": _each("quant.split_skip", "false", "true"),
    # Probabilities have at least the bits of the other activations.
    "softmax": tuple(
        Variant(
            f"{codes}, {bits} bits",
            (f"quant.activation.softmax={codes}", f"quant.activation.softmax_bits={bits}"),
            widest=bits,
        )
        for codes in ("uniform", "row")
        for bits in (4, 8)
    ),
    "correction": _each("quant.correction", "none", "ptqd", "drift"),
}
