"""The same network in what a user could take instead, for `benchmark.py --speed --peers`.

ONNX Runtime with its static quantization (QDQ: uint8 activations, int8 weights per channel), and
OpenVINO with NNCF's. Their packages are optional: onnx, onnxruntime, openvino, nncf.
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..common.files import atomic

PEERS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
PACKAGES = {
    ("onnxruntime", False): ("onnx", "onnxruntime"),
    ("onnxruntime", True): ("onnx", "onnxruntime"),
    ("openvino", False): ("onnx", "openvino"),
    ("openvino", True): ("onnx", "openvino", "nncf"),
}
OPSET = 17
Inputs = dict[str, np.ndarray]  # x (B, C, H, W), t (B,) and conditioning, by name


def missing(peer: str, int8: bool) -> str | None:
    """Why the peer cannot run here, or None."""
    names = [n for n in PACKAGES[peer, int8] if importlib.util.find_spec(n) is None]
    return f"not installed: {', '.join(names)}" if names else None


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
    with _quiet(), atomic(path) as temporary:
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
    with _quiet():
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
            prepare = _openvino_run if self.peer == "openvino" else _onnxruntime_run
            with _quiet():
                self._runs[key] = prepare(self.path, inputs, key[0])
        return torch.from_numpy(self._runs[key](inputs))


def _onnxruntime_run(path: Path, inputs: Inputs, threads: int) -> Callable[[Inputs], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    return lambda values: session.run(None, values)[0]


def _openvino_run(path: Path, inputs: Inputs, threads: int) -> Callable[[Inputs], np.ndarray]:
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    model.reshape({name: list(value.shape) for name, value in inputs.items()})
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    properties["INFERENCE_PRECISION_HINT"] = "f32"  # not the bfloat16 of newer processors
    request = core.compile_model(model, "CPU", properties).create_infer_request()
    return lambda values: next(iter(request.infer(values).values())).copy()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and progress messages of exporters and quantizers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
