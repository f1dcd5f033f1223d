"""Full precision with --compile: its layers, a whole denoiser, and the command line."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.integer_layers import compiled_with
from tests.helpers.narrow import SAMPLING, write_narrow
from tests.helpers.rooms import files_of
from tests.helpers.sampling import sample
from tinydm.models.ddim_unet import DDIMUNet
from tinydm.quant.backends.build import COMPILERS, instructions_here
from tinydm.quant.backends.full_precision import (
    FEW,
    FloatConv,
    FloatLinear,
    FloatMatMul,
    to_fast_float,
)
from tinydm.quant.backends.native import Compiled
from tinydm.scripts.experiment.runs import beside

pytestmark = [
    pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler here"),
    pytest.mark.skipif(not instructions_here(), reason="an x86 processor with AVX2 is needed"),
    pytest.mark.usefixtures("signals", "inference"),
]
LAST = torch.channels_last


@pytest.fixture(scope="module", params=instructions_here())
def compiled(request: pytest.FixtureRequest) -> Compiled:
    """With each set of instructions that this processor has."""
    return compiled_with(request.param)


# Channels, outputs, kernel, stride, padding: registers half full, more than one strip, no border.
GEOMETRIES = [
    (20, 40, 3, 1, 1),
    (3, 16, 3, 2, 0),
    (35, 3, 1, 1, 0),
    (8, 70, (1, 3), (2, 1), (0, 2)),
    (4, 5, 1, 2, 1),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("size", [(3, 5, 60), (1, 40, 7)], ids=str)
def test_convolution(compiled: Compiled, geometry: tuple, size: tuple[int, ...]) -> None:
    """With everything before and after it, and rows that are independent to the bit."""
    channels, outputs, *rest = geometry
    batch, height, width = size
    conv = nn.Conv2d(channels, outputs, *rest)
    own, norm = FloatConv(conv, compiled), nn.GroupNorm(1, channels, eps=1e-6)
    norm.weight.normal_(), norm.bias.normal_()
    x = (2 + 3 * torch.randn(batch, channels, height, width)).contiguous(memory_format=LAST)
    exact = copy.deepcopy(conv).double()(x.double())
    close = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(own(x).double(), exact, **close)
    assert torch.equal(own(x), own(x.contiguous()))  # of any layout
    wide = torch.cat((x, x), dim=1)[:, :channels]  # a part of the channels
    assert torch.equal(own(x), own(wide))
    shape = exact.shape
    for plus in (None, torch.randn(shape[:2])[:, :, None, None], torch.randn(shape)):
        whole = own.after_norm_silu(norm, x, plus)
        right = conv(F.silu(norm(x))) + (0 if plus is None else plus)
        torch.testing.assert_close(whole, right, rtol=1e-5, atol=5e-5)
        parts = [
            own.after_norm_silu(norm, x[i : i + 1], None if plus is None else plus[i : i + 1])
            for i in range(batch)
        ]
        assert torch.equal(torch.cat(parts), whole)
        assert whole.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("size", [(4, 20, 9), (4, 40, 20)], ids=["small map", "large map"])
def test_threads(compiled: Compiled, size: tuple[int, ...]) -> None:
    """The same bytes by any number of threads, also where each makes whole samples."""
    batch, height, width = size
    own, norm = FloatConv(nn.Conv2d(24, 40, 3, padding=1), compiled), nn.GroupNorm(3, 24)
    x = torch.randn(batch, 24, height, width).contiguous(memory_format=LAST)
    plus, before = torch.randn(batch, 40, height, width), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found += [(own(x), own.after_norm_silu(norm, x, plus))]
    finally:
        torch.set_num_threads(before)
    for plain, whole in found:
        assert torch.equal(plain, found[0][0]) and torch.equal(whole, found[0][1])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
def test_linear(compiled: Compiled, bias: bool) -> None:
    """Few rows, which are independent to the bit, and those that PyTorch multiplies."""
    linear = nn.Linear(45, 70, bias)
    own, x = FloatLinear(linear, compiled), torch.randn(40, 1, 45)
    exact = copy.deepcopy(linear).double()(x.double())
    few = own(x[:FEW])
    torch.testing.assert_close(few.double(), exact[:FEW], rtol=1e-5, atol=1e-5)
    assert torch.equal(own(x[3:5]), few[3:5]) and torch.equal(own(x[4]), few[4])
    assert torch.equal(own(x), linear(x)) and torch.equal(own(x[::20]), linear(x[::20]))
    assert own(x[:0]).shape == (0, 1, 70)
    with pytest.raises(RuntimeError):
        own(x[:1, :, 1:])


def test_softmax(compiled: Compiled) -> None:
    scores, right = 9 * torch.randn(2, 7, 37), torch.randn(2, 37, 5)
    exact = torch.softmax(0.3 * scores.double(), -1) @ right.double()
    found = FloatMatMul(compiled).after_softmax(scores.clone(), 0.3, right)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_denoiser() -> None:
    """The same eps up to rounding, by any number of threads; a copy and what is read again, too."""
    levels = {"ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,)}
    full = DDIMUNet(ch=16, **levels, image_size=16, norm_groups=8).eval()
    fast = to_fast_float(copy.deepcopy(full), Compiled()).to(memory_format=LAST)
    kinds = {type(module) for module in fast.modules()}
    assert {FloatConv, FloatMatMul} <= kinds and not kinds & {nn.Conv2d, nn.GroupNorm}
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([1, 500, 999])
    found, before = fast(x, t), torch.get_num_threads()
    torch.testing.assert_close(found, full(x, t), rtol=1e-4, atol=1e-5)
    try:
        torch.set_num_threads(3)
        for model in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            torch.testing.assert_close(model(x, t), found, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="5 channels, the layer 3"):
        fast.conv_in(torch.randn(1, 5, 16, 16))


def test_others_stay() -> None:
    """Groups, dilation, padding by name and half precision are PyTorch's."""
    convs = nn.ModuleList(
        [
            nn.Conv2d(4, 4, 3, groups=2),
            nn.Conv2d(4, 4, 3, dilation=2),
            nn.Conv2d(4, 4, 3, padding="same"),
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
            nn.Conv2d(4, 4, 3).bfloat16(),
        ]
    )
    assert all(type(module) is nn.Conv2d for module in to_fast_float(convs, Compiled()).denoiser)


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Without --quantized: the identity says what made the images; without a compiler, they are
    those of before."""
    command = ("--config", write_narrow(tmp_path, SAMPLING) / "narrow.yaml", "--out")
    out = tmp_path / "images"
    assert sample(*command, out, "--compile") == 0
    report = json.loads(beside(out, "report.json").read_text())
    assert report["backend"] == "full precision, compiled"
    assert len(files_of(out)) == 7
    assert sample(*command, out) == 2  # other bytes could join
    assert sample(*command, tmp_path / "plain") == 0
    monkeypatch.setenv("PATH", str(tmp_path))
    capsys.readouterr()
    assert sample(*command, tmp_path / "without", "--compile") == 0
    assert "note: --compile changes nothing here: no C++ compiler" in capsys.readouterr().out
    assert files_of(tmp_path / "without") == files_of(tmp_path / "plain")
    without, plain = (beside(tmp_path / n, "identity.json") for n in ("without", "plain"))
    assert without.read_bytes() == plain.read_bytes()
