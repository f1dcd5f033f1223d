"""Quantized files that are damaged, hostile or something else: one line, and nothing runs.

python -m pytest tests/test_quant_packed_damaged.py
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import nn

from tests.helpers.networks import narrow_unet
from tests.helpers.packed import Attention, meta
from tinydm.quant.runtime.denoiser import QuantDenoiser
from tinydm.quant.runtime.packed_file import PackedFileError, digest_of, load_quantized

FILE = HealthCheck.function_scoped_fixture


def refused(path: Path, kind: Callable[[], nn.Module] = Attention) -> str:
    with pytest.raises(PackedFileError) as caught:
        load_quantized(path, meta(kind))
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def rewrite(
    path: Path,
    content: bytes,
    change: Callable[[dict[str, torch.Tensor], dict[str, str]], object],
) -> None:
    """A file with changed tensors and metadata and a digest that fits them."""
    path.write_bytes(content)
    with safe_open(path, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        metadata = dict(handle.metadata())
    change(tensors, metadata)
    metadata["digest"] = digest_of(tensors, metadata)
    path.write_bytes(save(tensors, metadata))


def row_edit(name: str, /, **values: object) -> Callable:
    """Changes keys of one row of the layer table."""

    def change(tensors: dict, metadata: dict) -> None:
        table = json.loads(metadata["layers"])
        next(row for row in table if row["name"] == name).update(values)
        metadata["layers"] = json.dumps(table)

    return change


def tensor_edit(name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    def change(tensors: dict, metadata: dict) -> None:
        tensors[name] = edit(tensors[name]).contiguous()

    return change


def metadata_edit(**values: str) -> Callable:
    return lambda tensors, metadata: metadata.update(values)


def first_set(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def edit(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x.view(-1)[0] = value
        return x

    return edit


def wider(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x])


def deeper(x: torch.Tensor) -> torch.Tensor:
    return x[..., None]


def narrower(x: torch.Tensor) -> torch.Tensor:
    return x[..., :-1]


TABLES = ("activations.scale", "activations.zero_point", "activations.group")
CHANNELS = ("layers.w_scale", "layers.w_zero_point", "layers.bias")
TAMPERED = {
    **{f"wider {n}": tensor_edit(n, wider) for n in (*TABLES, *CHANNELS)},
    **{f"deeper {n}": tensor_edit(n, deeper) for n in (*TABLES, *CHANNELS)},
    **{f"narrower {n}": tensor_edit(n, narrower) for n in (*TABLES, *CHANNELS)},
    **{f"other type {n}": tensor_edit(n, torch.Tensor.double) for n in (*TABLES, *CHANNELS)},
    **{f"empty {n}": tensor_edit(n, lambda x: x[:0]) for n in (*TABLES, *CHANNELS)},
    **{f"without {n}": lambda t, m, n=n: t.pop(n) for n in (*TABLES, *CHANNELS)},
    "negative activation scale": tensor_edit("activations.scale", first_set(-1.0)),
    "zero activation scale": tensor_edit("activations.scale", first_set(0.0)),
    "infinite activation scale": tensor_edit("activations.scale", first_set(float("inf"))),
    "negative weight scale": tensor_edit("layers.w_scale", first_set(-1.0)),
    "weight scale that is no number": tensor_edit("layers.w_scale", first_set(float("nan"))),
    "bias that is no number": tensor_edit("layers.bias", first_set(float("nan"))),
    "norm that is no number": tensor_edit("float.norm.weight", first_set(float("nan"))),
    "group out of range": tensor_edit("activations.group", first_set(3)),
    "zero points beyond their bits": tensor_edit("activations.zero_point", lambda x: x | 64),
    "weight zero points beyond their bits": tensor_edit("layers.w_zero_point", lambda x: x | 8),
    "codes too short": tensor_edit("join.qweight", narrower),
    "codes too long": tensor_edit("join.qweight", wider),
    "signed codes": tensor_edit("join.qweight", torch.Tensor.char),
    "norm of another shape": tensor_edit("float.norm.weight", wider),
    "no norm": lambda t, m: t.pop("float.norm.weight"),
    "no codes": lambda t, m: t.pop("join.qweight"),
    "absurd shape": row_edit("join", shape=[10**9, 10**9, 10**9, 1]),
    "negative shape": row_edit("join", shape=[-4, 8, 1, 1]),
    "other shape": row_edit("join", shape=[8, 4, 1, 1]),
    "9 bits": row_edit("join", bits=9),
    "1 bit": row_edit("join", bits=1),
    "more bits than there are": row_edit("join", bits=8),
    "bits in text": row_edit("join", bits="3"),
    "activation bits": row_edit("join", inputs=[6, 60]),
    "fewer activation bits": row_edit("join", inputs=[2, 2]),
    "fewer activation bits of a group": row_edit("join", inputs=[[6, 5, 2], [6, 5, 6]]),
    "too many groups with bits": row_edit("join", inputs=[[6, 5, 6, 6], [6, 5, 6]]),
    "too few groups with bits": row_edit("join", inputs=[[6], [6, 5, 6]]),
    "a group without bits": row_edit("join", inputs=[[6, None, 6], [6, 5, 6]]),
    "no activation bits": row_edit("join", inputs=None),
    "one input of two": row_edit("join", inputs=[6]),
    "split at all channels": row_edit("join", split=8),
    "negative split": row_edit("join", split=-1),
    "infinite split": row_edit("join", split=float("inf")),
    "split of an unsplit layer": row_edit("first", split=1),
    "bias of a layer without": row_edit("join", bias=True),
    "no bias of a layer with": row_edit("first", bias=False),
    "convolution of the timestep": row_edit("first", time=True),
    "product that is a layer": row_edit("first", kind="matmul", inputs=[6, 6]),
    "layer that is a product": row_edit("scores", kind="Conv2d"),
    "unknown layer": row_edit("join", name="nowhere.join"),
    "name that is a number": row_edit("join", name=5),
    "name of the whole": row_edit("scores", name=""),
    "name that is null": row_edit("join", name=None),
    "a row twice": lambda t, m: m.update(layers=json.dumps(json.loads(m["layers"]) * 2)),
    "no rows": metadata_edit(layers="[]"),
    "rows that are numbers": metadata_edit(layers="[1, 2]"),
    "layers that are a number": metadata_edit(layers="5"),
    "layers that are not JSON": metadata_edit(layers="[{"),
    "layers nested deeply": metadata_edit(layers="[" * 100_000),
    "timesteps that are not JSON": metadata_edit(timesteps="[0,"),
    "timesteps that are text": metadata_edit(timesteps='["a"]'),
    "infinite timesteps": metadata_edit(timesteps="[Infinity]"),
    "timesteps that are no number": metadata_edit(timesteps="[NaN]"),
    "no timesteps": metadata_edit(timesteps="[]"),
    "another number of timesteps": metadata_edit(timesteps="[0, 3]"),
    "negative timestep": metadata_edit(timesteps="[-1, 3, 12, 40, 90]"),
    "timestep beyond the last": metadata_edit(timesteps="[0, 3, 12, 40, 100]"),
    "timesteps without end": metadata_edit(timesteps=json.dumps(list(range(5000)))),
    "absurd training timesteps": metadata_edit(train_timesteps=str(10**15)),
    "no training timesteps": metadata_edit(train_timesteps="0"),
    "training timesteps of many digits": metadata_edit(train_timesteps="9" * 6000),
    "training timesteps in words": metadata_edit(train_timesteps="many"),
    "another version": metadata_edit(version="99"),
    "another format": metadata_edit(format="gguf"),
    "another architecture": metadata_edit(architecture="0" * 64),
    "no architecture": lambda t, m: m.pop("architecture"),
    "half a correction": lambda t, m: t.update({"correction.k": torch.zeros(5, 2)}),
    "a correction too large": lambda t, m: t.update(
        {
            "correction.k": torch.full((5, 2), 0.5),
            "correction.mu": torch.zeros(5, 2),
            "correction.sigma": torch.zeros(5),
        }
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_values_behind_the_checksum_are_checked(what: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    rewrite(path, content, TAMPERED[what])
    assert "checksum" not in refused(path)


def test_rewriting_without_a_change_loads(
    small: QuantDenoiser, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "q.safetensors"
    rewrite(path, content, lambda tensors, metadata: None)
    x, t = torch.ones(2, 2, 5, 5), torch.tensor([3, 3])
    assert torch.equal(load_quantized(path, meta(Attention))(x, t), small(x, t))


def test_files_that_are_something_else(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    assert "no such file" in refused(path)
    path.mkdir()
    refused(path)
    path.rmdir()
    for data in (b"", b"\0" * 8, b"PK\3\4" + b"x" * 100, b"\xff" * 64, content[:7], content + b"x"):
        path.write_bytes(data)
        refused(path)
    save_file({"weight": torch.ones(3)}, path)
    assert "calibrate.py" in refused(path)
    torch.save({"weight": torch.ones(3)}, path)
    refused(path)


def test_another_architecture_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    path.write_bytes(content)
    assert "another architecture" in refused(path, narrow_unet)


@pytest.mark.parametrize("key", ["layers", "timesteps", "train_timesteps", "config"])
def test_metadata_belong_to_the_checksum(key: str, content: bytes, tmp_path: Path) -> None:
    """A changed split, bin or configuration would sample other images without a word."""
    path = tmp_path / "q.safetensors"
    path.write_bytes(content)
    with safe_open(path, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        metadata = dict(handle.metadata())
    changed = {
        "layers": metadata["layers"].replace('"split":4', '"split":5'),
        "timesteps": metadata["timesteps"].replace("12", "13"),
        "train_timesteps": "101",
        "config": "name: y",
    }[key]
    assert changed != metadata[key]
    path.write_bytes(save(tensors, metadata | {key: changed}))
    assert "checksum" in refused(path)


DAMAGE = settings(max_examples=120, deadline=None, suppress_health_check=[FILE])


@pytest.fixture(scope="module")
def skeleton() -> nn.Module:
    return meta(Attention)


@DAMAGE
@given(data=st.data())
def test_damage_anywhere_is_found(
    data: st.DataObject,
    small: QuantDenoiser,
    content: bytes,
    skeleton: nn.Module,
    tmp_path: Path,
) -> None:
    """Flipped, cut, inserted and repeated bytes: refused, or the model is the same bit for bit."""
    damaged = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little")
    end = data.draw(st.sampled_from([8, header, len(content)]))
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, min(end, len(damaged)) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "repeat", "remove"]))
        if kind == "flip":
            damaged[where] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del damaged[where + 1 :]
        elif kind == "insert":
            damaged[where:where] = data.draw(st.binary(min_size=1, max_size=9))
        elif kind == "repeat":
            damaged[where:where] = damaged[where : where + 20]
        else:
            del damaged[where : where + data.draw(st.integers(1, 20))]
        if not damaged:
            break
    path = tmp_path / "q.safetensors"
    path.write_bytes(bytes(damaged))
    try:
        model = load_quantized(path, copy.deepcopy(skeleton))
    except PackedFileError as error:
        assert "\n" not in str(error)
    else:
        x, t = torch.ones(2, 2, 5, 5), torch.tensor([3, 3])
        assert torch.equal(model(x, t), small(x, t))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@pytest.mark.slow
@DAMAGE
@given(data=st.data())
def test_any_content_with_a_fitting_checksum_is_refused_or_runs(
    data: st.DataObject, content: bytes, skeleton: nn.Module, tmp_path: Path
) -> None:
    """Behind the checksum every value is reached: no other exception, and what loads can run."""

    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        for _ in range(data.draw(st.integers(1, 2))):
            kind = data.draw(st.sampled_from(["row", "json", "value", "shape", "type", "name"]))
            if kind == "row":
                table = json.loads(metadata["layers"])
                row = data.draw(st.sampled_from(table))
                row[data.draw(st.sampled_from(sorted(row)))] = data.draw(VALUES)
                metadata["layers"] = json.dumps(table)
                return
            if kind == "json":
                key = data.draw(st.sampled_from(["layers", "timesteps", "train_timesteps"]))
                metadata[key] = json.dumps(data.draw(VALUES))
                return
            name = data.draw(st.sampled_from(sorted(tensors)))
            x = tensors[name]
            if kind == "value" and x.numel():
                place = data.draw(st.integers(0, x.numel() - 1))
                value = data.draw(st.sampled_from([0, 1, 2, 7, 63, 255]))
                sign = -1 if x.is_floating_point() and data.draw(st.booleans()) else 1
                tensors[name] = x.clone()
                tensors[name].view(-1)[place] = value * sign
            elif kind == "shape":
                edit = data.draw(st.sampled_from([wider, deeper, torch.Tensor.flatten]))
                tensors[name] = edit(x).contiguous()
            elif kind == "type":
                kinds = [torch.float64, torch.float16, torch.int8, torch.uint8, torch.bool]
                tensors[name] = x.to(data.draw(st.sampled_from(kinds)))
            elif kind == "name":
                tensors[data.draw(st.sampled_from(["correction.k", "x", "float.y"]))] = x.clone()

    path = tmp_path / "q.safetensors"
    rewrite(path, content, change)
    try:
        model = load_quantized(path, copy.deepcopy(skeleton))
    except PackedFileError as error:
        assert "\n" not in str(error)
    else:
        out = model(torch.ones(2, 2, 5, 5), torch.tensor([3, 41]))
        assert out.shape == (2, 2, 5, 5)
