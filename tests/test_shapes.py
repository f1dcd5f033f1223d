"""JSON of another shape than its readers rely on is one line that names the file and the key.

python -m pytest tests/test_shapes.py
"""

import json
from pathlib import Path

import pytest

from scripts.common.reports import CALIBRATION, LAYER
from scripts.common.runs import RunError
from scripts.common.shapes import (
    ANYTHING,
    COUNT,
    NOTHING,
    NUMBER,
    POSITIVE,
    TEXT,
    Cell,
    Keys,
    List,
    Map,
    Number,
    Shape,
    ShapeError,
    Text,
    fits,
    read_json,
)

DEEP: list = []
for _ in range(20):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("shape", "value", "said"),
    [
        (NUMBER, True, "is true, not a number"),
        (NUMBER, "1", 'is "1", not a number'),
        (NUMBER, 10**400, "not within"),
        (NUMBER, None, "is null, not a number"),
        (POSITIVE, -0.5, "is -0.5, not within 0..1e+30"),
        (COUNT, 1.0, "is 1.0, not a whole number"),
        (TEXT, 1, "is 1, not text"),
        (Text(choices=("a", "b")), "c", 'is "c", not one of a, b'),
        (List(COUNT), {}, "not a list"),
        (List(COUNT), [1, "x"], 'a[1] is "x"'),
        (List(COUNT, length=2), [1], "has 1 values, not 2"),
        (Map(NUMBER), {"b": []}, "a.b is a list, not a number"),
        (Map(NUMBER), [], "not an object"),
        (Keys({"b": TEXT}), {}, "a.b is missing"),
        (Keys({}, {"b": TEXT}), {"b": 1}, "a.b is 1"),
        (Keys({}, {"b": TEXT}, rest=NOTHING), {"c": 1}, "a.c is unknown"),
        (Keys(rest=COUNT), {"c": -1}, "a.c is -1"),
        (Cell(), [], "not a number"),
        (ANYTHING, DEEP, "nested too deeply"),
    ],
)
def test_what_does_not_fit_is_told_with_its_place(shape: Shape, value: object, said: str) -> None:
    with pytest.raises(ShapeError) as raised:
        shape.check(value, "a")
    assert str(raised.value).startswith("a") and said in str(raised.value)
    assert not fits(value, shape)


@pytest.mark.parametrize(
    ("shape", "value"),
    [
        (NUMBER, 1),
        (Number(none=True), None),
        (Text(none=True), None),
        (List(COUNT, none=True), None),
        (List(COUNT), []),
        (Keys({"b": TEXT}, none=True), None),
        (Keys({"b": TEXT}), {"b": "x", "c": {"d": [1, None]}}),
        (Cell(), "x"),
        (Cell(), 1.5),
    ],
)
def test_what_fits_is_taken(shape: Shape, value: object) -> None:
    shape.check(value, "a")
    assert fits(value, shape)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "no JSON"),
        (b"", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"name": "\\ud800"}', "no JSON"),
        (b'{"seconds": NaN}', "NaN is not a number"),
        (b'{"seconds": 1' + b"0" * 5000 + b"}", "no JSON"),
        (b"[]", "the whole is a list, not an object"),
        (b"{}", "name is missing"),
    ],
)
def test_a_damaged_report_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "report.json"
    assert read_json(path, CALIBRATION) is None
    path.write_bytes(content)
    with pytest.raises(RunError) as raised:
        read_json(path, CALIBRATION)
    line = str(raised.value)
    assert line.startswith(f"{path}: damaged (") and said in line and "\n" not in line
    assert len(line) < 400


def test_a_layer_of_a_report_fits(tmp_path: Path) -> None:
    layer = {"name": "a", "kind": "Conv2d", "weights": 9, "macs": 9, "note": ""}
    layer |= {"weight_bits": None, "activation_bits": [8, 8]}
    LAYER.check(json.loads(json.dumps(layer)), "layers[0]")
