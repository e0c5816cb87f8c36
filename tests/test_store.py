"""Stores: rows equal those written, damage is found, named and rebuilt, and other files are never deleted."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from skipkernels import store as store_module
from skipkernels.folders import LOCK
from skipkernels.store import (
    COMPUTED,
    DTYPES,
    MANIFEST,
    Layout,
    Manifest,
    Store,
    StoreError,
    Writer,
    is_store,
    map_shard,
    quantise,
)
from tests.stores import contents, fill, labels_of, layout_of, listed_shards, tensors_of, truth_of, write_manifest

OLD = Path(__file__).with_name("store_of_0.2")
SHARD = "00001.safetensors"


@pytest.fixture
def layout() -> Layout:
    return layout_of("int8")  # the dtype with the most tensors


@pytest.fixture
def folder(tmp_path, layout) -> Path:
    """A complete store."""
    fill(tmp_path / "store", layout)
    return tmp_path / "store"


# ---- reading ---------------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw) -> Layout:
    return layout_of(
        draw(st.sampled_from(sorted(DTYPES))),
        rows=draw(st.integers(1, 20)),
        shape=tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))),
        computed=draw(st.sampled_from(sorted(COMPUTED))),
        shard_rows=draw(st.integers(1, 25)),
        labelled=draw(st.booleans()),
    )


@given(layouts(), st.data())
def test_gather_of_any_rows(layout, data):
    index = torch.tensor(data.draw(st.lists(st.integers(0, layout.rows - 1), max_size=12)), dtype=torch.int64)
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), layout)
        store = Store(Path(folder), verify=True)
        batch = store.gather(index)
        assert batch.dtype == store.dtype == COMPUTED[layout.computed]
        assert batch.equal(truth_of(layout)[index])
        to = data.draw(st.sampled_from(sorted(COMPUTED)))
        out = torch.full((len(index), *layout.shape), torch.nan, dtype=COMPUTED[to])
        assert store.gather(index, out=out) is out
        assert out.equal(truth_of(layout, COMPUTED[to])[index])
        if layout.labelled:
            assert store.labels().equal(labels_of(layout))


def test_shards_are_mapped_and_not_copied(folder):
    map_shard(folder, layout_of("int8"), 1, Manifest.read(folder).shards[1])
    mapped = map_shard(folder, layout_of("int8"), 1, Manifest.read(folder).shards[1])
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(folder / SHARD))]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    for tensor in mapped:
        assert any(start <= tensor.data_ptr() < stop for start, stop in ranges)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_closes_maps_of_a_large_store(tmp_path, monkeypatch, dtype):
    layout, mapped = layout_of(dtype), []

    def counted(*arguments):
        mapped.append(arguments[2])
        return map_shard(*arguments)

    fill(tmp_path, layout)
    everything, truth = torch.arange(layout.rows), truth_of(layout)
    monkeypatch.setattr(store_module, "_MAPPED", layout.rows * layout.row_bytes - 1)
    small = Store(tmp_path)
    monkeypatch.setattr(store_module, "free_bytes", lambda device: 32 * small.bytes)
    large = Store(tmp_path)
    monkeypatch.setattr(store_module, "map_shard", counted)
    for _ in range(2):
        assert small.gather(everything).equal(truth)
    assert mapped == [0, 1, 2, 3, 4], "once each if memory suffices"
    kept = large.gather(everything)
    for _ in range(2):
        assert large.gather(everything).equal(truth)
    assert mapped == [0, 1, 2, 3, 4] * 4
    assert kept.equal(truth), "a batch is not a view of a map"


@pytest.mark.parametrize("index, wrong", [([0, 18], 18), ([-1, 3], -1), ([2**62], 2**62)])
def test_gather_of_a_row_out_of_range(folder, index, wrong):
    with pytest.raises(IndexError, match=rf"^gather: rows are numbered from 0 to 17; got {wrong}\.$"):
        Store(folder).gather(torch.tensor(index))


def test_read_only_store_opens_and_resumes(folder, layout, monkeypatch):
    """No file is created or changed, and no lock is taken."""
    before = contents(folder)
    (folder / LOCK).unlink()
    for name in ("locked", "replace_text", "replace_tensors"):
        monkeypatch.setattr(store_module, name, lambda *arguments, **options: pytest.fail("the folder was written"))
    assert Store(folder, verify=True).gather(torch.arange(18)).equal(truth_of(layout))
    assert fill(folder, layout, resume=True) == []
    assert contents(folder) == before and not (folder / LOCK).exists()


def test_store_of_version_0_2_loads(tmp_path):
    layout = layout_of("int8", rows=6)
    assert Store(OLD, verify=True).gather(torch.arange(6)).equal(truth_of(layout))
    fill(tmp_path / "new", layout)
    assert contents(tmp_path / "new") == contents(OLD), "the format is the same to the bit"
    shutil.copytree(OLD, tmp_path / "killed")
    Manifest.read(OLD).with_shards({1: None}).write(tmp_path / "killed")
    assert fill(tmp_path / "killed", layout, resume=True) == [1]
    assert contents(tmp_path / "killed") == contents(OLD)


def test_store_of_another_format_is_refused_unless_overwritten(folder, layout):
    sound = contents(folder)
    write_manifest(folder, {"format": 1, "rows": "elsewhere", "shards": []})
    before = contents(folder)
    for attempt in (lambda: Store(folder), lambda: fill(folder, layout, resume=True)):
        with pytest.raises(StoreError, match="has format 1, .* reads format 2. Build it again with `overwrite=True`"):
            attempt()
    assert contents(folder) == before
    fill(folder, layout, overwrite=True)
    assert contents(folder) == sound


# ---- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def flip_in(tensor: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / SHARD).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        end = json.loads(data[8:start])[tensor]["data_offsets"][1]
        flip(folder / SHARD, start + end - 2, bit=3)

    return damage


def swap(folder: Path) -> None:
    (folder / SHARD).rename(folder / "aside")
    (folder / "00002.safetensors").rename(folder / SHARD)
    (folder / "aside").rename(folder / "00002.safetensors")


def from_another_store(folder: Path) -> None:
    fill(folder.with_name("other"), layout_of("int8", weights="other"))
    shutil.copy(folder.with_name("other") / SHARD, folder / SHARD)


def other_rows(folder: Path) -> None:
    """Replace a shard by one with the same header."""
    with safe_open(folder / SHARD, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    (folder / SHARD).write_bytes(save({name: tensor.flip(0) for name, tensor in tensors.items()}, metadata))


DAMAGES: dict[str, tuple[Callable[[Path], object], str, bool]] = {  # True if only reading every byte finds it
    "bit-of-the-rows": (flip_in("rows"), "its contents have changed", True),
    "bit-of-the-labels": (flip_in("labels"), "its contents have changed", True),
    "other-rows": (other_rows, "its contents have changed", True),
    "bit-of-the-header": (lambda folder: flip(folder / SHARD, 8), "its header is unreadable", False),
    "truncated": (lambda folder: os.truncate(folder / SHARD, 50), "50 bytes instead of", False),
    "empty": (lambda folder: os.truncate(folder / SHARD, 0), "0 bytes instead of", False),
    "longer": (lambda folder: os.truncate(folder / SHARD, 1000), "1000 bytes instead of", False),
    "missing": (lambda folder: (folder / SHARD).unlink(), "missing", False),
    "swapped": (swap, "is shard 2, or of another store", False),
    "of-another-store": (from_another_store, "is shard 1, or of another store", False),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shard_is_named_and_rebuilt(folder, layout, damage):
    sound, (do, message, deep) = contents(folder), DAMAGES[damage]
    opened = Store(folder)
    do(folder)
    message = f"{SHARD}: .*{message}.* Build it again with `resume=True`"
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(opened.verify()[0])
    for verify in (deep, True):
        with pytest.raises(StoreError, match=message):
            Store(folder, verify=verify)
    with pytest.warns(UserWarning, match="It is rebuilt") as warned:
        assert fill(folder, layout, resume=True) == ([1, 2] if damage == "swapped" else [1])
    assert re.search(message, str(warned[0].message))
    assert contents(folder) == sound


MANIFESTS: dict[str, Any] = {
    "empty": b"",
    "binary": bytes(range(256)),
    "deep": b"[" * 100_000,
    "list": b"[]",
    "no-format": b"{}",
    "missing": None,
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_damaged_manifest_is_named_and_rebuilt(folder, layout, damage):
    sound = contents(folder)
    (folder / MANIFEST).unlink()
    if MANIFESTS[damage] is not None:
        (folder / MANIFEST).write_bytes(MANIFESTS[damage])
    with pytest.raises(StoreError, match=rf"{MANIFEST}: (damaged \(.+\)\. Build it again|not a store\. Build it)"):
        Store(folder)
    with pytest.raises(StoreError, match="holds a store. Open it, continue or repair it with `resume=True`"):
        fill(folder, layout)
    with pytest.warns(UserWarning, match=f"{MANIFEST}.* It is rebuilt completely"):
        assert len(fill(folder, layout, resume=True)) == 5
    assert contents(folder) == sound


def test_changed_byte_and_length_of_a_manifest_is_found(folder):
    path, manifest = folder / MANIFEST, Manifest.read(folder)
    data = path.read_bytes()
    for at in range(0, len(data), 5):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        for text in (data[:at], bytes(flipped)):
            path.write_bytes(text)
            try:
                assert Manifest.read(folder) == manifest, f"byte {at}"  # a space
            except StoreError as error:
                assert MANIFEST in str(error)


# ---- a store from a stranger -----------------------------------------------------------------------------------------

FORGED: dict[str, dict[str, Any]] = {
    "more-rows": {"rows": 2**63},
    "no-rows": {"rows": 0},
    "other-rows": {"rows": 7},
    "text": {"rows": "6"},
    "flat": {"shape": []},
    "shape": {"shape": [3, 2**62]},
    "dtype": {"dtype": "../../secret"},
    "computed": {"computed": "fp8"},
    "labels": {"labelled": 1},
    "shard-rows": {"shard_rows": 5},
    "fingerprint": {"fingerprint": {"weights": ["a"]}},
    "unknown": {"path": "/etc/passwd"},
}


@pytest.mark.parametrize("changes", FORGED.values(), ids=FORGED)
def test_forged_layout_is_refused(folder, layout, changes):
    """With a valid digest."""
    values = json.loads((folder / MANIFEST).read_text())
    write_manifest(folder, values | {"layout": values["layout"] | changes})
    with pytest.raises(StoreError, match=f"^{folder}") as refused:
        Store(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("shards", [None, [], [{"bytes": -1, "xxh3": ""}] * 5, [{"name": "../a"}] * 5], ids=str)
def test_forged_shards_are_refused(folder, shards):
    values = json.loads((folder / MANIFEST).read_text())
    write_manifest(folder, values | {"shards": shards})
    with pytest.raises(StoreError, match=f"{MANIFEST}: damaged"):
        Store(folder)


# ---- two processes, kills and disks ----------------------------------------------------------------------------------


def test_second_writer_is_refused(tmp_path, layout):
    with Writer(tmp_path, layout):
        with pytest.raises(StoreError, match="in use by another process. Wait for it, or choose another folder"):
            fill(tmp_path, layout, resume=True)
    fill(tmp_path, layout, resume=True)


def test_second_writer_may_wait(tmp_path, layout):
    """It then finds the store complete."""
    written = []
    second = threading.Thread(
        target=lambda: written.extend(fill(tmp_path, layout, resume=True, wait=True)), daemon=True
    )
    with Writer(tmp_path, layout) as writer:
        second.start()
        second.join(0.1)
        assert second.is_alive()
        for number in writer.missing:
            writer.write(number, tensors_of(layout, number))
    second.join(60)
    assert not second.is_alive() and written == []


@pytest.mark.parametrize("at", [0, 1, 3])
def test_full_disk_keeps_complete_shards(folder, layout, tmp_path, monkeypatch, at):
    """The disk is full when a shard, or the manifest that lists it, is renamed."""
    calls, rename = [], os.replace

    def full(source, target):
        calls.append(target)
        if len(calls) > 2 * at:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(StoreError) as caught:
        patch.setattr(os, "replace", full)
        fill(tmp_path / "full", layout)
    assert "No space left on device). Complete shards stay. Free space" in str(caught.value)
    listed = listed_shards(tmp_path / "full")
    assert listed == max(at - 1, 0) and not list(tmp_path.rglob("*partial"))
    assert len(fill(tmp_path / "full", layout, resume=True)) == 5 - listed
    assert contents(tmp_path / "full") == contents(folder)


def test_disk_too_small_is_refused_before_the_build(tmp_path, monkeypatch, layout):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**50, 0, layout.rows * layout.row_bytes - 1))
    with pytest.raises(StoreError, match="630 bytes are needed, and 629 bytes are free. Free space"):
        fill(tmp_path, layout)


# ---- other stores and other files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other, difference",
    [
        ({"weights": "others"}, r"weights \(these there, others here\)"),
        ({"shape": (15,)}, r"shape \(\(3, 5\) there, \(15,\) here\)"),
        ({"dtype": "fp16"}, r"dtype \(int8 there, fp16 here\)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_other_store_is_refused_and_kept(folder, layout, other, difference):
    before = contents(folder)
    with pytest.raises(StoreError, match=f"holds a store that differs in {difference}. Choose another folder, or"):
        fill(folder, layout_of(**{"dtype": layout.dtype, **other}), resume=True)
    assert contents(folder) == before


def test_overwrite_replaces_any_store(folder, tmp_path):
    other = layout_of("fp16", rows=5, weights="others")
    assert fill(folder, other, overwrite=True) == [0, 1]
    fill(tmp_path / "alone", other)
    assert contents(folder) == contents(tmp_path / "alone")


def test_resume_keeps_the_shard_rows_and_deletes_leftovers(folder, layout):
    sound = contents(folder)
    Manifest.read(folder).with_shards({1: None}).write(folder)
    shutil.copy(folder / SHARD, folder / "00008.safetensors")
    (folder / ".00003.safetensors-abcd1234.partial").mkdir()
    assert fill(folder, layout_of(layout.dtype, shard_rows=7), resume=True) == [1]
    assert contents(folder) == sound


@pytest.mark.parametrize("name", ["notes.txt", "00000.tar", "model.safetensors", ".mine.partial", "00007.safetensors"])
def test_folder_with_other_files_is_refused_and_kept(tmp_path, layout, name):
    (tmp_path / name).write_text("mine")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(StoreError, match=rf"holds other files \({name}\)\. Choose an empty folder"):
            fill(tmp_path, layout, **options)
    assert contents(tmp_path) == {name: b"mine"} and not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("text", ['{"name": "an app"}', '{"format": "mv3"}', "no JSON"])
def test_manifest_of_another_program_is_not_a_store(folder, tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    assert not is_store(tmp_path) and is_store(folder)
    (folder / MANIFEST).write_text(text)
    assert is_store(folder), "damaged: it has the lock of a build"


# ---- int8, layouts ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 99), st.floats(-30, 30), st.sampled_from(sorted(COMPUTED)))
def test_int8_error_is_at_most_half_a_step(seed, magnitude, dtype):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(4, 3, 17, generator=generator) * 10**magnitude
    features = features.clamp(-6e4, 6e4).to(COMPUTED[dtype])
    rows, scale = quantise(features)
    features = features.double()
    largest = features.abs().amax(dim=-1)
    normal = largest > 127 * torch.finfo(torch.float32).tiny  # a step that is a normal number in fp32
    off = (rows.double() * scale.double().unsqueeze(-1) - features).abs().amax(dim=-1)
    # Added to the half step: the scale, the quotient and fp64 inputs are rounded to 24 bits, at most 127 steps from 0.
    assert (off <= scale.double() * (0.5 + 127 * 2**-22))[normal].all()
    assert (rows.abs().amax(dim=-1) == 127)[normal].all() and rows.min() >= -127
