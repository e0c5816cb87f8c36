"""The command line: `skipkernels` and its subcommands. Arguments only; the work is done elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.table import Table

import skipkernels
import skipkernels.experiments
from skipkernels.cli import analyze, cache, study
from skipkernels.cli.errors import with_flags
from skipkernels.console import Terminal, plain, standard_streams
from skipkernels.data import InputError, Protocol
from skipkernels.memory import out_of_memory
from skipkernels.store import StoreError
from skipkernels.store.lock import holder
from skipkernels.tuner import TuneConfig, epochs_left, evaluate_run, tune
from skipkernels.tuner.checkpoint import DELTA, MODEL
from skipkernels.tuner.run_folder import resumed

_LONGEST = 1000  # characters of a message


def _flag_or_run(words: list[str]) -> bool | Path:
    if len(words) > 1:
        raise ValueError(f"one folder; got {' '.join(words)}")
    return Path(words[0]) if words else True


_FLAG_OR_RUN = tyro.constructors.PrimitiveConstructorSpec[Any](
    nargs="*",
    metavar="[RUN]",
    instance_from_str=_flag_or_run,
    is_instance=lambda value: isinstance(value, (bool, Path)),
    str_from_instance=lambda value: [str(value)] if isinstance(value, Path) else [],
)


@dataclasses.dataclass(frozen=True)
class TuneCommand(TuneConfig):
    """Tune a CLIP on some images of a dataset, and test it, also on classes or images of another kind."""

    resume: Annotated[bool | Path, _FLAG_OR_RUN] = False
    """Go on after the last complete epoch of the run in RUN, with its settings, to the same bits. Without RUN: in
    --out, with the settings given here; begin where there is none."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Compute the accuracy of a run's checkpoint again. Nothing is written."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or the model.safetensors or delta.safetensors in it."""
    data: str | None = None
    """Test on this dataset, named as for tune; by default on the run's."""
    root: Path | None = None
    """Folder of the datasets, for coop: and torchvision:; by default the run's."""
    protocol: Protocol | None = None
    """Which classes and images are tested; by default the run's."""
    device: str | None = None
    """Where to compute; by default where the run did."""
    json: bool = False
    """Print JSON in place of a table."""


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """Print versions, devices, and which kernel serves each operator."""


Command = (
    Annotated[TuneCommand, tyro.conf.subcommand("tune")]
    | Annotated[EvalConfig, tyro.conf.subcommand("eval")]
    | Annotated[study.ProtocolConfig, tyro.conf.subcommand("protocol")]
    | Annotated[study.CompareConfig, tyro.conf.subcommand("compare")]
    | Annotated[analyze.AnalyzeConfig, tyro.conf.subcommand("analyze")]
    | Annotated[cache.CacheConfig, tyro.conf.subcommand("cache")]
    | Annotated[DoctorConfig, tyro.conf.subcommand("doctor")]
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 2 for input that can't be used; 1 for a run that failed or results that can't be printed; 128 and the number
        of the signal that ended it.
    """
    with standard_streams() as (out, err):
        code = _run(arguments, out, err)
        out.output.flush()
        if out.output.error is None or out.output.unread:  # who reads no more, such as `head -1`, misses nothing
            return code
        _print_error(err, "failed", f"stdout can't be written: {out.output.error}; files of results are complete")
        return code or 1


def _run(arguments: list[str] | None, out: Terminal, err: Terminal) -> int:
    command = tyro.cli(
        Command,
        prog="skipkernels",
        description="Skip Tuning for CLIP.",
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
    )
    try:
        with _termination_as_interrupt():
            if isinstance(command, TuneConfig):
                _tune(command, out, err)
            elif isinstance(command, EvalConfig):
                _eval(command, out, err)
            elif isinstance(command, study.ProtocolConfig):
                study.run_protocols(command, out, err)
            elif isinstance(command, study.CompareConfig):
                study.run_comparison(command, out, err)
            elif isinstance(command, analyze.AnalyzeConfig):
                return analyze.run(command, out, err)
            elif isinstance(command, cache.CacheConfig):
                return cache.run(command.action, out, err)
            else:
                _doctor(out)
    except (InputError, StoreError, MemoryError) as error:
        _print_error(err, "error", with_flags(error) or "memory is used up")
        return 2
    except (FloatingPointError, OSError, BrokenExecutor) as error:
        _print_error(err, "failed", with_flags(error) if isinstance(error, FloatingPointError) else error)
        return 1
    except RuntimeError as error:
        if out_of_memory(error):
            _print_error(err, "error", f"memory is used up ({str(error).splitlines()[0]})")
            return 2
        if "DataLoader worker" not in str(error):
            raise
        _print_error(err, "failed", error)
        return 1
    except KeyboardInterrupt as error:
        left = with_flags(error)
        if isinstance(command, cache.CacheConfig) and isinstance(command.action, cache.CacheBuildConfig):
            left = "what is complete is in the folder; cache build goes on from there with --resume"
        elif isinstance(command, (study.ProtocolConfig, study.CompareConfig)):
            again = "the same command without --overwrite" if command.run.overwrite else "the same command"
            left = f"runs that are complete are kept; {again} goes on"
        _print_error(err, "", f"interrupted: {left}" if left else "interrupted")
        return 128 + (error.number if isinstance(error, _Terminated) else signal.SIGINT)
    return 0


class _Terminated(KeyboardInterrupt):
    number: int = signal.SIGTERM


def _terminate(number: int, frame: Any) -> None:
    error = _Terminated()
    error.number = number
    raise error


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM, as of a job on a cluster, and SIGHUP, as of a terminal that closes, leave what Ctrl-C leaves."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # by nohup
    numbers = [signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.signal(number, _terminate) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_error(err: Terminal, kind: str, error: object) -> None:
    """Print an error as one line of bounded length."""
    line = " ".join(str(error).split())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST - 200]} … {line[-200:]}"
    parts = [plain(kind, style="red")] if kind else []
    err.print(*parts, plain(line), soft_wrap=True)


def _tune(command: TuneConfig, out: Terminal, err: Terminal) -> None:
    config = resumed(command).resolved()
    metrics = tune(config, console=err)
    table = Table("accuracy, %", title=f"{config.model} on {config.data}, {config.method}, {config.shots} shots")
    for column in ("zero-shot", "tuned", "change"):
        table.add_column(column, justify="right")
    for key, before in metrics["zero_shot"].items():
        after = metrics["tuned"][key]
        change = None if before is None or after is None else after - before
        table.add_row(key, _number(before, ".2f"), _number(after, ".2f"), _number(change, "+.2f"))
    out.print(table)
    cost, kept, first = metrics["cost"], metrics["checkpoint"], next(iter(metrics["classes"].values()))
    costs = Table(show_header=False)
    if metrics["steps"]:
        pace = f"{cost['seconds_per_epoch']:.2f} s, {cost['milliseconds_per_step']:.1f} ms a step"
        costs.add_row("time of an epoch", pace)
        costs.add_row("classes compared", f"{metrics['kept_classes']:.1f} of {first} a step")
    costs.add_row("time of the run", f"{cost['seconds_total']:.1f} s on {cost['device']} in {config.precision}")
    before_model = f"{cost['baseline_memory_mib']:.0f} before the model"
    costs.add_row("peak memory", f"{cost['peak_memory_mib']:.0f} MiB, of which {before_model}")
    part = f" of {kept['mib_of_all']}" if config.delta else ""
    costs.add_row("weights", f"{kept['file']}, {kept['mib']}{part} MiB")
    costs.add_row("results", str(config.out))
    out.print(costs)
    names = ("report.html", "metrics.json", "metrics.jsonl", kept["file"], "state.pt", "config.yaml")
    there = [name for name in names if config.out is not None and (config.out / name).exists()]
    out.print("  " + "  ".join(there), soft_wrap=True)


def _number(value: float | None, how: str) -> str:
    return "–" if value is None else f"{value:{how}}"


def _eval(command: EvalConfig, out: Terminal, err: Terminal) -> None:
    named = command.run.suffix == ".safetensors"
    if named and command.run.name not in (MODEL, DELTA):
        raise InputError(f"eval: RUN must be the folder of a run or its {MODEL}; got {command.run}.")
    folder = command.run.parent if named else command.run
    accuracies = evaluate_run(
        folder, device=command.device, data=command.data, root=command.root, protocol=command.protocol
    )
    at_work, left = holder(folder), epochs_left(folder)
    if at_work is not None:
        err.print(f"note: a run is going on in this folder ({at_work}); {left} of its epochs are still to come")
    elif left:
        err.print(f"note: the run was cut off, {left} epoch{'s' if left > 1 else ''} before its end; --resume goes on")
    if command.json:
        out.print(json.dumps(accuracies), soft_wrap=True)
        return
    table = Table("accuracy, %", title=str(folder))
    table.add_column("tuned", justify="right")
    for key, value in accuracies.items():
        table.add_row(key, _number(value, ".2f"))
    out.print(table)


def _doctor(out: Terminal) -> None:
    versions = Table("part", "version", title="skipkernels doctor")
    versions.add_row("skipkernels", skipkernels.__version__)
    versions.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "triton", "open_clip_torch", "torchvision", "safetensors", "xformers"):
        try:
            versions.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            versions.add_row(package, "not installed")
    versions.add_row("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        versions.add_row(f"cuda:{index}", torch.cuda.get_device_name(index))
    if not torch.cuda.is_available():
        versions.add_row("cuda", "no device")
    out.print(versions)
    kernels = Table("operator", "device", "kernel", "why not a faster one", "leaves to plain PyTorch")
    for operator, devices in skipkernels.backends().items():
        for device, backend in devices.items():
            if device == "cuda" and not torch.cuda.is_available():
                continue
            kernels.add_row(operator, device, backend.kernel, backend.reason, backend.leaves)
    out.print(kernels)
