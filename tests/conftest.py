"""Options of the longer tests (sh scripts/test.sh --kills 50 --fuzz 2000) and shared fixtures."""

from pathlib import Path

import pytest

from quant.model import QuantDenoiser
from scripts.metrics import inception
from tests.images import write_images
from tests.packed import small_file, small_model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=5, help="processes killed in test_kills.py")
    parser.addoption("--fuzz", type=int, default=100, help="files mutated in test_fuzz.py")


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Inception weights, converted in a fresh folder."""
    return inception.prepare_inception(tmp_path_factory.mktemp("torch") / "hub" / "checkpoints")


@pytest.fixture(scope="session")
def network(weights) -> inception.InceptionFeatures:
    return inception.InceptionFeatures(weights, device="cpu")


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Six images of a reference and five others."""
    root = tmp_path_factory.mktemp("images")
    return write_images(root / "ref", 6, 0), write_images(root / "gen", 5, 1, dark=0.7)


@pytest.fixture(scope="module")
def small() -> QuantDenoiser:
    """A deployed model with every kind of row."""
    return small_model()


@pytest.fixture(scope="module")
def content(small: QuantDenoiser) -> bytes:
    """Its quantized file."""
    return small_file(small)
