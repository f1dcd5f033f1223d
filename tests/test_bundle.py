"""Quantized files that carry what sampling needs beside the denoiser (model.bundle)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import calibrate
import sample_diffusion
from tests.helpers.latent import CONFIG, write_checkpoint
from tinydm.models.architecture import describe
from tinydm.quant.runtime.packed_file import PackedFileError, read_beside, to_bytes
from tinydm.scripts.bench.random_models import deployed_of
from tinydm.scripts.experiment.assembly import assemble, bundled
from tinydm.scripts.experiment.bundle import unpacked
from tinydm.scripts.experiment.config import load_config, resolved_yaml

pytestmark = pytest.mark.usefixtures("one_thread")


def test_latent_diffusion_needs_its_checkpoint_no_more(tmp_path: Path) -> None:
    checkpoint = tmp_path / "narrow.pt"
    write_checkpoint(checkpoint, CONFIG)
    state = torch.load(checkpoint, weights_only=True)
    state["state_dict"]["scale_factor"] = torch.tensor(0.5)
    torch.save(state, checkpoint)
    model = CONFIG["model"] | {"checkpoint": str(checkpoint), "bundle": True}
    for part, prefix in (
        ("first_stage", "first_stage_model"),
        ("conditioning", "cond_stage_model"),
    ):
        model[part] = model[part] | {"prefix": prefix}
    path = tmp_path / "narrow.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"model": model}))
    config = load_config(path)
    deployed = deployed_of(config, config.quant)
    description = describe(config.model.arch, config.model.params, deployed.denoiser)
    about = {"config": resolved_yaml(config), "denoiser": json.dumps(description)}
    beside = bundled(config, assemble(config).pipeline)
    plain, whole = tmp_path / "plain.safetensors", tmp_path / "whole.safetensors"
    plain.write_bytes(to_bytes(deployed, about))
    whole.write_bytes(to_bytes(deployed, about, beside))
    more = whole.stat().st_size - plain.stat().st_size
    assert more >= sum(value.nbytes for value in beside.values())
    floats = [v for v in beside.values() if v.is_floating_point() and v.ndim]
    assert floats and all(value.dtype == torch.float16 for value in floats)
    with_original = assemble(config, plain)
    checkpoint.unlink()
    alone = assemble(config, whole)
    assert alone.pipeline.scale_factor == with_original.pipeline.scale_factor == 0.5
    assert set(alone.sources) == {"quantized"}
    expected = with_original.pipeline.sample(with_original.denoiser, range(2), 1)
    images = alone.pipeline.sample(alone.denoiser, range(2), 1)
    error = float((images - expected).square().mean() / expected.square().mean())
    assert 0 < error < 1e-3  # of half precision
    assert not read_beside(plain)


@pytest.mark.slow
def test_a_folder_of_diffusers_is_needed_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from tests.helpers.pipelines import make_pipeline, pictures, psnr

    folder = make_pipeline("text", tmp_path / "folder", diffusers.DDIMScheduler())
    tiny = ["quant.search.rounds=1", "quant.reconstruct.finetune_iterations=1"]
    tiny += ["calibration.samples=4", "calibration.trajectories=4", "quant.weight.bits=8"]
    tiny += ["sampling.micro_batch=2", "sampling.count=2", "quant.weight.rounding=nearest"]
    few = ["--steps", "2", "--prompt", "a b", "--bundle", "--set", *tiny]
    calibrate.main(["--ckpt", str(folder), "--out", str(tmp_path / "run"), *few])
    file = tmp_path / "run" / "quantized.safetensors"
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["file_bytes"] == file.stat().st_size > report["bytes"]
    assert f"the file has {file.stat().st_size / 2**20:.3f} MiB" in capsys.readouterr().out
    names = {name.removeprefix("file:") for name in read_beside(file)}
    assert {"vae/config.json", "tokenizer/tokenizer_config.json", "model_index.json"} <= names
    assert not any("unet" in name and name.endswith("safetensors") for name in names)
    full = ["--config", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "full")]
    sample_diffusion.main(full)
    shutil.rmtree(folder)
    more = ["--prompts", str(tmp_path / "texts"), "--count", "2"]
    (tmp_path / "texts").write_text("a b\n")
    sample_diffusion.main(["--quantized", str(file), "--out", str(tmp_path / "images"), *more])
    assert psnr(pictures(tmp_path / "images"), pictures(tmp_path / "full")) > 25


@pytest.mark.parametrize(
    "name", ["file:../x.json", "file:/tmp/x.json", "file:a/b/c.json", "x.json"]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PackedFileError, match="is no file of a folder"):
        with unpacked({name: torch.zeros(3, dtype=torch.uint8)}, tmp_path / "q.safetensors"):
            pass
    with pytest.raises(PackedFileError, match="is no file of a folder"):
        with unpacked({"file:a.py": torch.zeros(3, dtype=torch.uint8)}, tmp_path):
            pass
