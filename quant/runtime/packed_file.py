"""The quantized file: one safetensors file, as small as its bits say, enough by itself to sample.

Tensors
    <layer>.qweight        uint8 (bytes,)   codes of b bits, packed without gaps, first code highest
    layers.w_scale         float32 (sum O,) \\
    layers.w_zero_point    uint8 (sum O,)    | all layers one after the other, in table order
    layers.bias            float32 (sum,)   /
    layers.channel_scale   float16 (sum C,) of the layers whose input channels are scaled
    activations.scale      float32 (L, G)   one row per activation quantizer, padded with 1
    activations.zero_point int32 (L, G)
    activations.group      uint8 (L, S)     group of each calibrated timestep
    float.<parameter>      float32          what is not quantized: norms, embeddings
    correction.*           float32          optional, see correction.py
    beside.*               any              optional: what the caller adds, read by read_beside

Metadata: format, version, digest (sha256 of all tensors and the other metadata), architecture
(sha256 of names and shapes), layers (the table, JSON), timesteps, train_timesteps, and what the
caller adds (config, source checkpoint, versions). same: JSON, tensors that are copies of others and
are not stored -> these.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ..core.context import TimestepContext, plain_timestep
from .denoiser import QuantDenoiser
from .layers import QuantLayer, QuantMatMul, TimestepLayer
from .packed_model import ModelBuilder
from .packing import pack
from .quantizer import ActivationQuantizer

FORMAT = "tinydm-quantized"
VERSION = "2"
ANY_TIMESTEP = "any"  # train_timesteps where timesteps are any real numbers
BESIDE = "beside."
LEAST_SHARED = 4096  # bytes of a tensor that is worth a line in `same`
MOST_TRAIN_TIMESTEPS, MOST_CALIBRATED = 100_000, 255  # as the configuration allows them


class PackedFileError(ValueError):
    """A quantized file that cannot be used; the message names the file and what is wrong."""


def _layer_quantizers(module: QuantLayer | QuantMatMul) -> list[ActivationQuantizer]:
    if isinstance(module, QuantMatMul):
        return [module.left, module.right]
    return list(module.inputs)


def _deployed(model: QuantDenoiser) -> Iterator[tuple[str, bool, QuantLayer | QuantMatMul]]:
    """(name in the denoiser, depends on the timestep alone, QuantLayer or QuantMatMul)."""
    for name, module in model.denoiser.named_modules():
        if isinstance(module, TimestepLayer):
            assert isinstance(module.layer, QuantLayer)  # not under calibration
            yield name, True, module.layer
        elif isinstance(module, QuantMatMul):
            yield name, False, module
        elif isinstance(module, QuantLayer):
            parent = model.denoiser.get_submodule(name.rpartition(".")[0])
            if not isinstance(parent, TimestepLayer):
                yield name, False, module


def architecture_hash(shapes: dict[str, list[int]]) -> str:
    """sha256 of parameter names and shapes of the full-precision denoiser."""
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()


def layer_table(model: QuantDenoiser) -> list[dict[str, Any]]:
    """One row per quantized layer or product of a deployed model, in the file's order."""
    table = []
    for name, time, module in _deployed(model):
        inputs = [_input_bits(q) for q in _layer_quantizers(module)]
        if isinstance(module, QuantMatMul):
            kind = {"name": name, "kind": "matmul"}
            table.append(kind | {"inputs": inputs, "by_row": module.by_row})
            continue
        table.append(
            {
                "name": name,
                "kind": module.op.kind,
                "shape": list(module.qweight.shape),
                "bits": module.bits,
                "inputs": inputs,
                "split": module.split,
                "bias": module.bias is not None,
                "scaled": module.channel_scale is not None,
                "time": time,
            }
        )
    return table


def _input_bits(quantizer: ActivationQuantizer) -> int | list[int]:
    """Bits of an operand: a number, or one for each group where they differ."""
    bits = quantizer.group_bits
    return bits[0] if len(set(bits)) == 1 else bits


def to_bytes(
    model: QuantDenoiser,
    metadata: dict[str, str],
    beside: Mapping[str, torch.Tensor] | None = None,
) -> bytes:
    """The file's content.

    model: deployed, see quant.calibration.wrapping.deploy. metadata: what the caller adds. beside:
    tensors that belong to other parts of the pipeline, on the CPU.
    """
    tensors: dict[str, torch.Tensor] = {}
    scales, zero_points, biases, quantizers = [], [], [], []
    channel_scales = [torch.zeros(0)]
    shapes, covered = {}, set()
    for name, _, module in _deployed(model):
        quantizers += _layer_quantizers(module)
        if isinstance(module, QuantMatMul):
            continue
        covered.add(name)
        tensors[f"{name}.qweight"] = pack(module.qweight, module.bits)
        scales.append(module.w_scale)
        zero_points.append(module.w_zero_point)
        if module.channel_scale is not None:
            channel_scales.append(module.channel_scale.cpu())
        shapes[f"{name}.weight"] = list(module.qweight.shape)
        if module.bias is not None:
            biases.append(module.bias)
            shapes[f"{name}.bias"] = list(module.bias.shape)
    for name, value in _float_state(model.denoiser, covered).items():
        tensors[f"float.{name}"] = value.float().contiguous().cpu()
        shapes[name] = list(value.shape)
    tensors["layers.w_scale"] = torch.cat(scales).cpu()
    tensors["layers.w_zero_point"] = torch.cat(zero_points).cpu()
    tensors["layers.bias"] = torch.cat(biases).cpu() if biases else torch.zeros(0)
    tensors["layers.channel_scale"] = torch.cat(channel_scales).half()
    timesteps = len(model.context.timesteps)
    width = max((len(q.scale) for q in quantizers), default=1)
    scale = torch.ones(len(quantizers), width)
    zero = torch.zeros(len(quantizers), width, dtype=torch.int32)
    group = torch.zeros(len(quantizers), timesteps, dtype=torch.uint8)
    for row, q in enumerate(quantizers):
        scale[row, : len(q.scale)] = q.scale.cpu()
        zero[row, : len(q.scale)] = q.zero_point.cpu()
        group[row] = q.group_of_timestep.cpu()
    tensors |= {
        "activations.scale": scale,
        "activations.zero_point": zero,
        "activations.group": group,
    }
    if model.correction is not None:
        tensors |= {f"correction.{k}": v.cpu() for k, v in model.correction.state_dict().items()}
    tensors |= {f"{BESIDE}{name}": value.contiguous() for name, value in (beside or {}).items()}
    limit = model.context.train_timesteps
    metadata = metadata | {
        "format": FORMAT,
        "version": VERSION,
        "architecture": architecture_hash(shapes),
        "layers": json.dumps(layer_table(model), separators=(",", ":")),
        "timesteps": json.dumps(model.context.timesteps, separators=(",", ":")),
        "train_timesteps": ANY_TIMESTEP if limit is None else str(limit),
    }
    if copies := _copies(tensors):
        metadata["same"] = json.dumps(copies, separators=(",", ":"))
        tensors = {name: value for name, value in tensors.items() if name not in copies}
    metadata["digest"] = digest_of(tensors, metadata)
    return _sorted_header(save({name: tensors[name] for name in sorted(tensors)}, metadata))


def _copies(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Weights that are copies -> the first of them: DiT of diffusers has its embeddings in every
    block."""
    first: dict[tuple, str] = {}
    found = {}
    for name, value in sorted(tensors.items()):
        weights = name.startswith("float.") or name.endswith(".qweight")
        if weights and value.nbytes >= LEAST_SHARED:
            content = hashlib.sha256(value.view(-1).view(torch.uint8).numpy().tobytes()).digest()
            known = first.setdefault((value.dtype, value.shape, content), name)
            if known != name:
                found[name] = known
    return found


def _sorted_header(content: bytes) -> bytes:
    """The same safetensors file with its metadata in order: safetensors writes them in a random
    one, but the same calibration shall give the same bytes."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little") + text + content[start:]


def _float_state(denoiser: nn.Module, covered: set[str]) -> dict[str, torch.Tensor]:
    """State that belongs to no quantized layer."""
    quantized = tuple(f"{name}." for name in covered)
    skip = tuple(
        f"{name}." for name, m in denoiser.named_modules() if isinstance(m, ActivationQuantizer)
    )
    return {
        name: value
        for name, value in denoiser.state_dict().items()
        if not name.startswith(quantized) and not name.startswith(skip)
    }


def digest_of(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """sha256 of all tensors and of the metadata (texts) besides the digest itself."""
    texts = {name: text for name, text in metadata.items() if name != "digest"}
    digest = hashlib.sha256(json.dumps(sorted(texts.items())).encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Metadata with layers and timesteps parsed. Raises PackedFileError."""
    path = Path(path)
    if not path.is_file():
        what = "is no file" if path.exists() else "no such file"
        raise PackedFileError(f"{path}: {what} (calibrate.py writes quantized.safetensors)")
    try:
        with safe_open(path, framework="pt") as handle:
            metadata: dict[str, Any] = dict(handle.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise PackedFileError(f"{path}: not a readable safetensors file ({reason})") from error
    if metadata.get("format") != FORMAT:
        raise PackedFileError(f"{path}: not a quantized file of calibrate.py (format is missing)")
    if metadata.get("version") != VERSION:
        raise PackedFileError(
            f"{path}: format version {metadata.get('version')}, this program reads {VERSION}"
        )
    try:
        metadata["layers"] = json.loads(metadata["layers"])
        metadata["timesteps"] = [plain_timestep(t) for t in json.loads(metadata["timesteps"])]
        if not all(map(math.isfinite, metadata["timesteps"])):
            raise ValueError("a timestep is not finite")
        any_number = metadata["train_timesteps"] == ANY_TIMESTEP
        limit = None if any_number else int(metadata["train_timesteps"])
        metadata["train_timesteps"] = limit
        if limit is not None and not 1 <= limit <= MOST_TRAIN_TIMESTEPS:
            raise ValueError(f"train_timesteps is not within 1..{MOST_TRAIN_TIMESTEPS}")
        if not 1 <= len(metadata["timesteps"]) <= MOST_CALIBRATED:
            raise ValueError(f"not 1..{MOST_CALIBRATED} timesteps")
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise PackedFileError(f"{path}: damaged metadata ({error})") from error
    return metadata


def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata (see read_metadata) whose checksum matches. Raises PackedFileError."""
    metadata = read_metadata(path)
    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            texts = dict(handle.metadata())
        if digest_of(tensors, texts) != metadata.get("digest"):
            raise ValueError("its content does not match its checksum; copy or make it again")
        for name, first in dict(json.loads(texts.get("same", "{}"))).items():
            if name in tensors or first not in tensors:
                raise ValueError("damaged: a tensor is called a copy of one that is not there")
            tensors[name] = tensors[first]
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PackedFileError(f"{path}: {reason}") from error
    return tensors, metadata


def read_beside(path: str | Path) -> dict[str, torch.Tensor]:
    """What `to_bytes` got as `beside`; nothing where there was none. The checksum is compared when
    the denoiser is loaded. Raises PackedFileError."""
    read_metadata(path)
    try:
        with safe_open(path, framework="pt") as handle:
            names = [name for name in handle.keys() if name.startswith(BESIDE)]  # noqa: SIM118
            return {name.removeprefix(BESIDE): handle.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PackedFileError(f"{path}: {reason}") from error


def load_quantized(path: str | Path, denoiser: nn.Module) -> QuantDenoiser:
    """A deployed model from the file alone.

    denoiser: the architecture; its own weights are not used (random or on the meta device), and it
    is changed in place. Raises PackedFileError with the first thing that does not fit.
    """
    tensors, metadata = read_tensors(path)
    tensors = {name: value for name, value in tensors.items() if not name.startswith(BESIDE)}
    try:
        shapes = {name: list(value.shape) for name, value in denoiser.state_dict().items()}
        if architecture_hash(shapes) != metadata.get("architecture"):
            raise ValueError("it was made from another architecture; check model.params")
        context = TimestepContext(metadata["timesteps"], metadata["train_timesteps"])
        return ModelBuilder(tensors, context, denoiser).build(metadata["layers"])
    except (
        SafetensorError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        OverflowError,
        RuntimeError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PackedFileError(f"{path}: {reason}") from error
