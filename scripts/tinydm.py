"""Lets `python scripts/NAME.py` import this checkout as `tinydm` where it is not installed.

Python looks in the folder of the command first, which is this one and not the repository's root.
"""

import os

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
__path__ = [os.path.join(_ROOT, "tinydm"), _ROOT]
