"""Fetch a public checkpoint that a configuration names, or say how to get it by hand.

    python scripts/download.py --config configs/cifar10.yaml
    python scripts/download.py --cifar10-reference checkpoints/cifar10_train_images.npz

The file is written under a temporary name and renamed when it is whole. Nothing is fetched if it is
there. Without a network: one message that says what to download and where to put it, exit code 2.
"""

from tinydm.scripts.start import run  # first: it watches over the imports below

import shutil
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

# isort: split
import numpy as np
from tqdm import tqdm

from tinydm.models.checkpoint import load_state_dict
from tinydm.models.checkpoint_files import CheckpointError, NotACheckpointError
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.common.files import atomic
from tinydm.scripts.experiment.cli import add_config, make_parser
from tinydm.scripts.experiment.config import load_config, repository_path

TIMEOUT = 30  # seconds without an answer
OFFLINE_HINT = "sample_emoji.sh needs no download"


def fetch(url: str, path: Path, by_hand: str) -> None:
    """Download to `path`, atomically. Raises CheckpointError, which says what to do `by_hand`."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, atomic(path) as temporary:
            total = int(answer.headers.get("Content-Length") or 0) or None
            with (
                open(temporary, "wb") as file,
                tqdm(total=total, unit="B", unit_scale=True, desc=path.name) as bar,
            ):
                while block := answer.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
            if total is not None and temporary.stat().st_size != total:
                raise OSError("the connection ended early")
    except (OSError, urllib.error.URLError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise CheckpointError(
            f"cannot download {url} ({reason}); download it by hand and {by_hand}; {OFFLINE_HINT}"
        ) from error


def extract(archive: Path, path: Path) -> None:
    """The archive's member named like `path` -> path; the archive is removed."""
    try:
        with zipfile.ZipFile(archive) as members, atomic(path) as temporary:
            name = next(n for n in members.namelist() if Path(n).name == path.name)
            with members.open(name) as source, open(temporary, "wb") as file:
                shutil.copyfileobj(source, file)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, StopIteration) as error:
        archive.unlink(missing_ok=True)
        what = f"damaged, or holds no {path.name}"
        raise CheckpointError(f"{archive}: {what}; download it again") from error
    archive.unlink()  # on a full disk it stays, and needs no second download


def fetch_checkpoint(config_path: str, overrides: list) -> None:
    config = load_config(config_path, overrides)
    if config.model.checkpoint is None:
        raise ConfigError(f"{config_path}: model.checkpoint is not set")
    path = repository_path(config.model.checkpoint)
    if path.exists():
        print(f"{path}: is there")
        return
    if config.model.url is None:
        raise CheckpointError(f"{path}: no such file, and model.url is not set; {OFFLINE_HINT}")
    if config.model.url.endswith(".zip"):
        archive = path.with_suffix(".zip")
        if not archive.exists():
            fetch(config.model.url, archive, f"put the {path.name} in it at {path}")
        extract(archive, path)
    else:
        fetch(config.model.url, path, f"put it at {path}")
    try:
        load_state_dict(path, weights=config.model.weights)
    except NotACheckpointError:  # a web page instead of a file, for example
        path.unlink()
        raise


def fetch_cifar10_reference(path: Path) -> None:
    """The 50,000 training images of CIFAR-10 as array x of a .npz, through torchvision."""
    from torchvision.datasets import CIFAR10

    folder = path.parent / "cifar10-download"
    try:
        images = CIFAR10(folder, train=True, download=True).data  # (50000, 32, 32, 3) uint8
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot download the CIFAR-10 training images ({error}); put them at {path} "
            f"(array x, uint8, N x 32 x 32 x 3), or name statistics with REFERENCE=FILE.npz; "
            f"{OFFLINE_HINT}"
        ) from error
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, x=images)
    shutil.rmtree(folder, ignore_errors=True)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add_config(parser, required=False)
    parser.add_argument("--cifar10-reference", metavar="FILE", help="fetch the training images")
    args = parser.parse_args(argv)
    if args.cifar10_reference is not None:
        fetch_cifar10_reference(Path(args.cifar10_reference))
    elif args.config is not None:
        fetch_checkpoint(args.config, args.overrides)
    else:
        raise ConfigError("give --config FILE or --cifar10-reference FILE")


if __name__ == "__main__":
    run(main, again="the same command begins anew", less=None)
