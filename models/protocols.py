"""What a module may offer beyond `nn.Module`, and what others look for.

A quantized layer or denoiser offers more than the one that it replaces, and the models here use
that where it is there; the other way round, an architecture tells the quantizer about its layers.
Neither side imports the other's classes: these protocols are all that both know.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, overload

import torch
from torch import nn

from .roles import LayerRoles

M_co = TypeVar("M_co", bound=nn.Module, covariant=True)

if TYPE_CHECKING:

    class ModuleList(nn.ModuleList, Generic[M_co]):
        """An nn.ModuleList of modules of one type, which PyTorch's own annotations forget. There is
        no such class when the program runs: it is nn.ModuleList itself."""

        def __iter__(self) -> Iterator[M_co]: ...
        @overload
        def __getitem__(self, idx: slice) -> "ModuleList[M_co]": ...
        @overload
        def __getitem__(self, idx: int) -> M_co: ...
        def __getitem__(self, idx: int | slice) -> "M_co | ModuleList[M_co]": ...

else:
    ModuleList = nn.ModuleList


class DeclaresRoles(Protocol):
    """A denoiser that knows the roles of its own layers."""

    def layer_roles(self) -> LayerRoles:
        """What each layer is for, by its name."""
        ...


class ExactBetweenLayers(Protocol):
    """A denoiser that does nothing with a sample between its layers that could round in more than
    one way, so that its rows are independent as soon as those of its layers are."""

    exact_between_layers: bool


class IndependentRows(Protocol):
    """A denoiser whose output for a sample is the same to the bit in any batch."""

    independent_rows: bool


class NoiseScale(Protocol):
    """A denoiser whose output brings noise of its own, which the sampler adds less for."""

    def noise_scale(self, t: int, sigma: float, direction: float) -> float:
        """What is left of the sampler's noise sigma at timestep t, where the output enters the step
        with the factor `direction`."""
        ...


class FusedNormSilu(Protocol):
    """A layer that takes GroupNorm, SiLU and an addition to its output as one step."""

    def after_norm_silu(
        self, norm: nn.Module, x: torch.Tensor, plus: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The layer of silu(norm(x)), + plus. x (B, C, H, W)."""
        ...


class FusedSoftmax(Protocol):
    """A matrix product of attention that takes the softmax before it as one step."""

    def after_softmax(
        self, scores: torch.Tensor, scale: float, right: torch.Tensor
    ) -> torch.Tensor:
        """softmax(scores * scale) @ right. scores (B, N, K), right (B, K, M)."""
        ...


def roles_of(denoiser: nn.Module) -> LayerRoles:
    """The roles that a denoiser declares (DeclaresRoles), or none."""
    declared: Callable[[], LayerRoles] | None = getattr(denoiser, "layer_roles", None)
    return LayerRoles() if declared is None else declared()


def rows_are_independent(denoiser: object) -> bool:
    """Whether a denoiser declares IndependentRows."""
    return bool(getattr(denoiser, "independent_rows", False))


def is_exact_between_layers(denoiser: nn.Module) -> bool:
    """Whether a denoiser declares ExactBetweenLayers."""
    return bool(getattr(denoiser, "exact_between_layers", False))
