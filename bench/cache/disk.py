"""Time reading a store that is four times as large as the available memory.

    python -m bench.cache.disk --memory 1024 --batch 32

Writes a bf16 store of ViT-B/16 features and reads an epoch in random order in a new process, in a Linux control group
with this many MiB. Without the right to make a group, pages are dropped after each batch, and the row records that.
Compared with, under the same limit: `read` of the same rows in the same order, one by one and by 16 threads, and
sequential reading of the files, the most that the disk delivers.

Each starts with a cold page cache. Reports the rate and the peak resident memory of the process, with mapped files.
Appends to bench/results/DEVICE/cache_disk.csv.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from skipkernels.features import BatchSampler, FeatureCache
from skipkernels.memory import PeakMemory
from skipkernels.store.shards import path_of

from .. import measure
from . import random_store

_TIMES = 4  # store size over memory
_BLOCK = 4 << 20


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=int, default=1024, help="MiB")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; by default where temporary files are")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        images = (_TIMES * args.memory << 20) // (197 * 768 * 2)
        layout = random_store(folder, images, "bf16")
        total = images * layout.row_bytes
        print(f"{images} images, {total / 2**30:.1f} GiB")
        ways = {"loader": read_epoch, "rows, one by one": read_rows, "rows, 16 threads": read_rows_in_threads}
        ways |= {"files": read_files}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        peaks: dict[str, int] = {}
        for _ in range(args.rounds):
            for way, function in ways.items():
                drop(folder)
                took, peaks[way], limited = in_little_memory(function, folder, args.batch, args.memory)
                seconds[way].append(took)
        for way, times in seconds.items():
            rate = total / measure.quantile(times, 0.5) / 1e9
            rows.append(
                measure.machine(measure.CPU)
                | {"way": way, "images": images, "store_mib": total >> 20, "memory_mib": args.memory, "B": args.batch}
                | {"limited": limited, "gb_s": round(rate, 3), "peak_resident_mib": peaks[way] >> 20}
                | {"of_threads": round(measure.median_ratio(seconds["rows, 16 threads"], times), 3)}
                | {"of_files": round(measure.median_ratio(seconds["files"], times), 3)}
            )
            print(f"{way:16} {rate:6.2f} GB/s, {peaks[way] >> 20} MiB resident at most")
    print("memory was limited by " + ("a control group" if limited else "advice to the system alone"))
    if not args.no_save:
        print(f"appended to {measure.append_rows(rows, 'cache_disk')}")


def drop(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    os.sync()
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def in_little_memory(
    function: Callable[[Path, int, bool], None], folder: Path, batch: int, mebibytes: int
) -> tuple[float, int, bool]:
    """Seconds, peak resident bytes of a call in a new process, and True if its memory was limited by a group."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_limited, args=(function, folder, batch, mebibytes, results))
    process.start()
    while process.is_alive() and results.empty():
        process.join(0.1)
    if results.empty():
        raise SystemExit(f"{function.__name__} ended with {process.exitcode} in {mebibytes} MiB")
    result = results.get()
    process.join()
    return result


def _limited(function: Callable[[Path, int, bool], None], folder: Path, batch: int, mebibytes: int, results) -> None:
    memory = PeakMemory(measure.CPU)
    with group(mebibytes) as limited:
        started = time.perf_counter()
        function(folder, batch, not limited)
        seconds = time.perf_counter() - started
        results.put((seconds, memory.read(), limited))
        results.close()
        results.join_thread()


@contextmanager
def group(mebibytes: int):
    """Run in a new memory control group; yields False if none can be made."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    if "memory" in own:
        parent, limit = Path("/sys/fs/cgroup/memory" + own["memory"]), "memory.limit_in_bytes"
    else:
        parent, limit = Path("/sys/fs/cgroup" + own.get("", "/")), "memory.max"
    made = parent / f"skipkernels-{os.getpid()}"
    try:
        made.mkdir()
        (made / limit).write_text(str(mebibytes << 20))
        (made / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        with suppress(OSError):
            made.rmdir()
        yield False
        return
    try:
        yield True
    finally:
        (parent / "cgroup.procs").write_text(str(os.getpid()))
        with suppress(OSError):
            made.rmdir()


def read_epoch(folder: Path, batch: int, give_back: bool) -> None:
    """Read an epoch by the loader, in random order."""
    cache = FeatureCache.open(folder)
    total = torch.zeros(())
    for features, _ in cache.loader(batch, "random"):
        total += features[:, 0, 0].sum()  # use the batch
        if give_back:
            drop(folder)


def read_rows(folder: Path, batch: int, give_back: bool) -> None:
    """Read the same rows in the same order, one call each."""
    _read_rows(folder, batch, give_back, threads=1)


def read_rows_in_threads(folder: Path, batch: int, give_back: bool) -> None:
    """Read the same rows by 16 threads."""
    _read_rows(folder, batch, give_back, threads=16)


def _read_rows(folder: Path, batch: int, give_back: bool, threads: int) -> None:
    cache = FeatureCache.open(folder)
    layout = cache.store.layout
    files = [os.open(path_of(folder, number), os.O_RDONLY) for number in range(layout.shards)]
    own = threading.local()

    def read(row: int) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = bytearray(layout.row_bytes)
        number, place = divmod(row, layout.shard_rows)
        os.preadv(files[number], [own.buffer], place * layout.row_bytes)

    with ThreadPoolExecutor(threads) as pool:
        for numbers in BatchSampler(cache.labels, 16 * batch, "random"):
            list(pool.map(read, numbers))
            if give_back:
                drop(folder)
    for file in files:
        os.close(file)


def read_files(folder: Path, batch: int, give_back: bool) -> None:
    """Read every file sequentially."""
    buffer = bytearray(_BLOCK)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        if give_back:
            drop(folder)


if __name__ == "__main__":
    main()
