"""The quantized file: packing, reload equality, and its size.

python -m pytest tests/test_quant_packed.py
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.commands import ROOT
from tests.helpers.networks import layers_of, levels, narrow_unet
from tests.helpers.packed import TIMESTEPS, meta, quantized
from tinydm.models.ddim_unet import DDIMUNet
from tinydm.quant.calibration.wrapping import BitPolicy
from tinydm.quant.core.operation import LAYER_TYPES
from tinydm.quant.runtime.correction import OutputCorrection
from tinydm.quant.runtime.denoiser import QuantDenoiser
from tinydm.quant.runtime.packed_file import load_quantized, read_metadata, to_bytes
from tinydm.quant.runtime.packing import pack, unpack

# ---- codes ----


@pytest.mark.parametrize("bits", range(2, 9))
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_packing_round_trip(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=41))
    flat = torch.tensor(codes, dtype=torch.uint8)
    packed = pack(flat, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-len(codes) * bits // 8)
    assert unpack(packed, bits, len(codes)).tolist() == codes
    for wrong in (len(codes) + 8, max(0, len(codes) - 8)):
        with pytest.raises(ValueError):
            unpack(packed, bits, wrong)


@pytest.mark.parametrize("bits", [3, 4, 5])
@pytest.mark.parametrize("count", [(1 << 20) - 1, (1 << 20) + 3])
def test_packing_beyond_one_chunk(bits: int, count: int) -> None:
    codes = torch.randint(2**bits, (count,), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, count), codes)


def test_four_bit_codes_are_two_to_the_byte_first_highest() -> None:
    assert pack(torch.tensor([[1, 2], [15, 0]], dtype=torch.uint8), 4).tolist() == [0x12, 0xF0]


# ---- reload ----


@pytest.mark.parametrize("bits", [(4, 8), (3, 6), (8, 8)])
@pytest.mark.parametrize("correction", [False, True])
def test_reload_is_bit_equal(bits: tuple[int, int], correction: bool, tmp_path: Path) -> None:
    """At calibrated timesteps, at others, and in batches that mix them."""
    policy = BitPolicy(weight=bits[0], activation=bits[1])
    model = quantized(narrow_unet(), policy, [0, 17, 300, 301, 999], 4, total=1000)
    if correction:
        g = torch.Generator().manual_seed(1)
        k, mu = (torch.rand(5, 3, generator=g) * 0.2 - 0.1 for _ in range(2))
        model.correction = OutputCorrection(model.context, k, mu, torch.rand(5, generator=g))
    path = tmp_path / "q.safetensors"
    path.write_bytes(to_bytes(model, {"config": "x"}))
    loaded = load_quantized(path, meta(narrow_unet))
    again = load_quantized(path, narrow_unet(seed=9))  # its own weights are not used
    assert (loaded.correction is not None) == correction
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for t in ([0] * 4, [300] * 4, [120] * 4, [650] * 4, [999] * 4, [0, 17, 650, 999], [0, 0, 1, 1]):
        steps = torch.tensor(t)
        expected = model(x, steps)
        assert torch.isfinite(expected).all()
        assert torch.equal(loaded(x, steps), expected)
        assert torch.equal(again(x, steps), expected)
    assert not torch.equal(model(x, torch.tensor([0] * 4)), model(x, torch.tensor([999] * 4)))
    state = model.state_dict()
    loaded.load_state_dict(state, strict=True)
    again_bytes = to_bytes(load_quantized(path, meta(narrow_unet)), {"config": "x"})
    assert again_bytes == path.read_bytes()


def test_a_mixed_batch_gives_each_sample_what_it_gets_alone(small: QuantDenoiser) -> None:
    t = torch.tensor([0, 5, 33, 99])
    x = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    together = small(x, t)
    alone = torch.cat([small(x[i : i + 1], t[i : i + 1]) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_metadata_tells_what_the_file_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    path.write_bytes(content)
    metadata = read_metadata(path)
    assert metadata["config"] == "name: x" and metadata["method"] == "tinydm"
    assert metadata["timesteps"] == TIMESTEPS and metadata["train_timesteps"] == 100
    table = {row["name"]: row for row in metadata["layers"]}
    assert set(table) == {"time", "first", "join", "scores", "last"}
    assert table["time"]["time"] and table["time"]["inputs"] == [] and table["time"]["bits"] == 8
    assert table["join"]["split"] == 4 and table["join"]["inputs"] == [[6, 5, 6], [6, 5, 6]]
    assert table["join"]["bits"] == 3 and table["first"]["bits"] == 8
    expected = {"name": "scores", "kind": "matmul", "inputs": [[6, 5, 6]] * 2, "by_row": False}
    assert table["scores"] == expected


# ---- size, and levels of the embedded checkpoint ----


@pytest.mark.parametrize(("bits", "bar"), [(4, 0.16), (8, 0.27)])
def test_size_on_disk_of_the_embedded_architecture(bits: int, bar: float, tmp_path: Path) -> None:
    checkpoint = ROOT / "models/pretrained/emoji32.pt"
    state = torch.load(checkpoint, weights_only=True)
    denoiser = DDIMUNet(ch=32, norm_groups=8)
    denoiser.load_state_dict(state)
    policy = BitPolicy(weight=bits, weight_scale="minmax")
    model = quantized(denoiser.eval(), policy, list(range(0, 1000, 20)), 8, total=1000)
    config = (ROOT / "configs/emoji32.yaml").read_text() * 3
    path = tmp_path / "q.safetensors"
    path.write_bytes(to_bytes(model, {"config": config}))
    size = path.stat().st_size
    assert size <= bar * checkpoint.stat().st_size
    assert size <= bar * 4 * sum(p.numel() for p in denoiser.parameters())
    loaded = load_quantized(path, meta(lambda: DDIMUNet(ch=32, norm_groups=8)))
    layers = list(layers_of(loaded))
    assert len(layers) == sum(isinstance(m, LAYER_TYPES) for m in denoiser.modules())
    for name, layer in layers:
        assert layer.bits >= bits
        assert levels(layer.weight()) <= 2**layer.bits, name
    assert sum(p.numel() for _, p in denoiser.named_parameters() if p.dim() > 1) == sum(
        layer.qweight.numel() for _, layer in layers
    )
