"""From a configuration to what runs: the denoiser with its weights and the pipeline around it."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...models import checkpoint as checkpoints
from ...models.architecture import built
from ...models.autoencoder import first_stage_from_upstream
from ...models.checkpoint_files import CheckpointError, State, is_out_of_memory
from ...models.conditioning import VIT_L_14, ClassEmbedder, CLIPTextTower, PromptTable, tokenize
from ...models.diffusers_denoiser import DiffusersDenoiser
from ...models.diffusers_folder import scheduler_says
from ...models.diffusers_loading import DiffusersFolder
from ...models.diffusers_pipeline import DiffusersPipeline
from ...models.dit_original import OriginalDiT
from ...models.hub_names import is_hub_id, no_path
from ...models.pipeline import DIFFUSERS, Pipeline, build_denoiser, build_pipeline
from ...quant.backends.full_precision import to_fast_float
from ...quant.backends.native import Compiled
from ...quant.backends.selection import int8_supported, to_int8
from ...quant.runtime.denoiser import QuantDenoiser
from ...quant.runtime.packed_file import load_quantized, read_beside, read_metadata
from ..common.errors import ConfigError
from ..common.memory import return_freed_memory
from ..common.schema import printable
from .bundle import CONDITIONING, FIRST_STAGE, bundle_of, unpacked
from .config import Config, Override, parse_config, repository_path
from .config_sections import ConditioningConfig
from .downloads import hub_folder
from .precision import PRECISIONS, in_precision

BACKENDS = ("fake", "int8")
LATENT_PREFIX = "model.diffusion_model"  # of the denoiser in latent diffusion's files


@dataclass(frozen=True)
class Assembly:
    """A denoiser and the pipeline that samples with it.

    sources: the sha256 of each file that was read, by its role; bytes: their sizes.
    """

    denoiser: nn.Module
    pipeline: Pipeline | DiffusersPipeline
    sources: dict[str, str]
    bytes: dict[str, int]


def no_picture(assembly: Assembly) -> str | None:
    """Why what is sampled is no picture, or None: latents without their decoder."""
    pipeline = assembly.pipeline
    if pipeline.first_stage is not None or pipeline.shape[0] in (None, 1, 3):
        return None
    return f"{pipeline.shape[0]} channels are no picture"


def assemble(
    config: Config,
    quantized: str | Path | None = None,
    backend: str = "fake",
    device: str | torch.device = "cpu",
    compiled: Callable[[], Compiled | None] | None = None,
    precision: str = PRECISIONS[0],
) -> Assembly:
    """The full-precision denoiser, or with `quantized` the one of that file, and its pipeline.

    compiled: gives the C++ of --compile, or None, called once the file is read. precision: see
    precision.py. Raises ConfigError, CheckpointError or PackedFileError.
    """
    files = _Files(config)
    if quantized is not None:
        files.beside, files.packed = read_beside(quantized), Path(quantized)
    if config.model.arch == DIFFUSERS:
        model, parts = _of_folder(config, files, torch.device(device), quantized)
    else:
        parts = _surroundings(config, files, torch.device(device), quantized)
        model = empty_denoiser(config)
        if quantized is None:
            load_denoiser(config, model, files)
    if torch.device(device).type == "cuda" and compiled is not None:
        raise ConfigError("--compile: is for processors; leave it out on a CUDA device")
    if quantized is not None:
        model = load_quantized(quantized, model)
        known = model.context.train_timesteps
        if known is not None and max(parts.timesteps) >= known:
            raise ConfigError(
                f"{quantized}: was calibrated for schedule.train_timesteps {known}, and this "
                f"schedule asks for timestep {max(parts.timesteps)}"
            )
        code = None if compiled is None else compiled()
        model = select_backend(model, backend, device, code)
        files.note("quantized", Path(quantized))
    elif compiled is not None and (code := compiled()) is not None:
        model = to_fast_float(model, code)
        return_freed_memory()
    model = model.eval().requires_grad_(False)
    model = model.to(device).to(memory_format=torch.channels_last)
    model = in_precision(model, precision)
    return Assembly(model, parts, files.digests, files.sizes)


def unread_note(overrides: Sequence[str | Override], sources: Mapping[str, str]) -> str | None:
    """A line where a checkpoint was given beside a quantized file that needs none. sources: of the
    Assembly."""
    keys = (o.key if isinstance(o, Override) else o.partition("=")[0] for o in overrides)
    if set(sources) != {"quantized"} or "model.checkpoint" not in keys:
        return None
    return "note: model.checkpoint was not read; the quantized file holds all that is needed"


def source_digest(config: Config) -> str:
    """sha256 of the full-precision checkpoint, as Assembly.sources has it."""
    if config.model.arch == DIFFUSERS:
        return _folder_of(config).digest(with_denoiser=True)[0]
    return checkpoints.sha256_of(repository_path(config.model.checkpoint))


def _folder_of(config: Config) -> DiffusersFolder:
    if not config.model.checkpoint:
        raise ConfigError(f"{config.name}: model.checkpoint is not set (--ckpt FOLDER)")
    path = repository_path(config.model.checkpoint)
    stage = config.model.first_stage
    if path.is_file():
        decoder = None if stage is None else stage.checkpoint
        if decoder is not None and repository_path(decoder).exists():
            decoder = str(repository_path(decoder))
        return OriginalDiT.open(path, config.model.weights, decoder)
    by_path = no_path(config.model.checkpoint) is None and not is_hub_id(config.model.checkpoint)
    if not path.exists() and config.model.url is not None and by_path:
        raise CheckpointError(
            f"{path}: no such file; download it from {config.model.url} (scripts/download.py does)"
        )
    return DiffusersFolder.open(
        path if path.exists() else config.model.checkpoint, config.model.weights
    )


def _of_folder(
    config: Config, files: "_Files", device: torch.device, quantized: str | Path | None
) -> tuple[DiffusersDenoiser, DiffusersPipeline]:
    """The denoiser of a diffusers folder, empty for a quantized file, and its pipeline."""
    if files.beside:
        with unpacked(files.beside, files.packed) as path:
            return _from_folder(config, DiffusersFolder.open(path), device, quantized)
    folder = _folder_of(config)
    found = _from_folder(config, folder, device, quantized)
    part = "checkpoint" if quantized is None else "surroundings"
    files.digests[part], files.sizes[part] = folder.digest(with_denoiser=quantized is None)
    return found


def _from_folder(
    config: Config, folder: DiffusersFolder, device: torch.device, quantized: str | Path | None
) -> tuple[DiffusersDenoiser, DiffusersPipeline]:
    model, sampler = config.model, config.sampler
    if quantized is None:
        denoiser: nn.Module = folder.full_precision()
    else:
        text = read_metadata(quantized).get("denoiser")
        denoiser = folder.empty() if text is None else built(json.loads(text))
    try:
        pipeline = DiffusersPipeline(
            folder,
            denoiser,
            sampler.steps,
            eta=sampler.eta,
            guidance_scale=sampler.guidance_scale,
            prompts=None if model.conditioning is None else model.conditioning.prompts,
            micro_batch=config.sampling.micro_batch,
            decode_batch=config.sampling.decode_batch,
            arguments=model.params,
            device=device,
        )
        pipeline.labels([0], 0, config.sampling.classes)
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise ConfigError(f"{config.name}: {error}") from error
    return denoiser, pipeline


def bundled(config: Config, pipeline: Pipeline | DiffusersPipeline) -> dict[str, torch.Tensor]:
    """What the quantized file carries beside the denoiser, with `model.bundle`; pipeline: of full
    precision."""
    if not config.model.bundle:
        return {}
    conditioning = None
    if isinstance(pipeline, Pipeline) and config.model.conditioning is not None:
        state, source = _Files(config).state("checkpoint", config.model.checkpoint)
        prefix = config.model.conditioning.prefix
        conditioning = _conditioning(config.model.conditioning, state, source, prefix)
    return bundle_of(pipeline, conditioning)


def empty_denoiser(config: Config) -> nn.Module:
    """The architecture on the meta device. Raises ConfigError for parameters that do not fit."""
    what = f"{config.name}: model.params build no denoiser"
    with torch.device("meta"):
        return build_checked(what, lambda: build_denoiser(config.model.arch, config.model.params))


def build_checked(what: str, maker: Callable[[], nn.Module]) -> nn.Module:
    """maker(), of values that may not fit together. Raises ConfigError: "what: reason"."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes of 0, which are refused below
            model = maker()
    except (ValueError, TypeError, ArithmeticError, RuntimeError, LookupError) as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"{what}: {printable(error, 200)}") from error
    for name, value in model.named_parameters():
        if value.numel() == 0:
            raise ConfigError(f"{what}: {name} is empty {tuple(value.shape)}; a size is 0")
    for name, module in model.named_modules():  # -1 divides the channels: torch makes such a layer
        if isinstance(module, nn.GroupNorm) and module.num_groups < 1:
            raise ConfigError(f"{what}: {name} has {module.num_groups} groups")
    return model


def select_backend(
    model: QuantDenoiser,
    backend: str,
    device: str | torch.device = "cpu",
    compiled: Compiled | None = None,
) -> QuantDenoiser:
    """The quantized model as it is (fake: integers in floating point) or on integer kernels.

    compiled: faster integer kernels. Raises ConfigError where there are none.
    """
    if backend == "fake":
        return model
    reason = int8_supported(device)
    if reason is not None:
        raise ConfigError(f"--backend {backend}: {reason}; use --backend fake")
    model = to_int8(model, compiled=compiled, device=device)
    return_freed_memory()
    return model


def load_denoiser(config: Config, denoiser: nn.Module, files: "_Files | None" = None) -> None:
    """Fill a denoiser (on the meta device or not) with the checkpoint's weights."""
    files = _Files(config) if files is None else files
    state, source = files.state("checkpoint", config.model.checkpoint)
    if source.is_dir() and (other := scheduler_says(source, vars(config.schedule))):
        raise ConfigError(
            f"{source}: its scheduler_config.json says {other}, this configuration samples "
            "otherwise; use model.arch: diffusers, which follows it"
        )
    prefix = config.model.prefix
    if prefix is None and any(name.startswith(f"{LATENT_PREFIX}.") for name in state):
        prefix = LATENT_PREFIX
    state = state if prefix is None else checkpoints.select(state, prefix, source)
    checkpoints.load_into(denoiser, state, source)


def _surroundings(
    config: Config, files: "_Files", device: torch.device, quantized: str | Path | None
) -> Pipeline:
    """The pipeline with its first stage and class embedder."""
    model = config.model
    first_stage = embedder = None
    scale_factor = 1.0 if model.scale_factor is None else model.scale_factor
    if model.first_stage is not None:
        stage = model.first_stage
        first_stage = _built("first_stage", first_stage_from_upstream, vars(stage))
        name = "checkpoint" if stage.checkpoint is None else "first_stage"
        given = stage.checkpoint or model.checkpoint
        state, source, prefix = files.part(FIRST_STAGE, name, given, stage.prefix)
        _fill(first_stage, state, prefix, source)
        if model.scale_factor is None:
            scale_factor = _found_scale_factor(config, files, state, source, quantized)
    if model.conditioning is not None:
        given = model.conditioning.prefix
        found = files.part(CONDITIONING, "checkpoint", model.checkpoint, given)
        embedder = _embedder(model.conditioning, *found)
    return build_pipeline(
        model.arch,
        model.params,
        vars(config.schedule),
        vars(config.sampler),
        micro_batch=config.sampling.micro_batch,
        first_stage=None if first_stage is None else first_stage.to(device),
        embedder=None if embedder is None else embedder.to(device),
        scale_factor=scale_factor,
        decode_batch=config.sampling.decode_batch,
    )


def _embedder(
    conditioning: ConditioningConfig, state: State, source: Path, prefix: str | None
) -> ClassEmbedder | PromptTable:
    """The class embedder, or what the text tower makes of the prompts and of the empty one."""
    found = _conditioning(conditioning, state, source, prefix)
    if isinstance(found, ClassEmbedder):
        return found
    texts = (*(conditioning.prompts or ()), "")
    missing = f"model.conditioning.tokenizer: {conditioning.tokenizer} gives no vocabulary of CLIP"
    told = f"{missing}; docs/checkpoints.md tells where to get it"
    tokens = _or_refused(lambda: tokenize(texts, conditioning.tokenizer), told)
    with torch.no_grad():
        return PromptTable(torch.cat([found(row) for row in tokens.split(1)]))


def _conditioning(
    conditioning: ConditioningConfig, state: State, source: Path, prefix: str | None
) -> nn.Module:
    """The class embedder, or the text tower."""
    if conditioning.prompts is None:
        sizes = (conditioning.n_classes, conditioning.embed_dim)
        embedder = _built("conditioning", lambda _: ClassEmbedder(*sizes), {})
        _fill(embedder, state, prefix, source)
        return embedder
    params = {**VIT_L_14, **conditioning.text_params}
    tower = _or_refused(lambda: CLIPTextTower(params).eval(), "model.conditioning: no text tower")
    chosen = state if prefix is None else checkpoints.select(state, prefix, source)
    checkpoints.load_into(tower, tower.completed(chosen), source)
    return tower


def _or_refused(make: Callable[[], Any], told: str) -> Any:
    try:
        return make()
    except (ImportError, OSError, ValueError, TypeError, KeyError) as error:
        reason = printable(error, 300)
        raise ConfigError(f"{told}: {reason}") from error


def _found_scale_factor(
    config: Config, files: "_Files", state: State, source: Path, quantized: str | Path | None
) -> float:
    """The scale factor of the latents: of the first stage's file, else of the denoiser's (a first
    stage with a file of its own has none), whose quantized file remembers it; else 1."""
    if "scale_factor" in state:
        return _scale_factor(state["scale_factor"], source)
    if config.model.first_stage.checkpoint is None:
        return 1.0
    if quantized is not None:
        text = read_metadata(quantized).get("config")
        found = None if text is None else parse_config(text, str(quantized)).model.scale_factor
        if found is not None:
            return found
    # Files of earlier versions do not remember it.
    state, source = files.state("checkpoint", config.model.checkpoint)
    value = state.get("scale_factor")
    return 1.0 if value is None else _scale_factor(value, source)


def _scale_factor(value: torch.Tensor, source: Path) -> float:
    """The scale factor of the latents. Raises CheckpointError unless it is one positive number."""
    if value.numel() != 1 or not (torch.isfinite(value) & (value > 0)).all():
        raise CheckpointError(f"{source}: scale_factor is not one positive number; set it by hand")
    return float(value)


def _built(name: str, maker: Any, values: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        model = build_checked(f"model.{name} cannot be built", lambda: maker(values))
    return model.eval().requires_grad_(False)


def _fill(module: nn.Module, state: State, prefix: str | None, source: Path) -> None:
    chosen = state if prefix is None else checkpoints.select(state, prefix, source)
    chosen = {n: t for n, t in chosen.items() if not n.startswith(checkpoints.AVERAGED)}
    checkpoints.load_into(module, chosen, source)


class _Files:
    """Checkpoints that are read once, with their digests and sizes.

    beside: what a quantized file, `packed`, carries; it stands for them.
    """

    def __init__(self, config: Config):
        self.config = config
        self.digests: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.beside: dict[str, torch.Tensor] = {}
        self.packed = Path()
        self._states: dict[str, State] = {}

    def note(self, name: str, path: Path) -> None:
        self.digests[name] = checkpoints.sha256_of(path)
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        self.sizes[name] = sum(p.stat().st_size for p in files)

    def part(
        self, part: str, name: str, text: str | None, prefix: str | None
    ) -> tuple[State, Path, str | None]:
        """Tensors that hold the first stage or the conditioning, where they come from, and what
        its names begin with. name, text, prefix: of the checkpoint."""
        if self.beside:
            return self.beside, self.packed, part
        return (*self.state(name, text), prefix)

    def state(self, name: str, text: str | None) -> tuple[State, Path]:
        """The tensors of a checkpoint of the configuration, and its path."""
        if not text:
            raise ConfigError(f"{self.config.name}: model.checkpoint is not set (--ckpt FILE)")
        path = repository_path(text)
        if name not in self._states:
            if not path.exists():
                path = self._fetched(name, text)
            # As latent diffusion does: of a first stage, the weights that were trained.
            weights = "raw" if name == "first_stage" else self.config.model.weights
            self._states[name] = checkpoints.load_state_dict(path, weights=weights)
            self.note(name, path)
        return self._states[name], path

    def _fetched(self, name: str, text: str) -> Path:
        """A model of the hub. Raises CheckpointError, which says what else to do."""
        if is_hub_id(text):
            return hub_folder(text)
        url = self.config.model.url
        if url and name == "checkpoint" and no_path(text) is None:
            raise CheckpointError(
                f"{text}: no such file; download it from {url} (scripts/download.py does), or name "
                "yours with --ckpt FILE"
            )
        raise no_path(text) or CheckpointError(f"{text}: no such file; check the path")
