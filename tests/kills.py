"""Processes that are killed in the middle of their work."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from typing import Any


def server(*modules: str) -> Any:
    """Gives processes that have imported these, so that each begins at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", *modules])
    return context


def run_for(processes: Any, work: Callable[..., None], arguments: tuple, seconds: float) -> float:
    """Let another process work, and kill it so many seconds after it began, or when it has ended; gives the time.

    Args:
        processes: Of `server`.
        work: Called with the arguments and a pipe, through which it says "begins", then that it has ended, and waits.
        arguments: Of it.
        seconds: From "begins" on.
    """
    ours, theirs = processes.Pipe()
    process = processes.Process(target=work, args=(*arguments, theirs))
    process.start()
    theirs.close()
    assert ours.recv() == "begins"
    began = time.perf_counter()
    ours.poll(seconds)
    took = time.perf_counter() - began
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return took
