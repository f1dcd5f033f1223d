"""What the command lines share: options that stand for configuration keys, and one-line errors.

    parser = make_parser(__doc__)
    add_config(parser)
    args = parser.parse_args(argv)
    config = load_config(args.config, args.overrides)

Options are accepted with underscores and with dashes. The last one on the command line wins.
"""

import argparse
import errno
import io
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import torch
from tqdm import TqdmMonitorWarning, tqdm

from ...models.checkpoint_files import CheckpointError, is_out_of_memory
from ...models.samplers import SamplingError
from ...quant.calibration.statistics import StatisticsError
from ...quant.runtime.packed_file import PackedFileError
from ..common import signals
from ..common.errors import ConfigError, ImageError, MetricError, RunError
from ..common.files import check_folder, check_output, read_text, write_json
from ..common.memory import keep_freed_memory
from ..common.schema import whole_line
from ..common.streams import unread_output_is_dropped
from .config import Override

USER_ERRORS = (
    ConfigError,
    CheckpointError,
    PackedFileError,
    MetricError,
    ImageError,
    SamplingError,
    StatisticsError,
    RunError,
)


def quoted(text: str) -> str:
    """A text as YAML that reads back to it, whatever characters it holds.

    All but plain ASCII is escaped: YAML takes some characters for ends of lines, refuses others,
    and does not know the halves that stand for a byte of a path that is not UTF-8.
    """
    plain = (c if " " <= c <= "~" and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return f'"{"".join(plain)}"'


def one_text(text: str) -> str:
    """A list of one text, as YAML."""
    return f"[{quoted(text)}]"


def number(text: str) -> str:
    """A number of an option as YAML: `seq -w` gives leading zeros, which YAML takes for octal."""
    return re.sub(r"^([-+]?)0+(?=[0-9])", r"\1", text)


NUMBER, TEXT, NUMBERS = number, quoted, "[{}]".format  # how an option's text becomes YAML


def lines_of(file: str) -> str:
    """The lines of a text file that are not empty, as a list in YAML. Raises ConfigError."""
    try:
        lines = read_text(file).splitlines()
    except ConfigError as error:
        raise ConfigError(f"--prompts {error}") from error
    return f"[{', '.join(quoted(line.strip()) for line in lines if line.strip())}]"


# (spellings, key, text -> YAML, metavar, help): the words of ddim, latent-diffusion, q-diffusion
CHECKPOINT_OPTION = (
    ("--ckpt",),
    "model.checkpoint",
    TEXT,
    "FILE",
    "full-precision checkpoint: a file, a folder of diffusers or OWNER/NAME of the hub",
)
SAMPLER_OPTIONS = (
    (("--steps", "--timesteps", "--custom_steps", "-c"), "sampler.steps", NUMBER, "N", "steps"),
    (("--eta",), "sampler.eta", NUMBER, "ETA", "0 deterministic DDIM .. 1 ancestral"),
    (("--skip_type", "--skip"), "sampler.skip", TEXT, "NAME", "uniform, quad or logsnr"),
    (("--scale",), "sampler.guidance_scale", NUMBER, "S", "classifier-free guidance"),
    CHECKPOINT_OPTION,
)
HOW_OPTIONS = (
    (("--count", "-n", "--n_samples", "--max_images"), "sampling.count", NUMBER, "N", "images"),
    (("--batch_size",), "sampling.batch_size", NUMBER, "B", "images made together"),
    (("--seed",), "sampling.seed", NUMBER, "S", "seed of the images"),
)
WHAT_OPTIONS = (
    (("--classes",), "sampling.classes", NUMBERS, "1,7", "classes, given to the images in turn"),
    (("--prompt",), "model.conditioning.prompts", one_text, "TEXT", "the text of all images"),
    (("--prompts",), "model.conditioning.prompts", lines_of, "FILE", "texts, one a line"),
)
SAMPLING_OPTIONS = (*HOW_OPTIONS, *WHAT_OPTIONS)
QUANT_OPTIONS = (
    (("--method",), "quant.method", TEXT, "NAME", "preset of all other keys of quant"),
    (("--weight_bit", "--wq"), "quant.weight.bits", NUMBER, "BITS", "bits of the weights"),
    (("--act_bit", "--aq"), "quant.activation.bits", NUMBER, "BITS", "bits of the activations"),
)


class _Set(argparse.Action):
    """--set key.sub=value [key2=value2 ...]"""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        for pair in values:
            namespace.overrides = [*namespace.overrides, pair]


class _Alias(argparse.Action):
    """An option that stands for one key."""

    def __init__(self, *args: Any, key: str, form: Callable[[str], str], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.key, self.form = key, form

    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        override = Override(self.key, self.form(value), str(option))
        namespace.overrides = [*namespace.overrides, override]


class _Elsewhere(argparse.Action):
    """An option of other commands, which is refused with the key that is meant here."""

    def __init__(self, *args: Any, key: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.key = key

    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        shown = "VALUE" if value is None else value
        parser.error(f"{option} is of the images, not of this command: --set {self.key}={shown}")


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, without the usage."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if re.fullmatch(r"(--[\w-]+=|-\w)--", word):  # argparse takes it for a list of nothing
                self.error(f"{word}: '--' is no value")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {whole_line(message, 500)}; see --help\n")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose --help shows the script's docstring as it is written."""
    return _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def spellings(*names: str) -> list[str]:
    """Every name with underscores, and with dashes."""
    dashed = [n[:2] + n[2:].replace("_", "-") for n in names]
    return list(dict.fromkeys(name for pair in zip(dashed, names, strict=True) for name in pair))


def add_config(
    parser: argparse.ArgumentParser,
    options: Sequence[tuple] = (*SAMPLER_OPTIONS, *SAMPLING_OPTIONS, *QUANT_OPTIONS),
    required: bool = True,
    device: bool = True,
    hidden: Sequence[tuple] = (),
) -> None:
    """--config, --set, --device and the options for keys: args.config, .overrides, .device.

    device: whether the command computes. hidden: options that change nothing here, but are accepted
    so that one line of options serves several commands.
    """
    parser.set_defaults(overrides=[])
    unseen = {key for _, key, *_ in hidden}
    parser.add_argument(
        "--config", type=input_path, metavar="FILE", required=required, help="YAML of an experiment"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action=_Set,
        dest="overrides",
        default=[],
        metavar="key.sub=value",
        help="override keys of the configuration",
    )
    if device:
        add_device(parser)
    for names, key, form, metavar, text in (*options, *hidden):
        parser.add_argument(
            *spellings(*names),
            action=_Alias,
            key=key,
            form=form,
            dest=f"_{key}",
            default=argparse.SUPPRESS,
            metavar=metavar,
            help=argparse.SUPPRESS if key in unseen else f"{text} ({key})",
        )


def add_device(parser: argparse.ArgumentParser) -> None:
    words = "auto|cpu|cuda|cuda:N"
    parser.add_argument(
        "--device", default="auto", metavar=words, help="auto: a GPU if there is one"
    )


def refuse_options(
    parser: argparse.ArgumentParser, options: Sequence[tuple], keys: dict[str, str]
) -> None:
    """Options for keys, each refused with the key of `keys` that stands for it here."""
    for names, key, *_ in options:
        parser.add_argument(
            *spellings(*names),
            action=_Elsewhere,
            key=keys[key],
            nargs="?",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def add_out(parser: argparse.ArgumentParser, text: str) -> None:
    """--out, a folder to be written to: args.out. text: its help."""
    parser.add_argument(
        *spellings("--out", "-l", "--logdir"),
        dest="out",
        type=output_folder,
        metavar="DIR",
        required=True,
        help=text,
    )


def input_path(text: str) -> str:
    """The type of options that name what is read: a variable of a shell that is not set does not
    stand for the folder that one is in."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no name of a file or folder")
    return text


def output_file(ending: str) -> Callable[[str], str]:
    """The type of options that name a file to be written, looked at before any work is done. One of
    another ending, a configuration for example, is hardly meant to be replaced."""

    def check(text: str) -> str:
        check_output(text)
        if not text.endswith(ending):
            raise ConfigError(f"{text}: must end in {ending}")
        return text

    return partial(_checked, check)


def output_folder(text: str) -> str:
    """The type of options that name a folder to be written to."""
    return _checked(check_folder, text)


def _checked(check: Callable[[str], str], text: str) -> str:
    try:
        return check(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run(
    main: Callable[[], int | None],
    again: str = "the same command continues",
    less: str | None = "--set sampling.micro_batch=4",
) -> NoReturn:
    """Run a script's main and exit: 0 done, 2 bad input (one line on stderr), 130 interrupted.

    again: what to do after an interruption; less: the option that asks for less memory, if there is
    one. Anything else is a defect of the program and keeps its traceback.
    """
    print_any_text()
    warnings.simplefilter("ignore", TqdmMonitorWarning)  # a bar without its thread is still a bar
    sys.unraisablehook = _Unraisable(sys.unraisablehook)
    keep_freed_memory()
    before = signals.handlers()
    try:
        with unread_output_is_dropped():
            sys.exit(_code_of(main, again, less))
    finally:
        signals.restore(before)


def _code_of(main: Callable[[], int | None], again: str, less: str | None) -> Any:
    """The exit code of `main`, whose error is told."""
    try:
        signals.handle(_interrupt)
        try:
            return main() or 0
        except SystemExit as ended:  # of argparse
            return ended.code
        finally:
            sys.stdout.flush()  # here it can still be told that there is no room for it
    except KeyboardInterrupt:
        signals.ignore()  # impatience must not end in a traceback
        _complain(f"interrupted; {again}")
        return 130
    except Exception as error:
        line = explain(error, again, less)
        if line is None:
            raise
        _complain(line)
        _tell_torchrun(line)
        return 2


def print_any_text() -> None:
    """What the terminal's encoding lacks, in a path for example, is printed as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # tests and notebooks have others
            stream.reconfigure(errors="backslashreplace")


def explain(error: Exception, again: str = "run it again", less: str | None = None) -> str | None:
    """One line for what the user can mend, None for a defect of the program. See run."""
    if isinstance(error, USER_ERRORS):
        return whole_line(error)
    if is_out_of_memory(error):
        smaller = "" if less is None else f"lower the batch size ({less}), "
        if isinstance(error, torch.OutOfMemoryError):
            return f"the graphics card is out of memory: {smaller}end what else runs on it"
        return f"out of memory: {smaller}free some, or raise its limit (ulimit -v)"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        what = f"{where}{error.strerror or error}"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return whole_line(what + (f"; make room, {again}" if full else ""))
    return None


def _complain(line: str) -> None:
    for bar in list(getattr(tqdm, "_instances", ())):  # half-drawn; the line stands by itself
        bar.close()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rank = f"rank {os.environ.get('RANK')}: " if ranks > 1 else ""
    print(f"error: {rank}{line}", file=sys.stderr)


def _tell_torchrun(line: str) -> None:
    """torchrun ends with a summary; this puts the reason in it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is not None:
        with suppress(OSError):  # the disk may be what is full
            write_json(file, {"message": line, "timestamp": int(time.time())})


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


class _Unraisable:
    """An interruption that came while a destructor ran, where Python drops it, comes once more."""

    def __init__(self, previous: Callable[[Any], None]):
        self.previous = previous

    def __call__(self, unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            again = (threading.main_thread().ident, signal.SIGINT)
            threading.Timer(0.05, signal.pthread_kill, again).start()  # the destructor is over then
        else:
            self.previous(unraisable)
