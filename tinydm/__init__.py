"""tinyDM as a package: `tinydm.models`, `tinydm.quant` and `tinydm.scripts`.

These are the folders of the repository beside this one. `pip install -e .` makes them importable
from anywhere; a command that is run in a checkout finds that checkout's own, installed or not.

    module = tinydm.load("quantized.safetensors")
    module = tinydm.calibrate(pipeline, "quantized.safetensors", prompts=["a cat"])

are told of in docs/python.md.
"""

from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "quant").is_dir():  # in a checkout; a plain installation has them in this package
    __path__.append(str(_ROOT))


def __getattr__(name: str) -> Any:
    """load and calibrate; with PyTorch, which takes long to import, when they are asked for."""
    if name not in ("load", "calibrate"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)
