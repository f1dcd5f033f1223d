"""The conformance kit: golden tensors made by running the public reference implementations.

    python -m pytest tests/test_conformance.py                           # the committed subset
    TINYDM_KIT=path/to/kit python -m pytest tests/test_conformance.py    # any kit of this format
    python -m tests.helpers.kit SOURCE TARGET PREFIX...                  # make or extend a subset

A kit is a folder with an `index.json`: one entry per file, with a family, a role and, where the
file holds goldens, the tolerance `rtol`. A check is a function (entry, kit) that raises
AssertionError (or skips itself with `pytest.skip`); it is registered for a family and a role, and
`tests/test_conformance.py` runs every check on every entry that it fits. Always import this module
as `tests.helpers.kit`, so that there is one registry.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors.torch import load_file

Check = Callable[[dict, Path], None]
_CHECKS: list[tuple[str, str, Check]] = []


def register(family: str, role: str, check: Check) -> None:
    """Run `check(entry, kit)` on every entry of that family and role.

    family may be a pattern ("dd?m_*"). Several checks may fit one entry (a schedule file serves
    all families); each runs as a test of its own.
    """
    if (family, role, check) not in _CHECKS:
        _CHECKS.append((family, role, check))


def checks_for(entry: dict) -> list[Check]:
    """The registered checks that fit an index entry, in the order of registration."""
    return [
        check
        for family, role, check in _CHECKS
        if role == entry["role"] and fnmatchcase(entry["family"], family)
    ]


def kit_folder() -> Path:
    """$TINYDM_KIT, else the committed subset."""
    return Path(
        os.environ.get("TINYDM_KIT") or Path(__file__).resolve().parents[1] / "fixtures" / "kit"
    )


def entries(kit: Path) -> list[dict]:
    """All entries of `index.json`; each has at least file, family, role, bytes and sha256."""
    return json.loads((kit / "index.json").read_text(encoding="utf-8"))["entries"]


def entries_beside(entry: dict, kit: Path, role: str) -> list[dict]:
    """The entries of one role in the same folder as `entry` (its config, its checkpoint)."""
    folder = Path(entry["file"]).parent
    return [e for e in entries(kit) if Path(e["file"]).parent == folder and e["role"] == role]


def config_of(entry: dict, kit: Path) -> dict:
    """The parsed `config.json` beside an entry."""
    return json.loads((kit / entry["file"]).with_name("config.json").read_text(encoding="utf-8"))


def checkpoint_of(entry: dict, kit: Path) -> Path:
    """The path of the one checkpoint beside an entry."""
    (found,) = entries_beside(entry, kit, "checkpoint")
    return kit / found["file"]


def goldens_of(entry: dict, kit: Path) -> dict[str, torch.Tensor]:
    """The tensors of a golden file."""
    return load_file(kit / entry["file"])


def relative_error(actual: torch.Tensor, golden: torch.Tensor) -> float:
    """max|a - b| / max|b| in float64 over the whole tensor; infinite where a is not finite."""
    assert actual.shape == golden.shape, f"{tuple(actual.shape)} is not {tuple(golden.shape)}"
    difference = (actual.double() - golden.double()).abs().max().item()
    scale = golden.double().abs().max().item()
    if not math.isfinite(difference):
        return math.inf
    return difference / scale if scale else (math.inf if difference else 0.0)


def assert_close(name: str, actual: torch.Tensor, golden: torch.Tensor, rtol: float) -> None:
    """The kit's metric against `rtol`; prints what was measured (`pytest -rP` shows it)."""
    error = relative_error(actual, golden)
    print(f"{name}: error {error:.2e}, {error / rtol:.3f} of rtol {rtol:.0e}")
    assert error <= rtol, f"{name}: max|a-b|/max|b| is {error:.2e}, above {rtol:.0e}"


def assert_digest(
    state: dict[str, torch.Tensor], digest: dict[str, list], rtol: float = 1e-9
) -> None:
    """Every tensor of a `weights_digest.json`: its shape, its sum and its sum of magnitudes.

    Both sums in float64, relative to the sum of magnitudes (a plain sum may cancel to nothing).
    """
    missing = sorted(set(digest) - set(state))
    assert not missing, f"{len(missing)} tensors not loaded, first {missing[0]}"
    for name, (shape, total, magnitude) in digest.items():
        tensor = state[name].double()
        assert list(tensor.shape) == shape, f"{name}: {list(tensor.shape)} is not {shape}"
        bound = rtol * max(magnitude, 1e-300)
        assert abs(tensor.sum().item() - total) <= bound, f"{name}: the sum differs"
        assert abs(tensor.abs().sum().item() - magnitude) <= bound, f"{name}: the magnitude differs"


def assert_same_names(module: torch.nn.Module, listed: dict[str, list], prefix: str = "") -> None:
    """Names and shapes of a module (meta device will do) equal those of a full_size/*.json.

    listed: name -> [shape] or [shape, dtype]; only names under `prefix` count, without it.
    """
    wanted = {n[len(prefix) :]: v[0] for n, v in listed.items() if n.startswith(prefix)}
    built = {n: list(t.shape) for n, t in module.state_dict().items()}
    missing, surplus = sorted(set(wanted) - set(built)), sorted(set(built) - set(wanted))
    assert not missing, f"the module lacks {len(missing)} tensors, first {missing[0]}"
    assert not surplus, f"the module has {len(surplus)} unknown tensors, first {surplus[0]}"
    for name, shape in wanted.items():
        assert built[name] == shape, f"{name}: {built[name]} is not {shape}"


def copy_subset(source: Path, target: Path, prefixes: Iterable[str]) -> int:
    """Copy the entries whose file begins with one of `prefixes`, adding to what is there.

    Writes `target/index.json` in the source's order. Returns the subset's size in bytes.
    """
    index = json.loads((source / "index.json").read_text(encoding="utf-8"))
    have = {e["file"] for e in entries(target)} if (target / "index.json").exists() else set()
    new = {e["file"] for e in index["entries"] if e["file"].startswith(tuple(prefixes))}
    for name in sorted(new):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    index["entries"] = [e for e in index["entries"] if e["file"] in have | new]
    index["kit"] = "subset"
    index["total_bytes"] = sum(e["bytes"] for e in index["entries"])
    text = json.dumps(index, indent=1) + "\n"
    (target / "index.json").write_text(text, encoding="utf-8")
    return index["total_bytes"]


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: python -m tests.helpers.kit SOURCE TARGET PREFIX...")
    size = copy_subset(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    print(f"{sys.argv[2]}: {size / 1e6:.2f} MB")
