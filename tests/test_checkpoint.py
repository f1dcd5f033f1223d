"""Checkpoint loading: every container, and what does not fit a module."""

import collections
import hashlib
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.helpers.checkpoints import (
    PARAMS,
    assert_equal,
    narrow_model,
    refused,
    small_state,
    write,
)
from tinydm.models.checkpoint import load_into, load_state_dict, select, sha256_of
from tinydm.models.checkpoint_files import CheckpointError
from tinydm.models.ddim_unet import DDIMUNet

pytestmark = pytest.mark.usefixtures("one_thread")


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
        ({"model_ema.diffusion_modelblocks12bias": torch.ones(4)}, "4 averaged, 3 trained"),
        ({"model_ema.elsewhere": torch.ones(1)}, "model_ema.elsewhere"),
        ({"model.diffusion_model.blocks.1.2.bias": torch.ones(3)}, "share one"),
    ],
)
def test_doubtful_averaged_copies_are_refused(tmp_path: Path, change: dict, word: str) -> None:
    merged = latent_diffusion_state() | change
    path = write(tmp_path / "model.ckpt", {"state_dict": merged})
    line = refused(path)
    assert word in line and line.endswith("--set model.weights=raw")  # the remedy, as an option
    assert len(load_state_dict(path, weights="raw")) == sum("model_ema" not in n for n in merged)


def test_a_frozen_layer_without_a_copy_keeps_its_weights(tmp_path: Path) -> None:
    state = latent_diffusion_state() | {"model.diffusion_model.frozen": torch.full((2,), 3.0)}
    averaged = load_state_dict(write(tmp_path / "model.ckpt", {"state_dict": state}))
    values = {n: t.flatten()[0].item() for n, t in averaged.items() if "diffusion_model" in n}
    assert list(values.values()) == [5.0, 6.0, 3.0]


def test_pruned_files_hold_only_the_counters_of_their_copies(tmp_path: Path) -> None:
    state = latent_diffusion_state()
    pruned = {n: t for n, t in state.items() if not n.startswith("model_ema.diffusion")}
    found = load_state_dict(write(tmp_path / "pruned.ckpt", {"state_dict": pruned}))
    assert not found["model.diffusion_model.blocks.12.bias"].any()
    assert not [n for n in found if n.startswith("model_ema")]


def test_copies_of_a_first_stage_count_from_the_root(tmp_path: Path) -> None:
    state = {"encoder.conv_in.bias": torch.zeros(2), "loss.logvar": torch.zeros(())}
    state |= {"model_ema.encoderconv_inbias": torch.ones(2), "model_ema.decay": torch.ones(())}
    path = write(tmp_path / "vq.ckpt", {"state_dict": state})
    assert load_state_dict(path)["encoder.conv_in.bias"].tolist() == [1, 1]
    assert load_state_dict(path, weights="raw")["encoder.conv_in.bias"].tolist() == [0, 0]


@pytest.mark.parametrize("marker", ["v_pred", "ztsnr"])
def test_markers_of_another_prediction_are_heeded(tmp_path: Path, marker: str) -> None:
    state = latent_diffusion_state() | {marker: torch.tensor([])}
    assert marker in refused(write(tmp_path / "model.ckpt", {"state_dict": state}))


def test_files_without_checksums_are_whole(tmp_path: Path) -> None:
    state, path = {"a": torch.randn(3)}, tmp_path / "model.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_state_dict(path)["a"], state["a"])


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
