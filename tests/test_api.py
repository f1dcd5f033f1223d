"""tinydm.load and tinydm.calibrate: quantized modules in other people's programs."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tinydm
from tests.helpers.commands import ROOT
from tinydm.models.checkpoint_files import CheckpointError
from tinydm.quant.backends.selection import int8_supported
from tinydm.quant.core.settings import (
    CalibrationSettings,
    QuantSettings,
    ReconstructSettings,
    SearchSettings,
)
from tinydm.quant.runtime.packed_file import PackedFileError

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = QuantSettings(
    search=SearchSettings(rounds=2, batch_size=4),
    reconstruct=ReconstructSettings(finetune_iterations=2, finetune_batch_size=4),
)
FEW = CalibrationSettings(samples=8, batch_size=8)
QUICK = {"settings": SETTINGS, "calibration": FEW, "weight_bits": 8}


# ---- the example of docs/python.md ----


class Denoiser(nn.Module):
    """A network of one's own, called as eps = model(x, t)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.of_time = nn.Linear(1, 16)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time = self.of_time(t[:, None] / 1000)[:, :, None, None]
        return self.last(torch.relu(self.first(x) + time))


def sample(model: nn.Module, numbers: range) -> torch.Tensor:
    """One image for each number, always the same."""
    draws = [torch.Generator().manual_seed(i) for i in numbers]
    x = torch.stack([torch.randn(3, 8, 8, generator=g) for g in draws])
    for t in range(900, 0, -300):
        x = x - 0.1 * model(x, torch.full((len(x),), t))
    return x


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, file = Denoiser(), tmp_path / "q.safetensors"
    made = tinydm.calibrate(module, file, sample=sample, **QUICK)
    loaded = tinydm.load(file, Denoiser())
    with torch.no_grad():
        full, ours, again = (sample(m, range(4)) for m in (module, made, loaded))
    assert torch.equal(ours, again)
    error = (full - ours).square().mean() / full.square().mean()
    assert 0 < error < 1e-4
    x = torch.randn(2, 3, 8, 8)
    expected = loaded(x, torch.tensor([300, 300]))
    for t in (300, 300.0, torch.tensor(300), torch.tensor([300])):
        assert torch.equal(loaded(x, t), expected)
    with pytest.raises(PackedFileError, match="give module="):
        tinydm.load(file)
    with pytest.raises(ValueError, match="outside"):
        loaded(x, float("nan"))
    with pytest.raises(ValueError, match="must be fake or int8"):
        tinydm.load(file, Denoiser(), backend="int4")
    with pytest.raises(ValueError, match="needs backend"):
        tinydm.load(file, Denoiser(), compile=True)
    if int8_supported() is None:
        integers = tinydm.load(file, Denoiser(), backend="int8")
        torch.testing.assert_close(integers(x, 300), expected, rtol=1e-2, atol=1e-2)


def test_a_layer_that_computes_something_else_is_named() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.weight - self.weight.mean()
            return self._conv_forward(x, weight, self.bias)

    module = Denoiser()
    module.first = Standardised(3, 16, 3, padding=1)
    with pytest.raises(ValueError, match="layer first: Standardised computes something else"):
        tinydm.calibrate(module, sample=sample, **QUICK)
    with pytest.raises(ValueError, match="sample="):
        tinydm.calibrate(module)


def test_tracing_that_would_freeze_the_timestep_is_refused(tmp_path: Path) -> None:
    made = tinydm.calibrate(Denoiser(), sample=sample, **QUICK)
    example = (torch.randn(2, 3, 8, 8), torch.tensor([300, 300]))
    with pytest.raises(RuntimeError, match=r"use torch\.export"):
        torch.jit.trace(made, example)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"weight_bits": 1}, "weight_bits must be within 2..8"),
        ({"activation_bits": 16}, "activation_bits must be within 2..8"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"out": "no/such/folder/q.safetensors"}, "a folder that is there"),
        ({"out": "."}, "must be a file"),
    ],
)
def test_arguments_that_would_fail_later(arguments: dict, what: str) -> None:
    """Before the calibration, which may take an hour."""
    with pytest.raises(ValueError, match=what):
        tinydm.calibrate(Denoiser(), **({"sample": pytest.fail} | QUICK | arguments))


@pytest.mark.slow
def test_export_takes_the_timestep_as_an_input() -> None:
    made = tinydm.calibrate(Denoiser(), sample=sample, **QUICK)
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(made, (x, torch.tensor([300, 300]))).module()
    for t in (torch.tensor([300, 300]), torch.tensor([900, 900]), torch.tensor([600, 900])):
        assert torch.allclose(program(x, t), made(x, t), atol=1e-5)
    assert not torch.allclose(made(x, 300), made(x, 900), atol=1e-3)


@pytest.mark.slow
def test_outside_the_repository(tmp_path: Path) -> None:
    """From another folder, by the path of the checkout alone."""
    code = "import tinydm; print(tinydm.load.__name__, tinydm.calibrate.__name__)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout.split() == ["load", "calibrate"], run.stderr


# ---- diffusers ----


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory):
    """A loaded pipeline for texts and the file of its quantized denoiser."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from tests.helpers.pipelines import PROMPTS, make_pipeline

    folder = tmp_path_factory.mktemp("api")
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    path = make_pipeline("text", folder / "pipe", scheduler)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    file = folder / "q.safetensors"
    tinydm.calibrate(pipe, file, prompts=PROMPTS, steps=3, batch_size=2, **QUICK)
    return pipe, file


@pytest.mark.slow
def test_a_stock_pipeline_takes_the_loaded_module(pipe: tuple) -> None:
    from tests.helpers.pipelines import psnr
    from tinydm.models.diffusers_denoiser import DiffusersDenoiser
    from tinydm.models.diffusers_pipeline import DiffusersPipeline

    stock, file = pipe
    prompts, more = ["a b", "c"], {"num_inference_steps": 3, "output_type": "np"}

    def images(count: int = 2) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        return torch.from_numpy(stock(prompts[:count], generator=generators, **more).images)

    original, full = stock.unet, images()
    try:
        stock.unet = tinydm.load(file)
        ours = images()
        assert 30 < psnr(full, ours) < 100
        assert torch.allclose(images(1), ours[:1], atol=1e-4)
    finally:
        stock.unet = original
    assert torch.equal(images(), full)
    quantized = tinydm.load(file)
    sampler = DiffusersPipeline(stock, DiffusersDenoiser(quantized.original), 3, prompts="a b")
    assert sampler.prompts == ["a b"]
    assert sampler.guidance_scale == 7.5 and len(sampler.timesteps) == 3


@pytest.mark.slow
def test_it_is_called_like_the_original(pipe: tuple) -> None:
    stock, file = pipe
    unet = tinydm.load(file)
    assert unet.config.sample_size == stock.unet.config.sample_size
    assert unet.dtype == torch.float32 and unet.device == torch.device("cpu")
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    expected = unet(x, 401, encoder_hidden_states=text).sample
    for t in (401.0, torch.tensor(401), torch.tensor([401]), torch.tensor([401, 401])):
        assert torch.equal(unet(x, t, text, return_dict=False)[0], expected)
    assert torch.equal(copy.deepcopy(unet)(x, 401, text)[0], expected)
    program = torch.export.export(unet, (x, torch.tensor([1, 1]), text), strict=False).module()
    found = program(x, torch.tensor([401, 401]), text).sample
    assert (found - expected).square().mean() < 1e-3 * expected.square().mean()
    with pytest.raises(CheckpointError, match="no tensor"):
        unet(x, 401, text, cross_attention_kwargs={"scale": 0.5})
    with pytest.raises(ValueError, match="outside"):
        unet(x, 1000, text)
    for t in (torch.tensor([1, 2, 3]), torch.tensor([[1, 2]])):
        with pytest.raises(ValueError, match="one for each of 2 samples"):
            unet(x, t, text)


@pytest.mark.slow
def test_an_offloaded_module_comes_back(pipe: tuple) -> None:
    """What enable_model_cpu_offload does with a part of a pipeline."""
    accelerate = pytest.importorskip("accelerate")
    _, file = pipe
    unet = tinydm.load(file)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    expected = unet(x, 401, text).sample
    hooked, _ = accelerate.cpu_offload_with_hook(unet, "cpu")
    assert torch.equal(hooked(x, 401, text).sample, expected)


@pytest.mark.slow
def test_what_pipelines_do_to_their_parts(pipe: tuple) -> None:
    """Attention slicing would take the quantized products away without a word, and pipelines in
    half precision hand their type on."""
    stock, file = pipe
    unet = tinydm.load(file)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    expected = unet(x, 401, text).sample
    original = stock.unet
    try:
        stock.unet = unet
        with pytest.raises(ValueError, match="attention slicing"):
            stock.enable_attention_slicing()
    finally:
        stock.unet = original
    assert torch.equal(unet(x, 401, text).sample, expected)
    half = unet.to("cpu", torch.bfloat16)(x.bfloat16(), 401, text.bfloat16()).sample
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), expected, atol=0.05)
    assert torch.equal(unet(x, 401, text).sample, expected)
    with pytest.raises(ValueError, match="keep the quantized file"):
        unet.save_pretrained("anywhere")


@pytest.mark.slow
def test_pipelines_that_cannot_be_calibrated(pipe: tuple) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    from tests.helpers.pipelines import pixel_unet

    half = DDPMPipeline(pixel_unet().half(), DDPMScheduler())
    with pytest.raises(ValueError, match=r"load the pipeline in torch\.float32"):
        tinydm.calibrate(half, **QUICK)
    half.unet = tinydm.load(pipe[1])
    with pytest.raises(ValueError, match="unet: LikeDiffusers is not supported"):
        tinydm.calibrate(half, **QUICK)
