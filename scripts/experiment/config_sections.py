"""The sections of a configuration: their keys, and what must hold between them.

docs/configuration.md lists the keys; it is made from these frozen dataclasses. config.py reads
them from YAML.
"""

from dataclasses import MISSING, dataclass, field
from typing import Any

from ...models.ldm_unet import TRAINING_ONLY
from ...models.pipeline import (
    ARCHITECTURES,
    DIFFUSERS,
    SAMPLERS,
    SKIPS,
    sampling_plan,
)
from ...models.schedule import SCHEDULES
from ...quant.core.settings import (
    FEWEST_BITS,
    CalibrationSettings,
    QuantSettings,
    average_bits,
    bits_by_group,
    setting,
)
from ..common.errors import ConfigError
from ..common.schema import Key, Where, check_arguments

LARGEST_SIZE = 65_536  # of a number in model.params
MOST_ENTRIES = 64  # blocks of a level, entries of a list


@dataclass(frozen=True)
class FirstStageConfig:
    """The autoencoder of latent diffusion, in the public configurations' words."""

    target: str = setting(
        MISSING, "VQModelInterface or AutoencoderKL; a class path before it is ignored"
    )
    params: dict = setting(MISSING, "arguments of that class")
    checkpoint: str | None = setting(None, "its file; null: within the model's checkpoint")
    prefix: str | None = setting("first_stage_model", "its tensors' names begin with it")


@dataclass(frozen=True)
class ConditioningConfig:
    """One context token per class, or texts."""

    n_classes: int | None = setting(
        None, "classes; the last one is the null class", within=(2, 10**6)
    )
    embed_dim: int | None = setting(None, "width of a class's token", within=(1, 10**6))
    prompts: tuple[str, ...] | None = setting(None, "texts, numbered like classes")
    text_params: dict = field(
        default_factory=dict,
        metadata={
            "doc": "fields of transformers' CLIPTextConfig that differ from those of ViT-L/14"
        },
    )
    tokenizer: str = setting(
        "openai/clip-vit-large-patch14", "a folder or hub name with CLIP's vocabulary"
    )
    prefix: str | None = setting("cond_stage_model", "its tensors' names begin with it")


@dataclass(frozen=True)
class ModelConfig:
    """The full-precision model: architecture, checkpoint, and the parts beside the denoiser."""

    arch: str = setting(MISSING, "family of the denoiser", choices=(*ARCHITECTURES, DIFFUSERS))
    params: dict = field(
        default_factory=dict,
        metadata={
            "doc": "arguments of the denoiser, in upstream's names; of the pipeline's call for "
            "diffusers (height, negative_prompt, ...)"
        },
    )
    checkpoint: str | None = setting(
        None,
        "full-precision file, or folder of diffusers; relative to the repository, this file or the "
        "working directory",
    )
    url: str | None = setting(None, "where it can be downloaded")
    digest: str | None = setting(
        None, "sha256:HEX or md5:HEX of what lies there, if that is published"
    )
    weights: str = setting("ema", "which copy of the weights", choices=("ema", "raw"))
    prefix: str | None = setting(None, "the denoiser's tensors' names begin with it")
    first_stage: FirstStageConfig | None = None
    conditioning: ConditioningConfig | None = None
    scale_factor: float | None = setting(
        None, "of the latents; null: the checkpoint's own, else 1", within=(1e-6, 1e6)
    )
    bundle: bool = setting(
        False,
        "the quantized file also carries what sampling needs beside the denoiser, in half "
        "precision: first stage, class embedder, text towers, scheduler; calibrate.py --bundle",
    )


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule that the model was trained with."""

    betas: str = setting(
        "linear",
        "noise schedule; `scaled_linear` is what latent diffusion calls linear",
        choices=SCHEDULES,
    )
    beta_start: float = setting(1e-4, "first beta", within=(1e-9, 1.0))
    beta_end: float = setting(0.02, "last beta", within=(1e-9, 1.0))
    train_timesteps: int = setting(1000, "timesteps of the noise schedule", within=(2, 100_000))


@dataclass(frozen=True)
class SamplerConfig:
    """The sampler, of calibration and of images alike."""

    name: str = setting("ddim", "sampler", choices=tuple(SAMPLERS))
    steps: int = setting(100, "sampling steps", within=(1, 100_000))
    skip: str = setting("uniform", "spacing of the timesteps", choices=tuple(SKIPS))
    eta: float = setting(0.0, "0 deterministic DDIM .. 1 ancestral; DDIM only", within=(0.0, 1.0))
    clip_denoised: bool = setting(
        False,
        "clip the predicted x0; for DDIM, guided_ddpm and dpmpp: ddpm always does, the samplers of "
        "latent diffusion never do",
    )
    guidance_scale: float | None = setting(
        1.0,
        "classifier-free guidance; 1: none; null: what the pipeline of diffusers has by default",
        within=(0.0, 1000.0),
    )


OF_DIFFUSERS = SamplerConfig(name="scheduler", steps=50, guidance_scale=None)


@dataclass(frozen=True)
class SamplingConfig:
    """Which images are made, and how many at a time."""

    count: int = setting(64, "images", within=(1, 1_000_000))
    batch_size: int = setting(
        64, "images made together; changes nothing in an image", within=(1, 65_536)
    )
    micro_batch: int = setting(16, "rows of each network call", within=(1, 65_536))
    decode_batch: int = setting(
        1, "latents that the first stage decodes together", within=(1, 65_536)
    )
    seed: int = setting(1234, "seed of the images", within=(0, 2**63 - 1))
    classes: tuple[int, ...] | None = setting(
        None, "given to the images in turn; null: all classes evenly"
    )


@dataclass(frozen=True)
class Config:
    """The whole configuration of an experiment."""

    name: str
    model: ModelConfig
    schedule: ScheduleConfig = ScheduleConfig()
    sampler: SamplerConfig = SamplerConfig()
    quant: QuantSettings = QuantSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    sampling: SamplingConfig = SamplingConfig()


def check_config(config: Config, where: Where) -> None:
    """Checks what depends on several keys at once. Raises ConfigError."""

    def refuse(key: str, why: str) -> None:
        raise ConfigError(f"{where(tuple(key.split('.')))}: {key} {why}")

    def asked(key: str) -> bool:
        """Whether the command names the key, and not only its section."""
        return where(tuple(key.split("."))) == f"--set {key}"

    model, schedule, sampler = config.model, config.schedule, config.sampler
    if model.arch not in SAMPLERS[sampler.name]:
        fitting = [name for name, archs in SAMPLERS.items() if model.arch in archs]
        refuse("sampler.name", f"{sampler.name} does not fit {model.arch} ({', '.join(fitting)})")
    _check_conditioning(model.conditioning, refuse)
    if 0 < average_bits(config.quant) < FEWEST_BITS:
        refuse("quant.weight.average_bits", f"must be 0 or at least {FEWEST_BITS}")
    own_bits = "quant.activation.bits_by_group"
    if (
        config.quant.activation.bits_by_group
        and asked(own_bits)
        and not bits_by_group(config.quant)
    ):
        needed = "quant.activation.search=differentiable, kmeans or dp, quant.activation.scale=mse"
        refuse(own_bits, f"needs {needed} and quant.reconstruct.weigh_steps=true")
    temporal = config.quant.time_embedding == "reconstructed"
    if temporal and config.quant.reconstruct.iterations == 0:
        refuse("quant.time_embedding", "reconstructed needs quant.reconstruct.iterations above 0")
    if model.arch == DIFFUSERS:
        _check_diffusers(config, refuse)
        return
    denoiser = ARCHITECTURES[model.arch]
    extra = () if model.arch == "ddim_unet" else TRAINING_ONLY
    check_arguments(denoiser, model.params, where, ("model", "params"), extra)
    if model.arch != "ddim_unet" and not isinstance(model.params.get("image_size"), int):
        refuse("model.params", "needs image_size, the side of what the denoiser sees")
    check_sizes(model.params, ("model", "params"), refuse)
    check_image_size(model.params, refuse)
    _check_channels(config, refuse)
    if model.first_stage is not None:
        check_sizes(model.first_stage.params, ("model", "first_stage", "params"), refuse)
    for name in ("first_stage", "conditioning"):
        if getattr(model, name) is not None and model.arch != "ldm_unet":
            refuse(f"model.{name}", "belongs to arch ldm_unet only")
    if schedule.beta_start > schedule.beta_end:
        refuse("schedule.beta_end", f"must be at least beta_start, is {schedule.beta_end}")
    if schedule.beta_end >= 1:
        refuse("schedule.beta_end", "must be below 1")
    if sampler.steps > schedule.train_timesteps:
        limits = f"1..{schedule.train_timesteps}"
        refuse("sampler.steps", f"must be within {limits}, is {sampler.steps}")
    try:
        plan = sampling_plan(sampler.name, sampler.steps, sampler.skip, **vars(schedule))
    except ValueError as error:
        refuse("sampler", f"does not fit: {error}")
    for t in plan[0]:
        if not 0 < plan[1][t] < 1:
            what = "no noise" if plan[1][t] >= 1 else "nothing but noise"
            refuse("schedule", f"has {what} in an image at timestep {t}; other betas are needed")
    if sampler.eta > 0 and sampler.name in ("plms", "dpmpp"):
        refuse("sampler.eta", f"must be 0 for {sampler.name}, which adds no noise")
    if 0 < sampler.eta < 1 and sampler.name in ("ddpm", "guided_ddpm"):
        refuse("sampler.eta", f"is of DDIM; {sampler.name} is always as eta 1, leave it out")
    never = sampler.name in ("plms", "ldm_ddim")
    if never and sampler.clip_denoised and asked("sampler.clip_denoised"):
        refuse("sampler.clip_denoised", f"is not for {sampler.name}, which never clips")
    if model.scale_factor is not None and model.first_stage is None:
        refuse("model.scale_factor", "is of latents: it needs model.first_stage")
    if sampler.guidance_scale is None:
        refuse("sampler.guidance_scale", "must be a number; null is for diffusers")
    if sampler.guidance_scale != 1 and model.conditioning is None:
        refuse("sampler.guidance_scale", "needs model.conditioning")
    _check_classes(config, refuse)


def _check_diffusers(config: Config, refuse: Any) -> None:
    """The folder itself says the rest, once it is read."""
    stage = config.model.first_stage
    if config.model.prefix is not None:
        refuse("model.prefix", "is not for diffusers")
    if stage is not None and (stage.target != "AutoencoderKL" or stage.checkpoint is None):
        what = "is the folder of a decoder, {target: AutoencoderKL, params: {}, checkpoint: FOLDER}"
        refuse("model.first_stage", f"{what}, for a file of the original DiT; folders have theirs")
    if config.model.conditioning is not None and config.model.conditioning.prompts is None:
        refuse("model.conditioning", "has prompts only for diffusers: the folder has the classes")
    for name, section, plain in (
        ("schedule", config.schedule, ScheduleConfig()),
        ("sampler", config.sampler, OF_DIFFUSERS),
    ):
        for key in ("betas", "beta_start", "beta_end", "train_timesteps", "skip", "clip_denoised"):
            if getattr(section, key, None) != getattr(plain, key, None):
                refuse(f"{name}.{key}", "is ruled by the folder's scheduler_config.json")
    classes = config.sampling.classes
    if classes is not None and (not classes or min(classes) < 0):
        refuse("sampling.classes", "must be a list of numbers from 0 on")


def _check_conditioning(conditioning: ConditioningConfig | None, refuse: Any) -> None:
    if conditioning is None:
        return
    classes = (conditioning.n_classes, conditioning.embed_dim)
    if conditioning.prompts is None:
        if None in classes:
            refuse("model.conditioning", "needs n_classes and embed_dim, or prompts")
        for name in ("tokenizer", "text_params"):
            if getattr(conditioning, name) != getattr(ConditioningConfig(), name):
                refuse(f"model.conditioning.{name}", "is of prompts; classes have no texts")
    elif classes != (None, None):
        refuse("model.conditioning.prompts", "cannot be there beside n_classes and embed_dim")
    elif not conditioning.prompts:
        refuse("model.conditioning.prompts", "must hold at least one text")


def check_sizes(value: Any, key: Key, refuse: Any) -> None:
    """Building even an empty network takes time and memory by these: no file may ask for any.

    refuse(key, why) raises.
    """
    counted = key[-1].endswith(("blocks", "depth"))
    most = MOST_ENTRIES if counted else LARGEST_SIZE
    if isinstance(value, dict):
        for inner in value:
            check_sizes(value[inner], (*key, inner), refuse)
    elif isinstance(value, list | tuple):
        if len(value) > MOST_ENTRIES:
            refuse(".".join(key), f"has {len(value)} entries, at most {MOST_ENTRIES} are sensible")
        for inner in value:
            check_sizes(inner, key, refuse)
    elif isinstance(value, int | float) and not -most <= value <= most:
        refuse(".".join(key), f"is {value:.6g}, at most {most} is sensible")
    elif counted and isinstance(value, int | float) and value < 0:
        refuse(".".join(key), f"is {value:.6g}, must be at least 0")


def _check_channels(config: Config, refuse: Any) -> None:
    """The samplers take eps of everything that the denoiser sees, guided_ddpm also a variance."""
    model, name = config.model, config.sampler.name
    seen = model.params.get("in_channels", 3)
    key = "out_ch" if model.arch == "ddim_unet" else "out_channels"
    given = model.params.get(key, 3 if model.arch == "ddim_unet" else seen)
    fitting = {"guided_ddpm": [2 * seen], "guided_ddim": [seen, 2 * seen]}.get(name, [seen])
    if min(seen, given) > 0 and given not in fitting:  # 0 builds no denoiser, which is told later
        wanted = " or ".join(map(str, fitting))
        why = f"is {given}; {name} takes {wanted} of a denoiser that sees {seen}"
        refuse(f"model.params.{key}", why)


def check_image_size(params: dict, refuse: Any) -> None:
    """Each level but the last halves the picture, and the way up doubles it again.

    refuse(key, why) raises.
    """
    size = params.get("image_size")
    levels = params.get("ch_mult", params.get("channel_mult"))
    if not isinstance(size, int) or not isinstance(levels, list | tuple) or not levels:
        return
    unit = 2 ** (len(levels) - 1)
    if size < unit or size % unit:
        wanted = f"a multiple of {unit}" if unit > 1 else "at least 1"
        refuse("model.params.image_size", f"must be {wanted}, is {size}")


def _check_classes(config: Config, refuse: Any) -> None:
    model, classes = config.model, config.sampling.classes
    if classes is None:
        return
    count = number_of_classes(model)
    if count is None:
        refuse("sampling.classes", "is for class-conditional models only")
    elif not classes or min(classes) < 0 or max(classes) >= count:
        refuse("sampling.classes", f"must be a list of numbers within 0..{count - 1}")


def number_of_classes(model: ModelConfig) -> int | None:
    """Classes or prompts that can be asked for (the null class is none of them), or None."""
    if model.conditioning is not None:
        prompts = model.conditioning.prompts
        return model.conditioning.n_classes - 1 if prompts is None else len(prompts)
    return model.params.get("num_classes")


def calls_per_image(config: Config) -> int:
    """Rows of the network that an image takes: two a step with guidance, and PLMS asks once more
    at its start. As Pipeline.calls_per_image, without a pipeline. Not for diffusers, see
    DiffusersPipeline.calls_per_image."""
    sampler = config.sampler
    timesteps, _ = sampling_plan(sampler.name, sampler.steps, sampler.skip, **vars(config.schedule))
    calls = len(timesteps) + (sampler.name == "plms")
    return calls * (1 if sampler.guidance_scale == 1.0 else 2)
