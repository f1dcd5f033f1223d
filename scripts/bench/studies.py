"""What is measured of each method alike, beside the tables: its learning rates, and how far it gets
with more time.

tuning: the rates of every method by the same small search, on seeds that no table uses. budget:
more iterations of a block, more end-to-end steps. A table's name is "tuning of METHOD".
"""

from .ablations import Variant

TUNING, BUDGET = "tuning", "budget"
SCALE = "quant.reconstruct.lr_scale"
ROUNDING = "quant.reconstruct.lr_rounding"
RATES_OF_SCALES = ("0.001", "0.005", "0.01")
RATES_OF_ROUNDING = ("0.01", "0.1")
TUNING_SEEDS = range(100, 1000)  # of calibration and noise: tables use others


def _rates(*keys: str) -> tuple[Variant, ...]:
    """Every combination of the rates of these keys."""
    found: list[tuple[str, ...]] = [()]
    for key in keys:
        values = RATES_OF_SCALES if key == SCALE else RATES_OF_ROUNDING
        found = [(*pairs, f"{key}={value}") for pairs in found for value in values]
    return tuple(Variant(" ".join(pairs), pairs) for pairs in found)


def _iterations(key: str, *values: int, more: tuple[str, ...] = ()) -> tuple[Variant, ...]:
    """more: for the last value."""
    last = values[-1]
    return tuple(
        Variant(f"{value:,}", (f"{key}={value}", *(more if value == last else ())))
        for value in values
    )


_BLOCKS = _iterations("quant.reconstruct.iterations", 200, 600, 2000)
# Steps show a sample ten times at most, so that 8,000 of them need more samples than the others.
_STEPS = _iterations(
    *("quant.reconstruct.finetune_iterations", 500, 2000, 8000),
    more=("calibration.samples=6400",),
)

# study -> method -> what is tried. Methods that differ from another one in the correction alone
# (plan.BASES) have its rates; MinMax learns nothing.
STUDIES: dict[str, dict[str, tuple[Variant, ...]]] = {
    TUNING: {
        "ptq4dm": _rates(ROUNDING),
        "tfmq": _rates(ROUNDING),
        "apqdm": _rates(SCALE, ROUNDING),
        "qdiffusion": _rates(SCALE, ROUNDING),
        "e2e_plain": _rates(SCALE),
        "tinydm": _rates(SCALE),
    },
    BUDGET: {
        "ptq4dm": _BLOCKS,
        "tfmq": _BLOCKS,
        "apqdm": _BLOCKS,
        "qdiffusion": _BLOCKS,
        "ptqd": _BLOCKS,
        "e2e_plain": _STEPS,
        "e2e": _STEPS,
        "tinydm": _STEPS,
    },
}
