"""Tables: rows equal those written, kills and full disks lose nothing, damage is named and never read."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import pickle
import shutil
import signal
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skipkernels.features import writer as writer_module
from skipkernels.features.folder_table import (
    COMPUTED_DTYPES,
    STORED_DTYPES,
    Array,
    CacheError,
    FolderTable,
    Layout,
    quantise,
)
from skipkernels.features.table import FeatureTable, MemoryTable
from skipkernels.features.writer import TableWriter
from skipkernels.folders import LOCK
from tests.processes import forkserver

BATCH = 4
FILES = ("features.npy", "scales.npy", "labels.npy", "rows.npy", "identity.json")


def layout_of(dtype: str = "int8", *, rows: int = 18, shape: tuple[int, ...] = (3, 5), **changes: Any) -> Layout:
    """Layout with every file, by default: int8 has scales."""
    values = {
        "computed_dtype": "fp32",
        "labelled": True,
        "identity": {"weights": "these", "seed": 7},
        "probe": (0.1, -2.5e-7),
    }
    return Layout(rows, shape, dtype, **values | changes)


def features_of(layout: Layout) -> Tensor:
    values = 5 * torch.randn(layout.rows, *layout.shape, generator=torch.Generator().manual_seed(0))
    return values.to(COMPUTED_DTYPES[layout.computed_dtype])


def labels_of(layout: Layout) -> Tensor:
    return torch.arange(layout.rows) * 3 % 7


def fill(folder: Path, layout: Layout | None = None, **options: Any) -> list[int]:
    """Write a table, or its missing batches; return the first rows of the batches written. Flushes after each."""
    layout, first_rows = layout or layout_of(), []
    with TableWriter(folder, layout, **options) as writer:
        for start in range(0, layout.rows, BATCH):
            part = slice(start, start + BATCH)
            if writer.missing[part].any():
                writer.write(start, features_of(layout)[part], labels_of(layout)[part] if layout.labelled else None)
                first_rows.append(start)
    return first_rows


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK}


def all_rows(table: FeatureTable) -> Tensor:
    return table.rows(torch.arange(len(table)))


def read(folder: Path) -> tuple[Tensor, Tensor]:
    """Features and labels of a table."""
    table = FolderTable.open(folder)
    return all_rows(table), table.labels()


@pytest.fixture(autouse=True)
def _flush_each_batch(monkeypatch):
    monkeypatch.setattr(writer_module, "_FLUSH_BYTES", 0)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A complete table."""
    fill(tmp_path / "table")
    return tmp_path / "table"


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5), (4, 2, 3)], ids=["tokens", "map"])
@pytest.mark.parametrize("computed", COMPUTED_DTYPES)
@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_rows_are_those_written_and_numpy_reads_them(tmp_path, dtype, computed, shape):
    layout = layout_of(dtype, computed_dtype=computed, shape=shape)
    fill(tmp_path, layout)
    table, features = FolderTable.open(tmp_path), features_of(layout)
    stored = torch.from_numpy(np.load(tmp_path / "features.npy"))
    if dtype == "bf16":
        stored = stored.view(torch.bfloat16)
    if dtype == "int8":
        steps, scales = quantise(features)
        assert stored.equal(steps) and torch.from_numpy(np.load(tmp_path / "scales.npy")).equal(scales)
        stored = stored * scales.view(18, shape[0], *[1] * (len(shape) - 1))
        wrong = ((stored - features.float()).abs().flatten(2) / scales.unsqueeze(-1)).max()
        assert wrong <= 0.5 + 1e-4  # half a step; the quotient is rounded in fp32
    else:
        assert stored.equal(features.to(STORED_DTYPES[dtype]))
    ids = torch.tensor([17, 0, 3, 3])
    assert table.rows(ids).equal(stored.to(COMPUTED_DTYPES[computed])[ids])
    assert table.rows(ids[:0]).shape == (0, *shape)
    assert (
        table.labels().equal(labels_of(layout)) and (np.load(tmp_path / "labels.npy") == table.labels().numpy()).all()
    )
    assert (np.load(tmp_path / "rows.npy") != 0).all()
    in_memory = MemoryTable(all_rows(table))
    assert in_memory.rows(ids).equal(table.rows(ids))
    assert (in_memory.shape, in_memory.dtype, len(in_memory)) == (table.shape, table.dtype, len(table))
    assert (table.shape, len(table)) == (shape, 18)


def test_pickled_table_has_no_rows(folder, monkeypatch):
    """Also in another working directory."""
    monkeypatch.chdir(folder.parent)
    table = FolderTable.open(Path(folder.name))
    monkeypatch.chdir("/")
    unread, right = len(pickle.dumps(table)), all_rows(table)
    copy = pickle.dumps(table)
    assert len(copy) < unread + right.nbytes and all_rows(pickle.loads(copy)).equal(right)


@given(st.integers(0, 99), st.floats(-30, 30), st.sampled_from(sorted(COMPUTED_DTYPES)))
def test_int8_error_is_at_most_half_a_step(seed, magnitude, dtype):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(4, 3, 17, generator=generator) * 10**magnitude
    features = features.clamp(-6e4, 6e4).to(COMPUTED_DTYPES[dtype])
    rows, scale = quantise(features)
    features = features.double()
    largest = features.abs().amax(dim=-1)
    normal = largest > 127 * torch.finfo(torch.float32).tiny  # a step that is a normal number in fp32
    off = (rows.double() * scale.double().unsqueeze(-1) - features).abs().amax(dim=-1)
    # Added to the half step: the scale, the quotient and fp64 inputs are rounded to 24 bits, at most 127 steps from 0.
    assert (off <= scale.double() * (0.5 + 127 * 2**-22))[normal].all()
    assert (rows.abs().amax(dim=-1) == 127)[normal].all() and rows.min() >= -127


# ---- kills and disks -------------------------------------------------------------------------------------------------


def fill_until_killed(folder: Path, name: str, number: int, after: bool) -> None:
    """Write a table, and kill this process before or after a call of a function of `os` or `writer`."""
    writer_module._FLUSH_BYTES = 0
    module = os if hasattr(os, name) else writer_module
    function, calls = getattr(module, name), itertools.count(1)

    def killing(*arguments: Any) -> None:
        last = next(calls) == number
        if last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        function(*arguments)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, killing)
    fill(folder)


@pytest.mark.parametrize(
    ("name", "number", "after", "finished"),
    [
        ("replace", 1, True, None),  # identity.json, and no other file
        ("_write", 1, True, 0),  # features of the first batch
        ("_write", 7, False, 4),  # labels of the second
        ("_write", 8, False, 4),  # its checksums: the rows are on the disk
        ("_write", 8, True, 8),  # not flushed: a kill of the process alone loses nothing
        ("_write", 20, False, 16),  # checksums of the last
    ],
)
def test_killed_build_resumes_to_the_same_bytes(folder, tmp_path, name, number, after, finished):
    killed = tmp_path / "killed"
    process = forkserver().Process(target=fill_until_killed, args=(killed, name, number, after))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    message = "rows.npy: missing" if finished is None else f"incomplete: {finished} of 18 rows exist. Build the rest"
    with pytest.raises(CacheError, match=message):
        FolderTable.open(killed)
    assert fill(killed, resume=True) == list(range(finished or 0, 18, BATCH))
    assert contents(killed) == contents(folder)


def test_full_disk_keeps_finished_rows(folder, tmp_path, monkeypatch):
    at, calls, write = 8, itertools.count(1), writer_module._write

    def full(*arguments: Any) -> None:
        if next(calls) > at + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    message = r"No space left.*Finished rows stay\. Free[^`]*$"  # no option of `tune`, which needs none
    with monkeypatch.context() as patch, pytest.raises(CacheError, match=message):
        patch.setattr(writer_module, "_write", full)
        fill(tmp_path / "full")
    assert fill(tmp_path / "full", resume=True) == list(range(at, 18, BATCH))
    assert contents(tmp_path / "full") == contents(folder)


def test_disk_too_small_is_refused_before_the_build(tmp_path, monkeypatch):
    """Rows that exist have their place."""
    layout = layout_of(rows=10_000)
    usage = namedtuple("usage", "total used free")
    with TableWriter(tmp_path, layout) as writer:
        writer.write(0, features_of(layout)[:9_000], labels_of(layout)[:9_000])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**50, 0, 100_000))
    with pytest.raises(CacheError, match=r"350\.0 kB are needed, and 100\.0 kB are free\. Free space"):
        TableWriter(tmp_path / "new", layout).__enter__()
    with TableWriter(tmp_path, layout, resume=True) as writer:
        assert writer.missing.sum() == 1_000


def test_folder_is_compared_again_under_its_lock(tmp_path, monkeypatch):
    """Another build may have written its table between the first comparison and the lock."""
    lock = writer_module.locked

    @contextlib.contextmanager
    def after_another(folder: Path, **options: bool) -> Iterator[None]:
        monkeypatch.setattr(writer_module, "locked", lock)
        with TableWriter(folder, layout_of(identity={"weights": "others"})):
            pass
        with lock(folder, **options):
            yield

    monkeypatch.setattr(writer_module, "locked", after_another)
    with pytest.raises(CacheError, match="differs in weights"):
        fill(tmp_path / "table", resume=True)


def test_error_in_a_build_keeps_the_rows_before_it(folder, tmp_path, monkeypatch, recwarn):
    """Missing rows are not reported as damaged ones."""
    monkeypatch.setattr(writer_module, "_FLUSH_BYTES", 1 << 30)
    with pytest.raises(KeyboardInterrupt), TableWriter(tmp_path / "stopped", layout_of()) as writer:
        writer.write(0, features_of(writer.layout)[:BATCH], labels_of(writer.layout)[:BATCH])
        raise KeyboardInterrupt
    assert fill(tmp_path / "stopped", resume=True) == [4, 8, 12, 16] and not recwarn.list
    assert contents(tmp_path / "stopped") == contents(folder)


# ---- damage ----------------------------------------------------------------------------------------------------------


Change = Callable[[Path], object]


def flip(*places: int) -> Change:
    """Change a bit of some bytes of the data, behind the header of 128 bytes."""

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        for place in places:
            data[128 + place] ^= 1
        path.write_bytes(data)

    return change


DAMAGES: dict[str, tuple[str, Change, str, list[int]]] = {  # file, message, and batches to compute again
    "feature": ("features.npy", flip(15 * 6 + 4), "row 6 damaged", [4]),
    "scale": ("scales.npy", flip(12 * 6), "row 6 damaged", [4]),
    "label": ("labels.npy", flip(8 * 6), "row 6 damaged", [4]),
    "checksum": ("rows.npy", flip(24 * 6), "row 6 damaged", [4]),
    "two rows": ("features.npy", flip(15 * 6, 15 * 17), "row 6, 17 damaged", [4, 16]),
    "header": ("features.npy", flip(20 - 128), r"features\.npy: damaged: another header", []),
    "truncated": (
        "features.npy",
        lambda path: os.truncate(path, 128 + 15 * 9),
        "263 bytes instead of 398",
        [8, 12, 16],
    ),
    "empty": ("labels.npy", lambda path: os.truncate(path, 0), "0 bytes instead of 272", [0, 4, 8, 12, 16]),
    "longer": ("rows.npy", lambda path: os.truncate(path, 999), "999 bytes instead of 560", []),
    "missing": ("scales.npy", Path.unlink, r"scales\.npy: missing", [0, 4, 8, 12, 16]),
}


@pytest.mark.parametrize(("file", "damage", "message", "batches"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_never_read_and_computed_again(folder, file, damage, message, batches):
    sound, (right, _) = contents(folder), read(folder)
    damage(folder / file)
    with pytest.raises(CacheError, match=rf"^{folder}.*{message}.* Build it again with `resume=True`"):
        read(folder)
    if message.startswith("row"):
        table = FolderTable.open(folder)
        assert table.rows(torch.arange(5)).equal(right[:5]), "the others can be read"
        with pytest.raises(CacheError, match=message):
            FolderTable.open(folder, verify=True)
    with pytest.warns(UserWarning, match="It is computed again") if batches else contextlib.nullcontext():
        assert fill(folder, resume=True) == batches
    assert contents(folder) == sound


def test_file_that_is_truncated_while_it_is_read(folder, monkeypatch):
    """After its size was compared."""
    path, array = folder / "features.npy", Array((18, 3, 5), np.int8)
    os.truncate(path, 128 + 15 * 9)
    monkeypatch.setattr(Array, "file_bytes", path.stat().st_size)
    assert len(array.read(path, [8])) == 1
    with pytest.raises(CacheError, match=r"features\.npy: unreadable: truncated while it is read"):
        array.read(path, [3, 8, 9])


def test_rows_of_another_place_or_table_are_damaged(folder, tmp_path):
    other = layout_of(identity={"weights": "others", "seed": 7})
    fill(tmp_path / "other", other)
    for name in FILES[:4]:
        data = bytearray((folder / name).read_bytes())
        size = (len(data) - 128) // 18
        rows = [data[128 + i * size : 128 + (i + 1) * size] for i in range(18)]
        rows[4], rows[6] = rows[6], rows[4]
        (folder / name).write_bytes(data[:128] + b"".join(rows))
    assert FolderTable.open(folder).find_damage() == [4, 6]
    with pytest.raises(CacheError, match="row 4, 6 damaged"):
        FolderTable.open(folder).labels()
    for name in FILES[:4]:
        shutil.copy(tmp_path / "other" / name, folder / name)
    assert FolderTable.open(folder).find_damage() == list(range(18))


def test_row_is_compared_whenever_it_is_read(folder):
    table = FolderTable.open(folder)
    table.rows(torch.tensor([5, 6]))
    flip(15 * 6)(folder / "features.npy")  # or another process overwrites the table
    with pytest.raises(CacheError, match="row 6 damaged"):
        table.rows(torch.tensor([5, 6]))
    assert "row 0, 1, 2, 3, 4, 5, 6, 7, 8, … damaged" in table.damage_message(range(12))


@pytest.mark.parametrize(
    ("features", "labels", "words"),
    [
        (torch.ones(2, 3, 5), torch.ones(2, dtype=torch.int32), r"labels.npy must be int64 \(\); got int32 \(\)"),
        (torch.ones(2, 5, 3), torch.ones(2).long(), r"features.npy must be int8 \(3, 5\); got int8 \(5, 3\)"),
    ],
)
def test_rows_of_another_kind_are_not_written(tmp_path, features, labels, words):
    with TableWriter(tmp_path, layout_of()) as writer, pytest.raises(ValueError, match=words):
        writer.write(0, features, labels)
    with TableWriter(tmp_path, layout_of(), resume=True) as writer:
        assert writer.missing.all()


IDENTITIES: dict[str, tuple[str, str]] = {
    "empty": ("", r"damaged \(.+\)"),
    "number": ("3", r"damaged \(.+\)"),
    "other program": ('{"name": "an app"}', r"damaged \('format'\)"),
    "other format": ('{"format": 5}', "of format 5, and this version reads 6"),
    "more": (layout_of().to_json().replace('"rows"', '"more": 1, "rows"'), r"damaged \(.*'more'\)"),
}


@pytest.mark.parametrize(("text", "words"), IDENTITIES.values(), ids=IDENTITIES)
def test_other_identity_is_refused_and_kept(folder, text, words):
    (folder / "identity.json").write_text(text)
    before = contents(folder)
    for call in (FolderTable.open, partial(fill, resume=True), fill):
        with pytest.raises(CacheError, match=rf"identity\.json: {words}\. Delete the folder"):
            call(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("changes", [{"rows": 2**70}, {"shape": [3, 2**70]}], ids=str)
def test_size_of_an_identity_is_compared_with_the_files(folder, changes):
    """Before memory is allocated for it."""
    path = folder / "identity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CacheError, match=r"\.npy: damaged: \d+ bytes instead of "):
        FolderTable.open(folder)


def test_probe_tells_models_with_equal_weights_apart(folder):
    """Another device rounds the features of the fixed input differently; another activation changes more."""
    close, other = (layout_of(probe=(first, -2.5e-7)) for first in (0.10001, 0.102))
    assert fill(folder, close, resume=True) == [] and close.seed == FolderTable.open(folder).layout.seed
    for wrong in (other, layout_of(probe=(0.1,)), layout_of(probe=(float("nan"),) * 2)):
        with pytest.raises(CacheError, match="computes other features from the same weights"):
            fill(folder, wrong, resume=True)


# ---- other tables and other processes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"identity": {"weights": "others", "seed": 7}}, r"weights \(these there, others here\)"),
        ({"identity": {"weights": "these"}}, r"seed \(7 there, nothing here\)"),
        ({"identity": {"weights": "these", "seed": 7, "crop": 2}}, r"crop \(nothing there, 2 here\)"),
        ({"shape": (5, 3)}, r"shape \(\(3, 5\) there, \(5, 3\) here\)"),
        ({"dtype": "fp16"}, r"dtype \(int8 there, fp16 here\)"),
        ({"rows": 17}, r"rows \(18 there, 17 here\)"),
        ({"labelled": False}, r"labelled \(True there, False here\)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_other_table_is_refused_and_kept(folder, changes, difference):
    before, other = contents(folder), layout_of(**changes)
    with pytest.raises(CacheError, match=f"holds a cache that differs in {difference}. Choose another folder, or"):
        fill(folder, other, resume=True)
    with pytest.raises(CacheError, match=r"holds a cache\. Open it, continue or repair it with `resume=True`"):
        fill(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["notes.txt", "features.npy", "00000.safetensors"])
def test_folder_with_other_files_is_refused_and_kept(tmp_path, name):
    (tmp_path / name).write_text("mine")
    for options in ({}, {"resume": True}):
        with pytest.raises(CacheError, match=rf"holds other files \({name}\)\. Choose an empty folder"):
            fill(tmp_path, **options)
    assert contents(tmp_path) == {name: b"mine"} and not (tmp_path / LOCK).exists()
    with pytest.raises(CacheError, match="is a file. Choose a folder"):
        fill(tmp_path / name)


def test_complete_table_is_resumed_without_a_write(folder, monkeypatch):
    """Its disk can be read-only, and it may have been copied without its lock."""
    before = contents(folder)
    (folder / LOCK).unlink()
    for name in ("locked", "replace_text", "_write"):
        monkeypatch.setattr(writer_module, name, lambda *arguments, **options: pytest.fail("the folder was written"))
    assert fill(folder, resume=True) == [] and contents(folder) == before and not (folder / LOCK).exists()


def test_second_writer_is_refused_or_waits(folder, tmp_path):
    """One that waits then finds the table complete."""
    written: list[Any] = []
    second = threading.Thread(
        target=lambda: written.append(fill(tmp_path / "new", resume=True, wait=True)), daemon=True
    )
    with TableWriter(tmp_path / "new", layout_of()) as writer:
        with pytest.raises(CacheError, match="in use by another process. Wait for it, or choose another folder"):
            fill(tmp_path / "new", resume=True)
        second.start()
        second.join(0.1)
        assert second.is_alive()
        writer.write(0, features_of(writer.layout), labels_of(writer.layout))
    second.join(60)
    assert written == [[]] and contents(tmp_path / "new") == contents(folder)
