"""Arbitrary contents of files: a store is read as it was written, or refused with a StoreError."""

from __future__ import annotations

import copy
import json
import pickle
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skipkernels.store import COMPUTED, DTYPES, MANIFEST, Store, StoreError
from skipkernels.store.manifest import _MAX_BYTES
from tests.store.stores import contents, fill, layout_of, truth_of, write_manifest

# Every example writes the folder of the test again.
many = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])

SHARD = "00000.safetensors"
LAYOUT = layout_of("int8", rows=6)
TRUTH = truth_of(LAYOUT)

sizes = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 127, 2**31, 2**47, 2**48 - 1, 2**48, 2**63, 2**64, 10**400, -1])
names = st.sampled_from([*DTYPES, *COMPUTED, "rows", "labels", "token_scale", "F32", "I8", "F64", "format", "xxh3"])
leaves = st.one_of(st.none(), st.booleans(), sizes, st.integers(), st.floats(), names, st.text(max_size=8))
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names | st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, bytes]:
    """The files of a store."""
    folder = tmp_path_factory.mktemp("sound") / "store"
    fill(folder, LAYOUT)
    return contents(folder)


@pytest.fixture
def folder(tmp_path, sound) -> Path:
    put(tmp_path, sound)
    return tmp_path


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    """Allocations fail beyond one more GiB."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def read(folder: Path) -> Store | None:
    """Store with correct rows, or detected damage; None if it is refused."""
    try:
        store = Store(folder)
        rows = store.gather(torch.arange(store.layout.rows))
    except StoreError as error:
        assert str(folder) in str(error)
        return None
    assert rows.equal(TRUTH) or store.verify() != []
    return store


def nodes(tree: Any) -> Iterator[tuple[Any, ...]]:
    """Paths of all nodes of a tree of JSON values."""
    yield ()
    for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from ((key, *path) for path in nodes(part))


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Copy of a tree with another value at a path."""
    if not path:
        return value
    tree = copy.copy(tree)
    tree[path[0]] = replaced(tree[path[0]], path[1:], value)
    return tree


def without(tree: Any, path: tuple[Any, ...]) -> Any:
    tree = copy.copy(tree)
    if len(path) == 1:
        del tree[path[0]]
    else:
        tree[path[0]] = without(tree[path[0]], path[1:])
    return tree


def edited(draw: Any, tree: Any) -> Any:
    """Copy of a tree with one or two nodes replaced or deleted."""
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(sorted(nodes(tree), key=repr)))
        tree = replaced(tree, path, draw(trees)) if not path or draw(st.booleans()) else without(tree, path)
    return tree


def spliced(draw: Any, data: bytes, longest: int) -> bytes:
    """Bytes with one to three changes among the first `longest`: replaced, inserted or deleted bytes."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, longest))
        put = draw(st.binary(min_size=1, max_size=12))
        gone = draw(st.sampled_from([len(put), 0, 1, 12]))
        data = data[:start] + put + data[start + gone :]
    return data


# ---- manifests ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*It is rebuilt:UserWarning")
@many
@given(st.data())
def test_manifest_with_any_values(folder, sound, data):
    """A manifest with a valid digest is refused or read correctly; resume repairs the store or refuses another one."""
    put(folder, sound)
    write_manifest(folder, edited(data.draw, json.loads(sound[MANIFEST])))
    store = read(folder)
    assert store is None or store.gather(torch.arange(LAYOUT.rows)).equal(TRUTH)
    before = contents(folder)
    try:
        fill(folder, LAYOUT, resume=True)
    except StoreError as error:
        assert re.search("holds a store that differs in|has format", str(error))
        assert contents(folder) == before
    else:
        assert Store(folder, verify=True).gather(torch.arange(LAYOUT.rows)).equal(TRUTH)


WRONG = [
    ({"format": True}, "format must be a whole number of at least 1"),
    ({"format": 1.0}, "format must be a whole number of at least 1"),
    ({"format": 0}, "format must be a whole number of at least 1"),
    ({"rows": True, "shard_rows": 1, "shards": [None]}, "rows must be a whole number of at least 1"),
    ({"rows": 0, "shards": []}, "rows must be a whole number of at least 1"),
    ({"rows": 2**64, "shard_rows": 2**63}, "rows must be a whole number of at least 1"),
    ({"shard_rows": 2**48, "shards": [None]}, "shard_rows must be a whole number of at least 1"),
    ({"shard_rows": -4, "shards": []}, "shard_rows must be a whole number of at least 1"),
    ({"shape": []}, "shape must have one to four sizes"),
    ({"shape": [1] * 5}, "shape must have one to four sizes"),
    ({"shape": [3, True]}, "a size of shape must be a whole number of at least 1"),
    ({"shape": [2**24, 2**24]}, "shape is too large"),
    ({"dtype": "fp64"}, "dtype must be one of fp32, fp16, bf16, int8"),
    ({"computed": "int8"}, "computed must be one of fp64, fp32, fp16, bf16"),
    ({"dtype": ["int8"]}, "dtype must be one of"),
    ({"labelled": 1}, "labelled must be true or false"),
    ({"fingerprint": {"weights": 1.5}}, "fingerprint must be numbers and text"),
    ({"shards": [None]}, "the number of shards does not match the rows"),
    ({"shards": [{"bytes": 0, "xxh3": ""}, None]}, "bytes of a shard must be a whole number of at least 1"),
    ({"shards": [{"bytes": 9, "xxh3": "", "file": "/etc/passwd"}, None]}, "a shard has unknown fields"),
    ({"shards": [{"bytes": 9, "xxh3": 7}, None]}, "a shard has unknown fields"),
    ({"path": "/etc"}, "layout has unknown fields"),
]


@pytest.mark.parametrize("values, message", WRONG, ids=lambda value: "" if isinstance(value, str) else str(value)[:40])
def test_manifest_with_a_wrong_value(folder, sound, values, message):
    manifest = json.loads(sound[MANIFEST])
    for name, value in values.items():
        (manifest if name in ("format", "shards") else manifest["layout"])[name] = value
    write_manifest(folder, manifest)
    with pytest.raises(StoreError, match=f"{MANIFEST}: damaged: ({message})"):
        Store(folder)


@pytest.mark.parametrize("depth", [10, 100, 300, 500, 900, 990, 2000, 100_000])
def test_manifest_with_deep_notes(folder, depth):
    values = json.loads((folder / MANIFEST).read_text())
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(200_000)
    deep: list = []
    for _ in range(min(depth, 2000)):
        deep = [deep]
    try:
        write_manifest(folder, replaced(values, ("layout", "notes"), {"deep": deep}))
    finally:
        sys.setrecursionlimit(limit)
    if depth > 2000:
        (folder / MANIFEST).write_text("[" * depth)
    assert (read(folder) is None) == (depth > 10)


@pytest.mark.parametrize("item", ["{},", '"",', "0,"])
def test_manifest_of_the_largest_size_is_read_in_bounded_memory(folder, item):
    (folder / MANIFEST).write_text(f"[{item * ((_MAX_BYTES - 3) // len(item))}0]")
    with pytest.raises(StoreError, match="damaged: not a JSON object"):
        Store(folder)


# ---- shards ------------------------------------------------------------------------------------------------------


def parts(data: bytes) -> tuple[Any, bytes]:
    """A shard's header and data."""
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def write_shard(folder: Path, data: bytes) -> None:
    """Replace a shard by other bytes, and its size in the manifest."""
    (folder / SHARD).write_bytes(data)
    values = json.loads((folder / MANIFEST).read_text())
    write_manifest(folder, replaced(values, ("shards", 0, "bytes"), max(len(data), 1)))


@many
@given(st.data())
def test_shard_with_any_first_bytes(folder, sound, data):
    put(folder, sound)
    write_shard(folder, spliced(data.draw, sound[SHARD], min(len(sound[SHARD]), 1024)))
    read(folder)


@many
@given(st.data())
def test_shard_header_with_any_values(folder, sound, data):
    put(folder, sound)
    header, numbers = parts(sound[SHARD])
    text = json.dumps(edited(data.draw, header)).encode() + b" " * data.draw(st.integers(0, 9))
    write_shard(folder, len(text).to_bytes(8, "little") + text + numbers)
    read(folder)


@pytest.mark.parametrize("length", [0, 1, 7, 2**20, 2**31, 2**40, 2**63, 2**64 - 1])
def test_shard_header_of_another_length(folder, sound, length):
    write_shard(folder, length.to_bytes(8, "little") + sound[SHARD][8:])
    assert read(folder) is None


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("rows", "dtype"), "U8", "its tensors do not match the manifest"),
        (("token_scale", "dtype"), "I32", "its tensors do not match the manifest"),
        (("rows", "shape"), [4, 5, 3], "its tensors do not match the manifest"),
        (("rows", "shape"), [4, 15], "its tensors do not match the manifest"),
        (("more",), {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "its tensors do not match"),
        (("__metadata__", "shard"), "0", "belongs to another store"),
        (("__metadata__",), {}, "belongs to another store"),
    ],
    ids=["unsigned", "whole", "transposed", "flat", "more", "unnamed", "no-metadata"],
)
def test_shard_header_valid_for_safetensors_but_wrong(folder, sound, path, value, message):
    header, numbers = parts(sound[SHARD])
    if path == ("more",):
        header["more"] = None
    text = json.dumps(replaced(header, path, value)).encode()
    write_shard(folder, len(text).to_bytes(8, "little") + text + numbers)
    with pytest.raises(StoreError, match=f"{SHARD}: .*{message}"):
        Store(folder)


@many
@given(st.permutations(["rows", "token_scale", "labels"]), st.integers(0, 15))
def test_shard_tensors_in_any_order_and_place(folder, sound, order, spaces):
    put(folder, sound)
    header, numbers = parts(sound[SHARD])
    moved, end = b"", 0
    for name in order:
        start, stop = header[name]["data_offsets"]
        moved += numbers[start:stop]
        header[name]["data_offsets"] = [end, end := end + stop - start]
    text = json.dumps(header, separators=(",", ":")).encode() + b" " * spaces
    write_shard(folder, len(text).to_bytes(8, "little") + text + moved)
    starts = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in order}
    aligned = starts["labels"] % 8 == 0 and starts["token_scale"] % 4 == 0
    store = read(folder)
    assert (store is not None) == aligned
    if store is not None:
        assert store.gather(torch.arange(LAYOUT.rows)).equal(TRUTH)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["pickle", "torch", "legacy"])
def test_shard_is_never_unpickled(folder, tmp_path, kind):
    trap, sprung = tmp_path / "trap", tmp_path / "sprung"
    if kind == "pickle":
        trap.write_bytes(pickle.dumps(Trap(sprung)))
    else:
        torch.save(Trap(sprung), trap, _use_new_zipfile_serialization=kind == "torch")
    write_shard(folder, trap.read_bytes())
    with pytest.raises(StoreError, match=f"{SHARD}: damaged: its header is unreadable"):
        Store(folder)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists(), "the trap works"
