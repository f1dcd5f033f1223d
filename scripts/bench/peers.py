"""The same network in what a user could take instead, for `benchmark.py --speed --peers`.

ONNX Runtime with its static quantization (QDQ: uint8 activations, int8 weights per channel), and
OpenVINO with NNCF's. Their packages are optional: onnx, onnxruntime, openvino, nncf.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..common.files import atomic
from ..exporting.runtimes import RUNTIMES, Inputs, not_installed, prepare, quiet

PEERS = RUNTIMES
PACKAGES = {
    ("onnxruntime", False): ("onnx", "onnxruntime"),
    ("onnxruntime", True): ("onnx", "onnxruntime"),
    ("openvino", False): ("onnx", "openvino"),
    ("openvino", True): ("onnx", "openvino", "nncf"),
}
OPSET = 17


def missing(peer: str, int8: bool) -> str | None:
    """Why the peer cannot run here, or None."""
    return not_installed(PACKAGES[peer, int8])


def named(x: torch.Tensor, t: torch.Tensor, given: dict[str, torch.Tensor]) -> Inputs:
    values = {"x": x, "t": t} | given
    return {name: value.contiguous().numpy() for name, value in values.items()}


def export(model: nn.Module, example: Inputs, path: Path) -> None:
    """The float32 network as ONNX, for any number of images."""

    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            x, t, *rest = values
            return self.model(x, t, **dict(zip(names[2:], rest, strict=True)))

    names = list(example)
    tensors = tuple(torch.from_numpy(value) for value in example.values())
    batched = {name: {0: "batch"} for name in (*names, "eps")}
    with quiet(), atomic(path) as temporary:
        torch.onnx.export(
            Positional().eval(),
            tensors,
            str(temporary),
            input_names=names,
            output_names=["eps"],
            dynamic_axes=batched,
            opset_version=OPSET,
            dynamo=False,
        )


def quantize(peer: str, source: Path, inputs: list[Inputs], target: Path) -> None:
    """The exported network in int8, with the peer's own calibration on these inputs."""
    with quiet():
        if peer == "openvino":
            import nncf
            import openvino

            model = openvino.Core().read_model(str(source))
            dataset = nncf.Dataset(inputs)
            openvino.save_model(nncf.quantize(model, dataset, subset_size=len(inputs)), str(target))
            return
        from onnxruntime import quantization

        quantization.quantize_static(
            str(source),
            str(target),
            _Reader(inputs),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )


class _Reader:
    """What quantize_static reads its inputs from."""

    def __init__(self, inputs: list[Inputs]):
        self._rest = iter(inputs)

    def get_next(self) -> Inputs | None:
        return next(self._rest, None)


class PeerModel(nn.Module):
    """A file of `export` or `quantize` as a denoiser: eps = model(x, t, **given). It runs in
    float32 where it is not int8, with as many threads as PyTorch has at the call."""

    def __init__(self, peer: str, path: Path):
        super().__init__()
        self.peer, self.path = peer, path
        self._runs: dict[tuple[int, ...], Callable[[Inputs], np.ndarray]] = {}

    def forward(self, x: torch.Tensor, t: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        key = (torch.get_num_threads(), *x.shape)
        inputs = named(x, t, given)
        if key not in self._runs:
            self._runs[key] = prepare(self.peer, self.path, inputs, key[0])
        return torch.from_numpy(self._runs[key](inputs))
