"""Every shipped configuration builds what was published; latent models run through the command
lines; the scripts of the paper's rows say what is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import calibrate
import sample_diffusion
from tests.helpers.commands import ROOT
from tests.helpers.latent import CONFIG, PARAMS, write_checkpoint
from tests.helpers.web import serving
from tinydm.models.autoencoder import first_stage_from_upstream
from tinydm.models.pipeline import build_denoiser
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.experiment import cli
from tinydm.scripts.experiment.assembly import assemble, empty_denoiser
from tinydm.scripts.experiment.config import load_config, parse_config

# Parameters of the denoiser and of the first stage as published; ours for the embedded ones.
PUBLISHED = {
    "celeba": (78_700_803, None),
    "cifar10": (35_746_307, None),
    "emoji32": (2_245_763, None),
    "emoji64": (4_132_259, 684_526),
    "imagenet256": (400_920_579, 55_322_782),
    "imagenet256_adm": (553_838_086, None),
    "imagenet64_adm": (295_904_454, None),
    "lsun_bedroom": (274_056_163, 55_322_782),
    "lsun_church": (294_966_916, 83_653_863),
    "sd_v1": (859_520_964, 83_653_863),
}


def test_every_configuration_has_a_count() -> None:
    known = {*PUBLISHED, "dit_xl2"}  # diffusers builds that one: test_dit_original.py
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == known


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    denoiser, first_stage = PUBLISHED[name]
    assert sum(p.numel() for p in empty_denoiser(config).parameters()) == denoiser
    assert (config.model.first_stage is None) == (first_stage is None)
    if first_stage is not None:
        with torch.device("meta"):
            built = first_stage_from_upstream(vars(config.model.first_stage))
        assert sum(p.numel() for p in built.parameters()) == first_stage


# ---- text ----

TEXT_PARAMS = {
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "projection_dim": 8,
    "bos_token_id": 10,
    "eos_token_id": 11,
}


def write_tokenizer(folder: Path) -> None:
    """CLIP's two files for a language of the letters a to e."""
    folder.mkdir()
    words = [*"abcde", *(f"{c}</w>" for c in "abcde"), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    named = {"tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow Stable Diffusion: text.yaml, its checkpoint and its tokenizer."""
    pytest.importorskip("transformers")
    from tinydm.models.conditioning import VIT_L_14, CLIPTextTower

    folder = tmp_path_factory.mktemp("text")
    write_tokenizer(folder / "tokenizer")
    config = CONFIG | {"model": CONFIG["model"] | {"checkpoint": "text.ckpt"}}
    config["model"]["conditioning"] = {
        "prompts": ["a", "b c"],
        "text_params": TEXT_PARAMS,
        "tokenizer": str(folder / "tokenizer"),
    }
    (folder / "text.yaml").write_text(yaml.safe_dump(config))
    torch.manual_seed(0)
    parts = {
        "model.diffusion_model": build_denoiser("ldm_unet", config["model"]["params"]),
        "first_stage_model": first_stage_from_upstream(config["model"]["first_stage"]),
        "cond_stage_model": CLIPTextTower({**VIT_L_14, **TEXT_PARAMS}),
    }
    state = {f"{p}.{n}": v for p, module in parts.items() for n, v in module.state_dict().items()}
    torch.save({"state_dict": state}, folder / "text.ckpt")
    return folder


def test_prompts_are_numbered_like_classes(text_model: Path, tmp_path: Path) -> None:
    assembly = assemble(load_config(text_model / "text.yaml"))
    pipeline = assembly.pipeline
    assert pipeline.num_classes == 2
    labels = pipeline.labels(range(4), seed=0)
    assert sorted(labels[:2].tolist()) == [0, 1]
    contexts = pipeline.embedder(torch.tensor([0, 1, 2]))
    assert contexts.shape == (3, 77, 8)
    first, second = (pipeline.latents(assembly.denoiser, [0], 0, classes=[c]) for c in (0, 1))
    assert not torch.equal(first, second)
    arguments = ["--config", str(text_model / "text.yaml"), "--count", "2"]
    named, numbered = tmp_path / "named", tmp_path / "numbered"
    sample_diffusion.main([*arguments, "--out", str(named), "--prompt", "b c"])
    sample_diffusion.main([*arguments, "--out", str(numbered), "--classes", "1"])
    for name in ("000000.png", "000001.png"):
        assert (named / name).read_bytes() == (numbered / name).read_bytes()


@pytest.mark.parametrize("kind", [None, torch.float32, torch.float16])
def test_numbers_of_the_positions_are_constant(
    text_model: Path, tmp_path: Path, kind: torch.dtype | None
) -> None:
    content = torch.load(text_model / "text.ckpt", weights_only=True)
    state = content["state_dict"]
    (name,) = [n for n in state if n.endswith("position_ids")]
    positions = state.pop(name)
    if kind is not None:
        state[name] = positions.to(kind)
    torch.save(content, tmp_path / "text.ckpt")
    given = [f"model.checkpoint={tmp_path / 'text.ckpt'}"]
    ours = assemble(load_config(text_model / "text.yaml", given)).pipeline
    whole = assemble(load_config(text_model / "text.yaml")).pipeline
    assert torch.equal(ours.embedder.contexts, whole.embedder.contexts)


def test_a_prompt_may_hold_any_character(text_model: Path) -> None:
    option = cli.one_text('a \N{GRINNING FACE} "b": c # d')
    given = [f"model.conditioning.prompts={option}"]
    config = load_config(text_model / "text.yaml", given)
    assert config.model.conditioning.prompts == ('a \N{GRINNING FACE} "b": c # d',)


def test_latents_are_no_pictures(
    text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--config", str(text_model / "text.yaml"), "--out", str(tmp_path / "images")]
    without = [
        "model.first_stage=null",
        "model.params.in_channels=4",
        "model.params.out_channels=4",
    ]
    config = load_config(text_model / "text.yaml", without)
    net = build_denoiser("ldm_unet", config.model.params)
    content = torch.load(text_model / "text.ckpt", weights_only=True)
    state = {n: t for n, t in content["state_dict"].items() if n.startswith("cond_stage_model.")}
    state |= {f"model.diffusion_model.{n}": t for n, t in net.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "four.ckpt")
    with pytest.raises(ConfigError, match="4 channels are no picture"):
        sample_diffusion.main(
            [*arguments, "--ckpt", str(tmp_path / "four.ckpt"), "--set", *without]
        )
    arguments[-1] = str(tmp_path / "run")
    few = ["quant.method=minmax", "calibration.trajectories=2", "calibration.samples=4"]
    calibrate.main([*arguments, "--ckpt", str(tmp_path / "four.ckpt"), "--set", *without, *few])
    assert "note: 4 channels are no picture: sample_diffusion.py" in capsys.readouterr().out


def test_conditioning_is_classes_or_texts() -> None:
    def error_of(conditioning: dict[str, Any]) -> str:
        config = CONFIG | {"model": CONFIG["model"] | {"conditioning": conditioning}}
        with pytest.raises(ConfigError) as caught:
            parse_config(yaml.safe_dump(config), "x.yaml")
        return str(caught.value)

    assert "needs n_classes and embed_dim, or prompts" in error_of({"n_classes": 4})
    assert "at least one text" in error_of({"prompts": []})
    assert "cannot be there beside" in error_of({"prompts": ["a"], "n_classes": 4})
    for unread in ({"tokenizer": "folder"}, {"text_params": {"hidden_size": 8}}):
        assert "is of prompts" in error_of({"n_classes": 4, "embed_dim": 8} | unread)


def test_a_missing_tokenizer_gets_one_line(
    text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--config", str(text_model / "text.yaml"), "--out", str(tmp_path / "images")]
    arguments += ["--set", f"model.conditioning.tokenizer={tmp_path / 'nowhere'}"]
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: sample_diffusion.main(arguments))
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: model.conditioning.tokenizer: ")
    assert "no vocabulary of CLIP; docs/checkpoints.md tells where to get it" in error
    assert error.count("\n") == 1 and not (tmp_path / "images").exists()


# ---- the scripts of the paper's rows ----

QUICK = {
    "calibration": {"samples": 8, "trajectories": 4, "batch_size": 4},
    "quant": {"method": "minmax"},
}


def script(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    paths = {
        "CONFIG": str(folder / "narrow.yaml"),
        "RUN": str(folder / "run"),
        "REFERENCE": str(folder / "reference.npz"),
    }
    paths |= {"TINYDM_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1"}
    environment = {**os.environ, **paths}
    return subprocess.run(
        ["sh", str(ROOT / name), *arguments], env=environment, capture_output=True, text=True
    )


def write_config(folder: Path, model: dict[str, Any], **more: Any) -> dict[str, Any]:
    guided = "conditioning" in model
    sampler = CONFIG["sampler"] | {"guidance_scale": 1.5 if guided else 1.0}
    config = CONFIG | QUICK | {"model": model | more, "sampler": sampler}
    (folder / "narrow.yaml").write_text(yaml.safe_dump(config))
    return config


@pytest.mark.slow
def test_sample_lsun_without_a_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    model = {k: v for k, v in CONFIG["model"].items() if k != "conditioning"} | {"params": PARAMS}
    with serving() as web:  # which has nothing
        url = web.url("/model.ckpt")
        write_config(tmp_path, model, checkpoint=str(tmp_path / "nowhere/model.ckpt"), url=url)
        done = script("sample_lsun.sh", tmp_path)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: cannot download {url}") and "nowhere/model.ckpt" in line


@pytest.mark.slow
def test_sample_imagenet_runs_to_its_fid_line(tmp_path: Path) -> None:
    """The reference is not there: that is said last, when the images are made."""
    config = write_config(tmp_path, CONFIG["model"], checkpoint=str(tmp_path / "model.ckpt"))
    write_checkpoint(tmp_path / "model.ckpt", config)
    done = script("sample_imagenet.sh", tmp_path, "--count", "3")
    assert done.returncode == 2, done.stderr
    assert f"pytorch_fid {tmp_path / 'reference.npz'} {tmp_path / 'run/images'}" in done.stdout
    assert "set REFERENCE to the training images" in done.stderr.splitlines()[-1]
    assert len(list((tmp_path / "run/images").iterdir())) == 3
