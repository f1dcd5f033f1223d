"""What is wrong with a picture is told once: by the error that Pillow raises.

Beside it Pillow warns, logs, and lets libtiff print to stderr.
"""

import ctypes
import logging
import warnings
from contextlib import suppress
from pathlib import Path

from PIL import Image

MAPS = Path("/proc/self/maps")
HANDLERS = [f"TIFFSet{kind}Handler{form}" for kind in ("Error", "Warning") for form in ("", "Ext")]


def quiet_pillow() -> None:
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    for path in _libraries("libtiff"):
        with suppress(OSError, AttributeError):  # another build of it
            library = ctypes.CDLL(path)
            for name in HANDLERS:
                handler = getattr(library, name)
                handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
                handler(None)


def _libraries(name: str) -> set[str]:
    """The files of this name that the process has loaded; none where the system does not say."""
    assert Image.core  # is what loads them
    try:
        lines = MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return set()
    paths = {line.split(maxsplit=5)[-1] for line in lines}
    return {path for path in paths if Path(path).name.startswith(name)}
