"""Options of the longer tests (sh scripts/test.sh --kills 50 --fuzz 2000) and shared fixtures."""

import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.helpers.checkpoints import narrow_model
from tests.helpers.packed import small_file, small_model
from tests.helpers.rooms import write_room
from tinydm.quant.runtime.denoiser import QuantDenoiser

if TYPE_CHECKING:  # the import takes seconds, also where no fixture needs it
    from tinydm.scripts.metrics.inception import InceptionFeatures


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=5, help="processes killed in test_kills.py")
    parser.addoption("--fuzz", type=int, default=100, help="files mutated in test_fuzz.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with the marker `gpu` run where there is a CUDA device. The longest test comes first:
    begun last, it would keep one process busy while the other has nothing left."""
    items.sort(key=lambda item: item.name != "test_kernels_under_the_interpreter")
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Inception weights, converted in a fresh folder that the workers of pytest-xdist share."""
    from tinydm.scripts.metrics.inception import prepare_inception

    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    cache = root / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return prepare_inception(cache)


@pytest.fixture(scope="session")
def network(weights) -> "InceptionFeatures":
    from tinydm.scripts.metrics.inception import InceptionFeatures

    return InceptionFeatures(weights, device="cpu")


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Six images of a reference and five others."""
    from tests.helpers.images import write_images

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


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml and its checkpoint; some modules have a room of their own."""
    return write_room(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(room: Path) -> Path:
    """Images and a calibration in the room that nothing disturbed."""
    import calibrate
    import sample_diffusion
    from tests.helpers import forks  # at its first use: the import takes seconds

    for main, name in ((sample_diffusion.main, "images"), (calibrate.main, "run")):
        forks.succeed(main, "--config", room / "tiny.yaml", "--out", room / "whole" / name)
    return room / "whole"


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run and its report, which is made once; tests change copies of it."""
    from tests.helpers.report_page import write_home

    return write_home(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def inference() -> Iterator[None]:
    """A seed, one thread and no gradients."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Of a narrow network."""
    return narrow_model().state_dict()


@pytest.fixture
def signals() -> Iterator[None]:
    """The wrapper installs a handler; put back what pytest had."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
