"""Keys whose default depends on the device: how many rows go through a network at once.

    resolve(tree, memory, quant)      # what is `auto`, or not written, becomes a number

On a CPU these keys have the defaults of their classes, or the values of the configuration's section
`cpu`, which large models need. On a GPU they follow from its memory:

    rows = the largest power of two <= SHARE memory / bytes of a row, at most LARGEST_CALL

A row in float32 takes about 4 bytes (HELD values of the widest layer + COPIES attention scores),
which fake quantization copies, and LEARNING times as much where gradients are needed. A batch that
learns keeps its size, since the result depends on it, and is computed in as many parts as fit. GPUs
of nearly the same memory count as one (SIZES): what they make has the same identity.
"""

from collections.abc import Iterator
from dataclasses import MISSING, replace
from typing import Any

import torch

from ...models.pipeline import DIFFUSERS
from ...quant.calibration.distinct import enough_trajectories
from ...quant.core.settings import QuantSettings
from ..common.errors import ConfigError
from ..common.schema import Key, Tree
from .config_sections import Config

AUTO = "auto"
SECTION = "cpu"
ROWS = (("sampling", "batch_size"), ("sampling", "micro_batch"))
DECODED = ("sampling", "decode_batch")
CALIBRATED = ("calibration", "batch_size")
LEARNED = (  # size of a batch, the parts that it is computed in
    (("quant", "search", "batch_size"), ("quant", "search", "accumulate")),
    (("quant", "reconstruct", "finetune_batch_size"), ("quant", "reconstruct", "accumulate")),
)
BLOCKS = ("quant", "reconstruct", "batch_size")
SAMPLED = (*ROWS, DECODED)  # what sampling alone depends on
KEYS = (*SAMPLED, CALIBRATED, BLOCKS, *(key for pair in LEARNED for key in pair))

SIZES = (4, 8, 16, 24, 40, 80)  # GiB
NEARLY = 0.9  # of such a size, of which drivers keep some
SHARE = 0.6  # of the memory, beside weights and what the allocator cannot use
LARGEST_CALL, LARGEST_DECODED, LARGEST_CALIBRATED = 256, 16, 64  # rows, beyond which nothing gains
HELD, COPIES, LEARNING = 24, 3, 10
DECODER_HELD = 8
UNKNOWN_ROW = 2 * 2**30  # bytes, of a model whose sizes the configuration does not tell


def device_memory(device: torch.device) -> float | None:
    """GiB of a GPU; None for a CPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device).total_memory / 2**30


def resolve(tree: Tree, memory: float | None, quant: QuantSettings) -> None:
    """Gives all KEYS that are `auto` or absent their values, or leaves them absent where the class
    has the right one. Removes the section `cpu`.

    memory: GiB of the device, None for a CPU; quant: defaults of the method. Raises ConfigError.
    """
    own = {key: value for key, value in _section_of_cpu(tree) if value != AUTO}
    open_keys = [key for key in KEYS if tree.value(key) in (MISSING, AUTO)]
    given = own if memory is None else _by_memory(tree, memory, quant)
    for key in open_keys:
        place = tree.where((SECTION, *key) if memory is None else key)
        tree.drop(key)
        if key in given:
            tree.set(key, given[key], place)
    tree.drop((SECTION,))


def for_calibration(config: Config) -> Config:
    """A call has no more rows than there are trajectories: as many as fit would be made."""
    calibration = config.calibration
    count = calibration.trajectories
    if count is None:
        count = enough_trajectories(calibration.samples, config.sampler.steps)
    most = 2 ** (count.bit_length() - 1)
    if config.sampling.micro_batch <= most:
        return config
    return replace(config, sampling=replace(config.sampling, micro_batch=most))


def _section_of_cpu(tree: Tree) -> Iterator[tuple[Key, Any]]:
    """The keys of the section `cpu` and their values. Raises ConfigError for others than KEYS, and
    for values that are none, which nothing else notices where the key itself is written."""

    def walk(value: Any, key: Key) -> Iterator[tuple[Key, Any]]:
        if key in KEYS:
            if value != AUTO and (type(value) is not int or value < 1):
                name = ".".join((SECTION, *key))
                where = tree.where((SECTION, *key))
                raise ConfigError(f"{where}: {name} must be auto or a whole number from 1 on")
            yield key, value
        elif isinstance(value, dict) and any(known[: len(key)] == key for known in KEYS):
            for name, inner in value.items():
                yield from walk(inner, (*key, name))
        else:
            name = ".".join((SECTION, *key))
            raise ConfigError(
                f"{tree.where((SECTION, *key))}: {name} is not one of the sizes that depend on the "
                f"device ({', '.join('.'.join(known) for known in KEYS)})"
            )

    if tree.values.get(SECTION) is not None:
        yield from walk(tree.values[SECTION], ())


def _by_memory(tree: Tree, memory: float, quant: QuantSettings) -> dict[Key, int]:
    """The values for a GPU; without those that do not depend on its memory."""
    model = tree.values.get("model")
    model = model if isinstance(model, dict) else {}
    row = row_bytes(model)
    rows = fitting_rows(memory, row, LARGEST_CALL)
    found = dict.fromkeys(ROWS, rows)
    if model.get("first_stage") is not None:
        found[DECODED] = fitting_rows(memory, decoded_bytes(model), LARGEST_DECODED)
    found[CALIBRATED] = min(rows, LARGEST_CALIBRATED)
    together = fitting_rows(memory, LEARNING * row, LARGEST_CALL)
    defaults = {
        LEARNED[0][0]: quant.search.batch_size,
        LEARNED[1][0]: quant.reconstruct.finetune_batch_size,
    }
    for size, parts in LEARNED:
        written = tree.value(size)
        batch = written if isinstance(written, int) else defaults[size]
        found[parts] = max(1, -(-batch // together))
    return found


def fitting_rows(memory: float, row: int, most: int) -> int:
    """The largest power of two of rows that fit a GPU of so many GiB, 1 at least."""
    size = max((s for s in SIZES if NEARLY * s <= memory), default=SIZES[0])
    fitting = int(min(SHARE * size * 2**30 / row, most))
    return 2 ** max(fitting.bit_length() - 1, 0)


def row_bytes(model: dict[str, Any]) -> int:
    """Memory of one row of a call, an estimate; model: the section, not checked."""
    params = model.get("params")
    if model.get("arch") == DIFFUSERS or not isinstance(params, dict):
        return UNKNOWN_ROW
    try:
        ddim = model.get("arch") == "ddim_unet"
        side = int(params.get("image_size", 32))
        width = int(params.get("ch", 128) if ddim else params["model_channels"])
        scores = max(_scores(params, ddim, side, width), default=0)
        return max(4 * (HELD * side**2 * width + COPIES * scores), 1)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return UNKNOWN_ROW  # what is wrong is told where the configuration is checked


def _scores(params: dict[str, Any], ddim: bool, side: int, width: int) -> Iterator[int]:
    """Attention scores of one row, tokens^2 heads, at each level that has attention."""
    multiples = params.get("ch_mult" if ddim else "channel_mult") or [1, 2, 4, 8]
    places = params.get("attn_resolutions" if ddim else "attention_resolutions") or []
    for level, multiple in enumerate(multiples):
        tokens = (side // 2**level) ** 2
        if (side // 2**level if ddim else 2**level) not in places:
            continue
        heads = 1
        if not ddim and params.get("num_head_channels", -1) in (-1, None):
            heads = params.get("num_heads", 1)
        elif not ddim:
            heads = width * multiple // params["num_head_channels"]
        yield tokens**2 * int(heads)


def decoded_bytes(model: dict[str, Any]) -> int:
    """Memory of decoding one latent, an estimate."""
    try:
        decoder = model["first_stage"]["params"]["ddconfig"]
        tokens = int(model["params"]["image_size"]) ** 2
        pixels = tokens * 4 ** (len(decoder["ch_mult"]) - 1)
        return max(4 * (DECODER_HELD * pixels * int(decoder["ch"]) + COPIES * tokens**2), 1)
    except (KeyError, TypeError, ValueError):
        return UNKNOWN_ROW
