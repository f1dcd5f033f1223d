"""Folders of Hugging Face diffusers: where their parts lie, and how these are loaded.

    folder = DiffusersFolder.open("path/or/name-in-the-local-cache")
    denoiser = folder.full_precision()
    pipe = folder_pipe(folder, tap, scheduler)  # diffusers' own, the tap in its place

Pixel models without a text run in a loop of their own, since diffusers' pipelines for them give
neither classes nor every scheduler what they want.
"""

import copy
import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from .checkpoint import sha256_of
from .checkpoint_files import failure, printable
from .diffusers_denoiser import (
    DENOISERS,
    DiffusersDenoiser,
    LikeDiffusers,
    build,
    library,
    read,
    read_json,
    variant_of,
)
from .hub_names import is_hub_id, no_path
from .pipeline import filled

PIXELS = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
TEXT_GUIDED = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLInpaintPipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
)
UNGUIDED = ("LDMPipeline", "ConsistencyModelPipeline", "LatentConsistencyModelPipeline")
PIPELINES = (*PIXELS, *TEXT_GUIDED, *UNGUIDED, "LDMTextToImagePipeline", "DiTPipeline")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")
CHECKERS = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")


@dataclass(frozen=True)
class DiffusersFolder:
    """A folder of diffusers: its pipeline's class and where its parts lie.

    index: model_index.json, or what stands for it; denoiser: folder of the weights; scheduler:
    the scheduler's file.
    """

    path: Path
    index: Mapping[str, Any]
    denoiser: Path
    scheduler: Path

    @classmethod
    def open(cls, text: str | Path, weights: str = "ema") -> "DiffusersFolder":
        """text: a folder, or a name in the local cache of the hub. weights: "ema" takes unet_ema
        where it is there. Raises CheckpointError."""
        path = located(text)
        file = path / "model_index.json"
        index = read_json(file) if file.is_file() else _index_of_parts(path)
        name = index.get("_class_name")
        if name not in PIPELINES:
            what = f"is a {printable(name, 60)}"
            raise failure(file, what, f"supported are {', '.join(PIPELINES)}")
        _check_parts(index, file)
        for name in _needed(index):
            if not (path / name).is_dir() and name not in ("unet", "transformer", "scheduler"):
                raise failure(path, f"holds no folder {name}", "download the whole folder")
            # Without it, transformers makes a tokenizer that knows no word.
            words = [p for p in (path / name).glob("*") if p.name in VOCABULARIES]
            if name.startswith("tokenizer") and not words:
                raise failure(path / name, "holds no vocabulary", "download the whole folder")
        part = "transformer" if "transformer" in index else "unet"
        folders = [path / f"{part}_ema", path / part] if weights == "ema" else [path / part]
        denoiser = next((f for f in (*folders, path) if (f / "config.json").is_file()), None)
        if denoiser is None:
            raise failure(path, f"holds no {part}/config.json", "download the whole folder")
        places = (path / "scheduler", path, path.parent / "scheduler")
        files = [p / n for p in places for n in ("scheduler_config.json",)]
        scheduler = next((f for f in files if f.is_file()), None)
        if scheduler is None:
            what = "holds no scheduler/scheduler_config.json, so that its noise schedule is unknown"
            raise failure(path, what, "copy that file from where the model comes from")
        return cls(path, index, denoiser, scheduler)

    @property
    def kind(self) -> str:
        """Class of the pipeline in diffusers."""
        return self.index["_class_name"]

    @property
    def has_text(self) -> bool:
        """Whether the denoiser is conditioned on texts."""
        return any(name.startswith("tokenizer") for name in self.index)

    @property
    def part(self) -> str:
        """Name of the denoiser's part: transformer or unet."""
        return "transformer" if "transformer" in self.index else "unet"

    def files(self, with_denoiser: bool) -> list[Path]:
        """What is read, in order: without the denoiser where a quantized file stands for it."""
        kept = [p for p in self.path.glob("*/*") if p.parent.name in self.index]
        kept = [p for p in kept if p.parent.name not in (self.part, *CHECKERS)]
        kept += [self.scheduler]
        kept += [p for p in self.denoiser.glob("*") if with_denoiser or p.name == "config.json"]
        used = (".json", ".safetensors", ".bin", ".txt", ".model")
        return sorted({p for p in kept if p.is_file() and p.suffix in used})

    def digest(self, with_denoiser: bool) -> tuple[str, int]:
        """sha256 over the files and their names, and their bytes."""
        digest, size = hashlib.sha256(), 0
        for path in self.files(with_denoiser):
            digest.update(f"{path.parent.name}/{path.name} {sha256_of(path)}\n".encode())
            size += path.stat().st_size
        return digest.hexdigest(), size

    def full_precision(self) -> DiffusersDenoiser:
        """The denoiser with its weights."""
        return read(self.denoiser)

    def empty(self) -> DiffusersDenoiser:
        """The architecture, its weights on the meta device."""
        config = read_json(self.denoiser / "config.json")
        return build(str(config.get("_class_name")), config, self.denoiser / "config.json")

    def scheduler_config(self) -> dict[str, Any]:
        """What scheduler_config.json says."""
        return read_json(self.scheduler)

    def small_files(self) -> dict[Path, bytes]:
        """What is read besides weights and the denoiser's configuration, by its place in a folder
        of diffusers."""
        weights = (".safetensors", ".bin", ".index.json")
        kept = [p for p in self.files(with_denoiser=False) if p.parent != self.denoiser]
        kept = [p for p in kept if p != self.scheduler and not p.name.endswith(weights)]
        found = {Path(p.parent.name, p.name): p.read_bytes() for p in kept}
        return found | {Path("scheduler/scheduler_config.json"): self.scheduler.read_bytes()}

    def assembled(self, given: dict[str, Any]) -> Any:
        """diffusers' pipeline with these parts and those of the folder. Raises what the libraries
        raise."""
        variants = [p for p in self.files(with_denoiser=False) if ".fp16" in p.name]
        towers = {name: self._tower(name) for name in _needed(self.index) if "text_enc" in name}
        given = towers | given
        return library().DiffusionPipeline.from_pretrained(
            self.path,
            variant="fp16" if variants else None,
            torch_dtype=torch.float32,
            local_files_only=True,
            **given,
        )

    def _tower(self, name: str) -> nn.Module:
        """A text tower. transformers draws what is missing at random, with no more than a log."""
        import transformers

        transformers.logging.set_verbosity_error()
        place = self.path / name
        kind = getattr(transformers, self.index[name][1])
        tower, told = kind.from_pretrained(
            place,
            variant=variant_of(place),
            torch_dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
        if told["missing_keys"]:
            raise ValueError(f"{name} holds no tensor {min(told['missing_keys'])}")
        return tower


def located(text: str | Path) -> Path:
    """A folder, or that of a name in the local cache of the hub. Raises CheckpointError."""
    path = Path(text)
    if path.is_dir():
        return path
    if path.exists():
        raise failure(text, "not a folder", "name a folder of diffusers")
    if not is_hub_id(str(text)):
        nothing = failure(text, "no such file or folder", "name a folder of diffusers")
        raise no_path(str(text)) or nothing
    library()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(text), local_files_only=True))
    except Exception as error:  # of many kinds, all of which say that it is not there
        what = "neither a folder nor a model in the local cache of the hub"
        raise failure(text, what, f"download it: hf download {text}") from error


def _index_of_parts(path: Path) -> dict[str, Any]:
    """What model_index.json would say of a folder that has none: training writes unet and unet_ema
    alone, beside the scheduler's folder."""
    for part in ("unet_ema", "unet", "."):
        if (path / part / "config.json").is_file():
            name = read_json(path / part / "config.json").get("_class_name")
            if name == "UNet2DModel":
                return {"_class_name": "DDPMPipeline", "unet": ["diffusers", name]}
            what = f"has no model_index.json, which a {printable(name, 60)} needs"
            raise failure(path, what, "name the whole pipeline's folder")
    raise failure(path, "holds no model_index.json", "name a folder of diffusers")


def _check_parts(index: Mapping[str, Any], file: Path) -> None:
    """Only classes of the two libraries themselves: a folder may name code of its own."""
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue
        ours = ("diffusers", "transformers", "latent_diffusion", "stable_diffusion")
        if len(value) != 2 or value[0] not in (*ours, None):
            what = f"{name} is of {printable(value, 80)}, not of diffusers or transformers"
            raise failure(file, what, "nothing of it was run")


def _needed(index: Mapping[str, Any]) -> list[str]:
    """Parts that model_index.json names and that are read."""
    parts = {n: v for n, v in index.items() if isinstance(v, list) and v[0] is not None}
    return [name for name in parts if name not in CHECKERS]


class PixelLoop:
    """Samples a pixel model (UNet2DModel): any scheduler, with or without classes."""

    def __init__(self, unet: Any, scheduler: Any):
        self.unet, self.scheduler = unet, scheduler
        self.components = {"unet": unet, "scheduler": scheduler}

    def __call__(
        self,
        batch_size: int,
        generator: list[torch.Generator],
        num_inference_steps: int,
        eta: float = 0.0,
        class_labels: list[int] | None = None,
        output_type: str = "np",
    ) -> Any:
        config, device = self.unet.config, self.unet.device
        size = config.sample_size
        side = (size, size) if isinstance(size, int) else tuple(size)
        draws = [torch.randn(1, config.in_channels, *side, generator=g) for g in generator]
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.cat(draws).to(device) * self.scheduler.init_noise_sigma
        labels = None if class_labels is None else torch.tensor(class_labels, device=device)
        wanted = inspect.signature(self.scheduler.step).parameters
        more = {"eta": eta} if "eta" in wanted else {}
        for t in self.scheduler.timesteps:
            given = self.scheduler.scale_model_input(x, t)
            out = self.unet(given, t, class_labels=labels).sample
            x = self.scheduler.step(out, t, x, **more).prev_sample
        images = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return SimpleNamespace(images=images.cpu().numpy())


def folder_pipe(
    folder: DiffusersFolder, tap: LikeDiffusers, scheduler: Any, decode_batch: int = 1
) -> Any:
    """The pipeline with the tap as its denoiser, on its device. Raises CheckpointError.

    decode_batch: latents that a KL decoder decodes together, always as many: all at once would need
    much memory.
    """
    if folder.kind in PIXELS:
        return PixelLoop(tap, scheduler)
    given: dict[str, Any] = {folder.part: tap.original, "scheduler": scheduler}
    given |= {name: None for name in CHECKERS if name in folder.index}
    if "requires_safety_checker" in folder.index:
        given["requires_safety_checker"] = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe = folder.assembled(given)
    except Exception as error:  # whatever the libraries raise for files that are not whole
        raise failure(folder.path, f"no {folder.kind}: {error}", "download it again") from error
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and part is not tap.original:
            lacking = [n for n, value in part.state_dict().items() if value.is_meta]
            if lacking:
                what = f"holds no tensor {lacking[0]}"
                raise failure(folder.path / name, what, "download it again")
    setattr(pipe, folder.part, tap)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and part is not tap:
            part.to(tap.device).eval().requires_grad_(False)
            if hasattr(part, "use_slicing"):
                decoder = cast(Any, part)
                decoder.use_slicing = decode_batch == 1
                if decode_batch > 1:
                    decoder.decode = _in_parts(decoder.decode, decode_batch)
    return pipe


def _in_parts(decode: Callable[..., Any], size: int) -> Callable[..., Any]:
    """decode() of diffusers, with `size` latents at a time."""

    def decoded(z: torch.Tensor, return_dict: bool = True, **named: Any) -> Any:
        parts = [decode(filled(part, size), return_dict=False)[0] for part in z.split(size)]
        images = torch.cat(parts)[: len(z)]
        return SimpleNamespace(sample=images) if return_dict else (images,)

    return decoded


def write_parts(folder: DiffusersFolder, pipe: Any, target: Path) -> None:
    """Writes what sampling reads besides the denoiser's weights, as a folder that
    DiffusersFolder.open takes, with weights in half precision. pipe: of folder_pipe."""
    denoiser = pipe.components[folder.part]
    config = {k: v for k, v in denoiser.config.items() if not k.startswith("_")}
    config["_class_name"] = type(denoiser.original).__name__
    texts = {Path("model_index.json"): folder.index, Path(folder.part, "config.json"): config}
    written = {place: json.dumps(dict(value)).encode() for place, value in texts.items()}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name != folder.part:
            cast(Any, _halved(part)).save_pretrained(target / name, max_shard_size="1000GB")
    for place, content in (written | folder.small_files()).items():
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        (target / place).write_bytes(content)


def _halved(part: nn.Module) -> nn.Module:
    """A copy on the CPU in half precision, but for what is too large for it."""
    part = copy.deepcopy(part).cpu()
    for value in part.parameters():
        half = value.data.half()
        value.data = half if torch.isfinite(half).all() else value.data
    return part


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """The name and the module of a loaded pipeline's denoiser. Raises ValueError."""
    kind = type(pipe).__name__
    if kind not in PIPELINES:
        raise ValueError(f"{kind} is not supported ({', '.join(PIPELINES)})")
    part = "transformer" if "transformer" in pipe.components else "unet"
    module = pipe.components[part]
    name = type(module).__name__
    if name not in DENOISERS:
        raise ValueError(f"{part}: {name} is not supported ({', '.join(DENOISERS)})")
    if module.dtype != torch.float32:
        raise ValueError(f"{part} is in {module.dtype}: load the pipeline in torch.float32")
    return part, module


def pipe_beside(pipe: Any, tap: LikeDiffusers) -> Any:
    """A pipeline of the same parts but the tap."""
    if type(pipe).__name__ in PIXELS:
        return PixelLoop(tap, pipe.scheduler)
    part, _ = denoiser_of(pipe)
    beside = copy.copy(pipe)
    beside.__dict__[part] = tap
    beside.set_progress_bar_config(disable=True)
    return beside
