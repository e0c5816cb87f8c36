"""Several processes, with the variables that a launcher of distributed training sets."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

_PRELOADED = ["pytest", "open_clip", "skipkernels.app.train.run"]


def forkserver() -> Any:
    """Return a fork server with imported modules, so that its processes start at once.

    One list for all tests: a test process has one server, with the modules of its first user.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def by_two(folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results of `function(rank, *arguments)` in each of two processes, in which it may make a process group."""
    return together(2, folder, function, *arguments)


def together(
    size: int, folder: Path, function: Callable[..., Any], *arguments: Any, killed: Collection[int] = ()
) -> list[Any]:
    """Results of `function(rank, *arguments)` in each of `size` processes, in which it may make a process group.

    Those in `killed` must kill themselves; their result is None.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = forkserver()
    every = [
        context.Process(target=_process, args=(rank, size, port, folder, function, arguments)) for rank in range(size)
    ]
    for each in every:
        each.start()
    try:
        for rank, each in enumerate(every):
            each.join(300)
            assert each.exitcode == (-signal.SIGKILL if rank in killed else 0)
    finally:
        for each in every:
            each.kill()
    files = [None if rank in killed else folder / f"{rank}.pt" for rank in range(size)]
    return [None if file is None else torch.load(file, weights_only=True) for file in files]


def _process(
    rank: int, size: int, port: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    torch.save(function(rank, *arguments), folder / f"{rank}.pt")
