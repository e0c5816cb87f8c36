"""Entry point of the command line: parse the arguments, run the command, print errors, return the exit code."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from typing import Annotated, Any

import tyro
from rich.text import Text

from skipkernels.app.console import Terminal
from skipkernels.app.train.processes import is_first, launched
from skipkernels.formatting import first_line

from .blend import BlendCommand
from .cache import CacheCommand
from .check import CheckCommand
from .compare import CompareCommand
from .doctor import DoctorCommand
from .eval import EvalCommand
from .export import ExportCommand
from .interrupt import Terminated, termination_as_interrupt
from .listings import DatasetsCommand, ModelsCommand
from .options import REGISTRY
from .predict import PredictCommand
from .protocol import ProtocolCommand
from .report import ReportCommand
from .tune import TuneCommand, command_with_file
from .warmup import WarmupCommand

_LONGEST = 1000  # characters of an error message

_Others = (
    Annotated[EvalCommand, tyro.conf.subcommand("eval")]
    | Annotated[PredictCommand, tyro.conf.subcommand("predict")]
    | Annotated[BlendCommand, tyro.conf.subcommand("blend")]
    | Annotated[ExportCommand, tyro.conf.subcommand("export")]
    | Annotated[ReportCommand, tyro.conf.subcommand("report")]
    | Annotated[ProtocolCommand, tyro.conf.subcommand("protocol")]
    | Annotated[CompareCommand, tyro.conf.subcommand("compare")]
    | Annotated[CacheCommand, tyro.conf.subcommand("cache")]
    | Annotated[CheckCommand, tyro.conf.subcommand("check")]
    | Annotated[ModelsCommand, tyro.conf.subcommand("models")]
    | Annotated[DatasetsCommand, tyro.conf.subcommand("datasets")]
    | Annotated[WarmupCommand, tyro.conf.subcommand("warmup")]
    | Annotated[DoctorCommand, tyro.conf.subcommand("doctor")]
)


Command = Annotated[TuneCommand, tyro.conf.subcommand("tune")] | _Others


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
        code = _run(arguments, out, err)
        out.output.flush()
        error = out.output.error
        if error is None or (isinstance(error, OSError) and error.errno in closed):
            return code
        _print_error(err, "failed", f"stdout can't be written: {error}; result files are complete")
        return code or 1


def parse(arguments: list[str] | None, err: Terminal) -> Command:
    """Parse the arguments; exits the process for --help and for unknown arguments.

    Raises:
        InputError: If the file of --config can't be used.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # The settings of the file of --config are the defaults of the options, also in --help.
    default = command_with_file(arguments, err) if arguments[:1] == ["tune"] else TuneCommand()
    tune: Any = Annotated[TuneCommand, tyro.conf.subcommand("tune", default=default)]
    return tyro.cli(
        tune | _Others,
        prog="skipkernels",
        description="Skip Tuning for CLIP. See also: skipkernels COMMAND --help, skipkernels --version.",
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
        registry=REGISTRY,
        console_outputs=is_first(),
    )


def _run(arguments: list[str] | None, out: Terminal, err: Terminal) -> int:
    try:
        command = parse(arguments, err)
    except ValueError as error:  # InputError, which is not imported for --help
        from .errors import with_flags

        _print_error(err, "error", with_flags(error))
        return 2
    if launched() > 1 and not isinstance(command, (TuneCommand, EvalCommand)):
        if is_first():
            _print_error(
                err, "error", f"only tune and eval run in several processes; torchrun started {launched()}. Start one."
            )
        return 2
    by_torchrun = "TORCHELASTIC_ERROR_FILE" in os.environ  # it prints the traceback that `record` writes to this file
    try:
        with termination_as_interrupt(), _without_root_logger():
            if not by_torchrun:
                return command.execute(out, err)
            import torch.distributed as dist
            from torch.distributed.elastic.multiprocessing.errors import record

            code = record(command.execute)(out, err) or 0
            if dist.is_initialized():
                dist.destroy_process_group()  # or NCCL prints a warning
            return code
    except KeyboardInterrupt as error:
        from .errors import with_flags

        if is_first():
            _print_error(err, "", f"interrupted: {with_flags(error)}" if str(error) else "interrupted")
        return 128 + (error.number if isinstance(error, Terminated) else signal.SIGINT)
    except Exception as error:
        failure = _failure(error)
        if failure is None and by_torchrun:
            return 1
        if failure is None:
            raise
        code, kind, message = failure
        if is_first() or not by_torchrun:
            _print_error(err, kind, message)
        return code


@contextlib.contextmanager
def _without_root_logger() -> Iterator[None]:
    """Keep messages of the logger "skipkernels" from handlers that other packages install: the terminal shows them."""
    logger = logging.getLogger("skipkernels")
    before, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.propagate = before


def _failure(error: Exception) -> tuple[int, str, str] | None:
    """Return exit code, kind and message of an expected error; None if it is a bug, to be shown with its traceback."""
    from skipkernels.app.data import InputError
    from skipkernels.memory import out_of_memory
    from skipkernels.store import StoreError

    from .errors import with_flags

    if isinstance(error, (InputError, StoreError, MemoryError)):
        return 2, "error", with_flags(error) or "out of memory"
    if isinstance(error, RuntimeError) and out_of_memory(error):
        return 2, "error", f"out of memory ({first_line(error)})"
    worker = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
    if worker or isinstance(error, (FloatingPointError, OSError, BrokenExecutor)):
        return 1, "failed", with_flags(error) if isinstance(error, FloatingPointError) else str(error)
    return None


def _print_error(err: Terminal, kind: str, error: str) -> None:
    """Print an error as one line of bounded length."""
    line = " ".join(error.split())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST - 200]} … {line[-200:]}"
    err.print(*([Text(kind, "red")] if kind else []), line, soft_wrap=True)
