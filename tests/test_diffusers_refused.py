"""Folders of diffusers that cannot be used, and settings that do not fit them: one line each."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tests.helpers.pipelines import assembled, make_pipeline, sampled  # noqa: E402
from tinydm.models.checkpoint_files import CheckpointError  # noqa: E402
from tinydm.models.diffusers_loading import DiffusersFolder  # noqa: E402
from tinydm.models.samplers import SamplingError  # noqa: E402
from tinydm.scripts.common.errors import ConfigError  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["schedule.beta_end=0.01"], "ruled by the folder's scheduler_config.json"),
        (["sampler.name=ddim"], "does not fit diffusers"),
        (["sampler.eta=0.5"], "has none"),
        (["sampler.guidance_scale=3"], "no guidance"),
        (["sampling.classes=[1]"], "has no classes"),
        (["sampler.steps=5000"], "takes no 5000 steps"),
        (['model.params={"height": 8}'], "takes no such argument"),
        (['model.conditioning.prompts=["a"]'], "takes no text"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path: Path, overrides: list[str], what: str) -> None:
    folder = make_pipeline("pixels", tmp_path, diffusers.DDPMScheduler())
    with pytest.raises(ConfigError, match=what):
        assembled(folder, *overrides)


def changed(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values", "what"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "NoScheduler"}, "does not have"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "wavy"}, "wavy"),
        ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "supported are"),
        ("unet/config.json", {"block_out_channels": [8, 24]}, "holds no whole UNet2DModel"),
        ("model_index.json", {"_class_name": "ShapEPipeline"}, "supported are"),
        ("model_index.json", {"unet": ["mine", "UNet2DModel"]}, "nothing of it was run"),
    ],
)
def test_folders_that_cannot_be_used(
    tmp_path: Path, file: str, values: dict[str, Any], what: str
) -> None:
    folder = make_pipeline("pixels", tmp_path, diffusers.DDPMScheduler())
    changed(folder / file, **values)
    with pytest.raises(CheckpointError, match=what) as caught:
        assembled(folder)
    assert "\n" not in str(caught.value)


def test_absent_weights_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    folder = make_pipeline("pixels", tmp_path, diffusers.DDPMScheduler())
    capfd.readouterr()
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(CheckpointError, match="holds no whole UNet2DModel"):
        assembled(folder)
    assert capfd.readouterr().err == ""  # of what diffusers looked for on the way


def test_weights_that_are_quantized_already(tmp_path: Path) -> None:
    """diffusers takes their codes for weights, and leaves scales out."""
    folder = make_pipeline("pixels", tmp_path, diffusers.DDPMScheduler())
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    for changes, what in (
        (
            {"conv_in.weight_scale": torch.ones(8)},
            "conv_in.weight_scale has no place in UNet2DModel",
        ),
        ({"conv_in.bias": whole["conv_in.bias"].to(torch.int32)}, "conv_in.bias is of type I32"),
    ):
        save_file(whole | changes, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=what):
            assembled(folder)


def without(file: Path, start: str) -> None:
    kept = {n: v for n, v in load_file(file).items() if not n.startswith(start)}
    save_file(kept, file, {"format": "pt"})


def test_parts_beside_the_denoiser_are_whole(tmp_path: Path) -> None:
    """The libraries make up what is missing: random weights, a vocabulary without words."""
    prompts = 'model.conditioning.prompts=["a b"]'
    whole = make_pipeline("text", tmp_path / "whole", diffusers.DDIMScheduler())

    def copied(name: str) -> Path:
        return Path(shutil.copytree(whole, tmp_path / name))

    folder = copied("tower")
    without(folder / "text_encoder/model.safetensors", "embeddings.token_embedding")
    with pytest.raises(CheckpointError, match="text_encoder holds no tensor"):
        assembled(folder, prompts)
    folder = copied("decoder")
    without(folder / "vae/diffusion_pytorch_model.safetensors", "decoder.conv_out")
    with pytest.raises(CheckpointError, match=r"vae: holds no tensor decoder\.conv_out"):
        assembled(folder, prompts)
    folder = copied("words")
    (folder / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer: holds no vocabulary"):
        assembled(folder, prompts)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(CheckpointError, match="holds no folder tokenizer"):
        assembled(folder, prompts)


def test_shards_of_a_variant(tmp_path: Path) -> None:
    """Whose names have the variant before the number of the shard."""
    sizes = {"variant": "fp16", "max_shard_size": "8KB"}
    make_pipeline("text", tmp_path, diffusers.DDIMScheduler(), **sizes)
    assert any((tmp_path / "unet").glob("*.fp16-0*")), "no shards"
    assert any((tmp_path / "text_encoder").glob("*.fp16*")), "no variant"
    images = sampled(assembled(tmp_path, 'model.conditioning.prompts=["a b"]'), 1)
    assert images.shape == (1, 3, 8, 8)


def test_arguments_that_a_pipeline_cannot_use(tmp_path: Path) -> None:
    folder = make_pipeline("text", tmp_path, diffusers.DDIMScheduler())
    prompts = 'model.conditioning.prompts=["a b"]'
    for name, own in (("guidance_scale", "guidance_scale"), ("num_inference_steps", "steps")):
        with pytest.raises(ConfigError, match=rf"model\.params\.{name}: give sampler\.{own}"):
            assembled(folder, prompts, f'model.params={{"{name}": 9}}')
    with pytest.raises(SamplingError, match="refuses: tuple index out of range"):
        sampled(assembled(folder, prompts, 'model.params={"clip_skip": 5}'), 1)


def test_a_prediction_type_that_nobody_knows(tmp_path: Path) -> None:
    folder = make_pipeline("pixels", tmp_path, diffusers.DDPMScheduler())
    changed(folder / "scheduler/scheduler_config.json", prediction_type="guess")
    with pytest.raises(SamplingError, match="prediction_type"):
        sampled(assembled(folder))


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"steps_offset": 2000}, "DDIMScheduler cannot step"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, "needs a variance"),
    ],
)
def test_a_step_that_fails_is_one_line(tmp_path: Path, values: dict[str, Any], what: str) -> None:
    folder = make_pipeline("pixels", tmp_path, diffusers.DDIMScheduler())
    changed(folder / "scheduler/scheduler_config.json", **values)
    with pytest.raises(SamplingError, match=what):
        sampled(assembled(folder), 1)


def test_a_folder_without_its_scheduler(tmp_path: Path) -> None:
    folder = make_pipeline("pixels", tmp_path, diffusers.DDPMScheduler())
    (folder / "scheduler/scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match="noise schedule is unknown"):
        DiffusersFolder.open(folder)
    with pytest.raises(CheckpointError, match="local cache"):
        DiffusersFolder.open("nobody/nothing")
