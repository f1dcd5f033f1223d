"""A configuration for a folder of diffusers that has none: one argument is enough.

    config = config_of_folder(["model.checkpoint=path/to/folder"])

Everything else is the folder's own or the default; batches fit the size of what the denoiser sees.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ...models.checkpoint_files import refuse_foreign
from ...models.diffusers_denoiser import read_json
from ...models.diffusers_loading import DiffusersFolder
from ..common.errors import ConfigError
from ..common.schema import read_value
from .config import Config, Override, parse_config

# Texts to calibrate with where none are given: people, animals, places, things and styles.
CAPTIONS = (
    "a portrait photo of an old fisherman, natural light",
    "two children running along a beach at sunset",
    "a black cat asleep on a pile of books",
    "a brown horse galloping through shallow water",
    "a red fox in the snow, close up",
    "a mountain lake with pine trees and morning fog",
    "a narrow street in an old town after rain",
    "the skyline of a large city at night",
    "a plate of pasta with tomatoes and basil on a wooden table",
    "a bunch of tulips in a glass vase, watercolour",
    "a blue vintage car parked in front of a white wall",
    "an astronaut planting a flag, digital art",
    "a wooden sailing ship in a storm, oil painting",
    "a detailed pencil drawing of a cathedral",
    "a robot reading a newspaper in a cafe",
    "an abstract pattern of coloured triangles",
)
FEW_STEPS = {"ConsistencyModelPipeline": 2, "LatentConsistencyModelPipeline": 4}
ROWS = 16  # of a call where the denoiser sees little


def config_of_folder(overrides: Sequence[str | Override], memory: float | None = None) -> Config:
    """The configuration of a folder of diffusers, from the overrides of a command line.

    --ckpt FOLDER is among them. memory: GiB of a GPU, None for a CPU. Raises ConfigError
    where FOLDER is missing or none of diffusers, and CheckpointError for one that cannot be used.
    """
    given = [Override.parse(o) if isinstance(o, str) else o for o in overrides]
    named = [o for o in given if o.key == "model.checkpoint"]
    if not named:
        raise ConfigError("give --config FILE, or --ckpt FOLDER with a folder of diffusers")
    checkpoint = read_value(named[-1].text, named[-1].label)
    if Path(str(checkpoint)).is_file():
        refuse_foreign(Path(str(checkpoint)))
        raise ConfigError(f"{checkpoint}: a file needs --config FILE, which says what is in it")
    folder = DiffusersFolder.open(str(checkpoint))
    text = yaml.safe_dump(values_of(folder), sort_keys=False)
    return parse_config(text, str(checkpoint), overrides, memory=memory)


def values_of(folder: DiffusersFolder) -> dict[str, Any]:
    """The configuration's keys that differ from the defaults."""
    config = read_json(folder.denoiser / "config.json")
    rows = _rows(config)
    model: dict[str, Any] = {"arch": "diffusers", "checkpoint": str(folder.path)}
    if folder.has_text:
        model["conditioning"] = {"prompts": list(CAPTIONS)}
    parts = {"accumulate": max(1, 8 // rows)}
    return {
        "name": folder.path.resolve().name or "diffusers",
        "model": model,
        "sampler": {"steps": FEW_STEPS.get(folder.kind, 50)},
        "sampling": {"count": 16},
        "cpu": {
            "quant": {"search": {"accumulate": ROWS // rows}, "reconstruct": parts},
            "calibration": {"batch_size": rows},
            "sampling": {"batch_size": rows, "micro_batch": rows},
        },
    }


def _rows(config: dict[str, Any]) -> int:
    """Rows of a call. Attention over the whole of what the denoiser sees costs most memory, as
    those for texts have it; the others have it further down, or over patches."""
    size = config.get("sample_size") or 64
    side = max(size) if isinstance(size, list) else size
    if config.get("_class_name") == "UNet2DConditionModel":
        return 4 if side < 64 else 1
    return ROWS if side <= 64 else 4
