"""--backend and --compile: how a quantized model runs, for every command that samples.

    add_backend(parser)
    backend = read_backend(parser.parse_args(argv))
    assembly = assemble(config, quantized, backend.name, device, backend.code)

sample_diffusion.py compiles while it reads the file, and makes its Backend itself.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from ...quant.backends.build import CompileError
from ...quant.backends.native import Compiled
from ...quant.backends.selection import onednn_is_fast
from ..common.errors import ConfigError
from .assembly import BACKENDS

EARLIER_NAMES = {"int8-avx2": "int8"}  # which chooses by itself what the processor can do


@dataclass(frozen=True)
class Backend:
    """name: one of BACKENDS, or None for full precision; code: gives the compiled C++, None without
    --compile."""

    name: str | None = BACKENDS[0]
    code: Callable[[], Compiled | None] | None = None

    @property
    def label(self) -> str | None:
        """What images depend on: kernels that are compiled round otherwise. Waits for them. None:
        full precision as it is."""
        if self.code is None or self.code() is None:
            return self.name
        return f"{self.name or 'full precision'}, compiled"


def add_backend(parser: argparse.ArgumentParser) -> None:
    """--backend and --compile."""
    parser.add_argument(
        "--backend",
        type=lambda name: EARLIER_NAMES.get(name, name),
        choices=BACKENDS,
        default=BACKENDS[0],
        help="of the quantized model (fake)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="faster int8 or full precision on a CPU: compile C++ for it (once; two seconds), if "
        "there is a compiler",
    )


def check_backend(args: argparse.Namespace) -> None:
    """Raises ConfigError for options that do not go together."""
    if args.compile and args.backend == "fake":
        raise ConfigError("--compile: needs --backend int8")


def slow_backend(args: argparse.Namespace) -> str | None:
    """A line for a processor on which int8 without --compile is slower than it need be."""
    if args.backend == "int8" and not args.compile and not onednn_is_fast():
        return (
            "note: without AVX512-VNNI, which this CPU lacks, --backend int8 needs --compile "
            "to be faster than full precision"
        )
    return None


def read_backend(args: argparse.Namespace) -> Backend:
    """What the options name, compiled at once. Raises ConfigError."""
    check_backend(args)
    code = compiled_code(True) if args.compile else None
    note = slow_backend(args)
    if note is not None:
        print(note, flush=True)
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
    """A line that names the layers which the int8 backend left simulated, and says why."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in getattr(denoiser, "simulated", {}).items():
        by_reason.setdefault(reason, []).append(name)
    if not by_reason:
        return None
    told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
    return f"note: layers that stay simulated: {told}"
