"""Sizes and times as people read them."""


def mebibytes(value: float | None, digits: int = 2) -> str:
    """value: in units of 2^20 bytes."""
    return "unknown" if value is None else f"{value:.{digits}f} MiB"


def duration(seconds: float | None) -> str:
    """Seconds up to a minute and a half, then minutes, then hours."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
