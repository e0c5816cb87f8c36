"""Processes that are killed while they work."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from tests.processes import forkserver


def run_for(work: Callable[..., None], arguments: tuple, seconds: float) -> float:
    """Run a function in another process, and kill it after some seconds or at its end; returns the seconds it ran.

    Args:
        work: Function of the arguments and a pipe; it sends "begins", then a message at its end, and waits.
        arguments: Arguments of `work`.
        seconds: Time of the kill after "begins".
    """
    context = forkserver()
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(*arguments, theirs))
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
