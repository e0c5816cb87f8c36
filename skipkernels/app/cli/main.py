"""Entry point of the command line: parse the arguments, run the command, print errors, return the exit code."""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterable
from itertools import takewhile
from typing import Annotated, Any, Union

import tyro
from rich.text import Text

from skipkernels.app.console import Terminal
from skipkernels.app.train.processes import is_first, launched

from .blend import BlendCommand
from .check import CheckCommand
from .doctor import DoctorCommand
from .errors import Terminated, failure, termination_as_interrupt, with_flags
from .eval import EvalCommand
from .export import ExportCommand
from .listings import DatasetsCommand, ModelsCommand
from .options import registry, settings
from .parse_errors import in_one_line
from .predict import PredictCommand
from .report import ReportCommand
from .serve import ServeCommand
from .studies import CompareCommand, ProtocolCommand
from .tune import TuneCommand, command_with_file

COMMANDS: dict[str, Any] = {
    "tune": TuneCommand,
    "eval": EvalCommand,
    "predict": PredictCommand,
    "serve": ServeCommand,
    "blend": BlendCommand,
    "export": ExportCommand,
    "report": ReportCommand,
    "protocol": ProtocolCommand,
    "compare": CompareCommand,
    "check": CheckCommand,
    "models": ModelsCommand,
    "datasets": DatasetsCommand,
    "doctor": DoctorCommand,
}
_LONGEST = 1000  # characters of an error message


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Arguments after the program's name; by default those of the process.

    Returns:
        0; 1 if the run failed or its results can't be printed; 2 for invalid input or too little memory; 128 + the
        number of the signal that interrupted the command.
    """
    out, err = Terminal(sys.stdout), Terminal(sys.stderr)
    closed = (errno.EPIPE, errno.EIO) if out.is_terminal else (errno.EPIPE,)  # `| head -1`, or a closed terminal
    with contextlib.redirect_stdout(out.file), contextlib.redirect_stderr(err.file):
        code = _run(sys.argv[1:] if arguments is None else arguments, out, err)
        out.output.flush()
        error = out.output.error
        if error is None or (isinstance(error, OSError) and error.errno in closed):
            return code
        _print_error(err, "failed", f"stdout can't be written: {error}; result files are complete")
        return code or 1


def _run(arguments: list[str], out: Terminal, err: Terminal) -> int:
    by_torchrun = "TORCHELASTIC_ERROR_FILE" in os.environ  # it prints the traceback that `record` writes to this file
    try:
        with termination_as_interrupt():
            command = _parse(arguments, err)
            return _recorded(command, out, err) if by_torchrun else command.execute(out, err)
    except KeyboardInterrupt as error:
        if is_first():
            _print_error(err, "", f"interrupted: {with_flags(error)}" if str(error) else "interrupted")
        return 128 + (error.number if isinstance(error, Terminated) else signal.SIGINT)
    except Exception as error:
        expected = failure(error)
        if expected is None:
            if by_torchrun:
                return 1
            raise
        code, kind, message = expected
        if is_first() or not by_torchrun:
            _print_error(err, kind, message)
        return code
    finally:  # or the exit waits for threads that decode an image
        if decoder := sys.modules.get("skipkernels.app.data.decoder"):
            decoder.end_decoders()


def _parse(arguments: list[str], err: Terminal) -> Any:
    """Parse the arguments; exits the process for --help and --help-all, and for missing or invalid values."""
    name = arguments[0] if arguments else "-"
    if not name.startswith("-") and name not in COMMANDS:
        raise _unknown(f"command {name!r}", name, COMMANDS, "skipkernels --help")
    # The settings of the file of --config are the defaults of the options, also in --help.
    tune: Any = Annotated[TuneCommand, tyro.conf.subcommand("tune", default=command_with_file(arguments, err))]
    others = [Annotated[COMMANDS[name], tyro.conf.subcommand(name)] for name in COMMANDS if name != "tune"]
    commands: Any = Union[tuple([tune, *others])]  # noqa: UP007
    box = io.StringIO()  # tyro's message
    hidden: list[str] | None = [] if {"-h", "--help"} & set(arguments) and "--help-all" not in arguments else None
    try:
        with contextlib.redirect_stderr(box):
            command, unknown = tyro.cli(
                commands,
                prog="skipkernels",
                description="Skip Tuning for CLIP. See also: skipkernels COMMAND --help, skipkernels --version.",
                args=["--help" if word == "--help-all" else word for word in arguments],
                config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
                registry=registry(hidden),
                console_outputs=is_first(),
                return_unknown_args=True,
            )
    except SystemExit:
        if not box.getvalue():  # --help, or a process that prints nothing
            if hidden and is_first():
                words = takewhile(lambda word: not word.startswith("-"), arguments)
                sys.stdout.write(f"More options: {' '.join(['skipkernels', *words])} --help-all\n")
            raise
        raise _input_error(in_one_line(box.getvalue(), arguments)) from None
    if unknown:
        option = unknown[0].partition("=")[0]
        flags = [f"--{setting.replace('_', '-')}" for setting in settings(command)]
        raise _unknown(f"option {option!r} of {name}", option, flags, f"skipkernels {name} --help")
    if launched() > 1 and not isinstance(command, (TuneCommand, EvalCommand)):
        raise _input_error(f"only tune and eval run in several processes; torchrun started {launched()}. Start one.")
    return command


def _unknown(what: str, given: str, names: Iterable[str], help_command: str) -> Exception:
    """Error of one line for a word that is not among the names."""
    words = {name.lstrip("-"): name for name in names}  # two dashes in common would make all options alike
    close = [words[word] for word in difflib.get_close_matches(given.lstrip("-"), list(words), 1)]
    return _input_error(f"no {what}{f'; did you mean {close[0]}?' if close else '.'} See {help_command}.")


def _input_error(message: str) -> Exception:
    from skipkernels.app.data import InputError

    return InputError(message)


def _recorded(command: Any, out: Terminal, err: Terminal) -> int:
    """Run a command that torchrun started, and let torchrun print the traceback of an error."""
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.errors import record

    code = record(command.execute)(out, err) or 0
    if dist.is_initialized():
        dist.destroy_process_group()  # or NCCL prints a warning
    return code


def _print_error(err: Terminal, kind: str, error: str) -> None:
    """Print an error as one line of bounded length."""
    line = " ".join(error.split())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST - 200]} … {line[-200:]}"
    err.print(*([Text(kind, "red")] if kind else []), line, soft_wrap=True)
