"""scripts/evaluate.py as a whole and as a command."""

import io
import json
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_fid import fid_score
from tqdm import tqdm

from tests.helpers.commands import ROOT
from tests.helpers.images import needs_package, npz, write_images
from tinydm.scripts import evaluate as cli
from tinydm.scripts.common.errors import MetricError
from tinydm.scripts.experiment.cli import run
from tinydm.scripts.metrics import Pass, evaluate, inception, inputs


@pytest.mark.slow
@needs_package
def test_fid_equals_pytorch_fid_on_folders(weights, network, folders):
    """Same moments as pytorch-fid's own loop; the distance itself is compared in test_scores.py."""
    theirs = inception._build(torch.load(weights, weights_only=True), resize=True)
    files = sorted(folders[0].glob("*.png"))
    mu, sigma = fid_score.calculate_activation_statistics(files, theirs, 4, 2048, "cpu", 0)
    one = Pass({"pool", "spatial"})
    one.run(inputs.open_source(folders[0]), network, 3, tqdm(disable=True))
    found = one.statistics("pytorch-fid")
    assert found.n == 6 and found.mu_s.shape == (2023,)
    assert abs(found.mu - mu).max() < 1e-5 * abs(mu).max()
    assert abs(found.sigma - sigma).max() < 1e-5 * abs(sigma).max()


@pytest.mark.slow
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


@pytest.mark.slow
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
        (["{array}", "--save-stats", "{array}"], "would overwrite what is read"),
        (["{images}", "{stats}", "--paired", "{images}"], "stats.npz: not a folder of images"),
    ],
)
def test_bad_commands_give_one_line_and_exit_2(tmp_path, capsys, arguments, message):
    names = {
        "images": write_images(tmp_path / "images", 2, 0),
        "stats": npz(tmp_path / "stats.npz", mu=np.zeros(4), sigma=np.eye(4)),
        "absent": tmp_path / "absent",
        "one": write_images(tmp_path / "one", 1, 0),
        "array": npz(tmp_path / "array.npz", x=np.zeros((2, 8, 8, 3), np.uint8)),
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
        assert f"{name}: member mu.npy" in error or f"{name}: mu (" in error
        assert error.count("\n") == 1
    np.save(tmp_path / "plain.npy", np.zeros(3))
    (tmp_path / "plain.npy").rename(tmp_path / "plain.npz")
    assert run_cli(tmp_path / "plain.npz", tmp_path) == 2
    assert "plain.npz: one .npy array under the name .npz" in capsys.readouterr().err


def test_paired_alone_needs_no_network(folders, tmp_path, capsys):
    out = tmp_path / "m.json"
    options = ("--metrics", "none", "--paired", folders[0], "--json", out)
    assert run_cli(folders[0], folders[1], *options) == 0
    found = json.loads(out.read_text())
    assert found["paired"]["images"] == 5 and found["paired"]["unpaired"] == 1
    assert "5 pairs, 1 files without partner" in capsys.readouterr().out


@pytest.mark.slow
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
