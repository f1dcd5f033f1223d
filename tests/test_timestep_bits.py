"""Bits of the activations at each timestep: how they are shared out, and that groups keep them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.calibrated import run, tiny
from tests.helpers.narrow import BENCH, write_narrow
from tests.helpers.packed import Attention, meta, small_file, small_model
from tests.helpers.toy import STEPS, Toy
from tinydm.quant.calibration.coverage import format_table, layer_rows
from tinydm.quant.calibration.grouping import assign
from tinydm.quant.calibration.quantizer import LearnedQuantizer
from tinydm.quant.calibration.search import start, take_most_likely
from tinydm.quant.calibration.statistics import Statistics
from tinydm.quant.calibration.timestep_bits import bits_of_timesteps
from tinydm.quant.core.context import TimestepContext
from tinydm.quant.core.settings import METHODS, preset
from tinydm.quant.runtime.packed_file import layer_table, load_quantized
from tinydm.quant.runtime.quantizer import quantizers_of
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.experiment.config import load_config


def ones(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.long)


def test_bits_go_where_they_take_most_off_the_error() -> None:
    """A bit takes three quarters off: with errors of 16 : 1, one gives a bit to the other."""
    found = bits_of_timesteps(torch.tensor([16.0, 1.0]), ones(2), 4, 8)
    assert found.tolist() == [5, 3]
    # None has fewer than 3 bits. 64 / 16 + 1 + 4 + 4 is less than 64 / 4 + 1 + 1 + 4.
    found = bits_of_timesteps(torch.tensor([1.0, 64.0, 1.0, 1.0]), ones(4), 4, 8)
    assert found[1] == 6 and sorted(found.tolist()) == [3, 3, 4, 6]
    assert bits_of_timesteps(torch.ones(6), ones(6), 4, 8).tolist() == [4] * 6
    # a timestep that three sampling steps use costs three times its bits
    found = bits_of_timesteps(torch.tensor([16.0, 1.0]), torch.tensor([3, 1]), 4, 8)
    assert found.tolist() == [4, 4]


@pytest.mark.parametrize(("bits", "groups"), [(8, 8), (4, 1), (4, 2), (2, 8)])
def test_there_are_no_other_bits_than_products_and_groups_allow(bits: int, groups: int) -> None:
    """With two groups, three bits and four: nothing to gain, since none may lose more than one."""
    errors = torch.tensor([1e3, 1.0, 1e-3, 1e-9])
    assert bits_of_timesteps(errors, ones(4), bits, groups).tolist() == [bits] * 4


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 9)), min_size=1, max_size=30),
    st.integers(2, 8),
    st.integers(1, 9),
)
def test_the_mean_is_kept(rows: list[tuple[float, int]], bits: int, groups: int) -> None:
    errors, calls = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = bits_of_timesteps(errors, calls, bits, groups)
    assert (found * calls).sum() <= bits * calls.sum()
    assert len(found.unique()) <= groups
    assert found.min() >= max(2, bits - 1) and found.max() <= 8


def assigned(bits: torch.Tensor, groups: int, search: str) -> LearnedQuantizer:
    """Timesteps of which every second one is three times as wide."""
    values = torch.randn(len(bits), 500, generator=torch.Generator().manual_seed(0))
    values = values * (1 + 2 * (torch.arange(len(bits)) % 2))[:, None]
    stats = Statistics(values, values.amin(1), values.amax(1), torch.ones(len(bits)))
    quantizer = LearnedQuantizer(TimestepContext(range(len(bits)), 100), 4, False, False)
    assign(quantizer, stats, groups, search, "mse", torch.ones(len(bits)), bits)
    return quantizer


@pytest.mark.parametrize("search", ["differentiable", "dp"])
@pytest.mark.parametrize("groups", [3, 5, 8])
def test_groups_have_the_bits_of_their_timesteps(search: str, groups: int) -> None:
    bits = torch.tensor([6, 6, 4, 4, 4, 4, 3, 3, 3, 3])
    quantizer = assigned(bits, groups, search)
    assert quantizer.groups <= groups
    assert torch.equal(quantizer.group_bits[quantizer.group_of_timestep], bits)
    for index in range(len(bits)):
        quantizer.context.set(torch.tensor([index]))
        x = torch.linspace(-20, 20, 4001).view(1, -1)
        deployed = quantizer.deploy()
        assert len(deployed(x).unique()) == 2 ** int(bits[index])
        assert torch.equal(deployed(x), quantizer(x).detach())
        batch = torch.cat([x, x])
        quantizer.context.set(torch.tensor([index, 9]))
        each = quantizer.deploy()(batch)
        assert torch.equal(each, quantizer(batch).detach())
        assert [len(row.unique()) for row in each] == [2 ** int(bits[index]), 8]


def test_the_search_leaves_every_timestep_its_bits() -> None:
    bits = torch.tensor([6, 6, 4, 4, 4, 4, 3, 3, 3, 3])
    quantizer = assigned(bits, 8, "differentiable")
    (logits,) = start([quantizer])
    with torch.no_grad():  # whatever it learns
        logits += 50 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    before = quantizer.group_of_timestep
    _, moved = take_most_likely([quantizer])
    assert moved > 0 and not torch.equal(quantizer.group_of_timestep, before)
    assert torch.equal(quantizer.group_bits[quantizer.group_of_timestep], bits)


def test_a_step_moves_the_scales_of_fewer_bits_further() -> None:
    """Outer values of each group by as many codes: the unit of a log-scale halves with each bit."""
    quantizer = assigned(torch.tensor([6, 4, 4, 4, 3, 3]), 3, "dp")
    before = quantizer.current_scale().detach()
    with torch.no_grad():
        quantizer.log_scale += 0.01
    change = (quantizer.current_scale().detach() / before).log()
    expected = 0.01 * 2.0 ** (4 - quantizer.group_bits)
    assert torch.allclose(change, expected, rtol=1e-3)


@pytest.mark.slow
def test_a_calibration_keeps_the_mean_and_says_what_it_chose() -> None:
    denoiser = Toy()
    model, report, _, _ = run(denoiser, "tinydm")
    chosen = torch.tensor(report["ranges"]["bits_of_timesteps"])
    bits = tiny()[0].activation.bits
    assert chosen.float().mean() <= bits and len(chosen.unique()) > 1
    inner = [q for _, q in quantizers_of(model) if q.bits <= 8]
    assert inner
    for q in inner:
        groups = q.group_of_timestep.long()
        assert torch.equal(torch.tensor(q.group_bits)[groups], chosen)
    first, last = STEPS.index(max(STEPS)), STEPS.index(min(STEPS))
    errors = report["ranges"]["step_errors"]
    # The calibrated timesteps ascend, the sampling steps descend.
    assert (errors[first] > errors[last]) == bool(chosen[-1] > chosen[0])


def test_the_table_of_layers_has_the_mean_of_the_timesteps() -> None:
    model, denoiser = small_model(), Attention().eval()
    rows = layer_rows(denoiser, model, denoiser.layer_roles(), {})
    (row,) = (r for r in rows if r.name == "join")
    first, second = (q for name, q in quantizers_of(model) if ".join." in name)
    for q, bits in zip((first, second), row.activation_bits, strict=True):
        of_timesteps = [q.group_bits[g] for g in q.group_of_timestep.tolist()]
        assert bits == sum(of_timesteps) / len(of_timesteps)
    assert any(5 < bits < 6 for bits in row.activation_bits)
    assert f"{row.activation_bits[0]:.3g}+" in format_table(rows)


def test_the_file_holds_the_bits_of_each_group() -> None:
    model = small_model()
    table = {row["name"]: row for row in layer_table(model)}
    assert table["join"]["inputs"] == [[6, 5, 6], [6, 5, 6]]


def test_a_file_with_bits_of_groups_loads(tmp_path: Path) -> None:
    model = small_model()
    path = tmp_path / "quantized.safetensors"
    path.write_bytes(small_file(model))
    loaded = load_quantized(path, meta(Attention))
    for (name, a), (_, b) in zip(quantizers_of(model), quantizers_of(loaded), strict=True):
        assert a.group_bits == b.group_bits, name
    x = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(0)) * 3
    t = torch.tensor(model.context.timesteps)
    assert torch.equal(model(x, t), loaded(x, t))


@pytest.mark.parametrize(
    "keys",
    [
        ["quant.method=e2e"],
        ["quant.activation.search=uniform"],
        ["quant.activation.scale=minmax"],
        ["quant.reconstruct.weigh_steps=false"],
    ],
)
def test_asked_for_without_effect_is_refused(keys: list[str], tmp_path: Path) -> None:
    path = write_narrow(tmp_path, BENCH) / "narrow.yaml"
    load_config(path, keys)
    load_config(path, ["quant.activation.bits_by_group=true"])
    with pytest.raises(ConfigError, match="quant.activation.bits_by_group needs"):
        load_config(path, [*keys, "quant.activation.bits_by_group=true"])


def test_only_tinydm_has_them() -> None:
    having = [m for m in METHODS if preset(m)[0].activation.bits_by_group]
    assert having == ["tinydm"]
