"""size_table.py: what it counts is what sampling would read."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers.latent import CONFIG
from tinydm.quant.calibration.coverage import count_macs
from tinydm.quant.calibration.wrapping import BitPolicy
from tinydm.quant.core.context import TimestepContext
from tinydm.quant.core.operation import LAYER_TYPES
from tinydm.quant.runtime.packed_file import load_quantized, to_bytes
from tinydm.scripts import size_table
from tinydm.scripts.bench import random_models
from tinydm.scripts.common.paths import ROOT
from tinydm.scripts.experiment.assembly import empty_denoiser
from tinydm.scripts.experiment.config import load_config


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sizes") / "narrow.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def test_the_packed_bytes_are_a_file_that_runs(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    context = TimestepContext([1, 251, 501, 751], 1000)
    deployed = random_models.random_deployed(config, BitPolicy.of(config.quant), context)
    file = tmp_path / "random.safetensors"
    file.write_bytes(to_bytes(deployed, {}))
    loaded = load_quantized(file, empty_denoiser(config))
    assert to_bytes(loaded, {}) == file.read_bytes()
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    out = loaded(x, torch.tensor([501, 501]), context=torch.ones(2, 1, 8))
    assert torch.isfinite(out).all() and out.std() > 0.01


def test_rows_are_written_and_smaller_with_fewer_bits(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    size_table.main(["--configs", str(path), "--json", str(tmp_path / "rows.json")])
    full, eight, four = json.loads((tmp_path / "rows.json").read_text())
    assert full["bytes"] == 4 * full["parameters"] and full["bops"] == 1024 * full["macs"]
    assert four["bytes"] < eight["bytes"]
    assert full["bops"] > eight["bops"] > four["bops"] > 0
    weights = sum(m.weight.numel() for m in layers(path))
    assert eight["bytes"] - four["bytes"] < weights / 2  # some stay at 8 bits
    assert eight["bytes"] - four["bytes"] > weights / 4
    assert len(capsys.readouterr().out.splitlines()) == 5


def layers(path: Path) -> list[torch.nn.Module]:
    kinds = LAYER_TYPES
    return [m for m in empty_denoiser(load_config(path)).modules() if isinstance(m, kinds)]


@pytest.mark.parametrize(("name", "expected"), [("imagenet256", 99.770), ("lsun_bedroom", 96.018)])
def test_operations_of_the_published_denoisers(name: str, expected: float) -> None:
    """10^9 MACs of all convolutions and linear layers, counted on the reference implementation."""
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    macs = count_macs(empty_denoiser(config), (), random_models.example_call(config))
    assert sum(macs.values()) / 1e9 == pytest.approx(expected, abs=5e-4)
