"""Reading, resuming, locking and pruning of a store."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import threading
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skipkernels.store import (
    COMPUTED,
    DTYPES,
    MANIFEST,
    Layout,
    Manifest,
    Store,
    StoreError,
    Writer,
    digest_json,
    digest_tensors,
    leftovers,
    lock,
    manifest,
    prune,
    reader,
)
from skipkernels.store.lock import OWNER, locked
from skipkernels.store.shards import map_shard, quantise
from tests.store.stores import contents, fill, labels_of, layout_of, tensors_of, truth_of

# ---- gather ------------------------------------------------------------------------------------------------------


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
        assert batch.shape == (len(index), *store.shape)
        assert batch.equal(truth_of(layout)[index])
        to = data.draw(st.sampled_from(sorted(COMPUTED)))
        out = torch.full((len(index), *layout.shape), torch.nan, dtype=COMPUTED[to])
        assert store.gather(index, out=out) is out
        assert out.equal(truth_of(layout, COMPUTED[to])[index])
        if layout.labelled:
            assert store.labels().equal(labels_of(layout))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_closes_maps_of_a_large_store(tmp_path, monkeypatch, dtype):
    layout, mapped = layout_of(dtype), []

    def counted(*arguments):
        mapped.append(arguments[2])
        return map_shard(*arguments)

    fill(tmp_path, layout)
    everything, truth = torch.arange(layout.rows), truth_of(layout)
    monkeypatch.setattr(reader, "_MAPPED", layout.rows * layout.row_bytes - 1)
    small = Store(tmp_path)
    monkeypatch.setattr(reader, "free_bytes", lambda device: 32 * small.bytes)
    large = Store(tmp_path)
    monkeypatch.setattr(reader, "map_shard", counted)
    for _ in range(2):
        assert small.gather(everything).equal(truth)
    assert mapped == [0, 1, 2, 3, 4], "once each if memory suffices"
    kept = large.gather(everything)
    for _ in range(2):
        assert large.gather(everything).equal(truth)
    assert mapped == [0, 1, 2, 3, 4] * 4
    assert kept.equal(truth), "a batch is not a view of a map"


def test_pickled_store_has_no_maps(tmp_path):
    fill(tmp_path, layout_of())
    store = Store(tmp_path)
    everything, truth = torch.arange(18), truth_of(layout_of())
    unread = len(ForkingPickler.dumps(store))
    store.gather(everything)
    pickled = ForkingPickler.dumps(store)  # shares the memory of tensors
    assert len(pickled) == unread
    for copy in (pickle.loads(pickled), store):
        assert copy.gather(everything).equal(truth)


def test_gather_while_another_thread_closes_the_maps(tmp_path):
    fill(tmp_path, layout_of())
    store = Store(tmp_path)

    class Maps(dict):
        def __contains__(self, number):
            there = super().__contains__(number)
            store._maps = {}  # as another thread does at its limit
            return there

    everything, truth = torch.arange(18), truth_of(layout_of())
    store.gather(everything)
    for _ in range(2):
        store._maps = Maps(store._maps)
        assert store.gather(everything).equal(truth)
        store._maps = Maps(store._maps)
        store.expect(everything)


@pytest.mark.parametrize("index, wrong", [([0, 18], 18), ([-1, 3], -1), ([-2, 99], -2), ([2**62], 2**62)])
def test_gather_of_a_row_out_of_range(tmp_path, index, wrong):
    fill(tmp_path, layout_of())
    with pytest.raises(IndexError, match=rf"^gather: rows are numbered from 0 to 17; got {wrong}\.$"):
        Store(tmp_path).gather(torch.tensor(index))


def test_store_properties(tmp_path):
    layout = layout_of("int8", computed="bf16")
    fill(tmp_path, layout)
    store = Store(tmp_path)
    assert (store.layout, store.shape, store.dtype) == (layout, (3, 5), torch.bfloat16)
    assert store.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    read: list[int] = []
    assert store.verify(read.append) == [] and sum(read) == store.bytes


@pytest.mark.parametrize("done", [0, 4])
def test_incomplete_store_is_refused(tmp_path, done):
    layout = layout_of()
    fill(tmp_path / "whole", layout)
    manifest = Manifest.read(tmp_path / "whole")
    for number in range(done, 5):
        manifest = manifest.with_shard(number, None)
    manifest.write(tmp_path / "whole")
    with pytest.raises(StoreError, match=rf"incomplete: {done} of 5 shards exist. Build the rest with `resume=True`"):
        Store(tmp_path / "whole")
    assert not manifest.complete


def rebuild_with_other_rows(folder: Path) -> None:
    """Rebuild the store of a folder with the same layout and sizes, and other rows."""
    with Writer(folder, layout_of(), overwrite=True) as writer:
        for number in writer.missing:
            tensors = tensors_of(layout_of(), number)
            writer.write(number, tensors | {"rows": tensors["rows"] + 1})


def test_store_rebuilt_while_open_is_an_error(tmp_path):
    fill(tmp_path, layout_of())
    store, copy = Store(tmp_path), pickle.loads(pickle.dumps(Store(tmp_path)))
    first = torch.arange(4)
    before = store.gather(first)
    rebuild_with_other_rows(tmp_path)
    assert store.gather(first).equal(before), "existing maps stay valid"
    for opened in (store, copy):
        with pytest.raises(StoreError, match="has been rebuilt since it was opened. Open it again"):
            opened.gather(torch.tensor([17]))
    assert Store(tmp_path).gather(first).equal(before + 1)


def test_store_rebuilt_with_the_same_rows_stays_open(tmp_path):
    fill(tmp_path, layout_of())
    store = Store(tmp_path)
    fill(tmp_path, layout_of(), overwrite=True)
    assert store.gather(torch.arange(18)).equal(truth_of(layout_of()))


def test_relative_path_is_resolved_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Writer(Path("store"), layout_of()) as writer:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        for number in writer.missing:
            writer.write(number, tensors_of(layout_of(), number))
    monkeypatch.chdir(tmp_path)
    store = Store(Path("store"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert store.gather(torch.arange(18)).equal(truth_of(layout_of())) and store.verify() == []
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_path_that_is_not_utf8_is_refused(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    for attempt in (lambda: Writer(folder, layout_of()), lambda: Store(folder)):
        with pytest.raises(StoreError, match=r"caf\\udce9: its path is not UTF-8. Rename it or") as caught:
            attempt()
        str(caught.value).encode()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"rows": 200_000, "shard_rows": 1}, {"weights": "w" * (1 << 24)}])
def test_manifest_too_large_is_refused(tmp_path, changes):
    with pytest.raises(StoreError, match=r"store: \d+ shards need a manifest of up to \d+ bytes; at most 16777216 are"):
        Writer(tmp_path / "store", layout_of(**changes))
    assert list(tmp_path.iterdir()) == []


def test_check_manifest_uses_the_size_of_the_complete_manifest(tmp_path, monkeypatch):
    layout = layout_of()
    fill(tmp_path, layout)
    size = (tmp_path / MANIFEST).stat().st_size
    monkeypatch.setattr(manifest, "_MAX_BYTES", size + 5 * 15)  # sizes of shards with up to 15 digits
    layout.check_manifest(tmp_path)
    monkeypatch.setattr(manifest, "_MAX_BYTES", size)
    with pytest.raises(StoreError, match="5 shards need a manifest"):
        layout.check_manifest(tmp_path)


# ---- int8 --------------------------------------------------------------------------------------------------------


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


def test_int8_token_of_zeros():
    rows, scale = quantise(torch.tensor([[[0.0, 0.0], [1.0, -4.0], [-0.0, 1e-45]]]))
    assert rows.tolist() == [[[0, 0], [32, -127], [0, 0]]]
    assert scale[0, 0] == 0 and scale[0, 1] == torch.tensor(4.0) / 127 and scale.isfinite().all()


# ---- layouts and digests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, labelled, size",
    [("fp32", True, 68), ("fp32", False, 60), ("fp16", True, 38), ("bf16", True, 38), ("int8", True, 15 + 12 + 8)],
)
def test_layout_row_bytes(tmp_path, dtype, labelled, size):
    layout = layout_of(dtype, labelled=labelled)
    assert layout.row_bytes == size
    fill(tmp_path, layout)
    header = 8 + int.from_bytes((tmp_path / "00000.safetensors").read_bytes()[:8], "little")
    assert (tmp_path / "00000.safetensors").stat().st_size == header + 4 * size


@given(st.integers(1, 200), st.integers(1, 220))
def test_layout_shards_cover_all_rows(rows, shard_rows):
    layout = layout_of(rows=rows, shard_rows=shard_rows)
    parts = [layout.rows_of(number) for number in range(layout.shards)]
    assert [row for part in parts for row in part] == list(range(rows))
    assert all(len(part) == shard_rows for part in parts[:-1]) and 1 <= len(parts[-1]) <= shard_rows


def test_layout_digest_depends_on_everything_but_notes():
    layout = layout_of()
    changes = {
        "rows": 17,
        "shape": (5, 3),
        "dtype": "fp16",
        "computed": "fp64",
        "shard_rows": 5,
        "labelled": False,
        "fingerprint": {"weights": "those"},
    }
    digests = {layout.digest, *(replace(layout, **{name: value}).digest for name, value in changes.items())}
    assert len(digests) == len(changes) + 1
    assert replace(layout, notes={"by": "another test"}).digest == layout.digest
    reordered = replace(layout, fingerprint=dict(reversed(layout.fingerprint.items())))
    assert reordered.digest == layout.digest


def test_manifest_round_trip(tmp_path):
    fill(tmp_path, layout_of("int8"))
    manifest = Manifest.read(tmp_path).with_shard(2, None)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest and manifest.layout == layout_of("int8")


def test_digest_tensors_depends_on_names_shapes_dtypes_and_elements():
    x = torch.arange(6, dtype=torch.int32)
    different = [
        [("x", x)],
        [("y", x)],
        [("x", x.view(2, 3))],
        [("x", x.view(3, 2))],
        [("x", x.view(torch.float32))],
        [("x", x.flip(0))],
        [("x", x[:3]), ("x", x[3:])],
        [("x", x), ("x", x[:0])],
        [],
    ]
    assert len({digest_tensors(named) for named in different}) == len(different)
    assert digest_tensors([("x", x.view(2, 3).T)]) == digest_tensors([("x", x.view(2, 3).T.contiguous())])
    assert digest_tensors([("x", torch.tensor(-0.0))]) != digest_tensors([("x", torch.tensor(0.0))])
    assert digest_json([1, 2]) != digest_json([2, 1])


# ---- leftovers -------------------------------------------------------------------------------------------------------


def test_leftovers_are_temporary_and_unlisted_files(tmp_path):
    layout = layout_of()
    fill(tmp_path, layout)
    foreign = (".my-download.partial", ".mine.77.partial", ".mine.0123456789abcdef.skipkernels-partial")
    temporary = ".00003.safetensors.0123456789abcdef.skipkernels-partial"
    for name in (".00001.safetensors.77.partial", temporary, *foreign, "notes.txt", "model.safetensors"):
        (tmp_path / name).touch()
    shutil.copy(tmp_path / "00002.safetensors", tmp_path / "00005.safetensors")
    (tmp_path / "00009.safetensors").mkdir()
    manifest = Manifest.read(tmp_path)
    assert [path.name for path in leftovers(tmp_path, manifest)] == [
        ".00001.safetensors.77.partial",
        temporary,
        "00005.safetensors",
    ]
    assert "00002.safetensors" in [path.name for path in leftovers(tmp_path, manifest.with_shard(2, None))]


def test_resume_deletes_leftovers(tmp_path):
    layout = layout_of()
    fill(tmp_path, layout)
    sound = contents(tmp_path)
    for name in (".00001.safetensors.77.partial", ".manifest.json.77.partial"):
        (tmp_path / name).touch()
    shutil.copy(tmp_path / "00002.safetensors", tmp_path / "00005.safetensors")
    Manifest.read(tmp_path).with_shard(0, None).write(tmp_path)
    fill(tmp_path, layout, resume=True)
    assert contents(tmp_path) == sound


def test_prune_deletes_leftovers_and_optionally_unfinished_stores(tmp_path):
    layout = layout_of()
    fill(tmp_path, layout)
    sound = contents(tmp_path)
    shutil.copy(tmp_path / "00002.safetensors", tmp_path / "00005.safetensors")
    for dry_run in (True, False):
        assert prune(tmp_path, dry_run=dry_run) == [(tmp_path / "00005.safetensors", len(sound["00002.safetensors"]))]
    assert prune(tmp_path, unfinished=True) == [] and contents(tmp_path) == sound
    Manifest.read(tmp_path).with_shard(0, None).write(tmp_path)
    assert prune(tmp_path) == [(tmp_path / "00000.safetensors", len(sound["00000.safetensors"]))]
    gone = {path.name for path, _ in prune(tmp_path, unfinished=True)}
    assert gone == set(sound) - {"00000.safetensors"}
    assert contents(tmp_path) == {}


def test_prune_can_be_repeated_after_an_interrupt(tmp_path, monkeypatch):
    fill(tmp_path, layout_of())
    Manifest.read(tmp_path).with_shard(0, None).write(tmp_path)
    unlink = Path.unlink

    def stop(path, missing_ok=False):
        if path.name == "00003.safetensors":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", stop)
        prune(tmp_path, unfinished=True)
    assert (tmp_path / MANIFEST).exists() and len(contents(tmp_path)) == 3
    prune(tmp_path, unfinished=True)
    assert contents(tmp_path) == {}


# ---- the lock ----------------------------------------------------------------------------------------------------


def test_lock_refuses_a_second_writer(tmp_path):
    with Writer(tmp_path, layout_of()):
        for second in (lambda: fill(tmp_path, layout_of(), resume=True), lambda: prune(tmp_path)):
            with pytest.raises(StoreError, match=r"in use by this process, for 0 seconds\. Call close\(\)"):
                second()
    assert not (tmp_path / OWNER).exists()
    fill(tmp_path, layout_of(), resume=True)


def test_lock_can_be_waited_for(tmp_path):
    """The second writer then finds the store complete."""
    waits, messages, written = threading.Event(), [], []

    def on_wait(message):
        messages.append(message)
        waits.set()

    second = threading.Thread(
        target=lambda: written.extend(fill(tmp_path, layout_of(), resume=True, on_wait=on_wait)), daemon=True
    )
    with Writer(tmp_path, layout_of()) as writer:
        second.start()
        assert waits.wait(60)
        for number in writer.missing:
            writer.write(number, tensors_of(writer.layout, number))
    second.join(60)
    assert not second.is_alive() and written == []
    assert len(messages) == 1 and "in use by this process, for 0 seconds." in messages[0]


def test_lock_is_held_without_an_owner_file(tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lock, "replace_text", full)
    with locked(tmp_path):
        assert not (tmp_path / OWNER).exists()
        with pytest.raises(StoreError, match="in use by another process"), locked(tmp_path):
            pass


OWNERS = ["", "[]", "{", '{"pid": 1}', '{"pid": 1e999, "host": 1, "since": 1}', "\0\xff", None]


@pytest.mark.parametrize("owner", OWNERS)
def test_owner_file_with_invalid_contents(tmp_path, owner):
    with locked(tmp_path):
        (tmp_path / OWNER).unlink()
        if owner is not None:
            (tmp_path / OWNER).write_text(owner, "latin-1")
        with pytest.raises(StoreError, match="in use by another process"), locked(tmp_path):
            pass
