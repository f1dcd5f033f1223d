"""scripts/report.py on runs that lack files or hold damaged ones: a page that says so, or one line.

python -m pytest tests/test_report_damaged.py
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.helpers import forks
from tests.helpers.forks import refusal
from tests.helpers.report_page import PARAMS, QUICK, SECTIONS, Page, reported, write_plainly
from tests.helpers.strange import changed
from tinydm.models.ddim_unet import DDIMUNet
from tinydm.scripts import compare, report
from tinydm.scripts.common.errors import RunError
from tinydm.scripts.experiment.cli import explain
from tinydm.scripts.experiment.runs import png_name
from tinydm.scripts.reporting.measurements import FILE

READ = ["report.json", "comparison.json", FILE]
READ += [f"images-{kind}.{what}.json" for kind in ("fp", "w4a8") for what in ("report", "identity")]


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / "run", tmp_path / "copy"))


@pytest.fixture(scope="module")
def worn(home: Path) -> Path:
    """A copy whose files are changed, and put back, again and again."""
    return Path(shutil.copytree(home / "run", home / "worn"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gone", "sections"),
    [
        (["images-fp", "images-w4a8"], {"images", "psnr", "speed"}),
        (["images-fp"], {"images", "psnr", "speed"}),
        (["comparison.json"], {"summary"}),
        (["report.json"], {"summary", "timesteps", "layers", "speed"}),
        (["quantized.safetensors"], {"eps", "groups", "ranges", "layers", "size"}),
    ],
)
def test_what_is_missing_is_said(gone: list[str], sections: set[str], copy: Path) -> None:
    for name in gone:
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = reported(copy)
    assert set(page.text) == SECTIONS
    assert set(page.missing()) == sections
    assert all(said.startswith("Not in this run: ") for said in page.missing().values())


@pytest.mark.slow
def test_without_its_checkpoint_only_ranges_are_measured(copy: Path) -> None:
    """And another checkpoint is no substitute."""
    text = (copy / "config.yaml").read_text()
    found = re.search(r"checkpoint: (\S+)", text).group(1)
    (copy / "config.yaml").write_text(text.replace(found, "elsewhere.pt"))
    page = reported(copy)
    assert set(page.missing()) == {"eps", "layers"} and "elsewhere.pt" in page.missing()["eps"]
    assert "eps-MSE alone" not in page.text["layers"]
    torch.manual_seed(1)
    torch.save(DDIMUNet(**PARAMS).state_dict(), copy / "elsewhere.pt")
    page = reported(copy)
    assert "not the checkpoint that was calibrated" in page.missing()["eps"]
    page = reported(copy, "--trajectories", "0", "--states", "0")
    assert {"eps", "ranges", "layers"} == set(page.missing())


@pytest.mark.slow
def test_images_that_do_not_belong_together_are_not_compared(copy: Path, home: Path) -> None:
    identity = json.loads((copy / "images-fp.identity.json").read_text())
    (copy / "images-fp.identity.json").write_text(json.dumps(identity | {"seed": 7}))
    page = reported(copy)
    assert {"images", "psnr"} <= set(page.missing()) and "differ in seed" in page.notes[0]
    page = reported(copy, *QUICK, "--full", str(home / "run" / "images-fp"))
    assert page.missing() == {}
    identity = json.loads((copy / "images-w4a8.identity.json").read_text())
    identity["files_sha256"]["quantized"] = "0" * 64
    (copy / "images-w4a8.identity.json").write_text(json.dumps(identity))
    page = reported(copy, *QUICK, "--full", str(home / "run" / "images-fp"))
    assert "another file" in page.notes[0]


@pytest.mark.slow
def test_folders_of_different_counts_have_no_common_fid(copy: Path) -> None:
    (copy / "images-w4a8" / png_name(0)).unlink()
    arguments = ["--run", str(copy), "--full", "images-fp", "--quantized", "images-w4a8"]
    with pytest.raises(RunError, match="1 images are in one of them alone"):
        compare.main(arguments)


@pytest.mark.slow
def test_an_older_configuration_is_told_not_guessed(copy: Path) -> None:
    path = copy / "config.yaml"
    path.write_text(path.read_text() + "novelty: 1\n")
    page = reported(copy)
    assert "novelty" in page.notes[0] and "novelty: 1" in page.text["config"]
    assert set(page.missing()) == {"eps", "ranges", "layers"}


@pytest.mark.slow
@given(data=st.data())
@settings(
    max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
@seed(1)
def test_a_changed_file_gives_a_page_or_one_line(worn: Path, data: st.DataObject) -> None:
    """Every JSON that the page is made of, with one value of another kind, or without it."""
    path = worn / data.draw(st.sampled_from(READ))
    before = {name: (worn / name).read_bytes() for name in READ}
    try:
        path.write_text(json.dumps(changed(json.loads(path.read_text()), data)))
        try:
            write_plainly(worn)
        except Exception as error:
            line = explain(error)
            assert line is not None and len(line.splitlines()) == 1, path.read_text()
            assert path.name in line
        else:
            assert set(Page(worn / "report.html").text) == SECTIONS
    finally:
        for name, content in before.items():
            (worn / name).write_bytes(content)


@pytest.mark.slow
@given(data=st.data())
@settings(
    max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
@seed(2)
def test_compare_with_a_changed_report(worn: Path, data: st.DataObject) -> None:
    names = ["report.json", "images-fp.report.json", "images-w4a8.report.json"]
    path = worn / data.draw(st.sampled_from(names))
    before = path.read_bytes()
    try:
        path.write_text(json.dumps(changed(json.loads(before), data)))
        compare.main(["--run", str(worn), "--full", "images-fp", "--quantized", "images-w4a8"])
    except Exception as error:
        line = explain(error)
        assert line is not None and path.name in line, path.read_text()
    finally:
        path.write_bytes(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("report.json", "size_mb", "1.3", 'size_mb is "1.3", not a number'),
        ("report.json", "layers", [{}], "layers[0].name is missing"),
        ("report.json", "seconds", float("nan"), "no JSON: NaN is not a number"),
        ("report.json", "activation_bits", None, "activation_bits is null, not a whole number"),
        ("comparison.json", "rows", {"a": 1}, "rows is an object, not a list"),
        (
            "images-fp.report.json",
            "images_per_second",
            "1",
            'images_per_second is "1", not a number',
        ),
        (FILE, "states", {"settings": {}}, "states.values is missing"),
    ],
)
def test_a_wrong_kind_is_named(copy: Path, name: str, key: str, value: object, said: str) -> None:
    told = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps(told | {key: value}))
    page = copy / "report.html"
    page.unlink()
    line = refusal(forks.run(report.main, copy, *QUICK))
    assert f"{copy / name}: damaged ({said}" in line and not page.exists()


@pytest.mark.slow
def test_bad_input_is_refused_in_one_line(home: Path, tmp_path: Path, capsys) -> None:
    empty, damaged = tmp_path / "empty", tmp_path / "damaged"
    empty.mkdir()
    shutil.copytree(home / "run", damaged)
    with pytest.raises(report.RunError, match="give a run of calibrate.py"):
        report.main([str(empty)])
    data = bytearray((damaged / "quantized.safetensors").read_bytes())
    data[-100] ^= 1
    (damaged / "quantized.safetensors").write_bytes(data)
    assert "checksum" in refusal(forks.run(report.main, damaged, "--trajectories", 1))
    (damaged / "report.json").write_text("{")
    with pytest.raises(report.RunError, match="damaged"):
        report.main([str(damaged)])
    with pytest.raises(report.RunError, match="no such folder"):
        report.main([str(home / "run"), "--full", "nowhere"])
    with pytest.raises(SystemExit):
        report.main([str(home / "run"), "--trajectories", "-1"])
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (empty / "report.html").exists()
