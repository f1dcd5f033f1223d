"""tinyDM as a package: `tinydm.models`, `tinydm.quant` and `tinydm.scripts`.

These are the folders of the repository beside this one. `pip install -e .` makes them importable
from anywhere; a command that is run in a checkout finds that checkout's own, installed or not.
"""

import os  # pathlib would take longer to import than all that stands before scripts.start

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isdir(os.path.join(_ROOT, "quant")):  # in a checkout; else they are in this package
    __path__.append(_ROOT)
