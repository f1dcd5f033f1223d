"""Calibration and sampling on a stand-in for a CUDA device (see fake_cuda.py).

A tensor that is made on another device than the one it is used with fails here, without a GPU. What
comes out must have the bits of a run on the CPU. Speed, kernels and memory of a real GPU are not
tested by this.

python -m pytest tests/test_cuda.py
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers.fake_cuda import CUDA, CudaTensor, fake_cuda
from tests.helpers.rooms import CONFIG, RESULT
from tests.helpers.teams import Member
from tinydm.models.autoencoder import first_stage_from_upstream
from tinydm.models.conditioning import ClassEmbedder
from tinydm.models.noise import drawn_ahead
from tinydm.models.pipeline import build_denoiser
from tinydm.quant.calibration.run_state import RunState
from tinydm.quant.calibration.states import CalibrationStates
from tinydm.quant.runtime.correction import OutputCorrection
from tinydm.scripts.common.errors import ConfigError, RunError
from tinydm.scripts.experiment import resume
from tinydm.scripts.experiment.assembly import assemble
from tinydm.scripts.experiment.calibration_run import (
    CalibrationRun,
    calibrate_run,
    correct_run,
    make_states,
)
from tinydm.scripts.experiment.cli import explain
from tinydm.scripts.experiment.config import Config, load_config
from tinydm.scripts.experiment.devices import resolve_device
from tinydm.scripts.experiment.processes import Team, _packed, _unpacked
from tinydm.scripts.experiment.runs import claim
from tinydm.scripts.experiment.sampling_run import SamplingRun, make_images
from tinydm.scripts.experiment.trajectories import _to_tensors, shared_states

QUICK = (
    "calibration.samples=12",
    "calibration.trajectories=4",
    "quant.search.rounds=2",
    "quant.search.batch_size=4",
    "quant.reconstruct.batch_size=4",
    "quant.reconstruct.finetune_batch_size=4",
    "quant.reconstruct.finetune_iterations=3",
)
LDM = {
    "image_size": 4,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 8,
    "num_res_blocks": 1,
    "attention_resolutions": [1],
    "channel_mult": [1],
    "num_heads": 1,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 6,
    "norm_groups": 2,
}


def config_of(room: Path, *keys: str) -> Config:
    return load_config(room / "tiny.yaml", [*QUICK, *keys])


# ---- the stand-in itself ----


def test_the_device_is_strict() -> None:
    with fake_cuda() as mode:
        x = torch.randn(2, 3, device="cuda")
        assert x.device == CUDA and (2 * x + torch.tensor(1.0)).device == CUDA
        assert torch.arange(3, device=x.device).device == CUDA
        for mixed in (
            lambda: x + torch.ones(2, 3),
            lambda: torch.cat([x, torch.ones(2, 3)]),
            lambda: torch.ones(2, 3)[torch.zeros(1, dtype=torch.long, device="cuda")],
            lambda: torch.nn.functional.linear(x, torch.ones(4, 3)),
            lambda: x[:, 0].copy_(x[:, 1]) + torch.ones(2),
        ):
            with pytest.raises(RuntimeError, match="two devices"):
                mixed()
        with pytest.raises(TypeError, match="cpu"):
            x.numpy()
        assert not isinstance(x.cpu(), CudaTensor)
        assert x[torch.tensor([0])].device == CUDA  # as CUDA allows it
        waiting = (
            lambda: x[torch.tensor([0])],
            lambda: x[x > 0],
            lambda: torch.tensor(1.0, device="cuda"),
            lambda: torch.ones(3).to("cuda"),
            lambda: x.copy_(torch.ones(2, 3)),
            lambda: bool(x[0, 0] > 0),
            lambda: torch.arange(3)[x.argmax()],
            lambda: x.cpu(),
            lambda: x.tolist(),
        )
        going_on = (
            lambda: torch.full((), 1.0, device="cuda"),
            lambda: torch.ones(3).to("cuda", non_blocking=True),
            lambda: x.copy_(torch.ones(2, 3), non_blocking=True),
            lambda: torch.where(x > 0, 1.0, 2.0),
            lambda: x * torch.tensor(2.0),
        )
        for actions, most in ((waiting, 1), (going_on, 0)):
            for action in actions:
                before = mode.waits
                action()
                assert mode.waits - before == most
        layer = torch.nn.Linear(3, 3).to("cuda")
        layer(x).sum().backward()
        assert layer.weight.device == layer.weight.grad.device == CUDA


# ---- the project ----


# Fewer ranges to try, which take longest here.
SHORT = ["quant.weight.scale=minmax", "quant.activation.symmetric=true"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "keys", "team"),
    [
        ("tinydm", [], Member(0, 2)),
        (
            "ptqd",
            [*SHORT, "quant.reconstruct.iterations=2", "quant.time_embedding=reconstructed"],
            Team(),
        ),
    ],
)
def test_every_phase_of_calibration(
    room: Path,
    tmp_path: Path,
    method: str,
    keys: list[str],
    team: Team,
) -> None:
    """From the trajectories to the file, by one process or shared with another one."""
    config = config_of(room, f"quant.method={method}", *keys)
    cpu = torch.device("cpu")
    calibrate_run(CalibrationRun(config, assemble(config), tmp_path / "cpu", cpu))
    with fake_cuda() as mode:
        assembly = assemble(config, device=CUDA)
        assert all(p.device == CUDA for p in assembly.denoiser.parameters())
        calibrate_run(CalibrationRun(config, assembly, tmp_path / "cuda", CUDA, team))
    assert mode.calls > 100
    files = [(tmp_path / name / RESULT).read_bytes() for name in ("cpu", "cuda")]
    assert files[0] == files[1]


def test_another_rank_gets_samples_on_its_device() -> None:
    x = torch.randn(2, 3, 3, 4, 4)
    states = CalibrationStates(x, 2 * x, [5, 2.5], {"context": torch.randn(3, 1, 6)})

    class Second(Member):
        def share(self, count: int, make: Callable) -> Iterator:
            yield _unpacked(_packed(_to_tensors(states)))

    with fake_cuda():
        found = shared_states(Second(1, 2), None, CUDA)
        given, t, eps, conditioning = found.gather(torch.tensor([[1, 2]]))
        assert given.device == eps.device == conditioning["context"].device == CUDA
        assert torch.equal(given.cpu(), x[1:, 2]) and t.tolist() == [2.5]


@pytest.mark.slow
def test_a_correction_of_a_finished_run(
    room: Path,
    tmp_path: Path,
) -> None:
    """PTQD from Q-Diffusion's file, as the benchmark makes it; states of a run on the CPU."""
    base = config_of(room, "quant.method=qdiffusion", "quant.reconstruct.iterations=2")
    config = config_of(room, "quant.method=ptqd", "quant.reconstruct.iterations=2")
    assembly = assemble(base)
    states = make_states(CalibrationRun(base, assembly, tmp_path, torch.device("cpu")))
    calibrate_run(
        CalibrationRun(base, assembly, tmp_path / "base", torch.device("cpu")), states=states
    )
    correct_run(
        CalibrationRun(config, assembly, tmp_path / "cpu", torch.device("cpu")),
        tmp_path / "base",
        states,
    )
    with fake_cuda():
        assembly = assemble(config, device=CUDA)
        states = CalibrationStates(**(vars(states) | {"device": "cuda"}))
        correct_run(
            CalibrationRun(config, assembly, tmp_path / "cuda", CUDA), tmp_path / "base", states
        )
    files = [(tmp_path / name / RESULT).read_bytes() for name in ("cpu", "cuda")]
    assert files[0] == files[1]


@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_sampling_in_full_precision_and_quantized(
    room: Path,
    tmp_path: Path,
    sampler: str,
) -> None:
    eta = 1.0 if sampler == "ddim" else 0.0
    keys = (f"sampler.name={sampler}", f"sampler.eta={eta}")
    config = config_of(room, "quant.method=minmax", *keys)
    calibrate_run(CalibrationRun(config, assemble(config), tmp_path, torch.device("cpu")))
    for quantized in (None, tmp_path / RESULT):
        assembly = assemble(config, quantized)
        expected = assembly.pipeline.sample(assembly.denoiser, range(3), 1)
        with fake_cuda():
            assembly = assemble(config, quantized, device=CUDA)
            images = assembly.pipeline.sample(assembly.denoiser, range(3), 1, device=CUDA)
            assert images.device == CUDA
            assert torch.equal(images.cpu(), expected)


@pytest.mark.slow
def test_latent_diffusion_with_classes_and_guidance(tmp_path: Path) -> None:
    """A denoiser with context, a class embedder and a first stage, calibrated and sampled."""
    config = latent_room(tmp_path)
    assembly = assemble(config)
    calibrate_run(CalibrationRun(config, assembly, tmp_path / "cpu", torch.device("cpu")))
    quantized = assemble(config, tmp_path / "cpu" / RESULT)
    expected = quantized.pipeline.sample(quantized.denoiser, range(3), 1)
    with fake_cuda():
        assembly = assemble(config, device=CUDA)
        calibrate_run(CalibrationRun(config, assembly, tmp_path / "cuda", CUDA))
        quantized = assemble(config, tmp_path / "cuda" / RESULT, device=CUDA)
        images = quantized.pipeline.sample(quantized.denoiser, range(3), 1, device=CUDA)
        assert images.device == CUDA and torch.equal(images.cpu(), expected)
    files = [(tmp_path / name / RESULT).read_bytes() for name in ("cpu", "cuda")]
    assert files[0] == files[1]


def latent_room(folder: Path) -> Config:
    """A class-conditional latent diffusion of a few thousand random parameters."""
    stage = {
        "embed_dim": 3,
        "n_embed": 16,
        "ddconfig": {
            "double_z": False,
            "z_channels": 3,
            "resolution": 8,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 8,
            "ch_mult": [1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "dropout": 0.0,
            "norm_groups": 2,
        },
    }
    torch.manual_seed(1)
    first_stage = first_stage_from_upstream({"target": "VQModelInterface", "params": stage})
    parts = {
        "model.diffusion_model": build_denoiser("ldm_unet", LDM),
        "first_stage_model": first_stage,
        "cond_stage_model": ClassEmbedder(5, 6),
    }
    state = {f"{k}.{n}": v for k, part in parts.items() for n, v in part.state_dict().items()}
    torch.save({"state_dict": state}, folder / "ldm.ckpt")
    values = CONFIG | {
        "model": {
            "arch": "ldm_unet",
            "checkpoint": "ldm.ckpt",
            "params": LDM,
            "first_stage": {"target": "VQModelInterface", "params": stage},
            "conditioning": {"n_classes": 5, "embed_dim": 6},
        },
        "schedule": {"betas": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195},
        "sampler": {"name": "ldm_ddim", "steps": 4, "eta": 0.5, "guidance_scale": 3.0},
    }
    (folder / "ldm.yaml").write_text(yaml.safe_dump(values))
    return load_config(folder / "ldm.yaml", [*QUICK, "quant.method=minmax"])


@pytest.mark.parametrize("word", ["cuda:", "gpu", "cuda:-1", "cuda:x", "CUDA"])
def test_a_device_that_is_none_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=f"--device {word}: must be auto, cpu, cuda or cuda:N"):
        resolve_device(word)


@pytest.mark.parametrize(
    ("word", "rank", "index"), [("cuda", "0", 0), ("auto", "3", 1), ("cuda:1", "0", 1)]
)
def test_devices_of_two_gpus(
    word: str, rank: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert resolve_device(word) == torch.device("cuda", index) and chosen == [index]
    with pytest.raises(ConfigError, match="there are 2 CUDA devices, 0 to 1"):
        resolve_device("cuda:2")


def test_a_folder_belongs_to_a_kind_of_device(room: Path, tmp_path: Path) -> None:
    """Images of another device differ in their last bits: they do not continue a folder."""
    config = config_of(room)
    run = SamplingRun(config, assemble(config), tmp_path / "images", torch.device("cpu"))
    claim(run.folder, run.identity)
    make_images(run, [0])
    with pytest.raises(RunError, match="device is cpu, asked NVIDIA A100"):
        claim(run.folder, run.identity | {"device": "NVIDIA A100"})


def test_a_calibration_stays_on_its_kind_of_device(room: Path, tmp_path: Path) -> None:
    config = config_of(room)
    assembly = assemble(config)
    states = make_states(CalibrationRun(config, assembly, tmp_path, torch.device("cpu")))
    resume.save_state(tmp_path, config, assembly.sources, RunState(), states)
    given = (tmp_path, config, assembly.sources, True)
    assert resume.load_state(*given, torch.device("cpu")) is not None
    with pytest.raises(RunError, match="begun on another device, cpu; this one is cuda"):
        resume.load_state(*given, CUDA)


def test_a_finished_calibration_stays_on_its_kind_of_device(room: Path, tmp_path: Path) -> None:
    config = config_of(room, "quant.method=minmax")
    run = CalibrationRun(config, assemble(config), tmp_path, torch.device("cpu"))
    calibrate_run(run)
    made, note = (tmp_path / RESULT).read_bytes(), tmp_path / "report.json"
    assert calibrate_run(run) is None  # is there already
    report = json.loads(note.read_text())
    assert report.pop("device") == "cpu"
    note.write_text(json.dumps(report))  # as earlier versions wrote it
    assert calibrate_run(run) is None
    note.write_text(json.dumps(report | {"device": "NVIDIA A100"}))
    with pytest.raises(RunError, match="another device, NVIDIA A100; this one is cpu: choose with"):
        calibrate_run(run)
    assert (tmp_path / RESULT).read_bytes() == made
    assert calibrate_run(run, overwrite=True)
    assert json.loads(note.read_text())["device"] == "cpu"


def test_a_card_without_room_is_not_the_computer() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    line = explain(error, less="--set sampling.micro_batch=4")
    assert line.startswith("the graphics card is out of memory: lower the batch size (--set")


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_does_not_wait_for_the_device(room: Path, tmp_path: Path, eta: float) -> None:
    """Timesteps stay on the host and values are looked at once, at the end, so that the device has
    work queued all the time: the number of waits does not grow with the steps, not even where the
    first batch fills look-ups. A step copies its timestep, and its noise."""
    waits, copies = [], []
    for steps in (3, 6):
        keys = ("quant.method=minmax", f"sampler.eta={eta}", f"sampler.steps={steps}")
        keys += ("calibration.samples=12",)
        config = config_of(room, *keys)
        folder = tmp_path / str(steps)
        calibrate_run(CalibrationRun(config, assemble(config), folder, torch.device("cpu")))
        with fake_cuda() as mode:
            assembly = assemble(config, folder / RESULT, device=CUDA)
            model = assembly.denoiser
            none = torch.zeros(len(model.context.timesteps), 3)
            model.correction = OutputCorrection(model.context, none, none, none[:, 0]).to(CUDA)
            for _ in range(2):
                before = mode.waits, mode.copies
                assembly.pipeline.sample(model, range(2), 1, device=CUDA)
                waits.append(mode.waits - before[0])
                copies.append(mode.copies - before[1])
    assert waits[0] == waits[2] and waits[1] == waits[3] <= 2
    assert copies[3] - copies[1] == copies[2] - copies[0] == (6 if eta else 3)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_noise_is_drawn_ahead_and_stays_the_images_own(eta: float) -> None:
    """As many draws as steps ask for, and one more; the values are those of the CPU."""
    draws = []

    def draw() -> torch.Tensor:
        draws.append(torch.randn(2, 3, generator=generator))
        return draws[-1]

    generator = torch.Generator().manual_seed(3)
    with drawn_ahead(draw, "cpu") as noise:
        expected = [noise(k) for k in range(3)]
    assert len(draws) == 3
    draws.clear()
    generator.manual_seed(3)
    with fake_cuda() as mode, drawn_ahead(draw, CUDA) as noise:
        found = [noise(k) for k in range(3 if eta else 0)]
        assert mode.waits == 0 and all(x.device == CUDA for x in found)
        for x, y in zip(found, expected, strict=False):
            assert torch.equal(x.cpu(), y)
    assert len(draws) == (4 if eta else 0)


def test_a_draw_that_fails_is_told() -> None:
    def draw() -> torch.Tensor:
        raise MemoryError

    with fake_cuda(), pytest.raises(MemoryError), drawn_ahead(draw, CUDA) as noise:
        noise(0)


def test_latents_are_decoded_together(tmp_path: Path) -> None:
    """As many in a call whatever the batch, so that an image does not depend on it."""
    assembly = assemble(latent_room(tmp_path))
    pipeline = replace(assembly.pipeline, decode_batch=2)
    seen, decode = [], pipeline.first_stage.decode

    def noted(z: torch.Tensor) -> torch.Tensor:
        seen.append(len(z))
        return decode(z)

    pipeline.first_stage.decode = noted
    three = pipeline.sample(assembly.denoiser, range(3), 1)
    one = pipeline.sample(assembly.denoiser, [2], 1)
    assert seen == [2, 2, 2] and len(three) == 3 and torch.equal(three[2:], one)
    pipeline.first_stage.decode = decode
    alone = assembly.pipeline.sample(assembly.denoiser, range(3), 1)
    assert (three - alone).abs().max() < 1e-5
