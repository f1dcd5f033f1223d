"""Pipelines of Hugging Face diffusers as samplers: a folder with its own scheduler rules.

    folder = DiffusersFolder.open("path/or/name-in-the-local-cache")
    pipeline = DiffusersPipeline(folder, denoiser, steps=50, prompts=["a cat"])
    x = pipeline.sample(denoiser, range(16), seed=1234)  # (16, 3, H, W)

The images are those of diffusers' pipeline with `generator=[image_generator(seed, i), ...]`.

Shapes: B images, C x H x W what the denoiser sees.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .checkpoint_files import CheckpointError, printable
from .diffusers_denoiser import DiffusersDenoiser, LikeDiffusers
from .diffusers_loading import (
    PIXELS,
    UNGUIDED,
    DiffusersFolder,
    folder_pipe,
    pipe_beside,
    write_parts,
)
from .diffusers_scheduler import scheduler_of, told_in_one_line
from .pipeline import LOOKS_BACK, FixedBatch, OnOutput, image_generator, labels_of
from .samplers import FiniteCheck, SamplingError

Eps = Callable[..., torch.Tensor]  # (x, t, **named) -> the output of the denoiser
Numbers = Sequence[int]
Device = str | torch.device

OF_SAMPLER = {"num_inference_steps": "steps", "guidance_scale": "guidance_scale", "eta": "eta"}
PICTURES = ("image", "mask_image")  # arguments that are files
# What pipelines raise for arguments that they cannot use, often from deep within.
REFUSALS = (
    ValueError,
    NotImplementedError,
    ImportError,
    AttributeError,
    LookupError,
    TypeError,
)
# Schedulers of one call a step, which is linear in the state and the output ...
LINEAR_STEPS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
)
# ... and in the outputs before it, unless their solver_order is 1.
MULTISTEP = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
# Schedulers that cannot do without a learned variance where their file names one.
NEEDS_VARIANCE = ("DDPMScheduler", "DDPMParallelScheduler", "UnCLIPScheduler")


class _LastStep(Exception):
    """Carries the last latents out of a pipeline, whose decoder is not wanted."""


class DiffusersPipeline:
    """What models.pipeline.Pipeline is, of a diffusers folder.

    source: a folder, or a pipeline of diffusers that is loaded already and stays as it is.
    denoiser: whose place is in the pipeline; its weights are not used. prompts: texts, numbered
    like classes; decode_batch: see folder_pipe; arguments: others of the pipeline's call. Raises
    CheckpointError for a folder that cannot be loaded and ValueError for values that do not fit
    together.
    """

    scale_factor, first_stage = 1.0, None

    def __init__(
        self,
        source: Any,
        denoiser: DiffusersDenoiser,
        steps: int,
        *,
        eta: float = 0.0,
        guidance_scale: float | None = None,
        prompts: str | Sequence[str] | None = None,
        micro_batch: int = 4,
        decode_batch: int = 1,
        arguments: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
    ):
        self.micro_batch, self.steps = micro_batch, steps
        self.prompts = [prompts] if isinstance(prompts, str) else prompts
        self._output: torch.Tensor | None = None
        self._timestep: torch.Tensor | None = None  # of the coming call, on the host
        self._tap = LikeDiffusers(denoiser.model, None, torch.device(device))
        self._source = source
        if isinstance(source, DiffusersFolder):
            self.kind, self._scheduler = source.kind, scheduler_of(source)
            self._pipe = folder_pipe(source, self._tap, self._scheduler, decode_batch)
        else:
            self.kind, self._scheduler = type(source).__name__, source.scheduler
            self._pipe = pipe_beside(source, self._tap)
        self._wanted = inspect.signature(self._pipe.__call__).parameters
        self._arguments = self._checked(dict(arguments or {}), eta, guidance_scale)
        self.guidance_scale = self._arguments.get("guidance_scale", 1.0)
        self.num_classes = self._classes(denoiser.model.config)
        self.timesteps = self._timesteps()

    # ---- what is asked for ----

    def _checked(
        self, arguments: dict[str, Any], eta: float, guidance_scale: float | None
    ) -> dict[str, Any]:
        given = (
            *("prompt", "generator", "output_type", "batch_size", "class_labels", "return_dict"),
            *("num_images_per_prompt", "timesteps", "sigmas", "denoising_end"),
        )
        for name in arguments:
            if name in OF_SAMPLER:
                raise ValueError(f"model.params.{name}: give sampler.{OF_SAMPLER[name]} instead")
            if name not in self._wanted or name in given:
                raise ValueError(f"model.params.{name}: {self.kind} takes no such argument")
        for name in PICTURES:
            if name in arguments:
                arguments[name] = _picture(arguments[name])
            elif name in self._wanted and "Inpaint" in self.kind:
                raise ValueError(f"{self.kind} needs model.params.{name}, an image file")
        if "guidance_scale" in self._wanted:
            default = self._default("guidance_scale")
            arguments["guidance_scale"] = default if guidance_scale is None else guidance_scale
        elif guidance_scale not in (None, 1.0):
            raise ValueError(f"sampler.guidance_scale: {self.kind} has no guidance")
        accepts = "eta" in inspect.signature(self._scheduler.step).parameters
        if eta and not (accepts and "eta" in self._wanted):
            name = type(self._scheduler).__name__
            raise ValueError(f"sampler.eta must be 0: {self.kind} with {name} has none")
        if accepts and "eta" in self._wanted:
            arguments["eta"] = eta
        if "prompt" in self._wanted and not self.prompts:
            raise ValueError(f"{self.kind} needs prompts: --prompt TEXT or --prompts FILE")
        if "prompt" not in self._wanted and self.prompts:
            raise ValueError(f"model.conditioning.prompts: {self.kind} takes no text")
        return arguments

    def _default(self, name: str) -> Any:
        """Of an argument of the pipeline's call; None without it."""
        return self._wanted[name].default if name in self._wanted else None

    def _classes(self, config: Any) -> int | None:
        self._has_classes = False
        if self.prompts:
            return len(self.prompts)
        kinds = ("num_class_embeds", "class_embed_type", "num_embeds_ada_norm")
        taken = any(getattr(config, key, None) is not None for key in kinds)
        self._has_classes = taken and "class_labels" in self._wanted
        if not self._has_classes:
            return None
        if getattr(config, "class_embed_type", None) not in (None, "timestep"):
            raise ValueError(f"class_embed_type {config.class_embed_type} is not supported")
        count = getattr(config, "num_class_embeds", None)
        return count or getattr(config, "num_embeds_ada_norm", None)

    def _timesteps(self) -> list[float]:
        """Timesteps of the calls, in their order. Raises ValueError for settings that the
        scheduler does not take."""
        try:
            self._scheduler.set_timesteps(self.steps)
        except Exception as error:  # a library's, for fields that do not fit together
            name = type(self._scheduler).__name__
            raise ValueError(f"{name} takes no {self.steps} steps: {printable(error)}") from error
        made = self._scheduler.timesteps
        strength = self._arguments.get("strength", self._default("strength"))
        if strength is not None:  # below 1 the first steps are left out, by 0.9999 already
            made = self._pipe.get_timesteps(self.steps, strength, "cpu")[0]
        values = [float(t) for t in made]
        if not values:
            raise ValueError(f"model.params.strength {strength} leaves none of {self.steps} steps")
        return [int(t) if t.is_integer() else t for t in values]

    @property
    def shape(self) -> tuple[int | None, int, int]:
        """C, H, W of a pixel model's pictures; those of a decoder are always pictures."""
        size = self._tap.original.config.sample_size
        side = (size, size) if isinstance(size, int) else tuple(size or (0, 0))
        # The state's, not the output's: a learned variance follows the noise there.
        return (self._tap.original.config.in_channels if self.kind in PIXELS else None, *side)

    @property
    def train_timesteps(self) -> int | None:
        """T, or None where timesteps are other numbers (consistency models)."""
        count = int(self._scheduler.config.num_train_timesteps)
        inside = min(self.timesteps) >= 0 and max(self.timesteps) < count
        return count if inside else None

    @property
    def guided(self) -> bool:
        """True where an output is put together from one with and one without the class or text."""
        config = self._tap.original.config
        if self.kind in (*PIXELS, *UNGUIDED) or getattr(config, "time_cond_proj_dim", None):
            return False
        return self.guidance_scale != 1 if "LDM" in self.kind else self.guidance_scale > 1

    @property
    def calls_per_image(self) -> int:
        """Rows of the denoiser that an image takes."""
        return len(self.timesteps) * (2 if self.guided else 1)

    def uncorrected(self, correction: str) -> str | None:
        """See Pipeline.uncorrected."""
        name = type(self._scheduler).__name__
        kind = getattr(self._scheduler.config, "prediction_type", "something else")
        if kind != "epsilon":
            return f"the denoiser predicts {kind}, not epsilon"
        several = name == "PNDMScheduler" and not self._scheduler.config.skip_prk_steps
        if several or name not in (*LINEAR_STEPS, *MULTISTEP):
            return f"{name} calls the denoiser more than once a step, or not linearly"
        looks_back = name in MULTISTEP and getattr(self._scheduler.config, "solver_order", 4) > 1
        return f"{name} {LOOKS_BACK}" if looks_back and correction == "drift" else None

    def step_importance(self, floor: float = 0.02) -> np.ndarray:
        """See Pipeline.step_importance; all alike for a scheduler without alphas_cumprod."""
        table = getattr(self._scheduler, "alphas_cumprod", None)
        inside = self.train_timesteps is not None
        if table is None or not inside or max(self.timesteps) > len(table) - 1:
            return np.ones(len(self.timesteps))
        bar = np.asarray(table, np.float64)[np.round(self.timesteps).astype(int)].clip(
            1e-4, 1 - 1e-6
        )
        sigma = np.sqrt(1 / bar - 1)
        change = np.abs(np.diff(np.append(sigma, 0.0)))
        moved = (change * 2 / np.sqrt(4 + sigma**2)) ** 2
        kind = getattr(self._scheduler.config, "prediction_type", "epsilon")
        moved = moved * {"v_prediction": bar, "sample": bar / (1 - bar)}.get(kind, 1.0)
        return np.maximum(moved / moved.mean(), floor)

    def labels(
        self, indices: Sequence[int], seed: int, classes: Sequence[int] | None = None
    ) -> torch.Tensor | None:
        """Class or prompt of each index (B,); None for a model that has none."""
        if self.num_classes is None and classes is None:
            return None
        if classes is not None and not (self._has_classes or self.prompts):
            raise ValueError(f"sampling.classes: {self.kind} has no classes")
        count = self.num_classes
        if classes is not None and count and any(c not in range(count) for c in classes):
            limits = f"0..{count - 1}"
            raise ValueError(f"sampling.classes must be a list of numbers within {limits}")
        return labels_of(self.num_classes or 0, indices, seed, classes, shuffled=not self.prompts)

    def write_parts(self, target: Path) -> None:
        """Writes into a folder what sampling reads besides the denoiser's weights."""
        write_parts(self._source, self._pipe, target)

    # ---- sampling ----

    @torch.no_grad()
    def sample(
        self,
        denoiser: Eps,
        indices: Numbers,
        seed: int,
        classes: Numbers | None = None,
        device: Device = "cpu",
    ) -> torch.Tensor:
        """Images in [-1, 1], (B, C, H, W), made where the pipeline is. Raises SamplingError for
        values not finite."""
        parts = [self._run(denoiser, b, seed, classes, None, False) for b in self._blocks(indices)]
        images = torch.cat(parts)[: len(indices)]
        if not torch.isfinite(images).all():
            raise SamplingError("the images hold values that are NaN or infinite")
        return images

    @torch.no_grad()
    def latents(
        self,
        denoiser: Eps,
        indices: Numbers,
        seed: int,
        classes: Numbers | None = None,
        device: Device = "cpu",
        on_output: OnOutput | None = None,
    ) -> torch.Tensor:
        """What the scheduler ends with, (B, C, H, W).

        on_output(x, t, output) -> the output that the scheduler goes on with, after guidance. With
        it all indices are sampled together.
        """
        blocks = self._blocks(indices) if on_output is None else [list(indices)]
        parts = [self._run(denoiser, b, seed, classes, on_output, True) for b in blocks]
        return torch.cat(parts)[: len(indices)]

    def _blocks(self, indices: Sequence[int]) -> list[list[int]]:
        """Always micro_batch images together, so that an image depends on none of the others: the
        last one is repeated where there are fewer."""
        size = self.micro_batch
        padded = [*indices, *[indices[-1]] * (-len(indices) % size)]
        return [padded[i : i + size] for i in range(0, len(padded), size)]

    def _run(
        self,
        denoiser: Eps,
        indices: Numbers,
        seed: int,
        classes: Numbers | None,
        on_output: OnOutput | None,
        latent: bool,
    ) -> torch.Tensor:
        generators = [image_generator(seed, index) for index in indices]
        arguments = {"num_inference_steps": self.steps, "generator": generators}
        arguments |= self._arguments
        labels = self.labels(indices, seed, classes)
        if "batch_size" in self._wanted:
            arguments["batch_size"] = len(indices)
        if self.prompts:
            assert labels is not None  # the numbers of the prompts
            arguments["prompt"] = [self.prompts[i] for i in labels.tolist()]
            negative = arguments.get("negative_prompt")
            if isinstance(negative, str):
                arguments["negative_prompt"] = [negative] * len(indices)
        # A picture for each image: the noise of its latents, too, is the image's own.
        arguments |= {n: [arguments[n]] * len(indices) for n in PICTURES if n in arguments}
        if labels is not None and not self.prompts:
            arguments["class_labels"] = labels.tolist()
        self._tap.call = self._kept(FixedBatch(denoiser, self.micro_batch))
        try:
            with self._steps(generators, on_output, latent):
                images = self._pipe(**arguments, output_type="np").images
        except _LastStep as reached:
            return reached.args[0][: len(indices)]
        except REFUSALS as error:
            if isinstance(error, CheckpointError | SamplingError):
                raise
            raise SamplingError(f"{self.kind} refuses: {printable(error, 300)}") from error
        finally:
            self._tap.call = None
        return torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2).float() * 2 - 1

    def _kept(self, model: Eps) -> Eps:
        """The model, whose last output is kept: some pipelines cut off a learned variance. Some put
        t on the device, from where it would have to be fetched: then it is the scheduler's."""

        def call(x: torch.Tensor, t: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
            if t.device.type != "cpu" and self._timestep is not None:
                t = self._timestep.reshape(1).expand(len(x))
            self._output = model(x, t, **named)
            return self._output

        return call

    def _with_variance(self, output: Any, x: torch.Tensor) -> Any:
        """The output with the learned variance that the scheduler wants and did not get."""
        kind = getattr(self._scheduler.config, "variance_type", None)
        channels, given = x.shape[1], self._output
        if kind not in ("learned", "learned_range") or output.shape[1] != channels:
            return output
        if given is None or given.shape[1] != 2 * channels or len(given) != len(output):
            if type(self._scheduler).__name__ in NEEDS_VARIANCE:
                name = f"variance_type {kind} of {type(self._scheduler).__name__}"
                raise SamplingError(f"{name} needs a variance, which the denoiser does not give")
            return output
        return torch.cat([output, given[:, channels:]], dim=1)

    @contextmanager
    def _steps(
        self, generators: list[torch.Generator], on_output: OnOutput | None, latent: bool
    ) -> Iterator[None]:
        """Every step of the scheduler draws from the images' own generators, and shows its output
        to on_output; latent: the last one ends the sampling. Timesteps stay on the host, where the
        scheduler looks at them without waiting for the device."""
        scheduler, done, check = self._scheduler, 0, FiniteCheck()
        step, scale = scheduler.step, scheduler.scale_model_input
        set_timesteps = scheduler.set_timesteps
        draws = "generator" in inspect.signature(step).parameters

        @functools.wraps(step)  # pipelines look whether it takes eta
        def own(output: Any, t: Any, x: Any, *args: Any, **named: Any) -> Any:
            nonlocal done
            if draws:
                named["generator"] = generators * (len(x) // len(generators))
            if on_output is not None:
                output = self._shown(on_output, output, t, x)
            output = self._with_variance(output, x)
            wanted = named.pop("return_dict", True)
            with told_in_one_line(scheduler):
                result = step(output, t, x, *args, **named, return_dict=True)
            done += 1
            check(result.prev_sample, float(t))
            if latent and done == len(self.timesteps):
                check.end()
                raise _LastStep(result.prev_sample)
            return result if wanted else tuple(result.values())

        @functools.wraps(scale)
        def scaled(x: torch.Tensor, t: Any = None, *args: Any, **named: Any) -> torch.Tensor:
            self._timestep = None if t is None else torch.as_tensor(t)
            return scale(x, t, *args, **named)

        @functools.wraps(set_timesteps)
        def on_host(*args: Any, device: Any = None, **named: Any) -> None:
            set_timesteps(*args, **named)

        hooks = {"step": own, "scale_model_input": scaled, "set_timesteps": on_host}
        scheduler.__dict__.update(hooks)
        try:
            yield
            check.end()
        finally:
            self._timestep = None
            for name in hooks:
                del scheduler.__dict__[name]

    def _shown(self, on_output: OnOutput, output: Any, t: Any, x: torch.Tensor) -> torch.Tensor:
        """on_output of the denoiser's channels; those that the step does not get are zero."""
        channels = output.shape[1]
        all_channels = self._tap.original.config.out_channels or channels
        whole = nn.functional.pad(output, (0, 0, 0, 0, 0, all_channels - channels))
        steps = torch.as_tensor(t).reshape(1).expand(len(x))
        return on_output(x, steps, whole)[:, :channels]


def _picture(value: Any) -> Any:
    from PIL import Image

    try:
        with Image.open(value) as image:
            return image.copy()
    except (OSError, AttributeError, ValueError) as error:
        raise ValueError(f"{printable(value, 200)}: not a readable image") from error
