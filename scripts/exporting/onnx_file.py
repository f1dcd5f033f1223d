"""A deployed denoiser as a file of ONNX: QuantizeLinear and DequantizeLinear around its layers.

Inputs: x (B, C, H, W), t (1,) one timestep of all samples, and the denoiser's other tensors by
name. Scales and zero points of the activations are gathered by the timestep from tables, which are
initializers, or are initializers themselves where all timesteps share them. Weights are codes of
uint8, or uint4 up to 4 bits, with a DequantizeLinear.
"""

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ...quant.backends.graph import GraphDenoiser, GraphLayer
from ..common.errors import ConfigError
from .calls import Call
from .runtimes import not_installed, quiet

OPSET = 21  # the first one with codes of 4 bits
PACKAGES = ("onnx", "onnxscript")
ANY = "any"  # size of a dimension that the file leaves open
LARGEST_SINGLE_FILE = 1 << 30  # bytes in one file; above, the tensors lie beside it in NAME.data


class Written(NamedTuple):
    """bytes: of the file and what lies beside it; inputs: their names and shapes."""

    bytes: int
    inputs: dict[str, list[int | str]]


class _Plain(nn.Module):
    """A graph whose tensors by name have names that PyTorch's exporter takes: without the dots of
    added_cond_kwargs.text_embeds."""

    def __init__(self, graph: GraphDenoiser, names: Iterable[str]):
        super().__init__()
        self.inner = graph  # `graph` is the exporter's own
        self.names = {self.name_of(name): name for name in names}

    @staticmethod
    def name_of(name: str) -> str:
        return name.replace(".", "__")

    def forward(self, x: torch.Tensor, t: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        return self.inner(x, t, **{self.names[n]: value for n, value in named.items()})


def check_packages() -> None:
    """Raises ConfigError where a package is missing."""
    reason = not_installed(PACKAGES)
    if reason is not None:
        raise ConfigError(f"--format onnx: {reason}; pip install {' '.join(PACKAGES)}")


def write_onnx(graph: GraphDenoiser, call: Call, path: Path) -> Written:
    """graph is exported for any number of samples where its code allows that, else for that of
    the call. Raises ConfigError for a denoiser that PyTorch cannot export."""
    rows = torch.export.Dim.AUTO
    plain = _Plain(graph, call.named)
    named = {plain.name_of(name): value for name, value in call.named.items()}
    with quiet():
        try:
            program: Any = torch.onnx.export(
                plain,
                (call.x, call.t),
                kwargs=named,
                dynamo=True,
                opset_version=OPSET,
                input_names=["x", "t", *call.named],
                output_names=["output"],
                dynamic_shapes={"x": {0: rows}, "t": None} | {name: {0: rows} for name in named},
                custom_translation_table=_translations(),
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, torch.onnx.errors.OnnxExporterError) as error:
            reason = (str(error.__cause__ or error).strip().splitlines() or ["no reason given"])[0]
            raise ConfigError(f"PyTorch cannot export this denoiser: {reason}") from error
    _pack(program.model, plain)
    _without_traces(program.model)
    size = sum(t.const_value.nbytes for t in program.model.graph.initializers.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        program.save(Path(folder) / path.name, external_data=size > LARGEST_SINGLE_FILE)
        files = sorted(Path(folder).iterdir(), key=lambda f: f.name == path.name)
        written = sum(file.stat().st_size for file in files)
        for file in files:  # what lies beside it first
            os.replace(file, path.parent / file.name)
    shapes = {v.name: [_dimension(d) for d in v.shape] for v in program.model.graph.inputs}
    return Written(written, shapes)


def _dimension(value: Any) -> int | str:
    return value if isinstance(value, int) else ANY


def _translations() -> dict[Any, Callable]:
    """The two operators of quant.backends.graph -> ONNX."""
    from onnxscript import opset21 as op

    def fake_quantize(x: Any, scale: Any, zero_point: Any) -> Any:
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)

    def dequantize(codes: Any, scale: Any, zero_point: Any) -> Any:
        return op.DequantizeLinear(codes, scale, zero_point, axis=0)

    operators = torch.ops.tinydm
    return {
        operators.fake_quantize.default: fake_quantize,
        operators.dequantize.default: dequantize,
    }


def _pack(model: Any, graph: nn.Module) -> None:
    """Codes of up to 4 bits, which PyTorch holds in bytes, as uint4."""
    import ml_dtypes
    import onnx_ir

    found = model.graph.initializers
    for name, module in graph.named_modules():
        if not isinstance(module, GraphLayer) or module.bits > 4:
            continue
        for part in ("codes", "w_zero_point"):
            value = found[f"{name}.{part}"]
            codes = value.const_value.numpy().astype(ml_dtypes.uint4)
            value.const_value = onnx_ir.tensor(codes, name=value.name)
            value.type = onnx_ir.TensorType(onnx_ir.DataType.UINT4)


def _without_traces(model: Any) -> None:
    """Drops where each node comes from: lines of code of this machine, most of a small file."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
