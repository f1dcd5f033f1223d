"""The rooms of the repository: what each may import, and calls that none may make.

python -m pytest tests/test_rooms.py
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not any(p.startswith(".") or p in ("runs", "build") for p in path.relative_to(ROOT).parts)
)
MODELS = ("models",)
ROLES = ("models.protocols", "models.roles")  # what the models and the quantizer tell each other
CORE = ("quant.core",)
RUNTIME = (*CORE, "quant.runtime")
BACKENDS = (*RUNTIME, "quant.backends")
CALIBRATION = (*RUNTIME, "quant.calibration")
COMMON = ("scripts.common",)
EXPERIMENT = (*COMMON, "models", "quant", "scripts.experiment")
METRICS = (*COMMON, "models", "scripts.experiment", "scripts.metrics")
EXPORTING = (*EXPERIMENT, "scripts.exporting", "scripts.metrics")
BENCH = (*EXPORTING, *METRICS, "scripts.bench")
# room -> rooms of ours that it may import; the longest name that fits a file is its room
DOORS: dict[str, tuple[str, ...]] = {
    "models": MODELS,
    "quant.core": (*ROLES, *CORE),
    "quant.runtime": (*ROLES, *RUNTIME),
    "quant.backends": (*ROLES, *BACKENDS),
    "quant.calibration": (*ROLES, *CALIBRATION),
    "quant": (),
    "scripts.common": COMMON,
    "scripts.experiment": EXPERIMENT,
    "scripts.exporting": EXPORTING,
    "scripts.metrics": METRICS,
    "scripts.train": (*METRICS, "scripts.train"),
    "scripts.bench": BENCH,
    "scripts.reporting": (*BENCH, "scripts.reporting"),
    "tinydm": ("tinydm", "models", "quant"),
}
OURS = {name.partition(".")[0] for name in DOORS} | {"tests", "calibrate", "sample_diffusion"}
# What is neither ours nor the standard library's; rooms that are not named may import anything.
OUTSIDE = {
    "models": {"torch", "numpy", "safetensors"},
    "quant": {"torch", "numpy", "safetensors"},
}
# Only inside functions: not in requirements.txt, or with much to import.
OPTIONAL = {"models": {"transformers", "diffusers", "accelerate", "huggingface_hub", "PIL"}}
# Not every PyTorch comes with Triton.
TRITON_FILES = {"quant/backends/triton_kernels.py", "quant/backends/triton_launch.py"}
YAML_READERS = {
    "scripts/common/schema.py",
    "scripts/experiment/config.py",
    "scripts/experiment/folder_config.py",  # writes one
}


def module_of(path: str) -> str:
    """quant/core/affine.py -> quant.core.affine; a package is its folder."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(module: str) -> str:
    """The longest name of DOORS that the module lies in, else its first folder."""
    rooms = [name for name in DOORS if f"{module}.".startswith(f"{name}.")]
    return max(rooms, key=len) if rooms else module.partition(".")[0]


def imports(tree: ast.Module, path: str) -> Iterator[tuple[str, bool, int]]:
    """(module, at the top of the file, line) of every import, dynamic ones included."""
    top = {id(node) for node in tree.body}
    package = module_of(path).split(".")
    package = package if path.endswith("__init__.py") else package[:-1]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # What is imported may be a module itself.
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and called(node) in ("__import__", "import_module"):
            first = node.args[0] if node.args else None
            text = first.value if isinstance(first, ast.Constant) else "?"
            names = [str(text)]
        for name in names:
            yield name.removeprefix("tinydm.") or "tinydm", id(node) in top, node.lineno


def called(node: ast.Call) -> str:
    """f of f(...) and of x.f(...)."""
    return getattr(node.func, "id", None) or getattr(node.func, "attr", "")


def keyword(node: ast.Call, name: str) -> object:
    return next((getattr(k.value, "value", None) for k in node.keywords if k.arg == name), None)


def may_import(room: str, module: str) -> bool:
    return any(f"{module}.".startswith(f"{door}.") for door in DOORS[room])


def faults(source: str, path: str) -> list[str]:
    """Everything in a file (path relative to the repository) that its room forbids."""
    tree, module, found = ast.parse(source), module_of(path), []
    room, house = room_of(module), module.partition(".")[0]
    for name, at_top, line in imports(tree, path):
        package = name.partition(".")[0]
        known = package in sys.stdlib_module_names
        if package in OURS:
            if package == "tests" and house != "tests":
                found.append(f"{path}:{line} imports tests")
            elif package in ("calibrate", "sample_diffusion") and house != "tests":
                found.append(f"{path}:{line} imports the command {package}")
            elif room in DOORS and not may_import(room, name):
                found.append(f"{path}:{line} {room} imports {name}")
        elif house in OUTSIDE and not known and package not in OUTSIDE[house]:
            allowed = not at_top and package in OPTIONAL.get(house, ())
            if not allowed and not (package == "triton" and path in TRITON_FILES):
                found.append(f"{path}:{line} imports {package}")
        if package == "yaml" and house != "tests" and path not in YAML_READERS:
            found.append(f"{path}:{line} reads YAML by itself")
        if package in ("pickle", "dill", "joblib") and house != "tests":
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
        if isinstance(node.func, ast.Name) and house != "tests":
            if name in ("eval", "exec") or (name == "print" and house in OUTSIDE):
                found.append(f"{path}:{node.lineno} {name}")
        if keyword(node, "allow_pickle") is True and house != "tests":
            found.append(f"{path}:{node.lineno} allow_pickle")
    return found


def test_the_rooms_are_looked_at() -> None:
    rooms = {room_of(module_of(path.relative_to(ROOT).as_posix())) for path in FILES}
    assert set(DOORS) <= rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_file_keeps_to_its_room(path: Path) -> None:
    found = faults(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/a.py", "import quant.model"),
        ("models/a.py", "from tinydm.quant.core import affine"),
        ("models/a.py", "from ..quant.core.affine import fake_quantize"),
        ("models/a.py", "from ..scripts.common import files"),
        ("models/a.py", "def f():\n    import yaml"),
        ("models/a.py", "from PIL import Image"),
        ("models/a.py", "import torchvision"),
        ("models/a.py", "import transformers"),
        ("models/a.py", "print(1)"),
        ("quant/core/a.py", "from ..runtime.layers import QuantLayer"),
        ("quant/core/a.py", "from ...models.ops import MatMul"),
        ("quant/runtime/a.py", "from ..calibration.layers import CalibLayer"),
        ("quant/runtime/a.py", "from ..calibration import layers"),
        ("quant/runtime/a.py", "from .. import calibration"),
        ("quant/runtime/a.py", "def f():\n    from tinydm.quant.calibration import layers"),
        ("quant/runtime/a.py", "from ..backends.onednn import Int8Layer"),
        ("quant/backends/a.py", "from ..calibration.weights import WeightQuantizer"),
        ("quant/calibration/a.py", "from ..backends.native import Compiled"),
        ("quant/calibration/phases/a.py", "from ...backends.native import Compiled"),
        ("quant/a.py", "from .core.affine import fake_quantize"),
        ("quant/core/a.py", "import importlib\nimportlib.import_module('models.ops')"),
        ("quant/core/a.py", "import yaml"),
        ("quant/core/a.py", "def f():\n    print(1)"),
        ("quant/core/a.py", "model.cuda()"),
        ("scripts/common/a.py", "from ..experiment.config import Config"),
        ("scripts/common/a.py", "from ...models.ops import MatMul"),
        ("scripts/experiment/a.py", "from ..bench.cells import Bench"),
        ("scripts/experiment/a.py", "import calibrate"),
        ("scripts/bench/a.py", "from sample_diffusion import main"),
        ("scripts/metrics/a.py", "from ..bench import tables"),
        ("scripts/bench/a.py", "from ..reporting.page import text"),
        ("scripts/train/a.py", "from ...quant.core.settings import preset"),
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
        ("models/a.py", "import torch, math\nfrom .ops import MatMul\nmodel.eval()"),
        ("models/a.py", "def f():\n    import transformers"),
        ("quant/core/a.py", "import json\nfrom safetensors import safe_open\nsafe_open('x')"),
        ("quant/core/a.py", "from ...models.roles import LayerRoles"),
        ("quant/runtime/a.py", "from ..core.affine import fake_quantize"),
        ("quant/calibration/phases/a.py", "from ...core import affine\nfrom ..task import Job"),
        ("scripts/a.py", "import torch\ntorch.load('x', weights_only=True)\nprint(1)"),
        ("scripts/experiment/config.py", "import yaml\nfrom ..common.schema import build"),
        ("scripts/reporting/a.py", "from ..bench.plots import group_ranks"),
        ("calibrate.py", "from tinydm.scripts.experiment.calibration_run import RESULT"),
        ("tests/a.py", "import pickle, yaml, calibrate"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert not faults(source, path)
