"""JSON with one value of another kind, for tests of what reads it."""

import copy
from typing import Any

from hypothesis import strategies as st

GONE = object()
STRANGE = [
    *(GONE, None, True, "x", "1", "", "<b>$\\frac$", "\ud800", "a" * 5000),
    *(-1, 0, 1, 0.5, 5e-324, 1e29, 10**400, float("nan"), float("inf")),
    *([], {}, [[]], [None], ["x"], [1, 2], {"a": 1}, {"a": {"b": []}}, {"seconds": "x"}),
]


def changed(value: Any, data: st.DataObject) -> Any:
    """A copy of plain containers in which a random part is strange, or gone."""
    strange = data.draw(st.sampled_from(STRANGE))
    if data.draw(st.integers(0, 19)) == 0 and strange is not GONE:
        return strange
    value = copy.deepcopy(value)
    inside = value
    while True:
        keys = sorted(inside) if isinstance(inside, dict) else list(range(len(inside)))
        key = data.draw(st.sampled_from(keys))
        deeper = isinstance(inside[key], dict | list) and len(inside[key])
        if not deeper or data.draw(st.integers(0, 2)) == 0:
            break
        inside = inside[key]
    if strange is GONE:
        del inside[key]
    else:
        inside[key] = strange
    return value
