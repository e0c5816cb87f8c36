"""gather_rows equals the reference, to the bit: nothing here is summed."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skipkernels import reference
from skipkernels.functional import gather_rows
from skipkernels.ops.gather_rows import gather_rows as operator
from skipkernels.ops.gather_rows import gather_rows_out
from tests.layouts import LAYOUTS, laid_out

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STORED = (*FLOATS, torch.int8)
SHAPES = [(1, 1, 1, 1), (7, 5, 67, 4), (3, 99, 33, 2), (2, 1, 1025, 5)]  # the last: one more than a block of columns


def make(R, N, W, B, dtype=torch.float32, device="cpu", seed=0):
    rng = torch.Generator().manual_seed(seed)
    rows = (20 * torch.randn(R, N, W, generator=rng)).to(dtype)
    index = torch.randint(0, R, (B,), generator=rng)
    scale = torch.rand(R, N, generator=rng) if dtype == torch.int8 else None
    return rows.to(device), index.to(device), None if scale is None else scale.to(device)


def make_places(B, M, device="cpu", seed=0):
    """B of M rows of a buffer, in any order."""
    return torch.randperm(M, generator=torch.Generator().manual_seed(seed))[:B].to(device)


def put(out, out_index, batch):
    """The truth for `out_index`."""
    out = out.clone()
    out[out_index] = batch
    return out


def same(batch, right):
    return batch.dtype == right.dtype and torch.equal(batch, right)


@pytest.mark.parametrize("dtype", STORED, ids=lambda dtype: str(dtype)[6:])
def test_is_the_reference(backend, dtype):
    for to, shape in itertools.product(FLOATS, SHAPES):
        if backend.name == "interpreter" and (torch.bfloat16 in (dtype, to) or to == torch.float64):
            continue  # it does not round as bf16 does
        rows, index, scale = make(*shape, dtype, backend.device)
        right = reference.gather_rows(rows, index, scale, to)
        assert same(gather_rows(rows, index, scale, dtype=to), right)
        out = torch.full_like(right, torch.nan)
        assert gather_rows(rows, index, scale, out=out) is out and same(out, right)
        M = 3 * len(index) + 7
        out_index = make_places(len(index), M, backend.device)  # leaves the other rows
        out = torch.full((M, *right.shape[1:]), -7, dtype=to, device=backend.device)
        expected = put(out, out_index, right)
        assert gather_rows(rows, index, scale, out=out, out_index=out_index) is out and same(out, expected)
    if backend.name != "interpreter" or dtype != torch.bfloat16:  # without a dtype
        rows, index, scale = make(3, 2, 5, 2, dtype, backend.device)
        assert gather_rows(rows, index, scale).dtype == (torch.float32 if dtype == torch.int8 else dtype)


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 70),
    st.integers(0, 9),
    st.integers(1, 9),
    st.sampled_from(STORED),
    st.sampled_from(FLOATS),
    st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]),
    st.booleans(),
)
def test_every_shape_and_stride(R, N, W, B, more, dtype, to, steps, transposed):
    rows, index, scale = make(R, N, W, B, dtype, seed=R + N)
    rows = rows[:, :: steps[0], :: steps[1]]
    scale = None if scale is None else scale[:, :: steps[0]]
    if transposed:
        rows = rows.mT.contiguous().mT
    right = reference.gather_rows(rows, index, scale, to)
    assert same(gather_rows(rows, index, scale, dtype=to), right)
    out = torch.full((B + more, *right.shape[1:]), -7, dtype=to)
    out_index = make_places(B, B + more, seed=R + N)
    expected = put(out, out_index, right)
    assert same(gather_rows(rows, index, scale, out=out, out_index=out_index), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=["fp32", "int8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend, layout, dtype):
    rows, index, scale = make(6, 7, 40, 5, dtype, backend.device)
    rows = laid_out(rows, layout)
    strided = None if scale is None else scale.T.contiguous().T
    right = reference.gather_rows(rows, index, scale)
    assert same(gather_rows(rows, index.repeat_interleave(2)[::2], strided), right)
    out_index = make_places(5, 9, backend.device)
    out = torch.zeros(9 * 7 * 40 + 1, dtype=right.dtype, device=backend.device)[1:].view(9, 7, 40)  # unaligned
    expected = put(out, out_index, right)
    gather_rows(rows, index, strided, out=out, out_index=out_index.repeat_interleave(2)[::2])
    assert same(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=["fp32", "bf16", "int8"])
def test_straight_from_a_file(tmp_path, dtype):
    """Rows as in a safetensors shard: at an unaligned offset in the file."""
    rows, index, scale = make(9, 5, 64, 6, dtype)
    path = tmp_path / "shard"
    path.write_bytes(b"head!!" + rows.view(torch.uint8).numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)[6:]
    view = mapped.view(torch.int8) if dtype == torch.int8 else torch.frombuffer(mapped.numpy(), dtype=dtype)
    view = view.view(rows.shape)
    assert view.data_ptr() % 4 != 0
    assert same(gather_rows(view, index, scale), reference.gather_rows(rows, index, scale))


@pytest.mark.parametrize(
    ("dtype", "to"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.int8, torch.bfloat16)],
    ids=["fp32", "bf16-to-fp32", "int8-to-bf16"],
)
def test_any_number_of_threads_and_past_the_caches(dtype, to):
    """A batch large enough for streaming stores, with rows that are not a multiple of a cache line."""
    rows, index, scale = make(5, 97, 771, 120, dtype)
    right = reference.gather_rows(rows, index, scale, to)
    out = torch.empty(right.numel() + 1, dtype=to)[1:].view(right.shape)  # unaligned
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert same(gather_rows(rows, index, scale, out=out.fill_(torch.nan)), right)
        out_index = make_places(119, 120)
        expected = put(out.fill_(-7), out_index, right[:119])
        assert same(gather_rows(rows, index[:119], scale, out=out, out_index=out_index), expected)


def test_empty_batch(backend):
    rows, _, _ = make(3, 2, 5, 1, device=backend.device)
    index = torch.empty(0, dtype=torch.int64, device=backend.device)
    assert gather_rows(rows, index).shape == (0, 2, 5)
    out = torch.ones(4, 2, 5, device=backend.device)
    assert gather_rows(rows, index, out=out, out_index=index).eq(1).all()


@pytest.mark.parametrize("backend", ["cpp", "reference"], indirect=True)  # a GPU asserts, or it is undefined
@pytest.mark.parametrize(
    ("index", "out_index", "message"),
    [
        ([3, -1], [5, 6], "index must be rows of rows, 0 to 3; got -1"),
        ([3, 4], [5, 6], "index must be rows of rows, 0 to 3; got 4"),
        ([3, 3], [3, -1], "out_index must be rows of out, 0 to 6; got -1"),
        ([3, 3], [7, 3], "out_index must be rows of out, 0 to 6; got 7"),
        ([3, 3], [3, 3], "out_index must have no duplicates; got 3 more than once"),
    ],
)
def test_indices_that_cannot_be_are_named(backend, index, out_index, message):
    rows, out = make(4, 2, 5, 2)[0], torch.zeros(7, 2, 5)
    with pytest.raises(ValueError, match=rf"^gather_rows: {message}\.$"):
        gather_rows(rows, torch.tensor(index), out=out, out_index=torch.tensor(out_index))
    assert out.eq(0).all()


@pytest.mark.parametrize("backend", ["interpreter"], indirect=True)
@pytest.mark.parametrize("wrong", [-1, 7])
def test_bad_out_index_fails_a_device_assertion(backend, wrong):
    rows, index, _ = make(4, 2, 5, 2)
    with pytest.raises(Exception, match="gather_rows: out_index must be rows of out"):
        gather_rows(rows, index, out=torch.zeros(7, 2, 5), out_index=torch.tensor([3, wrong]))


def test_opcheck(backend):
    for dtype in (torch.float32, torch.int8):
        rows, index, scale = make(3, 2, 5, 2, dtype, backend.device)
        backend.opcheck(operator, (rows, index, scale, torch.float16, False))
        out = torch.empty(2, 2, 5, dtype=torch.float16, device=backend.device)
        backend.opcheck(gather_rows_out, (rows, index, scale, None, out))
        out = torch.zeros(7, 2, 5, dtype=torch.float16, device=backend.device)
        backend.opcheck(gather_rows_out, (rows, index, scale, make_places(2, 7, backend.device), out))


def test_compiles_into_one_graph():
    def step(rows, index, scale, out, wide, places):
        gather_rows(rows, index, scale, out=out)
        gather_rows(rows, index, scale, out=wide, out_index=places)
        return gather_rows(rows, index, scale, dtype=torch.bfloat16).float() + out

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 3, 16, 2), (9, 5, 31, 7)):
        rows, index, scale = make(*shape, torch.int8)
        outs, wides = torch.empty(2, shape[3], *shape[1:3]), torch.ones(2, shape[3] + 3, *shape[1:3])
        places = make_places(shape[3], shape[3] + 3)
        right = step(rows, index, scale, outs[1], wides[1], places)
        assert torch.equal(compiled(rows, index, scale, outs[0], wides[0], places), right)
        assert torch.equal(outs[0], outs[1]) and torch.equal(wides[0], wides[1])


def test_releases_the_interpreter_lock():
    """A Python thread keeps counting while a large batch is gathered."""
    torch.set_num_threads(1)
    rows = torch.zeros(64, 197, 768, dtype=torch.int8)
    scale, index = torch.zeros(64, 197), torch.zeros(400, dtype=torch.int64)
    out = torch.empty(400, 197, 768)
    gather_rows(rows, index, scale, out=out)
    ticks, done = [], threading.Event()

    def count():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-4)

    counter = threading.Thread(target=count)
    counter.start()
    while not ticks:
        time.sleep(1e-3)
    start = time.perf_counter()
    gather_rows(rows, index, scale, out=out)
    end = time.perf_counter()
    done.set()
    counter.join()
    # 60 million numbers take tens of milliseconds. With the lock held there would be no tick well inside.
    margin = (end - start) / 4
    assert any(start + margin < tick < end - margin for tick in ticks)


@pytest.mark.gpu
def test_pinned():
    rows, index, _ = make(3, 2, 5, 2)
    batch = gather_rows(rows, index, out=torch.empty(2, 2, 5, pin_memory=True))
    assert batch.is_pinned() and torch.equal(batch, rows[index])


@pytest.mark.gpu
def test_indices_are_read_at_replay():
    rows, index, scale = make(9, 5, 31, 4, torch.int8, "cuda")
    out, out_index = torch.zeros(11, 5, 31, device="cuda"), make_places(4, 11, "cuda")
    gather_rows(rows, index, scale, out=out, out_index=out_index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gather_rows(rows, index, scale, out=out, out_index=out_index)
    index.copy_(torch.tensor([8, 0, 0, 3])), out_index.copy_(torch.tensor([10, 0, 7, 3])), out.zero_()
    graph.replay()
    assert same(out, put(torch.zeros_like(out), out_index, reference.gather_rows(rows, index, scale)))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_runs_on_the_device_of_its_tensors():
    rows, index, scale = make(9, 5, 31, 4, torch.int8, "cuda:1")
    assert same(gather_rows(rows, index, scale), reference.gather_rows(rows, index, scale))
