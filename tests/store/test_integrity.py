"""Damage to the files of a store is found, named and repaired; foreign files are never deleted."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from skipkernels.store import MANIFEST, Manifest, Store, StoreError, Writer, erase, is_store, leftovers, prune, writer
from skipkernels.store.lock import LOCK, OWNER, locked
from skipkernels.store.shards import find_damage, is_shard
from tests.store.stores import contents, fill, layout_of, truth_of, write_manifest

SHARD = "00001.safetensors"


@pytest.fixture
def layout():
    return layout_of("int8")  # the dtype with the most tensors


@pytest.fixture
def folder(tmp_path, layout) -> Path:
    """A complete store."""
    fill(tmp_path / "store", layout)
    return tmp_path / "store"


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def header_of(path: Path) -> tuple[int, dict]:
    """Start of the data of a shard, and its header."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return start, json.loads(data[8:start])


def flip_in(tensor: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        start, header = header_of(folder / SHARD)
        flip(folder / SHARD, start + header[tensor]["data_offsets"][1] - 2, bit=3)

    return damage


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def swap(folder: Path) -> None:
    (folder / SHARD).rename(folder / "aside")
    (folder / "00002.safetensors").rename(folder / SHARD)
    (folder / "aside").rename(folder / "00002.safetensors")


def from_another_store(folder: Path) -> None:
    other = layout_of(Manifest.read(folder).layout.dtype, weights="other")
    fill(folder.with_name("other"), other)
    shutil.copy(folder.with_name("other") / SHARD, folder / SHARD)


def other_rows(folder: Path) -> None:
    """Replace a shard by one with the same header."""
    with safe_open(folder / SHARD, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    (folder / SHARD).write_bytes(save({name: tensor.flip(0) for name, tensor in tensors.items()}, metadata))


def other_tensors(folder: Path) -> None:
    """Rename a tensor in the header of a shard."""
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data.replace(b'"labels"', b'"levels"'))


class Damage(NamedTuple):
    """Function that damages a folder, the message, and True if only reading every byte finds it."""

    do: Callable[[Path], object]
    message: str
    deep: bool = False


DAMAGES = {
    "bit-of-the-rows": Damage(flip_in("rows"), "its contents have changed", deep=True),
    "bit-of-the-labels": Damage(flip_in("labels"), "its contents have changed", deep=True),
    "bit-of-a-scale": Damage(flip_in("token_scale"), "its contents have changed", deep=True),
    "bit-of-the-header": Damage(lambda folder: flip(folder / SHARD, 8), "its header is unreadable"),
    "bit-of-its-length": Damage(lambda folder: flip(folder / SHARD, 6), "its header is unreadable"),
    "other-rows": Damage(other_rows, "its contents have changed", deep=True),
    "other-tensors": Damage(other_tensors, "its tensors do not match the manifest"),
    "truncated": Damage(lambda folder: shorten(folder / SHARD), r"\d+ bytes instead of \d+"),
    "empty": Damage(lambda folder: (folder / SHARD).write_bytes(b""), r"0 bytes instead of \d+"),
    "longer": Damage(lambda folder: lengthen(folder / SHARD), r"\d+ bytes instead of \d+"),
    "missing": Damage(lambda folder: (folder / SHARD).unlink(), "missing"),
    "swapped": Damage(swap, "is the file of shard 2"),
    "of-another-store": Damage(from_another_store, "belongs to another store"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shard_is_found_named_and_repaired(folder, layout, damage):
    sound, (do, message, deep) = contents(folder), DAMAGES[damage]
    opened = Store(folder)
    do(folder)
    message = f"{SHARD}: .*{message}.* Build it again with `resume=True`"

    found = opened.verify()
    assert len(found) == (2 if damage == "swapped" else 1)
    assert re.search(message, found[0])
    if deep:
        Store(folder).gather(torch.arange(layout.rows))
    else:
        with pytest.raises(StoreError, match=message):
            Store(folder)
    with pytest.raises(StoreError, match=message):
        Store(folder, verify=True)

    with pytest.warns(UserWarning, match="It is rebuilt") as warned:
        rebuilt = fill(folder, layout, resume=True)
    assert rebuilt == ([1, 2] if damage == "swapped" else [1]) and len(warned) == len(rebuilt)
    assert re.search(message, str(warned[0].message))
    assert contents(folder) == sound
    assert Store(folder, verify=True).gather(torch.arange(layout.rows)).equal(truth_of(layout))


def test_any_changed_byte_of_a_shard_header_is_found(folder):
    path = folder / SHARD
    data = path.read_bytes()
    start, _ = header_of(path)
    for at in range(start):
        flip(path, at, bit=at % 8)
        try:
            assert Store(folder).verify() != [], f"byte {at}"
        except StoreError as error:
            assert SHARD in str(error)
        path.write_bytes(data)
    assert Store(folder).verify() == []


def test_several_damaged_shards_are_found_and_only_they_are_rebuilt(folder, layout):
    sound = contents(folder)
    (folder / "00000.safetensors").unlink()
    flip(folder / "00003.safetensors", -1)
    with pytest.warns(UserWarning) as warned:
        assert fill(folder, layout, resume=True) == [0, 3]
    assert ["00000" in str(warned[0].message), "00003" in str(warned[1].message)] == [True, True]
    assert contents(folder) == sound


def test_shard_deleted_after_opening_is_an_error(folder, layout):
    store = Store(folder)
    (folder / SHARD).unlink()
    with pytest.raises(StoreError, match=f"{SHARD}: missing"):
        store.gather(torch.arange(layout.rows))


def test_folder_at_the_path_of_a_shard_is_found_and_kept(folder, layout):
    sound = contents(folder)
    (folder / SHARD).unlink()
    (folder / SHARD).mkdir()
    (folder / SHARD / "foreign").touch()
    with pytest.raises(StoreError, match=f"{SHARD}: damaged: "):
        Store(folder)
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(StoreError, match=rf"holds other files \({SHARD}\)"):
            fill(folder, layout, **options)
    assert (folder / SHARD / "foreign").exists()
    shutil.rmtree(folder / SHARD)
    with pytest.warns(UserWarning, match=f"{SHARD}: missing"):
        fill(folder, layout, resume=True)
    assert contents(folder) == sound


# ---- the manifest ------------------------------------------------------------------------------------------------


def write(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / MANIFEST).write_bytes(data)


MANIFESTS = {
    "empty": (write(b""), "damaged: not JSON"),
    "text": (write(b"rows: 18"), "damaged: not JSON"),
    "binary": (write(bytes(range(256))), "damaged: not JSON"),
    "deep": (write(b"[" * 100_000), "damaged: not JSON"),
    "long-number": (write(b'{"format": ' + b"9" * 5000 + b"}"), "damaged: not JSON"),
    "list": (write(b"[]"), "damaged: not a JSON object"),
    "no-format": (write(b"{}"), "damaged: format must be a whole number of at least 1"),
    "huge": (lambda folder: os.truncate(folder / MANIFEST, 1 << 40), f"damaged: {1 << 40} bytes"),
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_damaged_manifest_is_found_named_and_rebuilt(folder, layout, damage):
    sound, (do, message) = contents(folder), MANIFESTS[damage]
    do(folder)
    with pytest.raises(StoreError, match=f"{MANIFEST}: {message}"):
        Store(folder)
    with pytest.warns(UserWarning, match=f"{MANIFEST}: {message}.* It is rebuilt completely"):
        assert len(fill(folder, layout, resume=True)) == 5
    assert contents(folder) == sound


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (3, "has format 3, of a newer .* reads format 2. Update"),
        (1, "has format 1, of an older .* reads format 2. Build"),
    ],
)
def test_manifest_of_another_format_is_refused_unless_overwritten(folder, layout, version, message):
    sound = contents(folder)
    write_manifest(folder, {"format": version, "rows": "elsewhere", "shards": []})
    before = contents(folder)
    for attempt in (lambda: Store(folder), lambda: fill(folder, layout, resume=True), lambda: prune(folder)):
        with pytest.raises(StoreError, match=f"{message} .*`overwrite=True`, or delete it"):
            attempt()
    assert contents(folder) == before
    fill(folder, layout, overwrite=True)
    assert contents(folder) == sound


def test_any_changed_byte_and_any_length_of_a_manifest_is_found(folder):
    path, manifest = folder / MANIFEST, Manifest.read(folder)
    data = path.read_bytes()

    def changed(text: bytes) -> bool:
        path.write_bytes(text)
        try:
            return Manifest.read(folder) != manifest
        except StoreError as error:
            assert MANIFEST in str(error)
            return False

    assert not changed(data)
    for at in range(len(data)):
        assert not changed(data[:at]), f"{at} bytes"
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        assert not changed(bytes(flipped)), f"byte {at}"


def test_deleted_manifest_is_rebuilt_with_its_shards(folder, layout):
    sound = contents(folder)
    (folder / MANIFEST).unlink()
    before = contents(folder)
    with pytest.raises(StoreError, match="store: no manifest.json: not a store. Build it first"):
        Store(folder)
    with pytest.raises(StoreError, match="holds a store"):
        fill(folder, layout)
    assert contents(folder) == before
    with pytest.warns(UserWarning, match="no manifest.json.* It is rebuilt completely"):
        assert len(fill(folder, layout, resume=True)) == 5
    assert contents(folder) == sound
    (folder / MANIFEST).unlink()
    fill(folder, layout, overwrite=True)
    assert contents(folder) == sound


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may read everything")
def test_manifest_without_permission_is_an_error(folder):
    (folder / MANIFEST).chmod(0)
    with pytest.raises(StoreError, match=f"{MANIFEST}: unreadable: Permission denied"):
        Store(folder)


@pytest.mark.parametrize("reading", ["open", "fdopen"])
def test_manifest_with_a_read_error_is_an_error(folder, monkeypatch, reading):
    def fail(path, *arguments, **options):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(StoreError) as caught:
        patch.setattr(os, reading, fail)
        Store(folder)
    assert re.search(f"{MANIFEST}: unreadable: Input/output error. Make it readable", str(caught.value))


# ---- pipes and devices -----------------------------------------------------------------------------------------------


def put_in_place(path: Path, kind: str) -> None:
    """Replace a file by a pipe or a device, from which reading never ends."""
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_do_not_hang_a_reader(folder, layout, kind):
    manifest = Manifest.read(folder)
    put_in_place(folder / SHARD, kind)
    with pytest.raises(StoreError, match=rf"{SHARD}: damaged: not a regular file\. Build it again"):
        Store(folder)
    assert not is_shard(folder / SHARD) and leftovers(folder, manifest) == []
    put_in_place(folder / MANIFEST, kind)
    for attempt in (lambda: Store(folder), lambda: fill(folder, layout), lambda: prune(folder)):
        with pytest.raises(StoreError, match=rf"{MANIFEST}: unreadable: not a regular file|holds other files"):
            attempt()


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_owner_file_that_is_a_pipe_or_device_does_not_hang(tmp_path, kind):
    with locked(tmp_path):
        put_in_place(tmp_path / OWNER, kind)
        with pytest.raises(StoreError, match="in use by another process"), locked(tmp_path):
            pass


@pytest.mark.parametrize(
    ("since", "age"), [(4e9, "0"), (float("nan"), None), ("long ago", None)], ids=["future", "nan", "text"]
)
def test_owner_with_a_time_in_the_future_or_invalid(tmp_path, since, age):
    """A clock that was set back gives an age of 0."""
    with locked(tmp_path):
        (tmp_path / OWNER).write_text(json.dumps({"pid": 7, "host": "there", "since": since}))
        owner = "another process" if age is None else f"process 7 on there, for {age} seconds"
        with pytest.raises(StoreError, match=f": in use by {owner}"), locked(tmp_path):
            pass


# ---- other stores and foreign files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other, difference",
    [
        ({"weights": "others"}, r"weights \(these there, others here\)"),
        ({"rows": 17}, r"rows \(18 there, 17 here\)"),
        ({"shape": (15,)}, r"shape \(\(3, 5\) there, \(15,\) here\)"),
        ({"dtype": "fp16"}, r"dtype \(\w+ there, fp16 here\)"),
        ({"computed": "fp64"}, r"computed \(fp32 there, fp64 here\)"),
        ({"labelled": False}, r"labelled \(True there, False here\)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_other_store_is_refused_and_kept(folder, layout, other, difference):
    before = contents(folder)
    with pytest.raises(StoreError, match=f"holds a store that differs in {difference}. Choose another folder, or"):
        fill(folder, layout_of(**{"dtype": layout.dtype, **other}), resume=True)
    assert contents(folder) == before


def test_other_store_with_a_missing_or_new_fingerprint_entry(folder, layout):
    fewer = layout_of(layout.dtype)
    del fewer.fingerprint["seed"]
    with pytest.raises(StoreError, match=r"differs in seed \(7 there, nothing here\)"):
        fill(folder, fewer, resume=True)
    more = layout_of(layout.dtype)
    more.fingerprint["mask"] = "causal"
    with pytest.raises(StoreError, match=r"differs in mask \(nothing there, causal here\)"):
        fill(folder, more, resume=True)


def test_other_store_without_shards_is_replaced(tmp_path):
    with Writer(tmp_path, layout_of(weights="others")):
        pass
    assert len(fill(tmp_path, layout_of(), resume=True)) == 5
    assert Store(tmp_path).layout == layout_of()


def test_existing_store_is_refused_without_resume_or_overwrite(folder, layout):
    before = contents(folder)
    with pytest.raises(StoreError, match="holds a store. Open it, continue or repair it with `resume=True`"):
        fill(folder, layout)
    assert contents(folder) == before


def test_resume_of_a_complete_store_writes_nothing(folder, layout):
    before = contents(folder)
    assert fill(folder, layout, resume=True) == []
    assert contents(folder) == before


def test_resume_keeps_the_shard_rows_of_the_store(folder, layout):
    sound = contents(folder)
    (folder / SHARD).unlink()
    with pytest.warns(UserWarning, match=f"{SHARD}: missing"):
        assert fill(folder, layout_of(layout.dtype, shard_rows=7), resume=True) == [1]
    assert contents(folder) == sound
    assert Store(folder, verify=True).layout == layout


@pytest.mark.parametrize("resume", [False, True])
def test_overwrite_replaces_any_store(folder, layout, resume, tmp_path):
    other = layout_of("fp16", rows=5, weights="others")
    assert fill(folder, other, overwrite=True, resume=resume) == [0, 1]
    fill(tmp_path / "alone", other)
    assert contents(folder) == contents(tmp_path / "alone")


def test_overwrite_can_be_repeated_after_an_error(folder, layout):
    with pytest.raises(ZeroDivisionError), Writer(folder, layout_of("fp16"), overwrite=True):
        raise ZeroDivisionError
    with pytest.raises(StoreError, match="incomplete: 0 of 5 shards exist"):
        Store(folder)
    fill(folder, layout, overwrite=True)
    assert Store(folder, verify=True).layout == layout


@pytest.mark.parametrize(
    "name", ["notes.txt", "00000.tar", "model.safetensors", ".hidden", "7.safetensors", "00007.safetensors"]
)
def test_folder_with_foreign_files_is_refused_and_kept(folder, layout, name, tmp_path):
    Manifest.read(folder).with_shard(1, None).write(folder)
    for place in (folder, tmp_path / "others"):
        place.mkdir(exist_ok=True)
        (place / name).write_text("mine")
        before = contents(place)
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(StoreError, match=rf"holds other files \({name}\)\. Choose an empty folder"):
                fill(place, layout, **options)
        assert contents(place) == before
    assert not (tmp_path / "others" / LOCK).exists()
    assert name not in [path.name for path, _ in prune(folder, unfinished=True)] and (folder / name).exists()


def test_foreign_shards_are_recognised_by_their_header(tmp_path, layout):
    """Shards listed in the manifest belong to the store; other files are shards only by their header."""
    fill(tmp_path, layout)
    foreign = tmp_path / "00006.safetensors"
    foreign.write_bytes(save({"weight": torch.ones(2)}, {"format": "pt"}))
    shutil.copy(tmp_path / SHARD, tmp_path / "00008.safetensors")
    assert [path.name for path in leftovers(tmp_path, Manifest.read(tmp_path))] == ["00008.safetensors"]
    (tmp_path / SHARD).write_bytes(b"damaged")
    with pytest.raises(StoreError, match=r"holds other files \(00006.safetensors\)"):
        fill(tmp_path, layout, resume=True)
    erase(tmp_path)
    assert list(contents(tmp_path)) == [foreign.name]


@pytest.mark.parametrize("text", ['{"name": "an app", "icons": []}', "no JSON", "[]"])
def test_foreign_manifest_is_not_a_store(tmp_path, text, layout):
    (tmp_path / MANIFEST).write_text(text)
    assert not is_store(tmp_path)
    with pytest.raises(StoreError, match=f"{MANIFEST}: damaged"):
        erase(tmp_path)
    assert (tmp_path / MANIFEST).read_text() == text
    fill(tmp_path / "store", layout)
    assert is_store(tmp_path / "store")
    (tmp_path / "store" / MANIFEST).write_text(text)
    assert is_store(tmp_path / "store"), "damaged"


def test_resume_of_a_complete_store_takes_no_lock(folder, layout, monkeypatch):
    """No file is created or changed: the disk may be read-only, or in use by other processes."""
    before, read = contents(folder), []
    (folder / LOCK).unlink()
    monkeypatch.setattr(writer, "locked", lambda *arguments, **options: pytest.fail("a lock was taken"))
    monkeypatch.setattr(writer, "find_damage", partial(find_damage, on_bytes=read.append))
    with Writer(folder, layout, resume=True) as done:
        assert done.missing == [] and done.manifest == Manifest.read(folder)
    assert sum(read) == Store(folder).bytes, "every byte was verified"
    assert contents(folder) == before and not (folder / LOCK).exists()


def test_file_at_the_path_of_the_folder_is_refused(tmp_path, layout):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="file: is a file. Choose a folder"):
        fill(tmp_path / "file", layout)
    with pytest.raises(StoreError, match=r"store: cannot be written \(Not a directory\)\. Choose another"):
        fill(tmp_path / "file" / "store", layout)
    for path in (tmp_path / "file", tmp_path / "nowhere"):
        with pytest.raises(StoreError, match="no manifest.json: not a store. Build it first"):
            Store(path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission_is_refused(tmp_path, layout):
    (tmp_path / "store").mkdir(mode=0o500)
    with pytest.raises(StoreError, match=r"store: cannot be written \(Permission denied\)\. Choose another"):
        fill(tmp_path / "store", layout)
