"""Other runtimes beside ours in benchmark.py --speed: optional, and the same network."""

from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers.latent import CONFIG
from tinydm.scripts.bench import speed
from tinydm.scripts.bench.speed_models import PEER_VARIANTS, VARIANTS, Models, obstacle
from tinydm.scripts.experiment.config import load_config
from tinydm.scripts.exporting import runtimes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "narrow.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.mark.slow
def test_a_peer_that_is_absent_is_a_line(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    options = ["--configs", str(path), "--variants", "fp32", "--peers", "onnxruntime,openvino"]
    options += ["--batches", "1", "--threads", "1", "--repeats", "2", "--out", str(tmp_path / "o")]
    speed.main(options)
    text = (tmp_path / "o" / "speed.md").read_text()
    assert "not installed: onnx, openvino, nncf" in capsys.readouterr().out
    assert "not installed: onnx, onnxruntime" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", PEER_VARIANTS)
def test_peers_compute_the_network(path: Path, tmp_path: Path, name: str):
    variant = PEER_VARIANTS[name]
    if (reason := obstacle(variant)) is not None:
        pytest.skip(reason)
    models = Models(load_config(path), tmp_path / "models")
    full = VARIANTS["fp32"]
    expected = models.call(models.build(full), 3)()
    given = models.call(models.build(variant), 3)()
    error = (given - expected).square().mean() / expected.square().mean()
    assert error < (1e-8 if variant.bits is None else 0.5) and models.bytes(variant) > 0


def test_signal_to_noise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: Path):
    """20 dB for a tenth of error everywhere; nothing for random weights."""
    models = Models(load_config(path), tmp_path)
    assert models.sqnr(torch.nn.Identity()) is None
    rows = [(torch.ones(2, 3), torch.tensor([1, 1]), {}, torch.full((2, 3), 5.0))]
    monkeypatch.setattr(models, "quantized", tmp_path / "any")
    monkeypatch.setattr(models, "states", lambda count, seed: rows)

    class Off(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return 5.5 * x

    assert models.sqnr(Off()) == pytest.approx(20.0)
