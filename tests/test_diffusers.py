"""Folders of diffusers: full precision against diffusers' own sampling, then quantized."""

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import calibrate  # noqa: E402
import sample_diffusion  # noqa: E402
from tests.helpers.fake_cuda import CUDA, fake_cuda  # noqa: E402
from tests.helpers.pipelines import (  # noqa: E402
    PROMPTS,
    SEED,
    assembled,
    decoder,
    make_pipeline,
    pictures,
    pixel_unet,
    psnr,
    sampled,
    small_dit,
    small_pixart,
    text_parts,
    text_unet,
)
from tinydm.models import diffusers_denoiser  # noqa: E402
from tinydm.models.diffusers_denoiser import DiffusersDenoiser, ProductAttention  # noqa: E402
from tinydm.models.pipeline import image_generator  # noqa: E402
from tinydm.quant.calibration.record import Recorder  # noqa: E402
from tinydm.quant.runtime.packed_file import read_metadata  # noqa: E402
from tinydm.scripts.common.errors import ConfigError  # noqa: E402
from tinydm.scripts.experiment.assembly import assemble  # noqa: E402
from tinydm.scripts.experiment.config import parse_config  # noqa: E402
from tinydm.scripts.experiment.folder_config import config_of_folder  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
TINY = (
    "quant.search.rounds=2",
    "quant.reconstruct.finetune_iterations=2",
    "calibration.samples=8",
    "calibration.trajectories=8",
    "sampling.count=2",
    "sampling.micro_batch=2",
    "quant.weight.bits=8",
)


def generators(count: int = 3) -> list[torch.Generator]:
    return [image_generator(SEED, i) for i in range(count)]


def own_loop(folder: Path, labels: torch.Tensor | None) -> torch.Tensor:
    """What diffusers' documentation writes for a UNet2DModel, with its own modules."""
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    text = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    scheduler = getattr(diffusers, text["_class_name"]).from_config(text)
    scheduler.set_timesteps(4)
    made = generators()
    rows = [torch.randn(1, 3, 8, 8, generator=g) for g in made]
    x = torch.cat(rows) * scheduler.init_noise_sigma
    draws = "generator" in inspect.signature(scheduler.step).parameters
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = unet(scheduler.scale_model_input(x, t), t, class_labels=labels).sample
            more = {"generator": made} if draws else {}
            x = scheduler.step(out, t, x, **more).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        diffusers.DDIMScheduler(prediction_type="sample", timestep_spacing="trailing"),
        diffusers.DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
        diffusers.PNDMScheduler(steps_offset=1),
        diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
        diffusers.EulerDiscreteScheduler(beta_end=0.012),
    ],
    ids=lambda s: type(s).__name__,
)
def test_the_folders_scheduler_rules(tmp_path: Path, scheduler: Any) -> None:
    folder = make_pipeline("classes", tmp_path, scheduler)
    assembly = assembled(folder)
    labels = assembly.pipeline.labels(range(3), SEED)
    assert psnr(sampled(assembly), own_loop(folder, labels)) > 100


def test_a_learned_variance_of_pixels(tmp_path: Path) -> None:
    """6 channels of output for pictures of 3."""
    unet = pixel_unet(out_channels=6)
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    assembly = assembled(tmp_path)
    assert assembly.pipeline.shape == (3, 8, 8)
    assert psnr(sampled(assembly), own_loop(tmp_path, None)) > 100


def test_text_is_sampled_as_the_pipeline_does(tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", steps_offset=1)
    folder = make_pipeline("text", tmp_path, scheduler)
    prompts = f"model.conditioning.prompts={json.dumps(PROMPTS)}"
    ours = sampled(assembled(folder, prompts))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    prompts = [*PROMPTS, PROMPTS[0]]
    theirs = pipe(prompts, generator=generators(), num_inference_steps=4, output_type="np").images
    assert psnr(ours, torch.from_numpy(theirs).permute(0, 3, 1, 2)) > 100


def test_classes_outside(tmp_path: Path) -> None:
    pipeline = assembled(make_pipeline("dit", tmp_path, diffusers.DDIMScheduler())).pipeline
    for wrong in (-1, 1000):
        with pytest.raises(ValueError, match="numbers within 0..999"):
            pipeline.labels(range(2), SEED, [3, wrong])


def test_classes_of_a_transformer(tmp_path: Path) -> None:
    folder = make_pipeline("dit", tmp_path, diffusers.DPMSolverMultistepScheduler())
    ours = sampled(assembled(folder), classes=[3, 900, 5])
    pipe = diffusers.DiTPipeline.from_pretrained(folder)
    more = {"generator": generators(), "num_inference_steps": 4, "output_type": "np"}
    theirs = pipe([3, 900, 5], **more).images
    assert psnr(ours, torch.from_numpy(theirs).permute(0, 3, 1, 2)) > 100


def test_timesteps_of_a_consistency_model_are_any_numbers(tmp_path: Path) -> None:
    folder = make_pipeline("consistency", tmp_path, diffusers.CMStochasticIterativeScheduler())
    assembly = assembled(folder)
    assert assembly.pipeline.train_timesteps is None and max(assembly.pipeline.timesteps) > 1000
    pipe = diffusers.ConsistencyModelPipeline.from_pretrained(folder)
    theirs = pipe(3, generator=generators(), num_inference_steps=4, output_type="np").images
    assert psnr(sampled(assembly), torch.from_numpy(theirs).permute(0, 3, 1, 2)) > 100


@pytest.mark.parametrize(
    ("kind", "scheduler", "waits"),
    [
        ("pixels", diffusers.DDIMScheduler(), 0),
        ("pixels", diffusers.DDPMScheduler(), 1),  # the noise, which diffusers copies
        ("dit", diffusers.DPMSolverMultistepScheduler(), 1),  # t, likewise
    ],
    ids=["pixels, DDIM", "pixels, DDPM", "DiT"],
)
def test_a_step_waits_once_at_most(tmp_path: Path, kind: str, scheduler: Any, waits: int) -> None:
    """On the stand-in for a CUDA device (fake_cuda.py), whose images have the bits of the CPU."""
    folder = make_pipeline(kind, tmp_path, scheduler)
    found, images = [], []
    for steps in (3, 6):
        images.append(sampled(assembled(folder, f"sampler.steps={steps}"), 2))
        with fake_cuda() as mode:
            keys = ["sampling.micro_batch=2", f"model.checkpoint={folder}"]
            config = config_of_folder([*keys, f"sampler.steps={steps}"])
            assembly = assemble(config, device=CUDA)
            before = mode.waits
            x = assembly.pipeline.sample(assembly.denoiser, range(2), SEED, device=CUDA)
            found.append(mode.waits - before)
            assert torch.equal((x / 2 + 0.5).clamp(0, 1), images[-1])
    assert found[1] - found[0] == 3 * waits


def test_steps_that_strength_leaves_out(tmp_path: Path) -> None:
    """Inpainting with less than full strength, as SDXL's has by default, begins later."""
    text, tokenizer = text_parts(tmp_path / "words")
    unet, parts = text_unet(in_channels=9), (diffusers.DDIMScheduler(), None, None, None, False)
    pipe = diffusers.StableDiffusionInpaintPipeline(decoder(), text, tokenizer, unet, *parts)
    pipe.save_pretrained(tmp_path / "folder")
    image, mask = Image.new("RGB", (8, 8), (200, 90, 30)), Image.new("L", (8, 8), 255)
    given = {"image": image, "mask_image": mask}
    for name, picture in given.items():
        picture.save(tmp_path / f"{name}.png")
    params = {name: str(tmp_path / f"{name}.png") for name in given}
    more = {"strength": 0.5, "height": 8, "width": 8}
    keys = [f"model.params={json.dumps(params | more)}", 'model.conditioning.prompts=["a b"]']
    assembly = assembled(tmp_path / "folder", *keys)
    pipeline, calls = assembly.pipeline, Recorder(assembly.denoiser)
    assert pipeline.latents(calls, range(2), SEED).shape == (2, 4, 8, 8)
    assert calls.states(2, "cpu").timesteps == pipeline.timesteps == [251, 1]
    theirs = pipe("a b", **given, **more, generator=generators(1), num_inference_steps=4)
    ours = (sampled(assembly, 1)[0].permute(1, 2, 0) * 255).round()
    assert (ours - torch.from_numpy(np.array(theirs.images[0]))).abs().max() <= 1


def test_noise_of_a_text_pipeline(tmp_path: Path) -> None:
    """sampler.eta reaches the scheduler, of which pipelines ask whether it takes one."""
    folder = make_pipeline("text", tmp_path, diffusers.DDIMScheduler())
    prompts = f"model.conditioning.prompts={json.dumps(PROMPTS)}"
    ours = sampled(assembled(folder, prompts, "sampler.eta=1.0"), 2)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    more = {"generator": generators(2), "num_inference_steps": 4, "output_type": "np"}
    theirs = pipe(PROMPTS, eta=1.0, **more).images
    assert psnr(ours, torch.from_numpy(theirs).permute(0, 3, 1, 2)) > 100


def test_latents_are_decoded_together(tmp_path: Path) -> None:
    """As many in a call whatever the batch, so that an image does not depend on it."""
    folder = make_pipeline("dit", tmp_path, diffusers.DDIMScheduler())
    expected = sampled(assembled(folder, "sampling.micro_batch=3"))
    assembly = assembled(folder, "sampling.decode_batch=2", "sampling.micro_batch=3")
    decoder = assembly.pipeline._pipe.vae.decoder
    seen: list[int] = []
    decoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    found = sampled(assembly)
    assert seen == [2, 2] and psnr(found, expected) > 100


def test_an_image_depends_on_its_number_alone(tmp_path: Path) -> None:
    folder = make_pipeline("pixels", tmp_path, diffusers.DDPMScheduler())
    assembly = assembled(folder)
    alone = assembly.pipeline.sample(assembly.denoiser, [2], SEED)
    assert torch.equal(assembly.pipeline.sample(assembly.denoiser, range(3), SEED)[2:], alone)


def test_variants_shards_and_the_averaged_weights(tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler()
    plain = make_pipeline("pixels", tmp_path / "plain", scheduler)
    expected = sampled(assembled(plain))
    shards = make_pipeline("pixels", tmp_path / "shards", scheduler, max_shard_size="20KB")
    assert len(list((shards / "unet").glob("*-of-*.safetensors"))) > 1
    assert torch.equal(sampled(assembled(shards)), expected)
    half = make_pipeline("pixels", tmp_path / "half", scheduler, variant="fp16")
    assert psnr(sampled(assembled(half)), expected) > 60
    with torch.no_grad():
        averaged = pixel_unet()
        averaged.save_pretrained(plain / "unet_ema")
    assert psnr(sampled(assembled(plain)), expected) < 40
    assert torch.equal(sampled(assembled(plain, "model.weights=raw")), expected)
    (plain / "model_index.json").unlink()  # as within a folder that training writes
    assert torch.equal(sampled(assembled(plain, "model.weights=raw")), expected)


@pytest.mark.parametrize(
    ("make", "named", "split", "timestep"),
    [
        (pixel_unet, {}, 4, 2 + 6),
        (text_unet, {"encoder_hidden_states": torch.randn(2, 5, 8)}, 4, 2 + 6),
        (small_dit, {"class_labels": torch.tensor([1, 2])}, 0, 4),
        (small_pixart, {"encoder_hidden_states": torch.randn(2, 5, 8)}, 0, 2),
    ],
)
def test_products_are_modules_and_roles_fit(
    make: Any, named: dict[str, torch.Tensor], split: int, timestep: int
) -> None:
    torch.manual_seed(1)
    original = make().eval()
    x, t = torch.randn(2, original.config.in_channels, 8, 8), torch.tensor([10, 500])
    with torch.no_grad():
        inputs = {diffusers_denoiser.DENOISERS[type(original).__name__][0]: x, "timestep": t}
        expected = original(**inputs, **named, return_dict=False)[0]
        denoiser = DiffusersDenoiser(original)
        assert psnr(denoiser(x, t, **named), expected) > 110
    roles = denoiser.layer_roles()
    count = sum(isinstance(m, ProductAttention) for m in denoiser.modules())
    assert len(roles.matmuls) == 2 * count > 0
    assert len(roles.concat_split) >= split and len(roles.timestep_only) >= timestep
    seen = inputs_seen(denoiser, roles.timestep_only, x, t[:1].expand(2), named)
    other = inputs_seen(
        denoiser, roles.timestep_only, -x, t[:1].expand(2), {n: v.flip(0) for n, v in named.items()}
    )
    assert all(torch.equal(seen[name], other[name]) for name in roles.timestep_only)
    for name in (*roles.inputs, *roles.outputs, *roles.units, *roles.concat_split):
        assert isinstance(denoiser.get_submodule(name), nn.Module)


def inputs_seen(
    denoiser: nn.Module, names: tuple[str, ...], x: torch.Tensor, t: torch.Tensor, named: dict
) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    handles = [
        denoiser.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0].detach())
        )
        for name in names
    ]
    with torch.no_grad():
        denoiser(x, t, **named)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("kind", "scheduler", "options"),
    [
        ("pixels", diffusers.DDIMScheduler(), []),
        ("text", diffusers.DDIMScheduler(), ["--prompt", "a b"]),
        ("dit", diffusers.DPMSolverMultistepScheduler(), ["--classes", "1,5"]),
        ("consistency", diffusers.CMStochasticIterativeScheduler(), []),
    ],
    ids=["pixels", "text", "dit", "consistency"],
)
def test_one_argument_is_enough(
    tmp_path: Path, kind: str, scheduler: Any, options: list[str], capsys: pytest.CaptureFixture
) -> None:
    """Calibrate, pack, load and sample without a configuration."""
    folder = make_pipeline(kind, tmp_path / "folder", scheduler)
    run, few = tmp_path / "run", ["--steps", "3", *options, "--set", *TINY]
    calibrate.main(["--ckpt", str(folder), "--out", str(run), *few])
    told = {"consistency": "something else", "dit": "weighs earlier outputs"}.get(kind, "")
    assert told in capsys.readouterr().out
    quantized = str(run / "quantized.safetensors")
    sample_diffusion.main(["--quantized", quantized, "--out", str(tmp_path / "q")])
    sample_diffusion.main(["--config", str(run / "config.yaml"), "--out", str(tmp_path / "full")])
    assert psnr(pictures(tmp_path / "q"), pictures(tmp_path / "full")) > 28
    metadata = read_metadata(quantized)
    assert (metadata["train_timesteps"] is None) == (kind == "consistency")
    table = metadata["layers"]
    assert sum(row["kind"] == "matmul" for row in table) > 0
    assert all(row["inputs"] or row["time"] for row in table)


def test_values_of_a_folder_can_be_written_by_hand() -> None:
    text = "name: x\nmodel: {arch: diffusers, checkpoint: some/folder}\n"
    config = parse_config(text, "x.yaml")
    assert (config.sampler.name, config.sampler.guidance_scale) == ("scheduler", None)
    with pytest.raises(ConfigError, match=r"guidance_scale must be a number"):
        parse_config(
            "name: x\nmodel: {arch: ddim_unet}\nsampler: {guidance_scale: null}\n", "x.yaml"
        )


def test_absent_values_within_an_argument() -> None:
    """As PixArt's resolution and aspect ratio, where the network takes none."""
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 8)
    more = {"encoder_hidden_states": text, "added_cond_kwargs": {"resolution": None}}
    named = diffusers_denoiser.flat(text_unet(), (x, 5), more)
    assert sorted(named) == ["encoder_hidden_states", "t", "x"]


@pytest.mark.parametrize(
    ("scheduler", "corrected"),
    [
        (diffusers.EulerDiscreteScheduler(), ("drift", "ptqd")),
        (diffusers.DPMSolverMultistepScheduler(solver_order=1), ("drift", "ptqd")),
        (diffusers.DPMSolverMultistepScheduler(), ("ptqd",)),
        (diffusers.PNDMScheduler(skip_prk_steps=True), ("ptqd",)),
        (diffusers.HeunDiscreteScheduler(), ()),
        (diffusers.DDIMScheduler(prediction_type="v_prediction"), ()),
    ],
)
def test_corrections_that_a_step_takes(
    tmp_path: Path, scheduler: Any, corrected: tuple[str, ...]
) -> None:
    pipeline = assembled(make_pipeline("pixels", tmp_path, scheduler)).pipeline
    kinds = ("drift", "ptqd")
    assert tuple(kind for kind in kinds if pipeline.uncorrected(kind) is None) == corrected
