"""Fetch a public checkpoint that a configuration names, or say how to get it by hand.

    python scripts/download.py --config configs/cifar10.yaml
    python scripts/download.py --config configs/cifar10.yaml --ckpt google/ddpm-cifar10-32
    python scripts/download.py --cifar10-reference checkpoints/cifar10_train_images.npz

The file appears when it is whole; the same command continues an interrupted download. Its sha256 is
compared with model.digest where one is published, and printed. Nothing is fetched if it is there.
--ckpt OWNER/NAME is a model of the Hugging Face hub (pip install huggingface_hub). Without a
network: one message that says what to download and where to put it, exit code 2.
"""

from tinydm.scripts.start import run  # first: it watches over the imports below

import shutil
import urllib.parse
import zipfile
import zlib
from pathlib import Path

# isort: split
import numpy as np

from tinydm.models.checkpoint import load_state_dict
from tinydm.models.checkpoint_files import CheckpointError, NotACheckpointError
from tinydm.models.hub_names import is_hub_id, no_path
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.common.files import atomic
from tinydm.scripts.experiment.cli import CHECKPOINT_OPTION, add_config, make_parser, output_file
from tinydm.scripts.experiment.config import load_config, repository_path
from tinydm.scripts.experiment.downloads import check_scheme, fetch, hub_folder

OFFLINE_HINT = "sample_emoji.sh needs no download"


def extract(archive: Path, path: Path, ours: bool) -> None:
    """The archive's member named like `path` -> path. One that is `ours` is removed then."""
    try:
        with zipfile.ZipFile(archive) as members, atomic(path) as temporary:
            name = next(n for n in members.namelist() if Path(n).name == path.name)
            with members.open(name) as source, open(temporary, "wb") as file:
                shutil.copyfileobj(source, file)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, StopIteration) as error:
        advice = "download it again"
        if ours:
            archive.unlink(missing_ok=True)
        else:
            advice = "it is kept; move it elsewhere, and this command downloads another"
        raise CheckpointError(f"{archive}: damaged, or holds no {path.name}; {advice}") from error
    if ours:
        archive.unlink()  # on a full disk it stays, and needs no second download


def fetch_checkpoint(config_path: str, overrides: list) -> None:
    """Fetches the checkpoint of a configuration to its place."""
    config = load_config(config_path, overrides)
    model = config.model
    if model.checkpoint is None:
        raise ConfigError(f"{config_path}: model.checkpoint is not set")
    path = repository_path(model.checkpoint)
    if path.exists():
        print(f"{path}: is there")
        return
    if is_hub_id(model.checkpoint):
        print(f"{model.checkpoint}: {hub_folder(model.checkpoint)}")
        return
    if (wrong := no_path(model.checkpoint)) is not None:
        raise wrong
    if model.url is None:
        raise CheckpointError(f"{path}: no such file, and model.url is not set; {OFFLINE_HINT}")
    check_scheme(model.url)
    if urllib.parse.urlsplit(model.url).path.endswith(".zip"):
        _fetch_archive(model.url, path, model.digest)
    else:
        digest = fetch(model.url, path, f"put it at {path}; {OFFLINE_HINT}", model.digest)
        print(f"{path}: sha256 {digest}")
    try:
        load_state_dict(path, weights=model.weights)
    except NotACheckpointError as error:
        path.unlink()  # it is not what was asked for, and came just now
        where = f"or get it elsewhere and put it at {path}"
        raise CheckpointError(
            f"{model.url}: what came is no checkpoint ({error}, {where})"
        ) from error


def _fetch_archive(url: str, path: Path, digest: str | None) -> None:
    """The checkpoint out of the user's own archive beside it, which stays, or of one fetched."""
    own = path.parent / Path(urllib.parse.urlsplit(url).path).name
    ours = path.with_name(f".{path.name}.archive")
    for archive in (path.with_suffix(".zip"), own):
        if archive.exists():
            print(f"{archive}: is there, and stays")
            extract(archive, path, ours=False)
            return
    if not ours.exists():
        found = fetch(url, ours, f"put the {path.name} in it at {path}; {OFFLINE_HINT}", digest)
        print(f"{url}: sha256 {found}")
    extract(ours, path, ours=True)


def fetch_cifar10_reference(path: Path) -> None:
    """The 50,000 training images of CIFAR-10 as array x of a .npz, through torchvision."""
    from torchvision.datasets import CIFAR10

    if path.exists():
        print(f"{path}: is there")
        return
    folder = path.parent / "cifar10-download"
    by_hand = (
        f"put the images at {path} (array x, uint8, N x 32 x 32 x 3), or name statistics with "
        f"REFERENCE=FILE.npz; {OFFLINE_HINT}"
    )
    if not (folder / CIFAR10.filename).exists():
        fetch(CIFAR10.url, folder / CIFAR10.filename, by_hand, f"md5:{CIFAR10.tgz_md5}")
    try:
        images = CIFAR10(folder, train=True, download=True).data  # (50000, 32, 32, 3) uint8
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot read the CIFAR-10 training images ({error}); {by_hand}"
        ) from error
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, x=images)
    shutil.rmtree(folder, ignore_errors=True)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add_config(parser, (CHECKPOINT_OPTION,), required=False, device=False)
    parser.add_argument(
        "--cifar10-reference",
        type=output_file(".npz"),
        metavar="FILE",
        help="fetch the training images",
    )
    args = parser.parse_args(argv)
    if args.cifar10_reference is not None:
        fetch_cifar10_reference(Path(args.cifar10_reference))
    elif args.config is not None:
        fetch_checkpoint(args.config, args.overrides)
    else:
        raise ConfigError("give --config FILE or --cifar10-reference FILE")


if __name__ == "__main__":
    run(main, again="the same command begins anew", less=None)
