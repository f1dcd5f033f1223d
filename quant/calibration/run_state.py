"""What an interrupted calibration goes on from: finished phases and the model under calibration."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from ..runtime.correction import OutputCorrection
from ..runtime.denoiser import QuantDenoiser
from .layers import CalibLayer
from .quantizer import LearnedQuantizer
from .weights import WeightQuantizer


@dataclass
class RunState:
    """Everything that a later run needs to go on from here.

    done: finished phases, by name. tensors: state of the model under calibration, filled only while
    it is saved or restored. tuples (n, 2): the calibration samples, once they are chosen. report:
    plain values of each finished phase. partial: what the phase after `done` has finished so far,
    in a form of its own. before: the tensors at the start of that phase, if it saves partials.
    """

    done: list[str] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    tuples: torch.Tensor | None = None
    report: dict[str, Any] = field(default_factory=dict)
    partial: dict[str, Any] | None = None
    before: dict[str, torch.Tensor] = field(default_factory=dict)

    def rewind(self) -> None:
        """Back to the start of the phase."""
        if self.partial is not None:
            self.tensors, self.before, self.partial = self.before, {}, None

    def to_plain(self) -> dict[str, Any]:
        """Lists, dicts and tensors only, for torch.save and weights_only loading."""
        return vars(self) | {"tensors": dict(self.tensors)}

    @classmethod
    def from_plain(cls, value: dict[str, Any]) -> "RunState":
        """The state of such values."""
        return cls(**{f.name: value[f.name] for f in fields(cls)})


def restore(model: QuantDenoiser, tensors: dict[str, torch.Tensor]) -> None:
    """Loads a state whose learnable tensors may differ in shape from the fresh model's."""
    for name, module in model.named_modules():
        if isinstance(module, LearnedQuantizer):
            prefix = f"{name}."
            module.take_ranges(
                {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            )
        elif isinstance(module, WeightQuantizer):
            for key in ("alpha", "latent", "log_gain"):
                value = tensors.get(f"{name}.{key}")
                if value is not None:
                    value = nn.Parameter(value.to(module.scale.device))
                setattr(module, key, value)
        elif isinstance(module, CalibLayer):
            value = tensors.get(f"{name}.channel_scale")
            module.channel_scale = None if value is None else value.to(module.weight.device)
    tables = {
        k.removeprefix("correction."): v for k, v in tensors.items() if k.startswith("correction.")
    }
    if tables:
        model.correction = OutputCorrection.from_state(model.context, tables)
    model.load_state_dict(tensors)
