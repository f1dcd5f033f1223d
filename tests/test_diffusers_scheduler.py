"""Files of schedulers that ask for what the scheduler does not do: one line, no wrong image."""

import json
from pathlib import Path
from typing import Any

import pytest

diffusers = pytest.importorskip("diffusers")

from tinydm.models.checkpoint_files import CheckpointError  # noqa: E402
from tinydm.models.diffusers_loading import DiffusersFolder  # noqa: E402
from tinydm.models.diffusers_scheduler import scheduler_of, told_in_one_line  # noqa: E402
from tinydm.models.samplers import SamplingError  # noqa: E402


def folder_with(tmp_path: Path, values: dict[str, Any]) -> DiffusersFolder:
    for name, content in (("unet/config", {"_class_name": "UNet2DModel"}), ("scheduler", values)):
        file = tmp_path / f"{name.replace('scheduler', 'scheduler/scheduler_config')}.json"
        file.parent.mkdir()
        file.write_text(json.dumps(content))
    return DiffusersFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "values", "what"),
    [
        ("PNDMScheduler", {"rescale_betas_zero_snr": True}, "which PNDMScheduler does not take"),
        ("IPNDMScheduler", {"prediction_type": "v_prediction"}, "does not take"),
        ("IPNDMScheduler", {"beta_end": 0.01}, "does not take"),
        ("LMSDiscreteScheduler", {"thresholding": True}, "does not take"),
        ("DDIMScheduler", {"spacing_of_tomorrow": "wavy"}, "which no scheduler"),
        ("DDPMScheduler", {"predict_epsilon": False}, "which no scheduler"),
        ("DDPMScheduler", {"variance_type": "wavy"}, "which DDPMScheduler does not know"),
        ("EulerDiscreteScheduler", {"timestep_type": "wavy"}, "does not know"),
        ("DDIMInverseScheduler", {}, "does not sample as these pipelines do"),
        ("FlowMatchEulerDiscreteScheduler", {}, "does not sample as these pipelines do"),
        ("KarrasVeScheduler", {}, "does not sample as these pipelines do"),
        ("ScoreSdeVeScheduler", {}, "does not sample as these pipelines do"),
    ],
)
def test_what_a_scheduler_would_not_do_is_said(
    tmp_path: Path, name: str, values: dict[str, Any], what: str
) -> None:
    folder = folder_with(tmp_path, {"_class_name": name} | values)
    with pytest.raises(CheckpointError, match=what) as caught:
        scheduler_of(folder)
    assert "\n" not in str(caught.value) and "scheduler_config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("PNDMScheduler", {"clip_sample": False, "skip_prk_steps": True}),  # Stable Diffusion 1
        ("EulerDiscreteScheduler", {"clip_sample": False, "sample_max_value": 1.0}),  # SDXL
        ("DPMSolverMultistepScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
        ("DDPMScheduler", {"tensor_format": "pt", "predict_epsilon": True}),  # of 2022
        ("PNDMScheduler", {"rescale_betas_zero_snr": False, "thresholding": None}),
    ],
)
def test_what_another_scheduler_left_behind_is_no_harm(
    tmp_path: Path, name: str, values: dict[str, Any]
) -> None:
    folder = folder_with(tmp_path, {"_class_name": name} | values)
    assert type(scheduler_of(folder)).__name__ == name


@pytest.mark.parametrize("error", [IndexError, TypeError, RuntimeError])
def test_what_a_scheduler_raises_is_told(error: type[Exception]) -> None:
    scheduler = diffusers.DDIMScheduler()
    with pytest.raises(SamplingError, match="DDIMScheduler cannot step: index 2750"):
        with told_in_one_line(scheduler):
            raise error("index 2750\nis out of bounds")
    with pytest.raises(MemoryError), told_in_one_line(scheduler):
        raise MemoryError
