"""What an architecture knows about its own layers."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerRoles:
    """The roles of a denoiser's layers, by module name. A denoiser that declares none has no roles:
    every layer is treated alike.

    inputs: layers that see the image itself; outputs: layers that produce the prediction.
    timestep_only: layers whose value depends on the timestep alone, not on the image.
    concat_split: layers whose input is a concatenation -> channels of its first part.
    matmuls: matrix products of attention -> "scores" (query @ key) or "values" (softmax @ value).
    units: residual units (names of submodules) in the order of execution.
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    timestep_only: tuple[str, ...] = ()
    concat_split: dict[str, int] = field(default_factory=dict)
    matmuls: dict[str, str] = field(default_factory=dict)
    units: tuple[str, ...] = ()
