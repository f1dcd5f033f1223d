"""Places of this checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"  # what was downloaded or unfolded once
