"""The phases of a calibration, in their order."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...core.settings import QuantSettings
from ..run_state import RunState
from ..task import Job
from . import correct, learn, prepare

Values = dict[str, Any]
END_TO_END_ALONE = {"finetune_iterations", "finetune_batch_size", "accumulate", "weigh_steps"}
BLOCKS_ALONE = {"iterations", "batch_size", "lr_rounding", "regulariser"}


def _no_settings(settings: QuantSettings) -> Values:
    return {}


def _step_weights(settings: QuantSettings) -> Values:
    """What decides whether the sampling steps have weights, from the ranges on."""
    return {"weigh_steps": settings.reconstruct.weigh_steps}


def _search_settings(settings: QuantSettings) -> Values:
    return vars(settings.search) | _step_weights(settings)


def _block_settings(settings: QuantSettings) -> Values:
    if settings.reconstruct.iterations == 0:
        return {}
    return {k: v for k, v in vars(settings.reconstruct).items() if k not in END_TO_END_ALONE}


@dataclass(frozen=True)
class Phase:
    """A step of the calibration, with what a run needs to know about it.

    run(job): works on job.model; its report, or None where the settings leave it out. settings:
    those that it alone reads, or it and later phases: they may change until it is done. lower: the
    keys to lower if it diverges; leave_out: the override that goes on without it. shared: several
    processes run it together; otherwise the first one alone.
    """

    name: str
    run: Callable[[Job], Values | None]
    settings: Callable[[QuantSettings], Values] = _no_settings
    lower: str = ""
    leave_out: str = ""
    shared: bool = False


BLOCK_RATES = "quant.reconstruct.lr_scale or quant.reconstruct.lr_rounding"
PHASES = (
    # scaling of input channels
    Phase("equivalent", prepare.equivalent, leave_out="quant.equivalent_scaling=false"),
    # bits of each layer's weights under a budget
    Phase("bits", prepare.mixed_bits, leave_out="quant.weight.average_bits=0"),
    # activation statistics, groups by an error table
    Phase("ranges", prepare.ranges, _step_weights, shared=True),
    # second-order rounding of the weights
    Phase("rounding", prepare.rounding, leave_out="quant.weight.rounding=nearest", shared=True),
    # differentiable groups with active timestep selection
    Phase("search", prepare.search, _search_settings, lower="quant.search.lr_scale", shared=True),
    # AdaRound of the layers of the timestep alone
    Phase(
        "temporal",
        learn.temporal,
        lambda s: _block_settings(s) if s.time_embedding == "reconstructed" else {},
        lower=BLOCK_RATES,
    ),
    # block-wise AdaRound and activation scales
    Phase(
        "reconstruct",
        learn.reconstruct,
        lambda s: _block_settings(s) if s.weight.rounding == "adaround" else {},
        lower=BLOCK_RATES,
    ),
    # end-to-end steps on the eps error
    Phase(
        "finetune",
        learn.finetune,
        lambda s: {k: v for k, v in vars(s.reconstruct).items() if k not in BLOCKS_ALONE},
        lower="quant.reconstruct.lr_scale",
        shared=True,
    ),
    # of the output: PTQD's tables or those of the drift
    Phase("correction", correct.correction, leave_out="quant.correction=none", shared=True),
)


def unfinished_phase(state: RunState) -> Phase:
    """The first phase that is not finished, or the last one."""
    return next((p for p in PHASES if p.name not in state.done), PHASES[-1])
