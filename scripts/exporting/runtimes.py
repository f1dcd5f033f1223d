"""Files of ONNX in ONNX Runtime and OpenVINO, which are optional.

run = prepare("openvino", path, inputs, threads=2)
output = run(inputs)
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
Inputs = dict[str, np.ndarray]  # by name


def not_installed(names: Sequence[str]) -> str | None:
    """Which of the packages are missing, in words, or None."""
    absent = [n for n in names if importlib.util.find_spec(n) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def prepare(
    runtime: str, path: Path, inputs: Inputs, threads: int, accurate: bool = False
) -> Callable[[Inputs], np.ndarray]:
    """What computes the file's first output of inputs with these shapes, in float32 where it is not
    in integers.

    accurate: OpenVINO may not quantize what the file does not: by default it gives linear layers
    with integer weights inputs of 8 bits.
    """
    with quiet():
        if runtime == "openvino":
            return _openvino_run(path, inputs, threads, accurate)
        return _onnxruntime_run(path, inputs, threads)


def _onnxruntime_run(path: Path, inputs: Inputs, threads: int) -> Callable[[Inputs], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    return lambda values: session.run(None, values)[0]


def _openvino_run(
    path: Path, inputs: Inputs, threads: int, accurate: bool
) -> Callable[[Inputs], np.ndarray]:
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    model.reshape({name: list(value.shape) for name, value in inputs.items()})
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    properties["INFERENCE_PRECISION_HINT"] = "f32"  # not the bfloat16 of newer processors
    if accurate:
        properties["EXECUTION_MODE_HINT"] = "ACCURACY"
    request = core.compile_model(model, "CPU", properties).create_infer_request()
    return lambda values: next(iter(request.infer(values).values())).copy()


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the warnings and progress messages of exporters and quantizers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
