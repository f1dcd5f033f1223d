"""A narrow network's checkpoints."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tinydm.models.checkpoint import load_state_dict
from tinydm.models.checkpoint_files import CheckpointError
from tinydm.models.ddim_unet import DDIMUNet

PARAMS = {
    "ch": 16,
    "ch_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [4],
    "in_channels": 3,
    "out_ch": 3,
    "image_size": 8,
    "norm_groups": 4,
}


def narrow_model(seed: int = 0) -> DDIMUNet:
    torch.manual_seed(seed)
    model = DDIMUNet(**PARAMS).eval()
    for tensor in model.parameters():  # norms too: no parameter keeps its initial value
        nn.init.normal_(tensor, std=0.2)
    return model


def write(path: Path, content: object, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def refused(path: Path, **options: object) -> str:
    """The message with which a file is refused: one printable line that names the file."""
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(path, **options)
    message = str(caught.value)
    assert message.isprintable() and path.name in message and "; " in message
    assert "weights_only" not in message  # torch's advice to load without protection
    return message


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def small_state(offset: float = 0.0) -> dict[str, torch.Tensor]:
    values = torch.arange(12.0).reshape(3, 4) + offset
    return {"a.weight": values, "a.bias": values[0].clone()}
