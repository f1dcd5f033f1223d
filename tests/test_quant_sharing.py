"""Work that several processes share: the result to the bit of one.

The processes themselves are in test_processes.py; here one process does what each of them would.

python -m pytest tests/test_quant_sharing.py
"""

import pytest
import torch
from torch import nn

from tests.helpers.teams import Member
from tests.helpers.toy import Toy
from tinydm.quant.calibration.gptq import _dealt, compensated_layers
from tinydm.quant.calibration.sharing import Alone, SharedRows, Tensors, add_gradients
from tinydm.quant.calibration.wrapping import BitPolicy, quantize
from tinydm.quant.core.context import TimestepContext
from tinydm.scripts.experiment.processes import _packed, _unpacked


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 5, 1), nn.Flatten(), nn.LazyLinear(7))
    network = nn.Sequential(*layers)
    network(torch.zeros(1, 3, 6, 6))
    return network.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_gradients_do_not_depend_on_who_makes_them(network: nn.Module, count: int) -> None:
    """Of the last part some parameters have none, of none the last parameter has any."""
    x, parameters = torch.randn(10, 3, 6, 6), [*network.parameters(), nn.Parameter(torch.ones(2))]

    def backward(i: int) -> Tensors:
        rows = x.chunk(count)[i]
        out = network[0](rows) if i == count - 1 and count > 1 else network(rows)
        loss = out.square().mean()
        loss.backward()
        return {"loss": loss.detach()}

    found = []
    for team in (Alone(), Member(0, 2), Member(1, 2), Member(2, 3)):
        for p in parameters:
            p.grad = None
        values = add_gradients(team, count, backward, parameters)
        found.append([p.grad for p in parameters] + [v["loss"] for v in values])
    for other in found[1:]:
        for value, reference in zip(other, found[0], strict=True):
            assert (value is None) == (reference is None)
            if reference is not None:
                assert torch.equal(value, reference) and value.stride() == reference.stride()
    assert found[0][len(parameters) - 1] is None and len(found[0]) == len(parameters) + count


def test_rows_come_back_in_their_order_and_layout() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, 3, padding=1)

    def denoiser(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert len(x) == len(t) == len(y) == 3
        return convolution(x) + (t + y).view(-1, 1, 1, 1)

    x, t = torch.randn(6, 3, 8, 8).to(memory_format=torch.channels_last), torch.arange(6.0)
    expected = torch.cat([convolution(part) for part in x.split(3)]) + (2 * t).view(-1, 1, 1, 1)
    made = [SharedRows(denoiser, team)(x, t, y=t) for team in (Alone(), Member(0, 2), Member(1, 2))]
    for eps in made:
        assert torch.equal(eps, expected)
        assert eps.is_contiguous(memory_format=torch.channels_last)
    one = SharedRows(lambda x, t: x * t.sum(), Alone())
    assert torch.equal(one(x[:1], torch.tensor(3.0)), x[:1] * 3)


def test_layers_are_dealt_once_each_by_their_work() -> None:
    layers = compensated_layers(quantize(Toy(), TimestepContext([0], 1000), BitPolicy()))
    for hands in (1, 2, 3, 100):
        dealt = _dealt(layers, 16, hands)
        assert sorted(name for names in dealt for name in names) == sorted(layers)
        assert len(dealt) == min(hands, len(layers))


def test_messages_hold_tensors_of_all_kinds() -> None:
    values = {
        "a name": torch.randn(3, 5).T,
        "bools": torch.tensor([True, False, True]),
        "codes": torch.arange(7, dtype=torch.uint8),
        "none": torch.zeros(0, 4),
        "number": torch.tensor(2.5, dtype=torch.float64),
        "": torch.tensor([[1, -(2**40)]]),
    }
    found = _unpacked(_packed(values))
    assert list(found) == list(values) and _unpacked(_packed({})) == {}
    for name, value in values.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)
