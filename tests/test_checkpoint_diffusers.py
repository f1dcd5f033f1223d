"""Folders of diffusers: the inverse of the mapping, written from the structure of both."""

import hashlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from tests.helpers.checkpoints import (
    PARAMS,
    narrow_model,
    refused,
    small_state,
    write,
)
from tinydm.models.checkpoint import load_into, load_state_dict, sha256_of
from tinydm.models.checkpoint_files import CheckpointError
from tinydm.models.ddim_unet import DDIMUNet
from tinydm.models.diffusers_folder import diffusers_params, scheduler_says
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.experiment.assembly import assemble
from tinydm.scripts.experiment.config import load_config
from tinydm.scripts.experiment.downloads import HUB_FILES
from tinydm.scripts.experiment.folder_config import config_of_folder

pytestmark = pytest.mark.usefixtures("one_thread")

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


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "holds a model of ['BertModel']"),
        ({}, "holds a model of no class"),
        ([1, 2], "holds a JSON that is no object"),
        ({"_class_name": "SD3Transformer2DModel"}, "holds a SD3Transformer2DModel"),
    ],
)
def test_other_folders_are_called_what_they_are(tmp_path: Path, config: object, words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = refused(tmp_path)
    assert words in line and "where they are supported" in line


def test_a_foreign_file_is_told_before_a_configuration_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    write(tmp_path / "model.pt", small_state())
    with pytest.raises(CheckpointError, match="a GGUF file"):
        config_of_folder([f"model.checkpoint={tmp_path / 'model.gguf'}"])
    with pytest.raises(ConfigError, match="a file needs --config FILE"):
        config_of_folder([f"model.checkpoint={tmp_path / 'model.pt'}"])


# ---- what is recognised ----


def test_half_precision_alone_and_square_sizes_are_read(tmp_path: Path) -> None:
    model = narrow_model()
    folder = write_folder(tmp_path / "a", as_diffusers(model, False), sample_size=[8, 8])
    plain = folder / "diffusion_pytorch_model.safetensors"
    plain.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert diffusers_params(folder)["image_size"] == 8
    other = narrow_model(seed=1)
    load_into(other, load_state_dict(folder), folder)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    oblong = write_folder(tmp_path / "b", as_diffusers(model, False), sample_size=[8, 16])
    line = refused(oblong)
    assert "sample_size is [8, 16]" in line and "damaged" not in line


def test_shards_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", as_diffusers(narrow_model(), False))
    for number in (1, 2):
        shard = folder / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        shard.write_bytes((folder / "diffusion_pytorch_model.safetensors").read_bytes())
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    line = refused(folder)
    assert "weights in 2 shards" in line and "max_shard_size" in line


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_other_predictions_are_refused(tmp_path: Path, kind: str) -> None:
    tensors = as_diffusers(narrow_model(), False)
    write_folder(tmp_path / "a" / "unet", tensors)
    (tmp_path / "a" / "scheduler").mkdir()
    scheduler = tmp_path / "a" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"prediction_type": kind}))
    with pytest.raises(CheckpointError, match=f"prediction_type is {kind}"):
        load_state_dict(tmp_path / "a")
    scheduler.write_text(json.dumps({"prediction_type": "epsilon"}))
    load_state_dict(tmp_path / "a")


def test_pipelines_of_other_kinds_are_told_what_is_supported(tmp_path: Path) -> None:
    """Stable Diffusion has a unet of another class, DiT a transformer in its place."""
    for name, pipeline, part, kind in (
        ("sd", "StableDiffusionPipeline", "unet", "UNet2DConditionModel"),
        ("dit", "DiTPipeline", "transformer", "DiTTransformer2DModel"),
    ):
        (tmp_path / name / part).mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
        (tmp_path / name / part / "config.json").write_text(json.dumps({"_class_name": kind}))
        for weights in (False, True):
            if weights:
                save_file(
                    small_state(), tmp_path / name / part / "diffusion_pytorch_model.safetensors"
                )
            with pytest.raises(CheckpointError) as error:
                load_state_dict(tmp_path / name)
            line = str(error.value)
            assert (kind if name == "sd" else pipeline) in line
            assert "UNet2DModel of the DDPM kind" in line and "configs/sd_v1.yaml" in line
    (tmp_path / "file").mkdir()
    save_file(small_state(), tmp_path / "file" / "model.safetensors")
    assert "name the checkpoint file in it" in refused(tmp_path / "file")


def test_a_model_of_the_hub_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library of the hub is replaced by a folder that is there."""
    model = narrow_model()
    folder = write_folder(tmp_path / "snapshot", as_diffusers(model, False))
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"name": "c", "model": {"arch": "ddim_unet", "params": PARAMS}})
    )
    config = load_config(tmp_path / "c.yaml", ["model.checkpoint=google/ddpm-cifar10-32"])
    denoiser = assemble(config).denoiser
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), denoiser.parameters(), strict=True)
    )
    assert asked == [("google/ddpm-cifar10-32", HUB_FILES)]
    assert not any(pattern.endswith((".py", "/*")) for pattern in HUB_FILES)


@pytest.mark.parametrize(
    ("said", "differs"),
    [
        ({}, ""),
        ({"prediction_type": "epsilon", "beta_schedule": "linear", "clip_sample": True}, ""),
        ({"prediction_type": "v_prediction"}, "prediction_type v_prediction"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule squaredcos_cap_v2"),
        ({"beta_end": 0.012}, "beta_end 0.012"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
        (
            {"timestep_spacing": "trailing", "steps_offset": 1},
            "timestep_spacing trailing, steps_offset 1",
        ),
    ],
)
def test_a_scheduler_that_samples_otherwise_is_told_of(
    tmp_path: Path, said: dict, differs: str
) -> None:
    ours = {"betas": "linear", "beta_start": 1e-4, "beta_end": 0.02, "train_timesteps": 1000}
    assert scheduler_says(tmp_path, ours) == ""
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(said))
    assert scheduler_says(tmp_path, ours) == differs
    cosine = ours | {"betas": "cosine"}
    assert ("squaredcos" in scheduler_says(tmp_path, cosine)) is False


def test_a_square_may_be_written_as_a_list(tmp_path: Path) -> None:
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").touch()
    for size, good in (([8, 8], True), ([8, 16], False)):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"sample_size": size}))
        if good:
            assert diffusers_params(tmp_path)["image_size"] == 8
        else:
            with pytest.raises(CheckpointError, match=r"\[8, 16\], DDIMUNet is square"):
                diffusers_params(tmp_path)
