"""The compiled pass of --compile: its codes, what falls back, and the command line."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from tests.helpers.integer_layers import (
    compiled_with,
    context,
    psnr,
    quant_layer,
    quantizer,
    same,
    small_unet,
)
from tests.helpers.narrow import SAMPLING
from tests.helpers.rooms import files_of
from tests.helpers.sampling import sample
from tinydm.models.pipeline import FixedBatch
from tinydm.quant.backends import build
from tinydm.quant.backends.build import COMPILERS, CompileError, instructions_here
from tinydm.quant.backends.native import Compiled, pixel_stride
from tinydm.quant.backends.native_layers import CompiledNorm
from tinydm.quant.backends.onednn import Int8Layer
from tinydm.quant.backends.selection import int8_supported, integer_module, to_int8
from tinydm.quant.core.affine import QuantizerStep
from tinydm.quant.runtime.denoiser import QuantDenoiser
from tinydm.quant.runtime.layers import QuantMatMul
from tinydm.quant.runtime.packed_file import to_bytes
from tinydm.scripts.bench.random_models import deployed_of
from tinydm.scripts.experiment.config import load_config, resolved_yaml
from tinydm.scripts.experiment.runs import beside

REASON = int8_supported()
if not any(map(shutil.which, COMPILERS)):
    REASON = "no C++ compiler"
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"not here: {REASON}"),
    pytest.mark.usefixtures("signals", "inference"),
]
LAST = torch.channels_last


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return Compiled()


@pytest.fixture(scope="module", params=instructions_here())
def each(request: pytest.FixtureRequest) -> Compiled:
    """With each set of instructions that this processor has."""
    return compiled_with(request.param)


def step_of(inverse: float, scale: float, zero_point: int, top: int) -> QuantizerStep:
    return QuantizerStep(inverse, scale, -zero_point, top - zero_point)


def codes_of(x: torch.Tensor, inverse: float, zero_point: int, top: int) -> torch.Tensor:
    return (torch.round(x * inverse) + zero_point).clamp(0, top).to(torch.uint8)


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (3, 64, 9, 7), (1, 33, 1, 1)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_plain_codes_are_equal(compiled: Compiled, shape: tuple[int, ...], threads: int):
    """Bit by bit, ends of the range and ties included; also of a part of the channels."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = (20 * torch.randn(shape)).contiguous(memory_format=LAST)
        x[0, :3] = torch.tensor([0.5, -2.5, 1e9]).view(3, 1, 1)
        factors = torch.rand(shape[1]) + 0.5
        scaled = x * factors.view(-1, 1, 1)
        ((got, scale, zero_point),) = compiled.codes(x, factors, step_of(0.75, 4 / 3, 9, 127))
        assert torch.equal(got, codes_of(scaled, 0.75, 9, 127)) and (scale, zero_point) == (
            4 / 3,
            9,
        )
        assert got.is_contiguous(memory_format=LAST)
        rest, step = factors[2:].contiguous(), step_of(1.5, 2 / 3, 128, 255)
        ((part, *_),) = compiled.codes(x[:, 2:], rest, step, (2, 1), shape[1] + 1)
        inner = F.pad(codes_of(scaled[:, 2:], 1.5, 128, 255).int(), (1, 1, 2, 2), value=128)
        assert torch.equal(part[:, : shape[1] - 2].int(), inner)
        planes = compiled.codes(x, factors, step_of(200.0, 1 / 200, 32000, 65535), (0, 1))
        value = sum(scale * (q.double() - z) for q, scale, z in planes)
        codes = (torch.round(scaled * 200.0) + 32000).clamp(0, 65535) - 32000
        assert torch.allclose(value, F.pad(codes.double(), (1, 1)) / 200)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_codes_of_a_norm(compiled: Compiled, mean: float):
    """One code apart at most, where a value lies at the border of two codes."""
    norm = nn.GroupNorm(4, 24, eps=1e-6)
    norm.weight.uniform_(0.5, 2), norm.bias.normal_()
    x = (mean + 3 * torch.randn(5, 24, 17, 9)).contiguous(memory_format=LAST)
    factors = torch.rand(24) + 0.5
    exact = F.silu(F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-6))
    exact = exact * factors.view(-1, 1, 1) * 40.0
    ((got, *_),) = compiled.norm_silu_codes(x, norm, factors, step_of(40.0, 1 / 40, 12, 255))
    border = (exact - exact.floor() - 0.5).abs() < 1e-3
    expected = (exact.round() + 12).clamp(0, 255)
    off = (got.double() - expected).abs()
    assert off.max() <= 1 and not off[~border].any() and border.double().mean() < 0.01
    for row, codes in zip(x, got, strict=True):  # whatever the batch and the border
        ((one, *_),) = compiled.norm_silu_codes(
            row[None], norm, factors, step_of(40.0, 1, 12, 255), (1, 1)
        )
        assert torch.equal(one[0, :, 1:-1, 1:-1], codes)
        assert one[:, :, 0].eq(12).all() and one[..., -1].eq(12).all()


def test_extreme_inputs(compiled: Compiled):
    """SiLU far from zero, and a constant feature map."""
    norm = nn.GroupNorm(1, 2)
    norm.weight.fill_(1e3), norm.bias.zero_()
    x = torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4).contiguous(memory_format=LAST)
    ones = torch.ones(2)
    ((got, *_),) = compiled.norm_silu_codes(x, norm, ones, step_of(0.1, 10.0, 3, 255))
    assert got[0, 0].eq(3).all() and got[0, 1].eq(103).all()
    norm.bias.fill_(50.0)
    ((got, *_),) = compiled.norm_silu_codes(x.abs(), norm, ones, step_of(1.0, 1.0, 0, 255))
    assert got.eq(50).all()


def test_strides():
    x = torch.zeros(2, 8, 4, 4)
    last = x.contiguous(memory_format=LAST)
    assert pixel_stride(x) is None and pixel_stride(last) == 8 and pixel_stride(last[:, 3:]) == 8
    assert pixel_stride(last[:, :, ::2]) is None and pixel_stride(last[::2]) in (8, None)
    assert pixel_stride(last.double()) is None and pixel_stride(x[:, :, 0]) is None


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("split, act_bits", [(0, 8), (3, 8), (0, 16)])
def test_layer(compiled: Compiled, scaled: bool, split: int, act_bits: int):
    """Channels beside each other, or not; one timestep, or a mixed batch."""
    at = context()
    layer = nn.Conv2d(8, 8, 3, padding=1)
    fake = quant_layer(at, layer, split=split, act_bits=act_bits, scaled=scaled)
    exact = Int8Layer(copy.deepcopy(fake), False, compiled)
    for q in exact.inputs:
        q.context = at
    x = 2 * torch.randn(4, 8, 6, 6)
    for t in (torch.full((4,), 300), torch.full((4,), 900), torch.tensor([0, 300, 600, 900])):
        at.set(t)
        for given in (x, x.contiguous(memory_format=LAST)):
            same(exact(given), fake(given))


@pytest.mark.parametrize("scaled, bits", [(False, 4), (True, 8)])
@pytest.mark.parametrize("channels, outputs", [(8, 5), (20, 70), (16, 33)])
def test_layer_of_a_norm(each: Compiled, scaled: bool, bits: int, channels: int, outputs: int):
    """With something to add: for each pixel, for each sample, or the same for all of them."""
    at, norm = context(), nn.GroupNorm(4, channels)
    layer = nn.Conv2d(channels, outputs, 3, padding=1)
    fake = quant_layer(at, layer, bits=bits, scaled=scaled)
    exact = integer_module(copy.deepcopy(fake), False, each)
    exact.inputs[0].context = at
    x = torch.randn(3, channels, 5, 13).contiguous(memory_format=LAST)
    vector = torch.randn(3, outputs, 1, 1)
    pluses = [None, torch.randn(3, outputs, 5, 13), vector, vector[:1].expand(3, -1, -1, -1)]
    pluses += [vector[:1], torch.randn(1, outputs, 5, 13), torch.randn(3, 1, 5, 13)]
    for t in (torch.full((3,), 300), torch.tensor([0, 300, 600])):
        at.set(t)
        for plus in pluses:
            expected = fake(F.silu(norm(x))) + (0 if plus is None else plus)
            given = exact.after_norm_silu(norm, x.clone(), plus)
            assert psnr(given, expected) >= 45
            assert torch.equal(exact.after_norm_silu(norm, x.contiguous(), plus), given) or t[0]


@pytest.mark.parametrize("act_bits, split", [(8, 0), (16, 0), (8, 30)])
def test_outputs_depend_neither_on_the_batch_nor_on_threads(
    each: Compiled, act_bits: int, split: int
):
    """Large enough for the threads to share a sample; bit by bit."""
    at, norm = context(), nn.GroupNorm(5, 100)
    fake = quant_layer(at, nn.Conv2d(100, 70, 3, padding=1), split=split, act_bits=act_bits)
    exact = integer_module(fake, False, each)
    product = integer_module(
        QuantMatMul(quantizer(at, 8, [0, 0]), quantizer(at, 8, [128, 128]), True), False, each
    )
    x = torch.randn(3, 100, 24, 20).contiguous(memory_format=LAST)
    scores, right = torch.randn(3, 130, 53), torch.randn(3, 53, 37)
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            at.set(torch.full((3,), 300))
            whole = exact(x), exact.after_norm_silu(norm, x), product(scores, right)
            rows = [
                (exact(x[i : i + 1]), exact.after_norm_silu(norm, x[i : i + 1]))
                + (product(scores[i : i + 1], right[i : i + 1]),)
                for i in range(3)
            ]
            outputs += [whole, tuple(map(torch.cat, zip(*rows, strict=True)))]
    finally:
        torch.set_num_threads(before)
    for given in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(given, outputs[0], strict=True))


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 6, 3), nn.Linear(8, 6), nn.Conv1d(8, 6, 1)])
def test_inputs_of_other_widths_are_refused(compiled: Compiled, layer: nn.Module):
    """They would read beyond the weights."""
    at = context()
    exact = integer_module(quant_layer(at, layer), True, compiled)
    at.set(torch.full((2,), 300))
    shape = {nn.Conv2d: (2, 7, 9, 9), nn.Linear: (2, 5, 7), nn.Conv1d: (2, 7, 5)}[type(layer)]
    with pytest.raises(ValueError, match="the input has 7 channels, the layer 8"):
        exact(torch.randn(shape))


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_product_of_a_softmax(each: Compiled, by_row: bool, threads: int):
    """One code apart at most in a few probabilities."""
    at = context()
    fake = QuantMatMul(quantizer(at, 8, [0, 0]), quantizer(at, 8, [128, 128]), by_row)
    fake.left.scale[:] = torch.tensor([1 / 255, 0.8 / 255])
    exact = integer_module(fake, False, each)
    scores, right = 30 * torch.randn(3, 70, 53), 2 * torch.randn(3, 53, 37)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for t in (torch.full((3,), 300), torch.full((3,), 900), torch.tensor([0, 300, 900])):
            at.set(t)
            expected = fake(torch.softmax(scores * 0.3, -1), right)
            assert psnr(exact.after_softmax(scores, 0.3, right), expected) >= 45
    finally:
        torch.set_num_threads(before)


def pair(compiled: Compiled) -> tuple[QuantDenoiser, QuantDenoiser]:
    model = small_unet()
    for layer in model.modules():
        if hasattr(layer, "qweight") and len(layer.inputs):
            layer.channel_scale = (torch.rand(layer.qweight.shape[1]) + 0.5).half().float()
    return model, to_int8(copy.deepcopy(model), False, compiled).to(memory_format=LAST)


def test_network(compiled: Compiled):
    fake, exact = pair(compiled)
    x = torch.randn(4, 3, 16, 16).contiguous(memory_format=LAST)
    for t in (torch.full((4,), 70), torch.full((4,), 999), torch.tensor([0, 70, 500, 999])):
        assert psnr(exact(x, t), fake(x, t)) >= 45
    expected = exact(x, t)
    for twin in (copy.deepcopy(exact), pickle.loads(pickle.dumps(exact))):
        assert torch.equal(twin(x, t), expected)


def test_network_uses_the_pass(compiled: Compiled):
    """Both functions run, and the norms before a compiled layer do not."""
    _, exact = pair(compiled)
    seen = []
    for name, module in exact.denoiser.named_modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=LAST)
    exact(x, torch.full((2,), 500))
    assert seen and all("attn" in name or name == "norm_out" for name in seen)


@pytest.mark.parametrize("shape", [(3, 20, 5, 7), (2, 100, 40, 40)], ids=str)
def test_group_norm(compiled: Compiled, shape: tuple[int, ...]):
    norm = nn.GroupNorm(5, shape[1], eps=1e-6)
    norm.weight.normal_(), norm.bias.normal_()
    x = (9 + 3 * torch.randn(shape)).contiguous(memory_format=LAST)
    own = CompiledNorm(norm, compiled)
    torch.testing.assert_close(own(x), norm(x), rtol=1e-5, atol=2e-5)
    assert torch.equal(torch.cat([own(row[None]) for row in x]), own(x))
    torch.testing.assert_close(own(x.contiguous()), norm(x.contiguous()))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_a_network_are_independent(compiled: Compiled, rows: int):
    """To the bit, whatever the batch and the threads: such a network needs no padding."""
    fake, _ = pair(compiled)
    exact = to_int8(copy.deepcopy(fake), False, compiled).to(memory_format=LAST)
    assert exact.independent_rows and not fake.independent_rows
    assert copy.deepcopy(exact).independent_rows
    x = torch.randn(6, 3, 16, 16).contiguous(memory_format=LAST)
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for model in (exact, FixedBatch(exact, 4), FixedBatch(exact, 16)):
                t = torch.full((6,), 70 + threads)  # another one: its embedding is not known yet
                parts = [model(v, t[: len(v)]) for v in x.split(rows)]
                assert torch.equal(torch.cat(parts), model(x, t))
                outputs.append(model(x, torch.full((6,), 500)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(v, outputs[0]) for v in outputs)


def test_networks_of_other_operations_are_padded(compiled: Compiled):
    """What an LDM UNet does between its layers, or a layer left as it is, may round otherwise."""
    fake, _ = pair(compiled)
    for change in ("exact_between_layers", "conv_in"):
        model = copy.deepcopy(fake)
        if change == "conv_in":
            model.denoiser.conv_in = nn.Conv2d(3, 32, 3, padding=1)
        else:
            model.denoiser.exact_between_layers = False
        assert not to_int8(model, True, compiled).independent_rows


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(build, "SOURCES", [tmp_path / "missing.cpp"])
    with pytest.raises(CompileError, match="missing.cpp") as refusal:
        Compiled()
    assert "\n" not in str(refusal.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompileError, match="no C\\+\\+ compiler"):
        Compiled()


def test_command_line_without_padding(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """int8 --compile: an image alone is that of a batch, and no padding is spoken of."""
    (tmp_path / "narrow.yaml").write_text(yaml.safe_dump(SAMPLING))
    config = load_config(tmp_path / "narrow.yaml")
    file = tmp_path / "quantized.safetensors"
    file.write_bytes(to_bytes(deployed_of(config, config.quant), {"config": resolved_yaml(config)}))
    command = ("--quantized", file, "--backend", "int8", "--compile", "--out")
    assert sample(*command, tmp_path / "all") == 0
    for extra in ((), ("--batch-size", 2)):
        out = tmp_path / f"one{len(extra)}"
        assert sample(*command, out, "--count", 3, *extra) == 0
        for image in out.iterdir():
            assert image.read_bytes() == (tmp_path / "all" / image.name).read_bytes()
    assert "note" not in capsys.readouterr().out


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The same images whatever the batch; their identity says what made them."""
    (tmp_path / "narrow.yaml").write_text(yaml.safe_dump(SAMPLING))
    config = load_config(tmp_path / "narrow.yaml")
    file = tmp_path / "quantized.safetensors"
    file.write_bytes(to_bytes(deployed_of(config, config.quant), {"config": resolved_yaml(config)}))
    out, command = tmp_path / "images", ("--quantized", file, "--backend", "int8-avx2", "--compile")

    assert sample(*command, "--out", out) == 0
    report = json.loads(beside(out, "report.json").read_text())
    assert report["backend"] == "int8, compiled"  # int8-avx2 is its earlier name
    made = files_of(out)
    assert len(made) == 7 and "note" not in capsys.readouterr().out
    (out / "000003.png").unlink()
    assert sample(*command, "--out", out, "--set", "sampling.batch_size=1") == 0  # resumes
    assert files_of(out) == made
    assert sample(*command[:-1], "--out", out) == 2  # other bytes could join
    assert sample(*command[:2], "--compile", "--out", tmp_path / "fake") == 2
    assert "--compile: needs --backend int8" in capsys.readouterr().err
    assert sample(*command[:-1], "--out", tmp_path / "plain") == 0
    monkeypatch.setenv("PATH", str(tmp_path))
    capsys.readouterr()
    assert sample(*command, "--out", tmp_path / "without") == 0
    assert "note: --compile changes nothing here: no C++ compiler" in capsys.readouterr().out
    assert files_of(tmp_path / "without") == files_of(tmp_path / "plain")
    without, plain = (beside(tmp_path / n, "identity.json") for n in ("without", "plain"))
    assert without.read_bytes() == plain.read_bytes()
