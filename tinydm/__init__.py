"""tinyDM as a package: `tinydm.models`, `tinydm.quant` and `tinydm.scripts`.

These are the folders of the repository beside this one. `pip install -e .` makes them importable
from anywhere; a command that is run in a checkout finds that checkout's own, installed or not.

    module = tinydm.load("quantized.safetensors")
    module = tinydm.calibrate(pipeline, "quantized.safetensors", prompts=["a cat"])

are told of in docs/python.md.
"""

import os  # nothing else before scripts.start has taken over the signals

TYPE_CHECKING = False  # as in typing, which takes long to import
if TYPE_CHECKING:
    from typing import Any

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isdir(os.path.join(_ROOT, "quant")):  # in a checkout; else they are in this package
    __path__.append(_ROOT)


def __getattr__(name: str) -> "Any":
    """load and calibrate; with PyTorch, which takes long to import, when they are asked for."""
    if name not in ("load", "calibrate"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)
