"""Any characters in what is typed: emoji, accents, bytes that are not UTF-8, an ASCII terminal."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.commands import ROOT
from tests.helpers.narrow import SAMPLING, write_narrow
from tinydm.scripts.common.files import append_lines, write_text
from tinydm.scripts.common.schema import printable, read_value
from tinydm.scripts.experiment import cli
from tinydm.scripts.experiment.config import load_config, parse_config, resolved_yaml
from tinydm.scripts.experiment.runs import beside

ODD = "caf\xe9-\U0001f600-\u2028-\x85-\udce9"  # an accent, an emoji, ends of lines, a lone byte


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(st.characters(), max_size=20))
def test_an_options_text_arrives_as_it_was_typed(text: str) -> None:
    assert read_value(cli.quoted(text), "--ckpt") == text
    assert read_value(cli.one_text(text), "--prompt") == [text]


def test_options_for_texts_take_any_character(tmp_path: Path) -> None:
    parser = cli.make_parser("")
    cli.add_config(parser)
    path = write_narrow(tmp_path, SAMPLING) / "narrow.yaml"
    options = ["--ckpt", f"/nowhere/{ODD}.pt", "--skip_type", "quad"]
    args = parser.parse_args(["--config", str(path), *options])
    config = load_config(path, args.overrides)
    assert config.model.checkpoint == f"/nowhere/{ODD}.pt"
    assert parse_config(resolved_yaml(config), "resolved") == config


def test_texts_are_written_and_shown_whatever_they_hold(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", ODD)
    append_lines(tmp_path / "a.txt", [ODD])
    assert (tmp_path / "a.txt").read_text(encoding="utf-8").count("\\udce9") == 2
    assert printable("a\udce9\nb") == "a\\udce9 b"


@pytest.mark.slow
@pytest.mark.parametrize(
    "surroundings",
    [{}, {"LC_ALL": "C", "LANG": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}],
    ids=["as it is", "ASCII"],
)
def test_a_run_whose_paths_hold_any_bytes_is_whole(tmp_path: Path, surroundings: dict) -> None:
    """Its report is written too, after images that took hours."""
    write_narrow(tmp_path, SAMPLING)
    odd = "caf\xe9 \U0001f600".encode() + b" \xe9"
    weights = os.path.join(os.fsencode(tmp_path), odd + b".pt")
    shutil.copy(tmp_path / "narrow.pt", weights)
    config = yaml.safe_load((tmp_path / "narrow.yaml").read_text())
    config["model"]["checkpoint"] = None
    (tmp_path / "none.yaml").write_text(yaml.safe_dump(config))
    out = os.path.join(os.fsencode(tmp_path), odd)
    script = os.fsencode(ROOT / "sample_diffusion.py")
    command = [
        os.fsencode(sys.executable),
        script,
        b"--config",
        os.fsencode(tmp_path / "none.yaml"),
    ]
    command += [b"--ckpt", weights, b"--out", out, b"--grid", out + b".png", b"--count", b"2"]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", **surroundings}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    folder = Path(os.fsdecode(out))
    assert json.loads(beside(folder, "report.json").read_text())["images"]["made"] == 2
    assert "2 images made" in beside(folder, "log.txt").read_text(encoding="utf-8")
    assert Path(os.fsdecode(out + b".png")).exists()
