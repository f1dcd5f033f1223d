"""The rooms of the repository: what each may import, and calls that none may make.

python -m pytest tests/test_rooms.py
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not any(p.startswith(".") or p == "runs" for p in path.relative_to(ROOT).parts)
)
OURS = {"models", "quant", "scripts", "tests", "calibrate", "sample_diffusion"}
# room -> packages it may import besides the standard library; the other rooms may import anything
ALLOWED = {"models": {"models", "torch", "numpy", "safetensors"}}
ALLOWED["quant"] = ALLOWED["models"] - {"models"} | {"quant"}
OPTIONAL = {"models": {"transformers"}}  # not in requirements.txt: only inside functions
YAML_READERS = {"scripts/common/strict.py", "scripts/common/config.py"}


def room_of(path: str) -> str:
    return path.partition("/")[0].removesuffix(".py")


def imports(tree: ast.Module, path: str) -> Iterator[tuple[str, bool, int]]:
    """(package, at the top of the module, line) of every import, dynamic ones included."""
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [room_of(path) if node.level else node.module or ""]
        elif isinstance(node, ast.Call) and called(node) in ("__import__", "import_module"):
            first = node.args[0] if node.args else None
            text = first.value if isinstance(first, ast.Constant) else "?"
            names = [str(text)]
        for name in names:
            yield name.partition(".")[0], id(node) in top, node.lineno


def called(node: ast.Call) -> str:
    """f of f(...) and of x.f(...)."""
    return getattr(node.func, "id", None) or getattr(node.func, "attr", "")


def keyword(node: ast.Call, name: str) -> object:
    return next((getattr(k.value, "value", None) for k in node.keywords if k.arg == name), None)


def faults(source: str, path: str) -> list[str]:
    """Everything in a file (path relative to the repository) that its room forbids."""
    tree, room, found = ast.parse(source), room_of(path), []
    for package, at_top, line in imports(tree, path):
        known = package in sys.stdlib_module_names
        if room in ALLOWED and not known and package not in ALLOWED[room]:
            if at_top or package not in OPTIONAL.get(room, ()):
                found.append(f"{path}:{line} imports {package}")
        if package == "tests" and room != "tests":
            found.append(f"{path}:{line} imports tests")
        if package == "yaml" and room != "tests" and path not in YAML_READERS:
            found.append(f"{path}:{line} reads YAML by itself")
        if package in ("pickle", "dill", "joblib") and room != "tests":
            found.append(f"{path}:{line} imports {package}")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            if any(alias.name == "load" for alias in node.names):
                found.append(f"{path}:{node.lineno} hides torch.load")
        if not isinstance(node, ast.Call):
            continue
        name, owner = called(node), getattr(getattr(node.func, "value", None), "id", None)
        if name == "load" and owner == "torch" and keyword(node, "weights_only") is not True:
            found.append(f"{path}:{node.lineno} torch.load without weights_only=True")
        if name == "cuda" and owner != "torch" and isinstance(node.func, ast.Attribute):
            found.append(f"{path}:{node.lineno} .cuda()")
        if isinstance(node.func, ast.Name) and room != "tests":
            if name in ("eval", "exec") or (name == "print" and room in ALLOWED):
                found.append(f"{path}:{node.lineno} {name}")
        if keyword(node, "allow_pickle") is True and room != "tests":
            found.append(f"{path}:{node.lineno} allow_pickle")
    return found


def test_the_rooms_are_looked_at() -> None:
    rooms = {room_of(path.relative_to(ROOT).as_posix()) for path in FILES}
    assert OURS <= rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_file_keeps_to_its_room(path: Path) -> None:
    found = faults(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/a.py", "import quant.model"),
        ("models/a.py", "from scripts.common import files"),
        ("models/a.py", "def f():\n    import yaml"),
        ("models/a.py", "from PIL import Image"),
        ("models/a.py", "import torchvision"),
        ("models/a.py", "import transformers"),
        ("models/a.py", "print(1)"),
        ("quant/a.py", "from models.ops import MatMul"),
        ("quant/a.py", "import importlib\nimportlib.import_module('models.ops')"),
        ("quant/a.py", "import yaml"),
        ("quant/a.py", "def f():\n    print(1)"),
        ("quant/a.py", "model.cuda()"),
        ("scripts/a.py", "import torch\ntorch.load('x')"),
        ("scripts/a.py", "import torch\ntorch.load('x', weights_only=False)"),
        ("scripts/a.py", "from torch import load"),
        ("scripts/a.py", "from tests import kit"),
        ("scripts/a.py", "import yaml"),
        ("calibrate.py", "import pickle"),
        ("calibrate.py", "np.load('x', allow_pickle=True)"),
        ("tests/a.py", "torch.load('x')"),
    ],
)
def test_a_breach_is_found(path: str, source: str) -> None:
    assert faults(source, path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/a.py", "import torch, math\nfrom models.ops import MatMul\nmodel.eval()"),
        ("models/a.py", "from .ops import MatMul"),
        ("models/a.py", "def f():\n    import transformers"),
        ("quant/a.py", "import json\nfrom safetensors import safe_open\nsafe_open('x')"),
        ("scripts/a.py", "import torch\ntorch.load('x', weights_only=True)\nprint(1)"),
        ("scripts/common/config.py", "import yaml"),
        ("tests/a.py", "import pickle, yaml"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert not faults(source, path)
