"""Entry point of the command line: parse the arguments, run the command, print errors, return the exit code."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
import warnings
from typing import Annotated, Any, Union

import tyro
from rich.text import Text

from skipkernels.app.console import Terminal
from skipkernels.app.settings import Settings

from .blend import BlendCommand
from .build import BuildCommand
from .check import CheckCommand
from .compare import CompareCommand
from .doctor import DoctorCommand
from .errors import Terminated, failure, termination_as_interrupt, with_flags
from .eval import EvalCommand
from .export import ExportCommand
from .options import registry
from .predict import PredictCommand
from .report import ReportCommand
from .serve import ServeCommand
from .tune import TuneCommand, command_with_file

COMMANDS: dict[str, Any] = {
    "tune": TuneCommand,
    "eval": EvalCommand,
    "predict": PredictCommand,
    "serve": ServeCommand,
    "blend": BlendCommand,
    "export": ExportCommand,
    "report": ReportCommand,
    "compare": CompareCommand,
    "check": CheckCommand,
    "doctor": DoctorCommand,
    "build": BuildCommand,
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Arguments after the program's name; by default those of the process.

    Returns:
        0; 1 if the run failed or its results can't be printed; 2 for invalid input or too little memory; 128 + the
        number of the signal that interrupted the command. For help, and for arguments that can't be parsed, SystemExit
        with 0 and 2 is raised.
    """
    warnings.filterwarnings("ignore", module="PIL")  # of large images, and of those that it repairs
    out, err = Terminal(sys.stdout), Terminal(sys.stderr)
    closed = (errno.EPIPE, errno.EIO) if out.is_terminal else (errno.EPIPE,)  # `| head -1`, or a closed terminal
    with contextlib.redirect_stdout(out.file), contextlib.redirect_stderr(err.file):
        code = _run(sys.argv[1:] if arguments is None else arguments, out, err)
        out.output.flush()
        error = out.output.error
        if error is None or (isinstance(error, OSError) and error.errno in closed):
            return code
        complete = "; result files are complete" if code == 0 else ""
        _print_error(err, "failed", f"stdout can't be written: {error}{complete}")
        return code or 1


def _run(arguments: list[str], out: Terminal, err: Terminal) -> int:
    try:
        with termination_as_interrupt():
            return _parse(arguments, err).execute(out, err)
    except KeyboardInterrupt as error:
        _print_error(err, "", f"interrupted: {with_flags(error)}" if str(error) else "interrupted")
        return 128 + (error.number if isinstance(error, Terminated) else signal.SIGINT)
    except Exception as error:
        expected = failure(error)
        if expected is None:
            raise
        code, kind, message = expected
        _print_error(err, kind, message)
        return code


def _parse(arguments: list[str], err: Terminal) -> Any:
    """Parse the arguments; exits the process for --help and --help-all, and for missing or invalid values."""
    basic = "--help-all" not in arguments and any(word in ("-h", "--help") for word in arguments)
    kind: Any = COMMANDS.get(arguments[0]) if arguments else None
    if kind is not None:
        program, words = f"skipkernels {arguments[0]}", arguments[1:]
    else:
        program, words = "skipkernels", arguments
        kind = Union[tuple(Annotated[COMMANDS[name], tyro.conf.subcommand(name)] for name in COMMANDS)]  # noqa: UP007
    try:
        return tyro.cli(
            kind,
            prog=program,
            default=command_with_file(words, err) if kind is TuneCommand else tyro.MISSING_NONPROP,
            args=["--help" if word == "--help-all" else word for word in words],
            config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
            registry=registry(basic=basic),
        )
    except SystemExit:
        if basic and isinstance(kind, type) and issubclass(kind, Settings):  # which --help does not show all
            sys.stdout.write(f"More options: {program} --help-all\n")
        raise


def _print_error(err: Terminal, kind: str, error: str) -> None:
    """Print an error as one line."""
    err.print(*([Text(kind, "red")] if kind else []), " ".join(error.split()), soft_wrap=True)
