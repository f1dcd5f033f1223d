"""Checkpoint loading: every container, folders of diffusers, and files that are wrong or hostile.

python -m pytest tests/test_checkpoint.py
"""

import collections
import hashlib
import json
import os
import pickle
import sys
import types
import warnings
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn

from models import checkpoint
from models.checkpoint import (
    CheckpointError,
    diffusers_params,
    load_into,
    load_state_dict,
    select,
    sha256_of,
)
from models.ddim_unet import DDIMUNet

PARAMS = {
    "ch": 16,
    "ch_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [4],
    "in_channels": 3,
    "out_ch": 3,
    "image_size": 8,
    "norm_groups": 4,
}


def narrow_model(seed: int = 0) -> DDIMUNet:
    torch.manual_seed(seed)
    model = DDIMUNet(**PARAMS).eval()
    for tensor in model.parameters():  # norms too: no parameter keeps its initial value
        nn.init.normal_(tensor, std=0.2)
    return model


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return narrow_model().state_dict()


def small_state(offset: float = 0.0) -> dict[str, torch.Tensor]:
    values = torch.arange(12.0).reshape(3, 4) + offset
    return {"a.weight": values, "a.bias": values[0].clone()}


def write(path: Path, content: object, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def refused(path: Path, **options: object) -> str:
    """The message with which a file is refused: one printable line that names the file."""
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(path, **options)
    message = str(caught.value)
    assert message.isprintable() and path.name in message and "; " in message
    assert "weights_only" not in message  # torch's advice to load without protection
    return message


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


# ---- containers ----


@pytest.mark.parametrize("legacy", [False, True])
def test_plain_files_of_both_formats(tmp_path: Path, state: dict, legacy: bool) -> None:
    path = write(tmp_path / "model-790000.ckpt", collections.OrderedDict(state), legacy)
    for weights in ("ema", "raw"):
        assert_equal(load_state_dict(path, weights=weights), state)
    assert_equal(load_state_dict(str(path)), state)


def test_safetensors_is_recognised_by_content(tmp_path: Path) -> None:
    for name in ("w.safetensors", "w.ckpt"):
        save_file(small_state(), tmp_path / name)
        loaded = load_state_dict(tmp_path / name)
        assert {n: t.tolist() for n, t in loaded.items()} == {
            n: t.tolist() for n, t in small_state().items()
        }
    assert_equal(load_state_dict(write(tmp_path / "z.safetensors", small_state())), small_state())


@pytest.mark.parametrize("legacy", [False, True])
def test_ddim_list_gives_the_averaged_or_the_raw_copy(tmp_path: Path, legacy: bool) -> None:
    raw = {"module." + n: t for n, t in small_state().items()}
    content = [raw, {"state": {}, "param_groups": []}, 3, 400, small_state(100)]
    path = write(tmp_path / "ckpt.pth", content, legacy)
    assert_equal(load_state_dict(path), small_state(100))
    assert_equal(load_state_dict(path, weights="raw"), small_state())
    path = write(tmp_path / "no_ema.pth", content[:4], legacy)
    assert_equal(load_state_dict(path), small_state())


def latent_diffusion_state() -> dict[str, torch.Tensor]:
    """A network with averaged copies, a first stage and buffers at the root."""
    trained = {
        "model.diffusion_model.blocks.1.0.weight": torch.zeros(2, 2),
        "model.diffusion_model.blocks.12.bias": torch.zeros(3),
        "first_stage_model.encoder.weight": torch.ones(4),
        "betas": torch.linspace(0.1, 0.2, 5),
        "scale_factor": torch.tensor(0.5),
    }
    copies = {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
        "model_ema.diffusion_modelblocks10weight": torch.full((2, 2), 5.0),
        "model_ema.diffusion_modelblocks12bias": torch.full((3,), 6.0),
    }
    return trained | copies


def test_latent_diffusion_copies_are_mapped_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "model.ckpt", {"state_dict": latent_diffusion_state(), "epoch": 1})
    averaged = load_state_dict(path, prefix="model.diffusion_model")
    assert {n: t.flatten()[0].item() for n, t in averaged.items()} == {
        "blocks.1.0.weight": 5.0,
        "blocks.12.bias": 6.0,
    }
    raw = load_state_dict(path, weights="raw", prefix="model.diffusion_model.")
    assert all(not t.any() for t in raw.values()) and list(raw) == list(averaged)
    whole = load_state_dict(path)
    assert whole["scale_factor"] == 0.5 and not [n for n in whole if n.startswith("model_ema")]
    assert list(select(whole, "first_stage_model", path)) == ["encoder.weight"]
    assert "first_stage_model" in refused(path, prefix="cond_stage_model")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_ema.diffusion_modelblocks12bias": None}, "blocks.12.bias has no averaged copy"),
        ({"model_ema.diffusion_modelblocks12bias": torch.ones(4)}, "4 averaged, 3 trained"),
        ({"model_ema.elsewhere": torch.ones(1)}, "model_ema.elsewhere"),
        ({"model.diffusion_model.blocks.1.2.bias": torch.ones(3)}, "share one"),
    ],
)
def test_doubtful_averaged_copies_are_refused(tmp_path: Path, change: dict, word: str) -> None:
    merged = latent_diffusion_state() | change
    merged = {n: t for n, t in merged.items() if t is not None}
    path = write(tmp_path / "model.ckpt", {"state_dict": merged})
    assert word in refused(path)
    assert len(load_state_dict(path, weights="raw")) == sum("model_ema" not in n for n in merged)


def test_lightning_files_need_no_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "pytorch_lightning.callbacks.model_checkpoint"
    stand_in = type("ModelCheckpoint", (), {"__module__": name})
    parts = name.split(".")
    for end in range(1, len(parts) + 1):  # as if it were installed, for writing only
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
    monkeypatch.setattr(sys.modules[name], "ModelCheckpoint", stand_in, raising=False)
    content = {"callbacks": {stand_in: {"monitor": "loss"}}, "state_dict": small_state()}
    path = write(tmp_path / "model.ckpt", content)
    monkeypatch.undo()
    assert name not in sys.modules
    before = set(torch.serialization.get_safe_globals())
    assert_equal(load_state_dict(path), small_state())
    assert set(torch.serialization.get_safe_globals()) == before  # nothing stays admitted


def test_losses_of_first_stages_are_left_out(tmp_path: Path) -> None:
    content = {"state_dict": small_state() | {"loss.discriminator.weight": torch.ones(2)}}
    assert_equal(load_state_dict(write(tmp_path / "model.ckpt", content)), small_state())


def test_views_and_parameters_become_tensors_of_their_own(tmp_path: Path) -> None:
    flat = torch.arange(20.0, requires_grad=True)
    content = {"a": flat[:12].view(3, 4), "b": flat[12:16], "c": nn.Parameter(torch.ones(2))}
    content["d"] = torch.arange(6.0).view(2, 3).t()
    content["e"] = content["c"]
    loaded = load_state_dict(write(tmp_path / "256.pt", content))
    assert len({t.untyped_storage().data_ptr() for t in loaded.values()}) == len(content)
    for name, tensor in loaded.items():
        assert type(tensor) is torch.Tensor and not tensor.requires_grad
        assert tensor.is_contiguous() and torch.equal(tensor, content[name])
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()


def test_sha256_is_that_of_the_weight_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ckpt", small_state())
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(CheckpointError, match="no such file"):
        sha256_of(tmp_path / "b.ckpt")


# ---- into a module ----


def test_floats_are_cast_and_a_meta_module_is_filled(state: dict) -> None:
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    expected = narrow_model()(x, t)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        with torch.device("meta"):
            model = DDIMUNet(**PARAMS).eval()
        stored = {n: v.to(dtype) for n, v in state.items()}
        load_into(model, stored, "x.ckpt")
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        tolerance = {torch.float16: 0.02, torch.bfloat16: 0.1}.get(dtype, 0)
        assert (model(x, t) - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conv_in.bias": None}, ["1 missing, first conv_in.bias (16)"]),
        ({"extra": torch.ones(2, 3)}, ["1 unexpected, first extra (2x3)"]),
        ({"conv_in.weight": torch.ones(8, 3, 3, 3)}, ["file 8x3x3x3, model 16x3x3x3"]),
        ({"conv_in.bias": None, "conv_in.b": torch.ones(16)}, ["1 missing", "1 unexpected"]),
        ({"conv_in.bias": torch.full((16,), float("nan"))}, ["conv_in.bias", "16 of 16"]),
        ({"conv_in.bias": torch.full((16,), 1e300, dtype=torch.float64)}, ["infinite"]),
        ({"conv_in.bias": torch.ones(16, dtype=torch.int64)}, ["int64", "float32"]),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(
    state: dict, change: dict, words: list[str]
) -> None:
    wrong = {n: v for n, v in (state | change).items() if v is not None}
    model = narrow_model(seed=1)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_into(model, wrong, "runs/my.ckpt")
    message = str(caught.value)
    assert message.startswith("runs/my.ckpt: ") and message.isprintable()
    assert all(word in message for word in words)
    assert_equal(dict(model.state_dict()), before)


# ---- folders of diffusers: the inverse of the mapping, written from the structure of both ----

CONFIG = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [16, 32, 32],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 8,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}


def as_diffusers(model: DDIMUNet, old_names: bool) -> dict[str, torch.Tensor]:
    """The weights of `model` as a UNet2DModel stores them."""
    found: dict[str, torch.Tensor] = {}

    def put(name: str, layer: nn.Module) -> None:
        for part, value in layer.named_parameters():
            found[f"{name}.{part}"] = value.detach().clone()

    def put_block(name: str, block: nn.Module) -> None:
        for part in ("norm1", "conv1", "norm2", "conv2"):
            put(f"{name}.{part}", getattr(block, part))
        put(f"{name}.time_emb_proj", block.temb_proj)
        if hasattr(block, "nin_shortcut"):
            put(f"{name}.conv_shortcut", block.nin_shortcut)

    def put_attention(name: str, attention: nn.Module) -> None:
        names = ["to_q", "to_k", "to_v", "to_out.0"]
        if old_names:
            names = ["query", "key", "value", "proj_attn"]
        put(f"{name}.group_norm", attention.norm)
        layers = (attention.q, attention.k, attention.v, attention.proj_out)
        for part, layer in zip(names, layers, strict=True):
            found[f"{name}.{part}.weight"] = layer.weight.detach()[:, :, 0, 0].clone()
            found[f"{name}.{part}.bias"] = layer.bias.detach().clone()

    def put_stage(name: str, stage: nn.Module) -> None:
        for i, block in enumerate(stage.block):
            put_block(f"{name}.resnets.{i}", block)
        for i, attention in enumerate(stage.attn):
            put_attention(f"{name}.attentions.{i}", attention)

    put("conv_in", model.conv_in)
    put("time_embedding.linear_1", model.temb.dense[0])
    put("time_embedding.linear_2", model.temb.dense[1])
    for level, stage in enumerate(model.down):
        put_stage(f"down_blocks.{level}", stage)
        if hasattr(stage, "downsample"):
            put(f"down_blocks.{level}.downsamplers.0.conv", stage.downsample.conv)
    put_block("mid_block.resnets.0", model.mid.block_1)
    put_block("mid_block.resnets.1", model.mid.block_2)
    put_attention("mid_block.attentions.0", model.mid.attn_1)
    for position, stage in enumerate(reversed(model.up)):
        put_stage(f"up_blocks.{position}", stage)
        if hasattr(stage, "upsample"):
            put(f"up_blocks.{position}.upsamplers.0.conv", stage.upsample.conv)
    put("conv_norm_out", model.norm_out)
    put("conv_out", model.conv_out)
    return found


def write_folder(folder: Path, tensors: dict, binary: bool = False, **changes: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    if binary:
        write(folder / "diffusion_pytorch_model.bin", tensors)
    else:
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("inside", ["", "unet"])
def test_diffusers_folder_computes_the_same(
    tmp_path: Path, old_names: bool, binary: bool, inside: str
) -> None:
    model = narrow_model()
    write_folder(tmp_path / "hub" / inside, as_diffusers(model, old_names), binary)
    folder = tmp_path / "hub"
    params = diffusers_params(folder)
    assert params == PARAMS
    other = DDIMUNet(**params).eval()
    load_into(other, load_state_dict(folder), folder)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 999])
    assert torch.equal(other(x, t), model(x, t))
    weights = next((folder / inside).glob("diffusion_pytorch_model.*"))
    assert sha256_of(folder) == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_diffusers_attention_per_level_is_found(tmp_path: Path) -> None:
    kinds = ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"]
    up = ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
    changes = {"down_block_types": kinds, "up_block_types": up, "attention_head_dim": 32}
    folder = write_folder(tmp_path / "hub", small_state(), **changes)
    assert diffusers_params(folder)["attn_resolutions"] == [4, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "UNet2DConditionModel"},
        {"downsample_padding": 1},
        {"flip_sin_to_cos": True},
        {"freq_shift": 0},
        {"norm_eps": 1e-5},
        {"act_fn": "gelu"},
        {"attention_head_dim": 8},
        {"resnet_time_scale_shift": "scale_shift"},
        {"add_attention": False},
        {"class_embed_type": "timestep"},
        {"block_out_channels": [16, 24, 32]},
        {"block_out_channels": [0, 0, 0]},
        {"block_out_channels": "many"},
        {"sample_size": None},
        {"down_block_types": ["DownBlock2D", "SkipDownBlock2D", "DownBlock2D"]},
        {"up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"]},
        {"down_block_types": 3},
    ],
)
def test_other_networks_of_diffusers_are_refused(tmp_path: Path, changes: dict) -> None:
    folder = write_folder(tmp_path / "hub", small_state(), **changes)
    assert "config.json" in str(pytest.raises(CheckpointError, load_state_dict, folder).value)


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    assert "config.json" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert "diffusion_pytorch_model" in refused(tmp_path)
    write(tmp_path / "diffusion_pytorch_model.bin", small_state())
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(CheckpointError, match="damaged"):
        load_state_dict(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="describes a list"):
        load_state_dict(tmp_path)


# ---- files that are not checkpoints ----


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><title>404</title></html>", "HTML"),
        (b"\xef\xbb\xbf\n  <html>" + b"x" * 5000, "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (b"\x1f\x8b\x08" + bytes(100), "gzip"),
        (bytes(257) + b"ustar" + bytes(600), "tar"),
        (b"\x00" * 4096, "not a whole file"),
        (b"{}", "not a whole file"),
        (b"\x80", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"PK\x03\x04", "damaged"),
        (b"PK\x03\x04" + b"\x55" * 3000, "damaged"),
        ((2**62).to_bytes(8, "little") + b"{" + b"0" * 99, "not a whole file"),
        ((20).to_bytes(8, "little") + b"{" + b" " * 99, "damaged"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    assert word in refused(path)


def test_missing_and_special_files_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "model.ckpt")
    os.mkfifo(tmp_path / "pipe.ckpt")
    assert "regular" in refused(tmp_path / "pipe.ckpt")


def test_archives_are_refused(tmp_path: Path) -> None:
    inner = write(tmp_path / "model.ckpt", small_state())
    with zipfile.ZipFile(tmp_path / "lsun.zip", "w") as archive:
        archive.write(inner, "model.ckpt")
    assert "unpack" in refused(tmp_path / "lsun.zip") and "model.ckpt" in refused(
        tmp_path / "lsun.zip"
    )
    bomb = write(tmp_path / "big.ckpt", {"w": torch.zeros(1 << 20)})
    with zipfile.ZipFile(bomb) as archive:
        members = {m: archive.read(m) for m in archive.namelist()}
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert "compressed" in refused(bomb)


SHARED = torch.ones(1000)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (torch.ones(3), "Tensor"),
        (7, "int"),
        ([], "list of 0"),
        ([small_state()], "list of 1"),
        ([small_state(), {}, 0, 1, small_state(), 2], "list of 6"),
        ([small_state(), {}, 0, 1, {}], "no tensor"),
        ([small_state(), {}, 0, 1, {"a.weight": torch.ones(3, 4)}], "a.bias"),
        ([7, {}, 0, 1, small_state()], "int"),
        ({}, "no tensor"),
        ({"state_dict": {}}, "no tensor"),
        ({"state_dict": [1, 2]}, "state_dict is of type list"),
        ({"model": {"deep": [{"er": torch.ones(1)}]}}, "entry model is of type dict"),
        ({"a": torch.ones(1), "b": None}, "entry b"),
        ({3: torch.ones(1)}, "key 3"),
        ({"a": torch.ones(2, 2).to_sparse()}, "not a plain dense"),
        ({"a": torch.ones(2, device="meta")}, "not a plain dense"),
        ({"a": torch.ones(1).expand(1 << 20, 1 << 20)}, "claims"),
        ({str(n): SHARED for n in range(2000)}, "overlap"),
        ({"evil\n\x1b[31mname": 3}, "evil"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_other_contents_are_refused(
    tmp_path: Path, content: object, word: str, legacy: bool
) -> None:
    assert word in refused(write(tmp_path / "model.ckpt", content, legacy))


class Payload:
    """Unpickling this would make a file."""

    def __init__(self, marker: Path):
        self.command = f"touch {marker}"

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 2, 4, None])
def test_code_is_named_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int | None
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not open a way around
    marker, path = tmp_path / "ran", tmp_path / "model.ckpt"
    payload = Payload(marker)
    shapes = (payload, {"a": payload}, {"state_dict": {"a": payload}}, [{}, payload, 0, 1, {}])
    for content in shapes:
        if protocol is None:
            write(path, content)
        elif protocol == 2:
            write(path, content, legacy=True)
        else:
            path.write_bytes(pickle.dumps(content, protocol=protocol))
        message = refused(path)
        assert protocol == 0 or f"{os.system.__module__}.system" in message
    assert not marker.exists()


def test_a_pickled_module_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "model.pt", narrow_model())
    assert "models.ddim_unet.DDIMUNet" in refused(path)


def test_programs_and_other_protocols_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(small_state(), path, pickle_protocol=4)
    assert "protocol" in refused(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(nn.Linear(2, 2)).save(str(path))
    assert "TorchScript" in refused(path)


@pytest.mark.parametrize("error", [MemoryError, RecursionError, UnicodeDecodeError, KeyError])
def test_every_exception_becomes_ours_but_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    path = write(tmp_path / "model.ckpt", small_state())

    def fail(*_: object, **__: object) -> None:
        raise error("utf-8", b"", 0, 1, "x") if error is UnicodeDecodeError else error()

    monkeypatch.setattr(checkpoint.torch, "load", fail)
    assert error.__name__ in refused(path)
    error = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        load_state_dict(path)


# ---- damage ----


def encoded(kind: str) -> bytes:
    """A small checkpoint in one of the three formats."""
    if kind == "safetensors":
        return save(small_state())
    buffer = BytesIO()
    torch.save(small_state(), buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


KINDS = ("zip", "legacy", "safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_cut_files_are_refused(tmp_path: Path, kind: str) -> None:
    whole = encoded(kind)
    path = tmp_path / "model.ckpt"
    for length in {*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 1}:
        path.write_bytes(whole[:length])
        refused(path)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=HealthCheck)
@given(data=st.data())
def test_damaged_bytes_never_escape(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """Overwritten, removed or inserted bytes: a CheckpointError or sound tensors.

    The zip format has checksums, so there what loads is what was saved.
    """
    content = bytearray(encoded(kind))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content) - 1))
        length = data.draw(st.sampled_from([0, 1, 1, 1, 8]))
        content[start : start + length] = data.draw(st.binary(max_size=8))
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    module = nn.ModuleDict({"a": nn.Linear(4, 3)})
    try:
        loaded = load_state_dict(path)
        assert all(isinstance(t, torch.Tensor) for t in loaded.values())
        load_into(module, loaded, path)
    except CheckpointError as error:
        assert str(error).isprintable()
        return
    assert all(torch.isfinite(p).all() for p in module.parameters())


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=HealthCheck)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_zip_is_noticed_or_harmless(
    tmp_path: Path, position: float, bit: int
) -> None:
    content = bytearray(encoded("zip"))
    content[int(position * len(content))] ^= 1 << bit
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    try:
        loaded = load_state_dict(path)
    except CheckpointError:
        return
    assert_equal(loaded, small_state())


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=HealthCheck)
@given(content=st.binary(max_size=300), magic=st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04"]))
def test_random_bytes_are_refused(tmp_path: Path, content: bytes, magic: bytes) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(magic + content)
    refused(path)
