"""The training loop and train_ldm.py, on models of a few thousand parameters."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import sample_diffusion
from tests.helpers.latent import CONFIG, narrow_first_stage
from tinydm.models.checkpoint import load_state_dict
from tinydm.scripts import train_ddim, train_ldm
from tinydm.scripts.common.errors import ConfigError, ImageError, RunError
from tinydm.scripts.common.images import grid, load_images
from tinydm.scripts.experiment import cli
from tinydm.scripts.experiment.runs import locked
from tinydm.scripts.train.first_stage import reconstruction_loss, start_codebook
from tinydm.scripts.train.loop import LoopSettings, fit, identity_of

SETTINGS = LoopSettings(iterations=8, batch_size=4, lr=0.05, warmup=2, save_every=2, grid_every=50)


def picture(ema: dict[str, torch.Tensor]) -> np.ndarray:
    return grid(np.full((2, 4, 4, 3), 9, np.uint8), 2)


class Regression:
    """A linear model towards known weights; `stop_at` interrupts like a kill between two saves."""

    def __init__(self, stop_at: int | None = None):
        torch.manual_seed(0)
        self.model, self.calls, self.stop_at = nn.Linear(3, 1), 0, stop_at

    def loss(self, generator: torch.Generator) -> torch.Tensor:
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        x = torch.randn(SETTINGS.batch_size, 3, generator=generator)
        return (self.model(x) - x.sum(1, keepdim=True)).square().mean()

    def fit(self, out: Path, settings: LoopSettings = SETTINGS) -> dict[str, torch.Tensor]:
        place = (out, torch.device("cpu"), {}, picture)
        return fit(self.model, self.loss, settings, *place, identity="regression")


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = Regression().fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        Regression(stop_at=5).fit(tmp_path / "parts")
    rest = Regression()
    resumed = rest.fit(tmp_path / "parts")
    assert rest.calls == 4  # from the save after iteration 4
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    saved = load_state_dict(tmp_path / "parts" / "ema.pt")
    assert all(torch.equal(saved[name], whole[name]) for name in whole)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = Regression().fit(tmp_path)
    again = Regression()
    second = again.fit(tmp_path)
    assert again.calls == 0 and all(torch.equal(first[n], second[n]) for n in first)
    more = Regression()
    more.fit(tmp_path, replace(SETTINGS, iterations=11))
    assert more.calls == 3


def test_other_data_does_not_continue_a_run(tmp_path: Path) -> None:
    Regression().fit(tmp_path)
    other = Regression()
    given = (other.model, other.loss, SETTINGS, tmp_path, torch.device("cpu"), {}, picture)
    with pytest.raises(RunError, match="other data"):
        fit(*given, identity="another")
    with locked(tmp_path / ".lock"), pytest.raises(RunError, match="held by"):
        fit(*given, identity="regression")
    assert other.calls == 0
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert identity_of(images, "a") == identity_of(images.clone(), "a")
    assert (
        len({identity_of(images, "a"), identity_of(images, "b"), identity_of(images + 1, "a")}) == 3
    )


@pytest.mark.parametrize(
    "values",
    [
        {"iterations": 0},
        {"minutes": 0.0},
        {"minutes": float("inf")},
        {"save_every": 0},
        {"grid_every": -1},
        {"lr": 0.0},
    ]
    + [{"batch_size": 0}, {"ema": 1.0}, {"lr": float("nan")}, {"warmup": -1}]
    + [{"batch_size": 10**20}, {"seed": 2**64}, {"seed": -(2**64)}],
)
def test_settings_of_no_training_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError, match="--") as caught:
        replace(SETTINGS, **values)
    assert "\n" not in str(caught.value)


def test_a_refused_option_has_its_own_name(data: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--config", data / "narrow.yaml", "--data", data / "images.npz"]
    arguments += ["--out", tmp_path / "run", "--first-stage-iterations", 0]
    assert command(*arguments) == 2
    assert "--first-stage-iterations: must be at least 1" in capsys.readouterr().err
    arguments[-1:] = [5, "--warm-start", tmp_path / "model.pt"]
    assert command(*arguments) == 2
    assert "--first-stage-iterations: --warm-start keeps the first" in capsys.readouterr().err


def test_images_are_read_as_they_are_seen(tmp_path: Path) -> None:
    """What is transparent is on white; 16 bits would be cut off."""
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (255, 0, 0, 255)).save(tmp_path / "b.png")
    found = load_images(tmp_path, 4)
    assert found[:, :, 0, 0].tolist() == [[255, 255, 255], [255, 0, 0]]
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "c.png")
    with pytest.raises(ImageError, match="c.png: has more than 8 bits"):
        load_images(tmp_path, 4)


def test_latents_of_other_images_are_not_used(tmp_path: Path) -> None:
    stage = narrow_first_stage().eval()
    (tmp_path / "stage.pt").write_bytes(b"the first stage")
    given = (tmp_path, tmp_path / "stage.pt", torch.device("cpu"))
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    dark = train_ldm.latents_of(stage, images, *given)
    light = train_ldm.latents_of(stage, images + 255, *given)
    assert not torch.equal(dark, light)
    assert torch.equal(train_ldm.latents_of(stage, images + 255, *given), light)


def test_the_rate_warms_up_and_ends_at_zero() -> None:
    settings = replace(SETTINGS, iterations=100, warmup=10, lr=1.0, minutes=2)
    rates = [settings.rate(step, settings.progress(step, 0)) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) > 0.95 and rates[100] == 0
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert settings.progress(10, 60) == 0.5 and settings.progress(10, 500) == 1.0


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    run = Regression()
    ema = run.fit(tmp_path, replace(SETTINGS, iterations=200))
    assert torch.allclose(ema["weight"], torch.ones(1, 3), atol=0.2)


def test_reconstruction_loss_counts_outlines_and_colours() -> None:
    image = torch.zeros(1, 3, 4, 4)
    flat, striped = image + 0.5, image.clone()
    striped[:, :, :, ::2], striped[:, :, :, 1::2] = 0.5, -0.5
    assert reconstruction_loss(image, image) == 0
    assert reconstruction_loss(flat, image) == pytest.approx(0.5 + 2 * 0.5)
    assert reconstruction_loss(striped, image) == pytest.approx(1.0)


def test_the_codebook_starts_at_distinct_latents() -> None:
    first_stage = narrow_first_stage()
    latents = torch.randn(40, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    latents[:20] = 0.25  # a background
    start_codebook(first_stage, latents, seed=0)
    codes = first_stage.quantize.embedding.weight
    assert len(torch.unique(codes, dim=0)) == len(codes)
    pixels = latents.movedim(1, -1).flatten(0, 2)
    nearest = (codes[:, None] - pixels[None]).abs().sum(2).amin(1)
    assert nearest.max() == 0
    with pytest.raises(ValueError, match="too few"):
        start_codebook(first_stage, latents[:20], seed=0)


def test_classes_are_drawn_evenly_and_some_labels_dropped() -> None:
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 7)
    classes = train_ldm.Classes(labels, 3)
    index, drawn = classes.draw(6000, torch.Generator().manual_seed(0))
    kept = drawn < 3
    assert torch.equal(labels[index][kept], drawn[kept])
    assert 0.07 < (drawn == 3).float().mean() < 0.13
    counts = torch.bincount(labels[index], minlength=3) / 6000
    assert counts.min() > 0.3 and set(index.tolist()) == set(range(60))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """narrow.yaml and images.npz: 12 images of 16 x 16, 3 classes that differ in colour."""
    folder = tmp_path_factory.mktemp("latent")
    (folder / "narrow.yaml").write_text(yaml.safe_dump(CONFIG))
    rng, y = np.random.default_rng(0), np.arange(12) % 3
    x = rng.integers(0, 256, (12, 16, 16, 3)).astype(np.uint8)
    x[np.arange(12), :, :, y] = 255
    np.savez(folder / "images.npz", x=x, y=y)
    return folder


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: train_ldm.main([str(a) for a in arguments]))
    return int(caught.value.code or 0)


@pytest.mark.slow
def test_train_ldm_writes_a_model_that_samples(data: Path) -> None:
    out = data / "run"
    arguments = ["--config", data / "narrow.yaml", "--data", data / "images.npz", "--out", out]
    arguments += ["--iterations", 3, "--first-stage-iterations", 4, "--batch-size", 4]
    assert command(*arguments) == 0
    model = out / "model.pt"
    state = load_state_dict(model)
    assert state["cond_stage_model.embedding.weight"].shape == (4, 8)
    assert state["model.diffusion_model.out.2.weight"].dtype == torch.float16
    latents = torch.load(out / "latents.pt", weights_only=True)["latents"]
    assert float(state["scale_factor"]) == pytest.approx(1 / float(latents.std()), rel=1e-5)
    parts = [model, out / "denoiser" / "ema.pt", out / "first_stage" / "ema.pt"]
    whole = [path.read_bytes() for path in parts]
    for gone in ([], parts):
        for path in gone:
            path.unlink()
        assert command(*arguments) == 0  # finished: nothing is trained again
        assert [path.read_bytes() for path in parts] == whole
    images = data / "images"
    sample_diffusion.main(
        ["--config", str(data / "narrow.yaml"), "--ckpt", str(model), "--out", str(images)]
    )
    names = sorted(path.name for path in images.iterdir())
    assert names == [f"{i:06d}.png" for i in range(6)]
    assert Image.open(images / names[0]).size == (16, 16)


@pytest.mark.slow
def test_a_warm_start_keeps_the_first_stage(data: Path, tmp_path: Path, capsys) -> None:
    base = ["--config", data / "narrow.yaml", "--data", data / "images.npz", "--batch-size", 4]
    first, second = tmp_path / "first", tmp_path / "second"
    few = ["--first-stage-iterations", 2, "--iterations", 2]
    assert command(*base, *few, "--out", first) == 0
    warm = [*base, "--warm-start", first / "model.pt", "--out", second, "--lr", 1e-4]
    assert command(*warm, "--iterations", 1) == 0
    assert command(*warm, "--iterations", 2) == 0  # resumes
    before, after = (load_state_dict(folder / "model.pt") for folder in (first, second))
    assert before.keys() == after.keys() and not (second / "first_stage").exists()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(n.startswith(("model.", "cond_stage_model.", "scale")) for n in moved)
    change = max(float((after[n].float() - before[n].float()).abs().max()) for n in moved)
    assert change < 1e-2  # two steps of the rate: trained on, not anew
    capsys.readouterr()
    assert command(*base, "--warm-start", tmp_path / "no.pt", "--out", tmp_path / "x") == 2
    error = capsys.readouterr().err
    assert "no.pt" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"y": np.zeros(12, np.int64)}, "does not hold each of the 3 classes"),
        ({"y": np.arange(12)}, "within 0..2"),
        ({"y": np.zeros(5, np.int64)}, "must be 12 class numbers"),
        ({"y": None}, "member y is missing"),
    ],
)
def test_wrong_classes_get_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, change: dict, expected: str
) -> None:
    with np.load(data / "images.npz") as archive:
        arrays = {**archive, **change}
    np.savez(tmp_path / "x.npz", **{k: v for k, v in arrays.items() if v is not None})
    arguments = ("--config", data / "narrow.yaml", "--data", tmp_path / "x.npz")
    assert command(*arguments, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_train_ddim_trains_and_resumes(data: Path, tmp_path: Path) -> None:
    base = ["--data", str(data / "images.npz"), "--batch-size", "4", "--out", str(tmp_path)]
    sizes = ["ch=8", "ch_mult=[1, 2]", "num_res_blocks=1", "norm_groups=2", "image_size=16"]
    train_ddim.main([*base, "--iterations", "2", "--set", *sizes])
    train_ddim.main([*base, "--iterations", "3", "--set", *sizes])
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 3 and (tmp_path / "grid.png").exists()
    for wrong, message in (
        (["ch=30"], "build no denoiser"),
        ([*sizes, "in_channels=1", "out_ch=1"], "must be 3"),
        ([*sizes[:-1], "image_size=15"], "image_size must be a multiple of 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_ddim.main([*base, "--iterations", "3", "--set", *wrong])
    with pytest.raises(RunError, match="another model"):
        train_ddim.main([*base, "--iterations", "3", "--set", *sizes, "num_res_blocks=2"])
    assert set(load_state_dict(tmp_path / "ema.pt")) == set(state["model"])
