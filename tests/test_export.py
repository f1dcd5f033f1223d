"""Quantized denoisers as graphs, and as files of ONNX in other runtimes."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.packed import TIMESTEPS, small_model
from tests.helpers.rooms import RESULT, write_room
from tinydm.models.architecture import describe
from tinydm.quant.backends.graph import GraphQuantizer, as_graph
from tinydm.quant.core.context import TimestepContext
from tinydm.quant.core.operation import Operation
from tinydm.quant.runtime.correction import OutputCorrection
from tinydm.quant.runtime.denoiser import QuantDenoiser
from tinydm.quant.runtime.layers import QuantLayer
from tinydm.quant.runtime.packed_file import PackedFileError, to_bytes
from tinydm.quant.runtime.quantizer import ActivationQuantizer
from tinydm.scripts import export
from tinydm.scripts.bench.random_models import deployed_of
from tinydm.scripts.common.errors import ConfigError, RunError
from tinydm.scripts.experiment.assembly import assemble
from tinydm.scripts.experiment.config import load_config, resolved_yaml
from tinydm.scripts.exporting import runtimes
from tinydm.scripts.exporting.calls import Call, of_images, record_calls

pytestmark = pytest.mark.usefixtures("one_thread")


def calls_of(model: QuantDenoiser) -> list[Call]:
    """At calibrated timesteps, and between them."""
    made = torch.Generator().manual_seed(3)
    calls = []
    for t in (*TIMESTEPS, 7, 8, 60, 99):
        x, step = torch.randn(2, 2, 6, 6, generator=made), torch.tensor([t])
        with torch.no_grad():
            calls.append(Call(x, step, {}, model(x, step)))
    return calls


def corrected_model() -> QuantDenoiser:
    model = small_model()
    k = torch.linspace(-0.2, 0.2, 2 * len(TIMESTEPS)).view(-1, 2)
    tables = {"k": k, "mu": k * 3, "sigma": torch.zeros(len(TIMESTEPS))}
    model.correction = OutputCorrection.from_state(model.context, tables)
    return model


def test_the_graph_computes_the_same() -> None:
    """With 3 bits, 6 and 16 bits, a split input, a product, a layer of the timestep, and a
    correction; the timestep is looked up."""
    model = corrected_model()
    calls = calls_of(model)
    graph = as_graph(model)
    for call in calls:
        assert export.decibels(graph(call.x, call.t), call.output) > 100
    assert export.decibels(graph(calls[0].x, calls[4].t), calls[0].output) < 30


@pytest.mark.parametrize("bits", [2, 4, 7, 8, 12, 16])
def test_a_quantizer_has_the_codes_of_its_bits(bits: int) -> None:
    top = 2**bits - 1
    context = TimestepContext([1, 5, 9], 10)
    scale, zero = torch.tensor([0.03, 0.4]), torch.tensor([0, top // 3])
    plain = ActivationQuantizer(context, scale, zero, torch.tensor([0, 1, 1]), bits)
    x = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)) * 0.3 * top
    step = type("Step", (), {})()
    quantizer = GraphQuantizer(step, plain)
    for index in range(3):
        context.index, step.index = index, torch.tensor([index])
        assert torch.allclose(quantizer(x), plain(x), rtol=1e-5)
    assert len((quantizer(x) / 0.4).round().unique()) <= top + 1
    alike = ActivationQuantizer(context, scale, zero, torch.tensor([1, 1, 1]), bits)
    assert GraphQuantizer(step, alike).scale.shape == (1,)  # nothing to look up


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a quantized file of random numbers."""
    folder = tmp_path_factory.mktemp("export")
    config = load_config(write_room(folder) / "tiny.yaml")
    model = deployed_of(config, config.quant)
    description = describe(config.model.arch, config.model.params, model.denoiser)
    about = {"config": resolved_yaml(config), "denoiser": json.dumps(description)}
    (folder / RESULT).write_bytes(to_bytes(model, about))
    return folder


@pytest.mark.slow
def test_the_file_computes_the_same_in_other_runtimes(
    run: Path, capsys: pytest.CaptureFixture
) -> None:
    onnx = pytest.importorskip("onnx")
    for name in ("onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    export.main([str(run), "--format", "onnx", "--images", "3"])
    lines = capsys.readouterr().out.splitlines()
    file = run / "quantized.onnx"
    for name in reversed(runtimes.RUNTIMES):
        missing = runtimes.not_installed([name]) is not None
        assert ("no images, not installed" if missing else "3 images, ") in lines.pop()
    assert lines[0].startswith(f"{file}: ") and "x (any, 3, 8, 8), t (1)" in lines[0]
    for name, line in zip(runtimes.RUNTIMES, lines[1:], strict=True):
        missing = runtimes.not_installed([name]) is not None
        assert ("not checked, not installed" in line) == missing
        assert ("dB to the fake backend" in line) != missing
    model = onnx.load(file)
    kinds = {i.name: i.data_type for i in model.graph.initializer}
    codes = {kind for name, kind in kinds.items() if name.endswith(".codes")}
    assert codes == {onnx.TensorProto.UINT8, onnx.TensorProto.UINT4}
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("QuantizeLinear") > 8
    assert "Round" in operators  # 16 bits, which OpenVINO would leave out as operators
    assert onnx.TensorProto.UINT16 not in kinds.values()
    assert operators.count("Gather") >= 2  # tables; those that are equal are one
    assert str(Path.cwd()).encode() not in file.read_bytes()


@pytest.mark.slow
def test_other_images_are_refused(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from tinydm.scripts.exporting.images import Images
    from tinydm.scripts.exporting.onnx_file import write_onnx

    config = of_images(load_config(run / "tiny.yaml"), 2)
    assert config.sampling.micro_batch == 2
    other = assemble(config, run / RESULT)
    call = record_calls(other, None, one=True)[0]
    for layer in other.denoiser.modules():
        if isinstance(layer, QuantLayer) and layer.bias is not None:
            layer.bias += 0.5
    write_onnx(as_graph(other.denoiser), call, tmp_path / "other.onnx")
    images = Images(config, assemble(config, run / RESULT), 2)
    with pytest.raises(RunError, match=r"2 images, .* dB to those of the fake backend; float"):
        images.check("onnxruntime", tmp_path / "other.onnx")


@pytest.mark.slow
def test_the_smallest_network_with_everything(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from tinydm.scripts.exporting.onnx_file import write_onnx

    model = corrected_model()
    calls = calls_of(model)
    file = tmp_path / "small.onnx"
    write_onnx(as_graph(model), calls[0], file)
    for name in runtimes.RUNTIMES:
        if runtimes.not_installed([name]) is None:
            assert "dB to the fake backend over 9 calls, " in export.check(name, file, calls)
    wrong = calls[1]._replace(output=calls[1].output + 1)
    with pytest.raises(RunError, match="at least 45.0 dB are expected"):
        export.check("onnxruntime", file, [calls[0], wrong])
    chaotic = wrong._replace(again=calls[1].output)  # which float rounding alone moves as much
    assert "float rounding alone moves" in export.check("onnxruntime", file, [chaotic])
    numbers = [calls[0].of_rows(rows) for rows in ([0], [1, 0, 1])]  # any number of samples
    assert "dB" in export.check("onnxruntime", file, numbers)
    other = calls[0]._replace(x=calls[0].x[:, :1])
    with pytest.raises(RunError, match="ONNX Runtime does not run it with 2 samples"):
        export.check("onnxruntime", file, [other])


@pytest.mark.slow
def test_linear_layers_of_tokens_get_no_other_quantizer(tmp_path: Path) -> None:
    """ONNX Runtime makes MatMulNBits of a MatMul with dequantized weights, 64 wide and more, which
    quantizes its input by itself."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from tinydm.scripts.exporting.onnx_file import write_onnx

    made, context = torch.Generator().manual_seed(2), TimestepContext([1, 5], 10)
    codes = torch.randint(0, 256, (64, 64), generator=made).to(torch.uint8)
    scale = ActivationQuantizer(
        context, torch.tensor([2e-4, 3e-4]), torch.tensor([32768] * 2), torch.tensor([0, 1]), 16
    )
    weights = (codes, torch.full((64,), 0.001), torch.full((64,), 128, dtype=torch.uint8), None)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = QuantLayer(Operation(nn.Linear(64, 64)), *weights, 8, [scale], 0)

        def forward(self, x: torch.Tensor, t: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
            out = self.layer(x.flatten(1, 2)).unflatten(1, x.shape[1:3])
            return out + named["added.bias"][:, None, None]  # a name with a dot, as SDXL's are

    model = QuantDenoiser(Tokens(), context)
    x, t = torch.randn(2, 4, 6, 64, generator=made), torch.tensor([5])
    named = {"added.bias": torch.randn(2, 64, generator=made)}
    with torch.no_grad():
        call = Call(x, t, named, model(x, t, **named))
    write_onnx(as_graph(model), call, tmp_path / "tokens.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "tokens.onnx")
    output = torch.from_numpy(session.run(None, call.inputs())[0])
    assert export.decibels(output, call.output) > 80


def test_what_is_missing_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        export.main([str(run), "--check", "tensorrt"])
    assert "is none of onnxruntime, openvino, none" in capsys.readouterr().err
    for options in (["--images", "0"], ["--images", "2", "--check", "none"]):
        with pytest.raises(SystemExit):
            export.main([str(tmp_path), *options])
        assert "give a number from 1 on" in capsys.readouterr().err
    monkeypatch.setattr(export, "check_packages", lambda: None)
    with pytest.raises(PackedFileError, match="no such file"):
        export.main([str(tmp_path)])
    bare = tmp_path / RESULT
    bare.write_bytes(to_bytes(small_model(), {}))
    with pytest.raises(PackedFileError, match="holds no configuration; give --config"):
        export.main([str(bare)])
    for read in (bare, run / "tiny.pt"):
        with pytest.raises(SystemExit):
            export.main([str(run), "--out", str(read)])
        assert f"{read}: must end in .onnx" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install onnx onnxscript"):
        export.main([str(run)])
    assert export.check("openvino", bare, []) == "OpenVINO: not checked, not installed: openvino"
