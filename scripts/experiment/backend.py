"""--backend and --compile: how a quantized model runs, for every command that samples.

    add_backend(parser)
    backend = read_backend(parser.parse_args(argv))
    assembly = assemble(config, quantized, backend.name, device, backend.code)

sample_diffusion.py compiles while it reads the file, and makes its Backend itself.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from ...quant.backends.native import Compiled, CompileError
from ..common.errors import ConfigError
from .assembly import BACKENDS


@dataclass(frozen=True)
class Backend:
    """name: one of BACKENDS; code: gives the compiled C++, None without --compile."""

    name: str = BACKENDS[0]
    code: Callable[[], Compiled | None] | None = None

    @property
    def label(self) -> str:
        """What images depend on: kernels that are compiled round otherwise. Waits for them."""
        compiled = self.code is not None and self.code() is not None
        return f"{self.name}, compiled" if compiled else self.name


def add_backend(parser: argparse.ArgumentParser) -> None:
    """--backend and --compile."""
    parser.add_argument(
        "--backend", choices=BACKENDS, default=BACKENDS[0], help="of the quantized model (fake)"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="faster int8: compile C++ for it at the start (seconds), if there is a compiler",
    )


def check_backend(args: argparse.Namespace) -> None:
    """Raises ConfigError for options that do not go together."""
    if args.compile and args.backend == "fake":
        raise ConfigError("--compile: needs --backend int8 or int8-avx2")


def read_backend(args: argparse.Namespace) -> Backend:
    """What the options name, compiled at once. Raises ConfigError."""
    check_backend(args)
    code = compiled_code(True) if args.compile else None
    return Backend(args.backend, lambda: code)


def compiled_code(speak: bool) -> Compiled | None:
    """None where it cannot be compiled, which is said in one line."""
    try:
        return Compiled()
    except CompileError as error:
        if speak:
            print(f"note: --compile changes nothing here: {error}", flush=True)
        return None


def simulated_note(denoiser: object) -> str | None:
    """A line that names the layers which the backend on CUDA left simulated, and says why."""
    simulated: dict[str, str] = getattr(denoiser, "simulated", {})
    if not simulated:
        return None
    names = "; ".join(f"{name}: {reason}" for name, reason in simulated.items())
    return f"note: layers that stay simulated, so that there is no CUDA graph: {names}"
