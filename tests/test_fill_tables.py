"""scripts/fill_tables.py as a command line: every row of the paper's tables, measured or empty.

python -m pytest tests/test_fill_tables.py
"""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.helpers import forks
from tests.helpers.narrow import BENCH, write_narrow
from tests.helpers.strange import changed
from tinydm.scripts import benchmark, fill_tables
from tinydm.scripts.bench.paper import PUBLISHED, TITLES
from tinydm.scripts.experiment.cli import explain

COLUMNS = ["Timesteps", "Bit-width (W/A)", "Method", "Size (MB)", "FID", "sFID", "IS", "Precision"]
METHODS = ["Q-Diffusion", "PTQD", "PTQ4DM", "TinyDM"]
LSUN, IMAGENET, DIT = (f"## {title}" for title in TITLES.values())
OTHERS = "### Published by others, not measured here"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What benchmark.py writes for a small model under the name of the LSUN configuration."""
    folder = write_narrow(tmp_path_factory.mktemp("tables"), BENCH | {"name": "lsun_bedroom"})
    place = ["--config", str(folder / "narrow.yaml"), "--out", str(folder / "bench")]
    what = ["--methods", "fp,ptq4dm", "--bits", "w8a8", "--steps", "50", "--transfer", "5"]
    benchmark.main([*place, *what, "--trajectories", "2"])
    return folder / "bench" / "results.json"


def parts(text: str) -> dict[str, list[list[str]]]:
    """Heading -> the rows of its table; OTHERS belongs to the heading before it."""
    tables: dict[str, list[list[str]]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = f"{heading.partition('|')[0]}|{line}" if line.startswith("###") else line
            tables[heading] = []
        elif line.startswith("|") and not line.startswith("|-"):
            tables[heading].append([cell.strip() for cell in line.strip("|").split("|")])
    return tables


def quantized_row(result: dict) -> dict:
    """The one of the calibrated number of steps."""
    rows = [row for row in result["rows"] if row["cell"]["label"] == "ptq4dm"]
    return next(row for row in rows if row["sampler"] == row["calibrated"])


def filled(*arguments: str) -> str:
    out = Path(arguments[0]).parent / "tables.md"
    fill_tables.main([*arguments, "--out", str(out)])
    return out.read_text()


def test_all_rows_are_there_and_empty_without_results(capsys) -> None:
    fill_tables.main([])
    tables = parts(capsys.readouterr().out)
    assert list(tables) == [LSUN, IMAGENET, DIT]
    for table in tables.values():
        assert table[0] == COLUMNS
        expected = [
            [steps, bits, method]
            for steps in ("250", "50")
            for bits, methods in (("32/32", ["FP"]), ("8/8", METHODS), ("4/8", METHODS))
            for method in methods
        ]
        assert [row[:3] for row in table[1:]] == expected
        assert all(row[3:] == [""] * 5 for row in table[1:])


@pytest.mark.slow
def test_measured_rows_are_filled_and_no_other(results: Path) -> None:
    tables = parts(filled(str(results)))
    told = {tuple(row[:3]): row[3:] for row in tables[LSUN][1:]}
    measured = {key for key, cells in told.items() if any(cells)}
    assert measured == {("50", "32/32", "FP"), ("50", "8/8", "PTQ4DM")}  # not the 5 steps
    size = quantized_row(json.loads(results.read_text()))["size_mb"]
    assert told["50", "8/8", "PTQ4DM"] == [f"{size:.3f}", "", "", "", ""]
    assert not any(any(row[3:]) for row in tables[IMAGENET][1:])


@pytest.mark.slow
def test_scores_come_with_their_images_and_a_later_file_wins(results: Path) -> None:
    result = json.loads(results.read_text())
    images = {"generated": 50000, "reference": 3000000}
    scores = {"fid": 3.456, "sfid": 7.0, "is": None, "precision": 0.64321}
    row = quantized_row(result)
    row["scores"] = scores | {"images": images, "reference": "bedroom.npz", "notes": []}
    result["rows"] = [row]
    later = results.parent / "later.json"
    later.write_text(json.dumps(result))
    text = filled(str(results), str(later))
    told = {tuple(row[:3]): row[3:] for row in parts(text)[LSUN][1:]}
    assert told["50", "8/8", "PTQ4DM"][1:] == ["3.46", "7.00", "", "0.6432"]
    assert any(told["50", "32/32", "FP"])
    assert "Scores: 50,000 images against 3,000,000 of bedroom.npz." in text
    assert f"{later}: commit" in text


@pytest.mark.slow
@given(data=st.data())
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
@seed(1)
def test_changed_results_give_a_table_or_one_line(
    results: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """With scores, as a run with --fid has them."""
    result = json.loads(results.read_text())
    scores = {"fid": 3.456, "sfid": 7.0, "is": None, "precision": 0.64321}
    images = {"generated": 50000, "reference": None}
    quantized_row(result)["scores"] = scores | {"images": images, "reference": "a.npz", "notes": []}
    path = tmp_path / "strange.json"
    path.write_text(json.dumps(changed(result, data)))
    try:
        fill_tables.main([str(results), str(path), "--out", str(tmp_path / "tables.md")])
    except Exception as error:
        line = explain(error)
        assert line is not None and str(path) in line, path.read_text()
    else:
        assert parts((tmp_path / "tables.md").read_text())[LSUN][0] == COLUMNS


@pytest.mark.slow
def test_published_numbers_stand_apart_with_their_sources(results: Path) -> None:
    plain, text = filled(str(results)), filled(str(results), "--published")
    tables = parts(text)
    for title in (LSUN, IMAGENET, DIT):
        assert tables[title] == parts(plain)[title]  # the measured tables do not change
        table = tables[f"{title}|{OTHERS}"]
        assert table[0] == [*COLUMNS, "Source"]
        for row in table[1:]:
            assert any(row[4:8]) and f"- {row[8]} " in text
    assert OTHERS not in plain
    data = json.loads(PUBLISHED.read_text())
    entries = [entry for table in data["tables"].values() for entry in table]
    assert {entry["source"] for entry in entries} == set(data["sources"])
    assert all(0 < entry.get("precision", 0.5) < 1 for entry in entries)


@pytest.mark.slow
def test_other_files_are_refused(results: Path, tmp_path: Path) -> None:
    result = json.loads(results.read_text()) | {"name": "emoji32"}
    other = tmp_path / "emoji.json"
    other.write_text(json.dumps(result))
    table = tmp_path / "t.md"
    line = forks.refusal(forks.run(fill_tables.main, other, "--out", table))
    assert "emoji32" in line and "lsun_bedroom" in line and not table.exists()
    for text in ("[]", '{"name": "lsun_bedroom", "rows": [{}]}', "{"):
        other.write_text(text)
        with pytest.raises(fill_tables.RunError, match="not a results.json"):
            fill_tables.main([str(other)])
    with pytest.raises(FileNotFoundError):
        fill_tables.main([str(tmp_path / "none.json")])
