"""Run a function in several processes, with the environment variables that torchrun sets."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

_PRELOADED = ["pytest", "open_clip", "skipkernels.app.train.tuning"]


def forkserver() -> Any:
    """Return a fork server that has imported slow modules, so that its processes start at once.

    All tests preload one list: a test process has one server, with the modules of its first user.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def run_in_processes(
    size: int, folder: Path, function: Callable[..., Any], *arguments: Any, killed: Collection[int] = ()
) -> list[Any]:
    """Return the result of `function(rank, *arguments)` in each of `size` processes, which may make a process group.

    Args:
        folder: Folder for the results, which the processes write with `torch.save`.
        killed: Ranks that must kill themselves; their result is None.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = forkserver()
    processes = [
        context.Process(target=_process, args=(rank, size, port, folder, function, arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        for rank, process in enumerate(processes):
            process.join(300)
            assert process.exitcode == (-signal.SIGKILL if rank in killed else 0)
    finally:
        for process in processes:
            process.kill()
    files = [None if rank in killed else folder / f"{rank}.pt" for rank in range(size)]
    return [None if file is None else torch.load(file, weights_only=True) for file in files]


def _process(
    rank: int, size: int, port: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Set the variables of torchrun, call the function, and save its result."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    torch.save(function(rank, *arguments), folder / f"{rank}.pt")
