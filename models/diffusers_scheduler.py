"""Schedulers of Hugging Face diffusers by their files: what they cannot do is refused.

    scheduler = scheduler_of(folder)

diffusers drops the fields that a scheduler does not take, and some values it never looks at. The
images would be those of another model.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .checkpoint_files import failure, is_out_of_memory, printable
from .diffusers_denoiser import library
from .diffusers_loading import DiffusersFolder
from .samplers import SamplingError

# What the denoiser was trained with, or how its output is read -> the values that ask for nothing.
# Other fields that a scheduler does not take are mostly left over from one that it replaced.
FACTS: dict[str, tuple[Any, ...]] = {
    "prediction_type": (None, "epsilon"),
    "rescale_betas_zero_snr": (None, False),
    "thresholding": (None, False),
    "trained_betas": (None,),
    "beta_schedule": (None,),
    "beta_start": (None,),
    "beta_end": (None,),
}
# Of no scheduler any more -> what asked for nothing.
FORMER: dict[str, tuple[Any, ...]] = {
    "predict_epsilon": (None, True),
    "tensor_format": (None, "pt", "np"),
}
# Values that diffusers does not check.
KNOWN_VALUES: dict[str, tuple[Any, ...]] = {
    "timestep_type": ("discrete", "continuous"),
    "variance_type": (
        *(None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
        *("learned", "learned_range"),
    ),
}
METHODS = ("set_timesteps", "scale_model_input", "step")  # of one that samples from noise


def scheduler_of(folder: DiffusersFolder) -> Any:
    """The scheduler of the folder's file. Raises CheckpointError for one that does not exist, that
    samples in another way, or that cannot do what the file says."""
    config = folder.scheduler_config()
    diffusers = library()
    name = str(config.get("_class_name"))
    kind: Any = getattr(diffusers, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin)):
        what = f"names the scheduler {printable(name, 60)}, which diffusers does not have"
        raise failure(folder.scheduler, what, "use a newer diffusers or another folder")
    if not _samples(kind):
        what = f"names the scheduler {name}, which does not sample as these pipelines do"
        raise failure(folder.scheduler, what, "name another one, such as DDIMScheduler")
    if folder.kind == "DDIMPipeline":  # which samples with DDIM whatever the file says
        kind = diffusers.DDIMScheduler
    reason = _not_done(config, kind)
    if reason is not None:
        raise failure(folder.scheduler, reason, "name another scheduler, or mend that field")
    try:
        return kind.from_config(config)
    except Exception as error:  # a library's, for values that it does not take
        raise failure(folder.scheduler, f"{name}: {error}", "mend that field") from error


def _samples(kind: Any) -> bool:
    """Whether a step takes the output, a timestep and the state, from noise to an image."""
    if "Inverse" in kind.__name__ or not all(hasattr(kind, method) for method in METHODS):
        return False
    needed = [
        p
        for p in inspect.signature(kind.step).parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    return len(needed) <= 4  # self, output, timestep, state


def _not_done(config: Mapping[str, Any], kind: Any) -> str | None:
    """The first field that asks for what the scheduler does not do, in words, or None."""
    taken = _fields(kind)
    for name, value in config.items():
        if name.startswith("_"):
            continue
        told = f"{printable(name, 40)} is {printable(value, 40)}"
        if name in taken:
            if name in KNOWN_VALUES and value not in KNOWN_VALUES[name]:
                return f"{told}, which {kind.__name__} does not know"
        elif name in FACTS:
            if value not in FACTS[name]:
                return f"{told}, which {kind.__name__} does not take"
        elif value not in FORMER.get(name, (None, False)) and name not in _fields_of_all():
            return f"{told}, which no scheduler of this diffusers takes"
    return None


def _fields(kind: Any) -> set[str]:
    return set(inspect.signature(kind.__init__).parameters)


def _fields_of_all() -> set[str]:
    """What any scheduler takes."""
    diffusers = library()
    found: set[str] = set()
    for name in dir(diffusers):
        if name.endswith("Scheduler"):
            found |= _fields(getattr(diffusers, name))
    return found


@contextmanager
def told_in_one_line(scheduler: Any) -> Iterator[None]:
    """What a scheduler's own code raises, whatever it is, as SamplingError: it says nothing of
    the program."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        name = type(scheduler).__name__
        kind = type(error).__name__
        raise SamplingError(f"{name} cannot step: {printable(error, 200)} ({kind})") from error
