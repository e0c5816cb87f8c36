"""Processes that are killed while they work."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from typing import Any


def server(*modules: str) -> Any:
    """Return a fork server with imported modules, so that its processes start at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", *modules])
    return context


def run_for(processes: Any, work: Callable[..., None], arguments: tuple, seconds: float) -> float:
    """Run a function in another process, and kill it after some seconds or at its end; returns the seconds it ran.

    Args:
        processes: Result of `server`.
        work: Function of the arguments and a pipe; it sends "begins", then a message at its end, and waits.
        arguments: Arguments of `work`.
        seconds: Time of the kill after "begins".
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
