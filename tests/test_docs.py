"""README and docs/: every link leads somewhere, every command line is one that the script knows."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import calibrate
import sample_diffusion
from tests.helpers.commands import ROOT
from tinydm.scripts import benchmark, evaluate, fill_tables, report
from tinydm.scripts.experiment.config import load_config

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors that a forge makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.M)
    plain = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
    return set(plain)


def commands(page: Path) -> Iterator[list[str]]:
    """The command lines in the code blocks of a page, split as a shell does."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text_of(page), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # a formula, or the output of a command
                continue
            for word in words:
                if word.endswith((".py", ".sh")):
                    yield words[words.index(word) :]
                    break


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for groups in LINK.findall(text_of(page)):
        target = groups[0] or groups[1]
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else (page.parent / path).resolve()
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_scripts_and_configurations_of_command_lines_exist(page: Path) -> None:
    for script, *arguments in commands(page):
        assert (ROOT / script).exists() or script.startswith("tests/"), script
        for word in arguments:
            if word.startswith("configs/") and "{" not in word:
                assert (ROOT / word).exists(), word


def test_overrides_of_the_command_lines_are_keys_and_fit() -> None:
    seen = 0
    for page in PAGES:
        for _, *arguments in commands(page):
            config = next((w for w in arguments if w.startswith("configs/")), None)
            if config is None or "--set" not in arguments or "{" in config:
                continue
            given = arguments[arguments.index("--set") + 1 :]
            pairs = [w for w in given if re.fullmatch(r"[\w.]+=[^\[\].]*[^.]", w)]
            load_config(ROOT / config, pairs)
            seen += len(pairs)
    assert seen


def test_options_of_the_command_lines_are_known(capsys: pytest.CaptureFixture) -> None:
    mains = {
        "calibrate.py": calibrate.main,
        "sample_diffusion.py": sample_diffusion.main,
        "scripts/benchmark.py": benchmark.main,
        "scripts/evaluate.py": evaluate.main,
        "scripts/fill_tables.py": fill_tables.main,
        "scripts/report.py": report.main,
    }
    known = {}
    for script, main in mains.items():
        with pytest.raises(SystemExit):
            main(["--help"])
        known[script] = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", capsys.readouterr().out))
        if script == "scripts/benchmark.py":
            with pytest.raises(SystemExit):
                main(["--speed", "--help"])
            known[script] |= set(re.findall(r"(?<![\w-])--[\w-]+", capsys.readouterr().out))
    for page in PAGES:
        for script, *arguments in commands(page):
            options = {
                w.strip("[]").partition("=")[0] for w in arguments if w.strip("[").startswith("-")
            }
            if script in known:
                assert not options - known[script], f"{page.name}: {script} {options}"
