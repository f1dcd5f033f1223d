"""The compiled library is kept in a folder of the user alone."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tinydm.quant.backends import build
from tinydm.quant.backends.build import COMPILERS, CompileError, library, private_cache

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)) or not hasattr(os, "getuid"), reason="no C++ compiler"
)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small source instead of the real ones, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "SOURCES", (tmp_path / "small.cpp",))
    write(tmp_path / "small.cpp", 41)
    return tmp_path / "small.cpp"


def write(source: Path, answer: int) -> None:
    source.write_text(f'extern "C" int answer() {{ return {answer}; }}\n')


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where the compiler worked."""
    folders: list[Path] = []
    original = build._build

    def counted(compiler: str, flags: tuple[str, ...], folder: Path) -> Path:
        folders.append(folder)
        return original(compiler, flags, folder)

    monkeypatch.setattr(build, "_build", counted)
    return folders


def libraries() -> list[Path]:
    cache = private_cache()
    assert cache is not None
    return sorted(cache.iterdir())


def test_built_once(source: Path, builds: list[Path]):
    """Kept for ourselves alone, until the source changes."""
    assert library().answer() == 41 and library().answer() == 41 and len(builds) == 1
    (file,) = libraries()
    assert file.parent.stat().st_mode & 0o777 == 0o700 and file.stat().st_mode & 0o077 == 0
    write(source, 42)
    assert library().answer() == 42 and len(builds) == 2 and len(libraries()) == 2


def test_who_starts_together_builds_once(source: Path, builds: list[Path]):
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: library().answer(), range(3))) == [41, 41, 41]
    assert len(builds) == 1 and len(libraries()) == 1


def test_options_and_compiler_belong_to_the_name(source: Path, monkeypatch, builds: list[Path]):
    library()
    monkeypatch.setattr(build, "SPEED_FLAGS", ("-O1",))
    library()
    monkeypatch.setattr(build, "_processor", lambda: ("another", frozenset()))
    library()
    assert len(builds) == 3


@pytest.mark.parametrize("fault", ["empty", "cut", "changed", "shared", "link", "folder"])
def test_damaged_and_foreign_files_are_built_again(
    source: Path, fault: str, tmp_path: Path, builds: list[Path]
):
    flags, (model, known) = build.INSTRUCTIONS[None][0], build._processor()
    compiler = next(filter(None, map(shutil.which, COMPILERS)))
    made = build._build(compiler, flags, tmp_path)  # never loaded, so that it may be changed
    content, key = made.read_bytes(), build._key(compiler, flags, (model, *sorted(known)))
    file = private_cache() / f"{key}-{build._digest(content)}.so"
    if fault == "link":
        file.symlink_to(made)
    elif fault == "folder":
        file.with_name(f"{key}-{'0' * 32}.so").mkdir()
    else:
        flipped = bytes([content[0] ^ 1]) + content[1:]
        file.write_bytes(
            {"empty": b"", "cut": content[:100], "changed": flipped}.get(fault, content)
        )
        file.chmod(0o620 if fault == "shared" else 0o600)
    builds.clear()
    assert library().answer() == 41 and len(builds) == 1
    assert library().answer() == 41 and len(builds) == 1
    assert file.is_file() and not file.is_symlink() and file.read_bytes() == content


@pytest.mark.parametrize("fault", ["shared", "link", "file", "relative"])
def test_a_folder_of_others_is_not_used(
    source: Path, fault: str, tmp_path: Path, monkeypatch, builds: list[Path]
):
    """The library is built in a folder with a random name, and gone with it."""
    folder = tmp_path / "cache" / "tinydm"
    folder.parent.mkdir()
    if fault == "shared":
        folder.mkdir()
        folder.chmod(0o777)
    elif fault == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif fault == "file":
        folder.write_text("")
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert private_cache() is None
    assert library().answer() == 41 and library().answer() == 41
    assert len({*builds}) == 2 and not any(path.exists() for path in builds)
    assert not folder.is_dir() or not any(folder.iterdir())


def test_a_folder_of_another_user_is_not_used(source: Path, monkeypatch, builds: list[Path]):
    assert private_cache() is not None
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert private_cache() is None


def test_old_libraries_go(source: Path, monkeypatch):
    monkeypatch.setattr(build, "KEPT_LIBRARIES", 2)
    stale = private_cache() / "build-killed"
    stale.mkdir()
    os.utime(stale, (0, 0))
    for answer in range(3):
        write(source, answer)
        assert library().answer() == answer
    assert len(libraries()) == 2 and not stale.exists()


def test_instructions_that_the_processor_lacks(source: Path, monkeypatch):
    monkeypatch.setattr(build, "_processor", lambda: ("old", frozenset({"avx2"})))
    with pytest.raises(CompileError, match="lacks fma, f16c, bmi2$"):
        library("avx2")
    assert build.instructions_here() == []
