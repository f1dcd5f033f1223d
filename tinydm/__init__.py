"""tinyDM as a package: `tinydm.models`, `tinydm.quant` and `tinydm.scripts`.

These are the folders of the repository beside this one. `pip install -e .` makes them importable
from anywhere; a command that is run in a checkout finds that checkout's own, installed or not.
"""

from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "quant").is_dir():  # in a checkout; a plain installation has them in this package
    __path__.append(str(_ROOT))
