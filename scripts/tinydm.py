"""Lets `python scripts/NAME.py` import this checkout as `tinydm` where it is not installed.

Python looks in the folder of the command first, which is this one and not the repository's root.
"""

from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
__path__ = [str(_ROOT / "tinydm"), str(_ROOT)]
