"""models/pipeline.py: an image depends on the seed and its index alone; batches of a fixed size."""

import numpy as np
import pytest
import torch

from tests.helpers.narrow import PARAMS, SAMPLER
from tinydm.models.pipeline import FixedBatch, build_denoiser, build_pipeline, image_generator
from tinydm.models.samplers import SamplingError


def make(sampler: dict, **options):
    values = SAMPLER | {"guidance_scale": 1.0} | sampler
    return build_pipeline("ddim_unet", PARAMS, {}, values, micro_batch=2, **options)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "plms", "dpmpp"])
def test_an_image_depends_on_seed_and_index_alone(name: str) -> None:
    pipeline = make({"name": name, "skip": "uniform", "steps": 4})
    torch.manual_seed(0)
    model = build_denoiser("ddim_unet", PARAMS)
    together = pipeline.sample(model, [4, 0, 9], seed=1)
    for row, index in enumerate([4, 0, 9]):
        assert torch.equal(together[row : row + 1], pipeline.sample(model, [index], seed=1))
    assert together.shape == (3, 3, 8, 8)
    assert not torch.equal(together, pipeline.sample(model, [4, 0, 9], seed=2))


def test_sampling_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    make({}).sample(half, [0], seed=1)
    assert torch.equal(torch.rand(1), expected)


def half(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.5 * x


def test_not_finite_names_the_timestep() -> None:
    def broken(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * (torch.nan if int(t[0]) < 400 else 1.0)

    pipeline = make({"skip": "uniform", "steps": 4})  # 750, 500, 250, 0
    with pytest.raises(SamplingError, match="timestep 250"):
        pipeline.sample(broken, [0], seed=1)


def test_generators_of_one_run_are_all_different() -> None:
    """torch reads 32 bits of a seed: hashes of 200,000 indices would collide there."""
    seeds = {image_generator(7, index).initial_seed() for index in range(200_000)}
    assert len(seeds) == 200_000 and max(seeds) < 2**32
    assert image_generator(2**63 - 1, 0).initial_seed() != image_generator(0, 0).initial_seed()


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_fixed_batch_calls_with_its_size(rows: int) -> None:
    sizes = []

    def model(x: torch.Tensor, t: torch.Tensor, *, y: torch.Tensor, scale: float) -> torch.Tensor:
        sizes.append((len(x), len(t), len(y)))
        return x * y[:, None, None, None] * scale + t[:, None, None, None]

    x, t, y = torch.randn(rows, 3, 2, 2), torch.arange(rows), torch.arange(rows) + 1
    assert torch.equal(FixedBatch(model, 4)(x, t, y=y, scale=2.0), model(x, t, y=y, scale=2.0))
    assert set(sizes[:-1]) == {(4, 4, 4)} and len(sizes) - 1 == -(-rows // 4)


def test_classes_are_spread_evenly_or_taken_in_turn() -> None:
    params = {
        "image_size": 8,
        "in_channels": 3,
        "out_channels": 6,
        "model_channels": 8,
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "channel_mult": [1, 2],
        "num_heads": 1,
        "num_classes": 10,
        "norm_groups": 2,
    }
    sampler = {"name": "guided_ddpm", "steps": 2, "skip": "uniform", "eta": 0.0}
    sampler |= {"clip_denoised": True, "guidance_scale": 1.0}
    pipeline = build_pipeline("adm_unet", params, {"betas": "cosine"}, sampler, micro_batch=2)
    labels = pipeline.labels(range(20), seed=3)
    assert np.bincount(labels).tolist() == [2] * 10
    assert labels.tolist() != sorted(labels.tolist())
    assert pipeline.labels([5, 0, 1], 3, [7, 8]).tolist() == [8, 7, 8]
    torch.manual_seed(0)
    model = build_denoiser("adm_unet", params)
    images = [pipeline.sample(model, [2], seed=1, classes=[c]) for c in (0, 1)]
    assert images[0].shape == (1, 3, 8, 8) and not torch.equal(*images)


def test_importance_is_how_far_an_error_moves_gaussian_images() -> None:
    """With data N(0, d^2) the best denoiser is linear, and so is what an error of a step does."""
    pipeline = make({"clip_denoised": False, "eta": 0.0, "steps": 50})
    d, table = 2.0, torch.from_numpy(pipeline.alphas_cumprod)
    wrong = -1

    def gaussian(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = table[t].view(-1, 1, 1, 1)
        error = 0.1 if int(t[0]) == wrong else 0.0
        return (1 - a).sqrt() * x / (a * d**2 + 1 - a) + error

    straight = pipeline.sample(gaussian, [0], seed=1)
    moved = []
    for wrong in pipeline.timesteps[::7]:  # noqa: B007 (gaussian reads it)
        moved.append(float((pipeline.sample(gaussian, [0], seed=1) - straight).square().mean()))
    ratio = np.array(moved) / pipeline.step_importance(data_std=d, floor=0.0)[::7]
    assert max(moved) > 1000 * min(moved)
    assert ratio.max() < 1.7 * ratio.min()  # the formula is that of small steps
    assert ratio[4:].max() < 1.02 * ratio[4:].min()


def test_no_step_of_a_published_schedule_has_most_of_the_importance() -> None:
    """LDM's last of 250 uniform steps is a long one, guided diffusion's first ones are longest."""
    for sampler, steps in (("ldm_ddim", 250), ("ldm_ddim", 20), ("guided_ddpm", 250)):
        arch = "adm_unet" if sampler.startswith("guided") else "ldm_unet"
        values = SAMPLER | {"name": sampler, "skip": "uniform", "steps": steps}
        pipeline = build_pipeline(arch, PARAMS, {}, values | {"guidance_scale": 1.0})
        importance = pipeline.step_importance()
        assert len(importance) == steps and importance.min() >= 0.02
        assert importance.max() < 0.3 * importance.sum()
