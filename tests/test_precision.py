"""--precision: what computes in half precision or TF32, what keeps float32, and what is refused.

python -m pytest tests/test_precision.py
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.helpers.integer_layers import small_unet
from tests.helpers.rooms import RESULT
from tests.helpers.tensor_cores import TensorCores
from tinydm.models.ddim_unet import DDIMUNet
from tinydm.models.ldm_unet import LDMUNet
from tinydm.quant.runtime.layers import QuantLayer, QuantMatMul
from tinydm.scripts.common.errors import ConfigError, RunError
from tinydm.scripts.experiment.assembly import assemble
from tinydm.scripts.experiment.calibration_run import CalibrationRun, calibrate_run
from tinydm.scripts.experiment.config import load_config
from tinydm.scripts.experiment.precision import (
    HALVES,
    InPrecision,
    check_precision,
    in_precision,
    precision_note,
)
from tinydm.scripts.experiment.runs import claim
from tinydm.scripts.experiment.sampling_run import SamplingRun, make_images

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("inference")


def nets() -> list[tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    """Every family, and what it is called with."""
    shared = {"num_res_blocks": 1, "norm_groups": 4}
    ldm = LDMUNet(
        in_channels=4,
        model_channels=8,
        out_channels=4,
        attention_resolutions=(1,),
        channel_mult=(1, 2),
        num_heads=2,
        use_spatial_transformer=True,
        context_dim=6,
        **shared,
    )
    ddim = DDIMUNet(ch=8, ch_mult=(1, 2), attn_resolutions=(8,), image_size=8, **shared)
    t = torch.full((2,), 300)
    return [
        (ddim.eval(), (torch.randn(2, 3, 8, 8), t)),
        (ldm.eval(), (torch.randn(2, 4, 8, 8), t, torch.randn(2, 5, 6))),
    ]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("family", [0, 1])
def test_full_precision_in_half(name: str, family: int) -> None:
    net, call = nets()[family]
    for parameter in net.parameters():  # some layers begin at zero
        parameter.copy_(0.1 * torch.randn_like(parameter))
    half = in_precision(copy.deepcopy(net), name)
    found, expected = half(*call), net(*call)
    assert found.dtype is torch.float32
    assert 0 < relative(found, expected) < (0.03 if name == "bf16" else 0.004)
    types = {m.weight.dtype for m in half.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert types == {HALVES[name]}
    assert {m.weight.dtype for m in half.modules() if isinstance(m, nn.GroupNorm)} == {
        torch.float32
    }


def test_full_precision_in_tf32() -> None:
    net, call = nets()[0]
    for parameter in net.parameters():
        parameter.copy_(0.1 * torch.randn_like(parameter))
    expected = net(*call)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with TensorCores() as cores:
            assert torch.equal(net(*call), expected) and cores.calls == 0
            found = in_precision(net, "tf32")(*call)
            assert cores.calls > 10 and 1e-5 < relative(found, expected) < 1e-2
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_quantized_layers_lose_nothing_in_tf32() -> None:
    """All that is rounded is integers that TF32 holds: the output has the same bits."""
    fake = small_unet(weight=4, activation=8)
    model = in_precision(fake, "tf32")
    x, t = torch.randn(2, 3, 16, 16), torch.full((2,), 500)
    expected = model(x, t)
    with TensorCores() as cores:
        assert torch.equal(model(x, t), expected)
        assert cores.calls > 20
    note = precision_note(model)
    assert note is not None and "conv_in: its input has 16 bits" in note
    assert precision_note(fake) is None


def test_long_products_of_attention_keep_float32() -> None:
    """257 products of codes up to 255 stay below 2^24, 259 need not."""
    model = in_precision(small_unet(weight=4, activation=8), "tf32")
    product = next(m for m in model.modules() if isinstance(m, QuantMatMul))
    model.context.set(torch.tensor([500]))
    for quantizer in (product.left, product.right):
        quantizer.zero_point.zero_()
        quantizer._forget()
    allowed = []

    class Noted(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
        ) -> Any:
            if func is torch.baddbmm:
                allowed.append(torch.backends.cuda.matmul.allow_tf32)
            return func(*args, **(kwargs or {}))

    with Noted():
        for length in (257, 259):
            product(torch.rand(1, 2, length), torch.rand(1, length, 3))
    assert allowed == [True, False]


def test_quantized_layers_keep_float32_among_halves() -> None:
    fake = small_unet(weight=4, activation=8, quantize_matmuls=False)
    plain = copy.deepcopy(fake)
    model = in_precision(fake, "bf16")
    assert isinstance(model, InPrecision) and model.noise_scale(3, 0.5, 1.0) == 0.5
    seen: list[torch.dtype] = []
    for module in model.modules():
        if isinstance(module, QuantLayer):
            module.op._call = noted(module.op._call, seen)
    x, t = torch.randn(2, 3, 16, 16), torch.full((2,), 500)
    found, expected = model(x, t), plain(x, t)
    assert len(seen) > 20 and set(seen) == {torch.float32}
    assert found.dtype is torch.float32 and 0 < relative(found, expected) < 0.1


def noted(call: Any, seen: list[torch.dtype]) -> Any:
    def wrapped(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        out = call(x, weight, *rest)
        seen.extend([x.dtype, weight.dtype, out.dtype])
        return out

    return wrapped


def test_float32_is_the_denoiser_itself() -> None:
    net = nn.Identity()
    assert in_precision(net, "float32") is net


# ---- the commands ----


def test_what_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_precision("float32", CPU, "int8")
    with pytest.raises(ConfigError, match="--precision tf32: is of CUDA devices alone; use"):
        check_precision("tf32", CPU)
    with pytest.raises(ConfigError, match="--precision bf16: needs full precision or --backend"):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
        check_precision("bf16", CPU, "int8")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    with pytest.raises(ConfigError, match="--precision fp16: this CPU has no instructions for it"):
        check_precision("fp16", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    cuda = torch.device("cuda", 0)
    for name in ("tf32", "bf16"):
        with pytest.raises(ConfigError, match=r"capability 7\.5\) has none; 8\.0 and newer have"):
            check_precision(name, cuda)
    check_precision("fp16", cuda)
    check_precision("fp16", cuda, "int8")
    with pytest.raises(ConfigError, match="tf32: --backend int8 takes bf16, fp16 or float32"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        check_precision("tf32", cuda, "int8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    check_precision("tf32", cuda)


def test_a_folder_belongs_to_a_precision(room: Path, tmp_path: Path) -> None:
    config = load_config(room / "tiny.yaml", ["quant.method=minmax"])
    calibrate_run(CalibrationRun(config, assemble(config), tmp_path, CPU))
    for quantized in (None, tmp_path / RESULT):
        folder = tmp_path / f"images-{quantized is None}"
        backend = None if quantized is None else "fake"
        runs = [
            SamplingRun(
                config,
                assemble(config, quantized, precision=name),
                folder,
                CPU,
                backend,
                name,
            )
            for name in ("bf16", "float32")
        ]
        claim(folder, runs[0].identity)
        make_images(runs[0], [0])
        assert "precision" not in runs[1].identity  # folders of before can be continued
        with pytest.raises(RunError, match="precision is bf16, asked float32"):
            claim(folder, runs[1].identity)
