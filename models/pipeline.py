"""From plain values to images: denoiser, schedule, sampler and each image's own noise.

    denoiser = build_denoiser("ddim_unet", params)
    pipeline = build_pipeline("ddim_unet", params, schedule, sampler)
    x = pipeline.sample(denoiser, range(16), seed=1234)  # (16, 3, R, R)

An image depends on (seed, index) alone, not on the images made with it.

Shapes: B images, C x H x W what the denoiser sees (latents in latent diffusion), T train timesteps.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .autoencoder import KLAutoencoder, VQAutoencoder, decode_first_stage
from .conditioning import ClassEmbedder, GuidedDenoiser, PromptTable
from .ddim_unet import DDIMUNet
from .dpm_solver import SPACINGS, dpm_timesteps, dpmpp_2m
from .guided_samplers import guided_ddim, guided_ddpm, space_timesteps
from .ldm_samplers import ldm_ddim, ldm_timesteps, plms
from .ldm_unet import LDMUNet
from .noise import drawn_ahead
from .protocols import rows_are_independent
from .samplers import Denoiser, NoiseScale, SamplingError, StepHook, ddim, ddpm
from .schedule import SKIPS as DDIM_SKIPS
from .schedule import alphas_cumprod, make_betas, sampling_timesteps

ARCHITECTURES = {"ddim_unet": DDIMUNet, "ldm_unet": LDMUNet, "adm_unet": LDMUNet}
DIFFUSERS = "diffusers"  # the architecture that a folder of diffusers brings itself
SKIPS = (*DDIM_SKIPS, *(name for name in SPACINGS if name not in DDIM_SKIPS))

# sampler -> the architectures whose output it understands (guided: eps and v)
SAMPLERS = {
    "ddim": ("ddim_unet", "ldm_unet"),
    "ddpm": ("ddim_unet",),
    "plms": ("ddim_unet", "ldm_unet"),
    "dpmpp": ("ddim_unet", "ldm_unet"),
    "ldm_ddim": ("ldm_unet",),
    "guided_ddpm": ("adm_unet",),
    "guided_ddim": ("adm_unet",),
    "scheduler": (DIFFUSERS,),  # of the folder
}
MULTISTEP = ("plms", "dpmpp")
# What the fit takes off the drift would come back at the next step, perhaps larger.
LOOKS_BACK = "weighs earlier outputs along with the last one"


def build_denoiser(arch: str, params: Mapping[str, Any]) -> nn.Module:
    """The denoiser with upstream's parameter names, in eval mode, channels_last, not loaded."""
    if arch == "ddim_unet":
        model: nn.Module = DDIMUNet(**params)
    else:
        model = LDMUNet.from_upstream(params)
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def sampling_plan(
    name: str,
    steps: int,
    skip: str,
    betas: str = "linear",
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    train_timesteps: int = 1000,
) -> tuple[list[int], np.ndarray]:
    """Timesteps in the order of use and alphas_cumprod (T,), as the sampler's publication has them.

    The table is float32 for DDIM, float32 rounded from float64 for latent diffusion and float64 for
    guided diffusion. Raises ValueError when the values do not fit together.
    """
    values = make_betas(betas, beta_start, beta_end, train_timesteps)
    exact = alphas_cumprod(values, np.float64)
    if name in ("guided_ddpm", "guided_ddim"):
        if skip != "uniform":
            raise ValueError(f"{name} has no skip {skip} (uniform)")
        spacing = f"ddim{steps}" if name == "guided_ddim" else str(steps)
        return space_timesteps(spacing, train_timesteps), exact
    if name == "dpmpp":
        return dpm_timesteps(steps, exact, skip), exact
    if name in ("ldm_ddim", "plms"):
        return ldm_timesteps(steps, skip, train_timesteps), exact.astype(np.float32)
    return sampling_timesteps(steps, skip, train_timesteps), alphas_cumprod(values)


def build_pipeline(
    arch: str,
    params: Mapping[str, Any],
    schedule: Mapping[str, Any],
    sampler: Mapping[str, Any],
    *,
    micro_batch: int = 16,
    first_stage: VQAutoencoder | KLAutoencoder | None = None,
    embedder: ClassEmbedder | PromptTable | None = None,
    scale_factor: float = 1.0,
    decode_batch: int = 1,
) -> "Pipeline":
    """schedule: betas, beta_start, beta_end, train_timesteps; sampler: name, steps, skip, eta,
    clip_denoised, guidance_scale. Raises ValueError when the values do not fit together."""
    plan = {key: sampler[key] for key in ("name", "steps", "skip")}
    timesteps, table = sampling_plan(**plan, **schedule)
    default = (3, 32) if arch == "ddim_unet" else (None, None)
    channels, side = params.get("in_channels", default[0]), params.get("image_size", default[1])
    return Pipeline(
        shape=(channels, side, side),
        sampler=sampler["name"],
        timesteps=timesteps,
        alphas_cumprod=table,
        eta=sampler["eta"],
        clip_denoised=sampler["clip_denoised"],
        guidance_scale=sampler["guidance_scale"],
        micro_batch=micro_batch,
        num_classes=embedder.null_class if embedder is not None else params.get("num_classes"),
        first_stage=first_stage,
        embedder=embedder,
        scale_factor=scale_factor,
        decode_batch=decode_batch,
    )


def image_generator(seed: int, index: int) -> torch.Generator:
    """The generator of one image: its start noise, then the noise of each stochastic step.

    torch's CPU generator uses 32 bits of its seed, where hashes of 50,000 indices would collide
    (by one chance in four). A line modulo 2**32 with an odd slope, both from the hash of the seed,
    gives no two indices of a run the same.
    """
    digest = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8).digest()
    slope = int.from_bytes(digest[:4], "little") | 1
    offset = int.from_bytes(digest[4:], "little")
    return torch.Generator().manual_seed((slope * index + offset) % 2**32)


def labels_of(
    count: int,
    indices: Sequence[int],
    seed: int,
    classes: Sequence[int] | None = None,
    shuffled: bool = True,
) -> torch.Tensor:
    """Class of each index (B,) int64: `classes` in turn, else all of them in the seed's order."""
    if classes is None and shuffled:
        digest = hashlib.blake2b(f"classes {seed}".encode(), digest_size=4).digest()
        order = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        classes = torch.randperm(count, generator=order).tolist()
    classes = range(count) if classes is None else classes
    return torch.tensor([classes[index % len(classes)] for index in indices])


class FixedBatch:
    """Calls a model with exactly `size` rows whatever the batch; the last call is padded.

    Kernels choose other algorithms for other batch sizes, which changes the last bits. With a
    constant size a row's result does not depend on its place or on its neighbours. A model that
    declares `independent_rows` needs no padding for that.
    """

    def __init__(self, model: Callable[..., torch.Tensor], size: int):
        self.model, self.size = model, size
        self.pads = not rows_are_independent(model)

    def __call__(self, x: torch.Tensor, t: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = len(x)
        outputs = []
        for start in range(0, rows, self.size):

            def part(value: Any, start: int = start) -> Any:
                whole = isinstance(value, torch.Tensor) and value.ndim and len(value) == rows
                return _rows(value, start, self.size, self.pads) if whole else value

            named = {name: part(value) for name, value in kwargs.items()}
            outputs.append(self.model(part(x), part(t), *map(part, args), **named))
        return outputs[0] if len(outputs[0]) == rows else torch.cat(outputs)[:rows]


def _rows(value: torch.Tensor, start: int, size: int, pad: bool) -> torch.Tensor:
    """Rows start .. start + size; to pad, the last row is repeated where there are fewer."""
    rows = value[start : start + size]
    rows = filled(rows, size) if pad else rows
    return rows.contiguous(memory_format=torch.channels_last) if rows.ndim == 4 else rows


def filled(rows: torch.Tensor, size: int) -> torch.Tensor:
    """At least `size` rows: the last one is repeated."""
    missing = size - len(rows)
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing > 0 else rows


# (x_t (B, C, H, W), t (B,), output of the denoiser) -> output, both (B, C or 2 C, H, W)
OnOutput = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _observed(model: Denoiser, on_output: OnOutput) -> Denoiser:
    return lambda x, t: on_output(x, t, model(x, t))


@dataclass(frozen=True)
class Pipeline:
    """Everything around a denoiser; see build_pipeline. timesteps are in the order of use."""

    shape: tuple[int, int, int]  # C, H, W of what the denoiser sees
    sampler: str
    timesteps: list[int]
    alphas_cumprod: np.ndarray  # (T,)
    eta: float
    clip_denoised: bool
    guidance_scale: float
    micro_batch: int
    num_classes: int | None
    first_stage: VQAutoencoder | KLAutoencoder | None
    embedder: ClassEmbedder | PromptTable | None
    scale_factor: float
    decode_batch: int = 1  # latents that the first stage decodes together, always as many

    @property
    def guided(self) -> bool:
        """True where an output is put together from one with and one without the class or text."""
        return self.embedder is not None and self.guidance_scale != 1.0

    @property
    def train_timesteps(self) -> int:
        """Timesteps of the noise schedule."""
        return len(self.alphas_cumprod)

    @property
    def calls_per_image(self) -> int:
        """Rows of the denoiser that an image takes: two a step with guidance, and PLMS asks once
        more at its start."""
        calls = len(self.timesteps) + (self.sampler == "plms")
        return calls * (2 if self.guided else 1)

    def uncorrected(self, correction: str) -> str | None:
        """Why a correction, ptqd or drift, does not apply, or None."""
        looks_back = correction == "drift" and self.sampler in MULTISTEP
        return f"{self.sampler} {LOOKS_BACK}" if looks_back else None

    def step_importance(self, data_std: float = 2.0, floor: float = 0.02) -> np.ndarray:
        """How much an eps error at each step moves the final image, (S,), mean 1 before the floor.

        In x / sqrt(abar) a step adds eps times the change of sigma = sqrt(1/abar - 1); what it adds
        at noise level sigma then shrinks as for Gaussian data, by data_std / sqrt(data_std^2 +
        sigma^2). Squared, since errors of different steps add like noise. data_std is that of the
        directions in which images differ most, several times that of a pixel: errors of a denoiser
        lie there, and those of white noise would be taken out again.
        """
        sigma = np.sqrt(1 / self.alphas_cumprod[self.timesteps].astype(np.float64) - 1)
        change = np.abs(np.diff(np.append(sigma, 0.0)))
        moved = (change * data_std / np.sqrt(data_std**2 + sigma**2)) ** 2
        return np.maximum(moved / moved.mean(), floor)

    @torch.no_grad()
    def sample(
        self,
        denoiser: Callable[..., torch.Tensor],
        indices: Sequence[int],
        seed: int,
        classes: Sequence[int] | None = None,
        on_step: StepHook | None = None,
        device: str | torch.device = "cpu",
    ) -> torch.Tensor:
        """Images around [-1, 1], (B, C, H, W). Raises SamplingError for values not finite.

        classes are given to the indices in turn; without them each index has its own.
        """
        x = self.latents(denoiser, indices, seed, classes, on_step, device)
        if self.first_stage is None:
            return x
        size = self.decode_batch
        parts = [
            decode_first_stage(self.first_stage, filled(z, size), self.scale_factor)
            for z in x.split(size)
        ]
        images = torch.cat(parts)[: len(x)]
        if not torch.isfinite(images).all():
            raise SamplingError("the first stage decodes to values that are NaN or infinite")
        return images

    @torch.no_grad()
    def latents(
        self,
        denoiser: Callable[..., torch.Tensor],
        indices: Sequence[int],
        seed: int,
        classes: Sequence[int] | None = None,
        on_step: StepHook | None = None,
        device: str | torch.device = "cpu",
        on_output: OnOutput | None = None,
    ) -> torch.Tensor:
        """What the sampler ends with, before the first stage's decoder, (B, C, H, W).

        on_output(x, t, eps) -> the output that the sampler goes on with, after guidance.
        """
        generators = [image_generator(seed, index) for index in indices]

        def draw() -> torch.Tensor:
            draws = torch.stack([torch.randn(self.shape, generator=g) for g in generators])
            return draws.contiguous(memory_format=torch.channels_last)

        labels = self.labels(indices, seed, classes)
        model: Denoiser = FixedBatch(denoiser, self.micro_batch)
        model = self.conditioned(model, None if labels is None else labels.to(device))
        if on_output is not None:
            model = _observed(model, on_output)
        # Offered by a denoiser whose eps brings noise of its own (protocols.NoiseScale).
        noise_scale = getattr(denoiser, "noise_scale", None)
        start = draw().to(device)
        with drawn_ahead(draw, device) as noise:
            return self._run(model, start, noise, noise_scale, on_step)

    def labels(
        self, indices: Sequence[int], seed: int, classes: Sequence[int] | None = None
    ) -> torch.Tensor | None:
        """Class of each index (B,) int64; None for a model without classes.

        Without `classes`, each run of num_classes indices has every class once, in the seed's
        order.
        """
        if self.num_classes is None:
            return None
        return labels_of(self.num_classes, indices, seed, classes)

    def conditioned(
        self, model: Callable[..., torch.Tensor], labels: torch.Tensor | None
    ) -> Denoiser:
        """eps(x, t) of a batch with these classes, guided where guidance_scale is not 1."""
        if labels is None:
            return model
        if self.embedder is None:
            return lambda x, t: model(x, t, y=labels)
        null = torch.full_like(labels, self.embedder.null_class)
        context, without = self.embedder(labels), self.embedder(null)  # (B, 1, D)
        return GuidedDenoiser(model, context, without, self.guidance_scale)

    def _run(
        self,
        model: Denoiser,
        x: torch.Tensor,
        noise: Callable[[int], torch.Tensor],
        noise_scale: NoiseScale | None,
        on_step: StepHook | None,
    ) -> torch.Tensor:
        start = (model, x, self.timesteps, self.alphas_cumprod)
        eta, clip = self.eta, self.clip_denoised
        if self.sampler == "ddim":
            return ddim(
                *start,
                eta=eta,
                clip_denoised=clip,
                noise=noise,
                noise_scale=noise_scale,
                on_step=on_step,
            )
        if self.sampler == "ddpm":
            return ddpm(*start, noise=noise, noise_scale=noise_scale, on_step=on_step)
        if self.sampler == "ldm_ddim":
            return ldm_ddim(*start, eta=eta, noise=noise, noise_scale=noise_scale, on_step=on_step)
        if self.sampler == "plms":
            return plms(*start, on_step=on_step)
        if self.sampler == "dpmpp":
            return dpmpp_2m(*start, clip_denoised=clip, on_step=on_step)
        if self.sampler == "guided_ddpm":
            return guided_ddpm(*start, noise=noise, clip_denoised=clip, on_step=on_step)
        return guided_ddim(*start, eta=eta, clip_denoised=clip, noise=noise, on_step=on_step)
