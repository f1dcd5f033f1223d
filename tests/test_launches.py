"""How many kernels a step of sampling launches, counted on the stand-in for a device
(tests/helpers/fake_cuda.py): of small batches a card spends its time on launches. The networks are
those of the configurations, narrow, which does not change the number.

python -m pytest tests/test_launches.py
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.helpers.fake_cuda import CUDA, FakeCuda, fake_cuda
from tests.helpers.integer_layers import TIMESTEPS, context, deployed, quant_layer
from tinydm.models.conditioning import ClassEmbedder
from tinydm.models.ddim_unet import DDIMUNet
from tinydm.models.ldm_unet import LDMUNet
from tinydm.models.pipeline import build_pipeline
from tinydm.quant.backends.tensor_cores import IntegerProductLayer

# Operators that may be added: one in each of the six attentions of CIFAR-10's network, which are
# the rarest part, is too many.
SLACK = 5
SCHEDULE = {"betas": "linear", "beta_start": 1e-4, "beta_end": 0.02, "train_timesteps": 1000}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """As Pipeline.sample. In inference mode the stand-in would see operators that consist of
    others."""
    with torch.no_grad():
        yield


def cifar10() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """configs/cifar10.yaml, 8 channels instead of 128."""
    levels = {"ch_mult": (1, 2, 2, 2), "num_res_blocks": 2, "attn_resolutions": (16,)}
    return DDIMUNet(ch=8, norm_groups=4, **levels), (torch.randn(1, 3, 32, 32),)


def imagenet256() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """configs/imagenet256.yaml, 8 channels instead of 192."""
    levels = {"channel_mult": (1, 2, 3, 5), "num_res_blocks": 2, "attention_resolutions": (8, 4, 2)}
    attention = {"num_heads": 1, "use_spatial_transformer": True, "context_dim": 8}
    ends = {"in_channels": 3, "out_channels": 3}
    net = LDMUNet(model_channels=8, norm_groups=4, **levels, **attention, **ends)
    return net, (torch.randn(1, 3, 16, 16), torch.randn(1, 1, 8))


def launches(mode: FakeCuda, model: nn.Module, given: tuple[torch.Tensor, ...]) -> int:
    """Of a call, after one that fills look-ups."""
    x, *rest = (value.to(CUDA) for value in given)
    model(x, t := torch.full((1,), 500), *rest)
    before = mode.launches
    model(x, t, *rest)
    return mode.launches - before


def test_what_launches() -> None:
    with fake_cuda() as mode:
        x = torch.randn(2, 3, device=CUDA)
        counts = []
        for action in (
            lambda: x + 1,
            lambda: x.mul_(2),
            lambda: x.t().contiguous(),
            lambda: x.double(),
            lambda: torch.zeros(2, device=CUDA),
            lambda: x[0].view(3, 1).expand(3, 2).detach(),
            lambda: torch.empty_like(x),
            lambda: torch.empty(2, device=CUDA),
            lambda: x.cpu(),
            lambda: torch.ones(2).to(CUDA),
            lambda: float(x[0, 0]),
        ):
            before = mode.launches
            action()
            counts.append(mode.launches - before)
    assert counts == [1] * 5 + [0] * 6


@pytest.mark.parametrize(
    ("network", "full", "quantized"),
    [(cifar10, 311, 689), pytest.param(imagenet256, 731, 2179, marks=pytest.mark.slow)],
)
def test_launches_of_a_call(network, full: int, quantized: int) -> None:
    """In full precision and fake-quantized at W4A8: quantizing takes three for each input, and the
    scale of the output one, where nothing is added to it."""
    net, given = network()
    net = net.eval()
    x, *rest = given
    policy = {"weight": 4, "activation": 8, "softmax_by_row": True}
    fake = deployed(copy.deepcopy(net), x, torch.full((1,), 500), *rest, **policy)
    with fake_cuda() as mode:
        found = [launches(mode, model.to(CUDA), given) for model in (net, fake)]
    assert found[0] <= full + SLACK and found[1] <= quantized + SLACK, found


@pytest.mark.parametrize(("split", "exact"), [(0, False), (2, False), (0, True)])
def test_look_ups_are_filled_once_for_each_group(split: int, exact: bool) -> None:
    """Not for each of hundreds of timesteps."""
    at = context()
    layer = quant_layer(at, nn.Conv2d(4, 4, 1), split=split, scaled=True)
    layer = IntegerProductLayer(layer) if exact else layer
    counts = []
    with fake_cuda() as mode:
        layer.to(CUDA)
        x = torch.randn(1, 4, 3, 3, device=CUDA)
        for timestep in TIMESTEPS:  # whose groups are 0, 1, 1, 0
            at.set(torch.tensor([timestep]))
            before = mode.launches
            layer(x)
            counts.append(mode.launches - before)
    assert counts[0] > counts[1] > counts[2] == counts[3]


@pytest.mark.parametrize(
    ("name", "eta", "guidance", "most"),
    [("ddim", 0.0, 1.0, 7), ("ddim", 1.0, 1.0, 9), ("ldm_ddim", 0.0, 3.0, 12)],
)
def test_launches_of_a_step_beside_the_call(
    name: str, eta: float, guidance: float, most: int
) -> None:
    arch = "ddim_unet" if name == "ddim" else "ldm_unet"
    sampler = {"name": name, "skip": "uniform", "eta": eta, "guidance_scale": guidance}
    embedder = ClassEmbedder(5, 6) if guidance != 1.0 else None
    counts = []
    for steps in (4, 8):
        pipeline = build_pipeline(
            arch,
            {"in_channels": 3, "image_size": 8},
            SCHEDULE,
            sampler | {"steps": steps, "clip_denoised": False},
            embedder=embedder,
            micro_batch=2,
        )
        with fake_cuda() as mode:
            if embedder is not None:
                embedder.to(CUDA)
            pipeline.sample(lambda x, t, context=None: x, range(2), 1, device=CUDA)
            counts.append(mode.launches)
    assert (counts[1] - counts[0]) / 4 <= most
