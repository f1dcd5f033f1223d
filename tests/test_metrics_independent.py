"""The evaluator against the definitions, written out once more in plain numpy and pytorch-fid's
network: FID, sFID, Inception Score, precision and recall of two folders, from files to numbers.

python -m pytest tests/test_metrics_independent.py
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_fid.inception import fid_inception_v3
from torch import nn

from tests.helpers.images import load_folder, needs_package
from tinydm.scripts.metrics import METRICS, evaluate

REFERENCE, GENERATED = 12, 8
K = 3


def write_kinds(folder: Path, count: int, seed: int, kinds: int) -> Path:
    """Images of `kinds` kinds (stripes, blobs, flat), each with noise of its own."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    y, x = np.mgrid[:32, :32] / 32
    for i in range(count):
        pattern = (np.sin(20 * x + 3 * y), np.exp(-8 * ((x - 0.5) ** 2 + (y - 0.5) ** 2)), 0 * x)
        values = 0.5 + 0.3 * pattern[i % kinds][..., None] * rng.uniform(0.5, 1, 3)
        values = values + rng.normal(0, 0.05, (32, 32, 3)) + rng.uniform(-0.1, 0.1, 3)
        pixels = (255 * values.clip(0, 1)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


def features_of(network: nn.Module, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pool (N, 2048) and mixed_6/conv, channels 0..6, (N, 2023), in float64: torchvision's graph
    as pytorch-fid patches it, with its resize to 299 and range -1..1."""
    kept: dict[str, list[np.ndarray]] = {"pool": [], "spatial": []}

    def keep(name: str, channels: int):
        def hook(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
            kept[name].append(out[:, :channels].flatten(1).double().numpy())

        return hook

    handles = [
        network.avgpool.register_forward_hook(keep("pool", 2048)),
        network.Mixed_6d.branch1x1.register_forward_hook(keep("spatial", 7)),
    ]
    for image in load_folder(folder):
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        x = nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        with torch.no_grad():
            network(2 * x - 1)
    for handle in handles:
        handle.remove()
    return np.concatenate(kept["pool"]), np.concatenate(kept["spatial"])


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^(1/2) S2 S1^(1/2))^(1/2), by eigenvalues.

    In the span of the features, which no turn of the axes leaves: 22 dimensions instead of 2048.
    """
    basis = np.linalg.qr(np.concatenate([x, y]).T)[0]  # (D, N + M)
    x, y = x @ basis, y @ basis
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inside = np.linalg.eigvalsh(root @ s2 @ root)
    gap = x.mean(0) - y.mean(0)
    return gap @ gap + np.trace(s1) + np.trace(s2) - 2 * np.sqrt(inside.clip(0)).sum()


def inception_score(pool: np.ndarray, matrix: np.ndarray) -> float:
    """exp of the mean divergence of p(y|x) from p(y); logits without bias."""
    logits = pool @ matrix.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return float(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))


def inside_share(points: np.ndarray, manifold: np.ndarray) -> float:
    """Share of the points in a ball that reaches from one of the manifold to its K-th neighbour."""
    inside = 0
    for point in points:
        for centre in manifold:
            to_others = sorted(np.linalg.norm(manifold - centre, axis=1))  # itself comes first
            if np.linalg.norm(point - centre) <= to_others[K]:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.slow
@needs_package
def test_the_numbers_are_those_of_the_definitions(weights: Path, tmp_path: Path) -> None:
    """The generated images lack one of three kinds, so that they do not cover the others."""
    state = torch.load(weights, weights_only=True)
    shape = state["fc.weight"].shape
    state["fc.weight"] = torch.randn(shape, generator=torch.Generator().manual_seed(3)) / 4
    state["fc.bias"] = torch.full_like(state["fc.bias"], 5.0)  # which the score leaves out
    state["fc.bias"][::2] = 0.0
    torch.save(state, tmp_path / "official.pth")
    network = fid_inception_v3_of(state)
    folders = [
        write_kinds(tmp_path / "reference", REFERENCE, 0, kinds=3),
        write_kinds(tmp_path / "generated", GENERATED, 1, kinds=2),
    ]
    (ref, ref_s), (gen, gen_s) = (features_of(network, folder) for folder in folders)
    assert ref.shape == (REFERENCE, 2048) and gen_s.shape == (GENERATED, 7 * 17 * 17)
    expected = {
        "fid": frechet(ref, gen),
        "sfid": frechet(ref_s, gen_s),
        "is": inception_score(gen, state["fc.weight"].double().numpy()),
        "precision": inside_share(gen, ref),
        "recall": inside_share(ref, gen),
    }
    found = evaluate(
        *folders,
        METRICS,
        inception=tmp_path / "official.pth",
        device="cpu",
        batch_size=4,
        progress=False,
    )
    print({name: (found[name], value) for name, value in expected.items()})
    assert 0 < expected["precision"] <= 1 and 0 < expected["recall"] < 1
    assert expected["fid"] > 1 and expected["sfid"] > 1 and expected["is"] > 1.01
    for name in ("fid", "sfid", "is"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    for name in ("precision", "recall"):  # no distance is within 0.1% of a ball's radius
        assert found[name] == pytest.approx(expected[name]), name


def fid_inception_v3_of(state: dict[str, torch.Tensor]) -> nn.Module:
    """pytorch-fid's own builder, without its download."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytorch_fid.inception.load_state_dict_from_url", lambda *a, **k: state)
        return fid_inception_v3().eval()
