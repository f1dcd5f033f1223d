"""scripts/environment.sh: which Python the shell scripts use, and how a broken .venv is mended."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

FILES = ("requirements.txt", "scripts/environment.sh", "scripts/check_environment.py")
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PATH": "/usr/bin:/bin"}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What the set-up needs, and nothing to install from."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def prepared(folder: Path, base: str) -> subprocess.CompletedProcess:
    command = ["sh", "-c", ". scripts/environment.sh; echo PYTHON=$PYTHON"]
    environment = {**os.environ, **OFFLINE, "TINYDM_PYTHON": base}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_a_venv_of_a_removed_python_is_made_anew(copy: Path) -> None:
    binaries = copy / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("python", "python3"):
        (binaries / name).symlink_to("/nowhere/bin/python3.10")
    # The Python behind this environment, which has no packages.
    done = prepared(copy, os.path.join(sys.base_prefix, "bin", "python3"))
    assert done.returncode == 2 and "pip could not install" in done.stderr  # there is no index
    subprocess.run([binaries / "python", "-m", "pip", "--version"], check=True, timeout=60)


def test_a_python_that_is_too_old_is_refused_before_anything_is_installed(copy: Path) -> None:
    old = copy / "old-python"
    old.write_text("#!/bin/sh\necho 'this Python is 3.9.1, 3.10 or newer is needed' >&2\nexit 1\n")
    old.chmod(0o755)
    done = prepared(copy, str(old))
    assert done.returncode == 2 and not (copy / ".venv").exists()
    lines = done.stderr.strip().splitlines()
    assert lines[0] == "this Python is 3.9.1, 3.10 or newer is needed"
    assert lines[1].startswith(f"error: {old} cannot be used; TINYDM_PYTHON=")


def test_a_python_that_has_everything_is_used(copy: Path) -> None:
    if subprocess.run(
        [sys.executable, "scripts/check_environment.py", "requirements.txt"], cwd=copy
    ).returncode:
        pytest.skip("this Python lacks a requirement")
    done = prepared(copy, sys.executable)
    assert done.stdout.strip() == f"PYTHON={sys.executable}" and not (copy / ".venv").exists()
