"""Bits of the activations by step (PTQD's step-aware mixed precision)."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from quant.compiled import Compiled, CompileError
from quant.int8 import int8_supported, to_int8
from quant.model import BitPolicy, QuantDenoiser, activation_quantizers
from quant.packed import (
    MIXED_VERSION,
    VERSION,
    PackedFileError,
    digest_of,
    load_quantized,
    read_metadata,
    to_bytes,
)
from quant.precision import lowest_sufficient
from quant.state import CalibrationState
from scripts.common.config import ConfigError, parse_config
from tests.calibrated import run
from tests.packed import meta, quantized
from tests.test_quant_quantizer import narrow_unet
from tests.toy import STEPS, Toy

NOISY = torch.tensor([1e-3, 1e-2, 0.1, 0.1, 1.0, 1.0, 1e9, 1e9])  # SNR_F of the toy's steps
ENDS = [0, 17, 300, 301, 999]


def test_the_lowest_bits_whose_noise_is_below_that_of_the_state() -> None:
    ratios = {
        8: torch.tensor([100.0, 100.0, 100.0, 100.0]),
        6: torch.tensor([20.0, 20.0, 20.0, 20.0]),
        4: torch.tensor([2.0, 25.0, 2.0, 2.0]),
    }
    forward = torch.tensor([1.0, 22.0, 10.0, 1000.0])
    # 6 bits alone would not do at the second step, but 4 do; none does at the last.
    assert lowest_sufficient(ratios, forward).tolist() == [4, 4, 6, 8]


def codes_of(model: QuantDenoiser) -> dict[str, list[int]]:
    """Quantizer -> the bits of each step of the toy."""
    bins = [int(model.context.bin_of_t[t]) for t in STEPS]
    return {
        name: [int(q.group_bits[q.group_of_bin[b].long()]) for b in bins]
        for name, q in activation_quantizers(model)
    }


@pytest.mark.parametrize("method", ["ptqd", "tinydm"])
def test_each_step_has_the_bits_that_were_chosen_for_it(method: str) -> None:
    model, report, progress, saved = run(
        Toy(), method, step_bits=(2, 4), signal_to_noise=NOISY, progressive=False
    )
    chosen = report["precision"]
    bits = chosen["bits_of_step"]
    assert bits[-2:] == [6, 6] and bits[0] < 6 and len(set(bits)) > 1
    assert chosen["average_bits"] == pytest.approx(sum(bits) / len(bits))
    for k, forward in enumerate(NOISY.tolist()):
        enough = [b for b in (2, 4, 6) if chosen["of_bits"][str(b)][k] > forward]
        assert bits[k] == min(enough, default=6)
    assert all(value == bits for value in codes_of(model).values())
    assert progress.phases["bits by step"] == [3 * len(STEPS)] * 2
    state = next(plain for plain in saved if plain["done"][-1] == "precision")
    again, *_ = run(
        Toy(),
        method,
        CalibrationState.from_plain(copy.deepcopy(state)),
        step_bits=(2, 4),
        signal_to_noise=NOISY,
        progressive=False,
    )
    assert to_bytes(again, {}) == to_bytes(model, {})


def test_a_step_of_few_bits_has_few_values() -> None:
    model, report, *_ = run(Toy(), "ptqd", step_bits=(2,), signal_to_noise=NOISY)
    bits = report["precision"]["bits_of_step"]
    few, many = bits.index(2), bits.index(6)
    x = torch.linspace(-50, 50, 4001).view(1, 1, 1, -1)
    for _, q in activation_quantizers(model):
        alone = []
        for k, most in ((few, 4), (many, 64)):
            q.context.set(torch.tensor([STEPS[k]]))
            assert 2 < len(q(x).unique()) <= most
            alone.append(q(x))
        q.context.set(torch.tensor([STEPS[few], STEPS[many]]))
        assert torch.allclose(q(torch.cat([x, x])), torch.cat(alone))


def test_noise_that_allows_nothing_changes_nothing() -> None:
    plain, *_ = run(Toy(), "ptqd")
    model, report, *_ = run(
        Toy(), "ptqd", step_bits=(4,), signal_to_noise=torch.full((len(STEPS),), 1e12)
    )
    assert set(report["precision"]["bits_of_step"]) == {6}
    assert to_bytes(model, {}) == to_bytes(plain, {})


def test_noise_that_allows_everything_gives_a_file_of_few_bits(tmp_path: Path) -> None:
    model, report, *_ = run(Toy(), "ptqd", step_bits=(4,), signal_to_noise=torch.zeros(len(STEPS)))
    assert set(report["precision"]["bits_of_step"]) == {4}
    (tmp_path / "q.safetensors").write_bytes(to_bytes(model, {}))
    loaded = load_quantized(tmp_path / "q.safetensors", Toy())
    assert all(set(bits) == {4} for bits in codes_of(loaded).values())


def test_steps_of_one_bin_share_the_strictest_of_their_bits() -> None:
    noise = torch.zeros(len(STEPS))
    noise[2] = 1e9  # timestep 500, the bin of 700 and 400 as well; the others are 900, 200 and 0
    _, report, *_ = run(Toy(), "ptqd", step_bits=(4,), signal_to_noise=noise, bins=4)
    assert report["precision"]["bits_of_step"] == [4, 6, 6, 6, 4, 4, 4, 4]


def test_step_bits_need_the_signal_to_noise_ratio() -> None:
    with pytest.raises(ValueError, match="signal-to-noise"):
        run(Toy(), "ptqd", step_bits=(4,))


# ---- the file and integers ----


def mixed_model() -> QuantDenoiser:
    """Groups of 3, 8, 5 and 8 bits, but for the inputs of the first and last layer."""
    model = quantized(narrow_unet(), BitPolicy(), ENDS, 4, total=1000)
    for _, q in activation_quantizers(model):
        if q.bits == 8:
            q.group_bits = torch.tensor([3, 8, 5, 8], dtype=torch.uint8)
            middle = 2 ** (q.group_bits.int() - 1)  # which fits int8 as it does at 8 bits
            q.zero_point = torch.where(q.zero_point == 0, q.zero_point, middle)
    return model


@pytest.fixture(scope="module")
def content() -> bytes:
    return to_bytes(mixed_model(), {"config": "x"})


@pytest.fixture
def reload(tmp_path: Path) -> Callable[[bytes], QuantDenoiser]:
    def read(content: bytes) -> QuantDenoiser:
        path = tmp_path / "q.safetensors"
        path.write_bytes(content)
        return load_quantized(path, meta(narrow_unet))

    return read


@torch.no_grad()
def outputs(model: QuantDenoiser, t: list[int]) -> torch.Tensor:
    x = torch.randn(len(t), 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return model(x, torch.tensor(t))


TIMES = ([0] * 4, [120] * 4, [300] * 4, [999] * 4, [0, 17, 650, 999])


def test_reload_is_bit_equal(
    content: bytes, reload: Callable[[bytes], QuantDenoiser], tmp_path: Path
) -> None:
    model, loaded = mixed_model(), reload(content)
    for t in TIMES:
        assert torch.equal(outputs(loaded, t), outputs(model, t))
    assert to_bytes(loaded, {"config": "x"}) == content
    version = read_metadata(tmp_path / "q.safetensors")["version"]
    assert version == MIXED_VERSION != VERSION


def test_other_bits_are_other_outputs(content: bytes) -> None:
    """Else the tests here would show nothing."""
    wide = mixed_model()
    for _, q in activation_quantizers(wide):
        q.group_bits = torch.full_like(q.group_bits, q.bits)
    assert not torch.allclose(outputs(wide, TIMES[0]), outputs(mixed_model(), TIMES[0]), atol=1e-2)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("vnni", [True, False])
def test_integers_agree(vnni: bool, compiled: bool) -> None:
    if reason := int8_supported(vnni=vnni):
        pytest.skip(reason)
    code = None
    if compiled:
        try:
            code = Compiled()
        except CompileError as error:
            pytest.skip(str(error))
    model = mixed_model()
    integers = to_int8(copy.deepcopy(model), vnni, code)
    for t in TIMES:
        expected = outputs(model, t)
        error = (outputs(integers, t) - expected).square().mean() / expected.square().mean()
        assert error < 1e-4, t


def edited(content: bytes, edit: Callable[[dict[str, torch.Tensor]], None], path: Path) -> bytes:
    """With a checksum that is right."""
    path.write_bytes(content)
    texts = read_metadata(path)
    for name in ("layers", "timesteps"):
        texts[name] = json.dumps(texts[name], separators=(",", ":"))
    texts = {name: str(text) for name, text in texts.items()}
    tensors = load(content)
    edit(tensors)
    texts["digest"] = digest_of(tensors, texts)
    return save(tensors, texts)


def put(name: str, value: int | None) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if value is None:
            tensors[name] = tensors[name][:, :-1].contiguous()
        else:
            tensors[name][1, 0] = value

    return change


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (put("activations.bits", None), "shape"),
        (put("activations.bits", 1), "bits out of range"),
        (put("activations.bits", 9), "bits out of range"),
        (put("activations.zero_point", 8), "zero point"),  # of a group of 3 bits
        (lambda t: t["activations.bits"][0].fill_(8), "bits out of range"),  # of a 16-bit input
        (lambda t: t.update({"activations.bits": t["activations.bits"].int()}), "int32"),
    ],
)
def test_damaged_bits_are_refused(
    content: bytes,
    reload: Callable[[bytes], QuantDenoiser],
    edit: Callable[[dict[str, torch.Tensor]], None],
    word: str,
    tmp_path: Path,
) -> None:
    reload(edited(content, lambda tensors: None, tmp_path / "q.safetensors"))
    with pytest.raises(PackedFileError, match=word):
        reload(edited(content, edit, tmp_path / "q.safetensors"))


@pytest.mark.parametrize(
    ("value", "word"),
    [("[4, 6]", "fewer than"), ("[1]", "2..7"), ("4", "a list"), ("[four]", "whole number")],
)
def test_settings_are_checked(value: str, word: str) -> None:
    text = Path("configs/emoji32.yaml").read_text(encoding="utf-8")
    given = ["quant.activation.bits=6", f"quant.activation.step_bits={value}"]
    with pytest.raises(ConfigError, match=word) as caught:
        parse_config(text, "configs/emoji32.yaml", given)
    assert "quant.activation.step_bits" in str(caught.value) and "\n" not in str(caught.value)
