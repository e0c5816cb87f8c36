"""sgd_momentum_: the step equals the reference, to the bit. tests/test_optimizer.py compares FusedSGD with torch."""

from __future__ import annotations

import copy
import functools
import itertools
import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from skipkernels import reference
from skipkernels.functional import sgd_momentum_
from skipkernels.ops import launching
from skipkernels.ops import sgd_momentum as sgd_momentum_module
from skipkernels.ops.sgd_momentum import sgd_momentum_ as operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# On a GPU one kernel launch: 16 · 64 elements take the vectorised path, 4,200 take three programs.
SIZES = [(1,), (3, 5), (0,), (1025,), (16, 64), (2, 3, 7), (4200,)]
HYPER = {"lr": 0.013, "momentum": 0.9, "weight_decay": 5e-4}
HALVES = (torch.bfloat16, torch.float16)
# Weights, gradient and buffer in one dtype; gradients or buffer or both in that of arithmetic; something else.
TRIPLES = [
    *((dtype,) * 3 for dtype in DTYPES),
    *((half, half, torch.float32) for half in HALVES),
    *((half, torch.float32, half) for half in HALVES),
    *((half, torch.float32, torch.float32) for half in HALVES),
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.float32, torch.float32, torch.float64),
    (torch.float64, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16, torch.float64),
]


class State:
    """Weights, gradients and buffers of a model."""

    def __init__(self, sizes, weight, grad=None, buffer=None, device="cpu", seed=0):
        rng = torch.Generator().manual_seed(seed)
        dtypes = (weight, grad or weight, buffer or weight)
        self.lists = [
            [torch.randn(size, generator=rng).to(device=device, dtype=dtype) for size in sizes] for dtype in dtypes
        ]

    def __eq__(self, other) -> bool:
        return all(
            a.dtype == b.dtype and torch.equal(a, b)
            for a, b in zip(itertools.chain(*self.lists), itertools.chain(*other.lists), strict=True)
        )

    def step(self, function=sgd_momentum_, **options) -> State:
        function(*self.lists, **{**HYPER, **options})
        return self


def name(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


@pytest.mark.parametrize("dtypes", TRIPLES, ids=lambda triple: "-".join(map(name, triple)))
def test_is_the_reference(backend, dtypes):
    """Random bits too: the sizes include tensors that do not begin with a new group of four elements."""
    if backend.name == "interpreter" and not set(dtypes) <= set(backend.dtypes):
        pytest.skip("the interpreter does not round as bf16 does, and fp64 runs in the reference")
    ours = State(SIZES, *dtypes, device=backend.device)
    theirs = copy.deepcopy(ours)
    for number in (0.013, torch.tensor(0.5), torch.tensor([1e-3], dtype=torch.float64)):
        number = number.to(backend.device) if isinstance(number, Tensor) else number
        options = dict.fromkeys(HYPER, number)
        assert ours.step(**options) == theirs.step(reference.sgd_momentum_, **options)
    for options in ({"momentum": 0.0}, {"weight_decay": 0.0}):
        assert ours.step(**options) == theirs.step(reference.sgd_momentum_, **options)
    if dtypes[0] == torch.bfloat16:
        for seed in (0, -1, 2**64 - 1, np.int64(-3), torch.tensor(1 << 62, device=backend.device)):
            assert ours.step(seed=seed) == theirs.step(reference.sgd_momentum_, seed=seed)
        assert theirs.step(seed=1) != ours.step()


def test_a_seed_with_a_fraction_is_refused():
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        reference.signed64(2.5)


@pytest.mark.parametrize("dtype", HALVES, ids=name)
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16], ids=name)
def test_casts_are_copies_of_the_new_weights(backend, grad, dtype):
    """Vectorised or not, beside weights without a copy; nothing else changes."""
    backend.skip_unless_supported(grad)
    backend.skip_unless_supported(dtype)
    ours = State(SIZES, torch.float32, grad, torch.float32, device=backend.device)
    theirs = copy.deepcopy(ours)
    casts = [
        None if number == 1 else torch.full_like(x, torch.nan, dtype=dtype) for number, x in enumerate(ours.lists[0])
    ]
    assert ours.step(casts=casts) == theirs.step()
    for weight, cast in zip(ours.lists[0], casts, strict=True):
        assert cast is None or cast.equal(weight.to(dtype))


def test_offsets_give_the_same_bits_in_any_list(backend):
    """The offsets include one that is not a multiple of four."""
    sizes, offsets = [(3,), (32,), (7,), (16,)], [0, 8, 41, 48]
    dtype = torch.float32 if backend.name == "interpreter" else torch.bfloat16
    seed = 5 if dtype == torch.bfloat16 else None
    ours = State(sizes, dtype, device=backend.device)
    theirs, by_reference = copy.deepcopy(ours), copy.deepcopy(ours)
    ours.step(seed=seed, offsets=offsets)
    for i in (2, 0, 3, 1):
        sgd_momentum_(*([x[i]] for x in theirs.lists), **HYPER, seed=seed, offsets=offsets[i : i + 1])
    assert ours == theirs == by_reference.step(reference.sgd_momentum_, seed=seed, offsets=offsets)


def test_tables_of_a_capture_and_beside_it(monkeypatch):
    """The stream decides: while one is captured, other threads launch on others, and read written tables."""
    captured = False
    monkeypatch.setattr(launching, "runs_beside_host", lambda device: True)
    monkeypatch.setattr(launching, "is_captured", lambda device: captured)
    table = functools.partial(sgd_momentum_module._table, device=torch.device("cpu"))
    with sgd_momentum_module.tables_of_graph([torch.empty(5)], torch.device("cpu")) as tables:
        beside = table([3, 1], repeat=True)
        captured = True
        own, other = table([111, 222, 333]), table([444])
        with pytest.raises(RuntimeError, match="^sgd_momentum_: a graph can only update the weights of its optimizer"):
            table([0] * 20)
    assert beside.tolist() == [0, 0, 0, 1]
    tables.upload()
    assert own.tolist() == [111, 222, 333] and other.tolist() == [444]
    assert own.data_ptr() + 32 == other.data_ptr()
    assert table([3, 1], repeat=True) is beside
    with pytest.raises(
        RuntimeError, match=r"^sgd_momentum_: a captured graph can only read tensors of an earlier call"
    ):
        table([111, 222])


def test_two_threads_capture_one_after_the_other():
    order = []

    def other() -> None:
        with sgd_momentum_module.tables_of_graph([], torch.device("cpu")):
            order.append("second")

    thread = threading.Thread(target=other)
    with sgd_momentum_module.tables_of_graph([], torch.device("cpu")):
        thread.start()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_one_tensor_needs_no_list():
    ours = State([(5, 7)], torch.float32)
    theirs = copy.deepcopy(ours)
    sgd_momentum_(*(tensors[0] for tensors in ours.lists), **HYPER)
    assert ours == theirs.step()
    sgd_momentum_([], [], [], 0.1)


@pytest.mark.parametrize(
    ("dtype", "seed"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 3)],
    ids=["fp32", "bf16-nearest", "bf16-random"],
)
def test_bits_do_not_depend_on_threads(dtype, seed):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(State([(70001,), (5,), (64, 1031), (3,)], dtype).step(seed=seed))
    assert results[0] == results[1] and results[0] == results[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_any_strides(backend, dtype):
    backend.skip_unless_supported(dtype)
    seed = 3 if dtype == torch.bfloat16 else None
    plain = State([(6, 10)], dtype, device=backend.device)
    strided = copy.deepcopy(plain)
    weight, grad, buffer = (tensors[0] for tensors in strided.lists)
    strided.lists = [
        [weight.T.contiguous().T],
        [torch.stack([grad, grad], dim=2).flatten(1)[:, ::2]],
        [torch.cat([buffer.new_zeros(1), buffer.flatten()])[1:].view(6, 10)],
    ]
    assert strided.step(seed=seed) == plain.step(seed=seed)


def test_values_that_are_not_finite_stay_so(backend):
    """No random bit turns an infinity into NaN, or NaN into a number."""
    backend.skip_unless_supported(torch.bfloat16)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0], device=backend.device)
    for seed in (None, 0, 1):
        for dtype in (torch.bfloat16, torch.float32):
            weight, buffer = special.new_zeros(5, dtype=torch.bfloat16), special.new_zeros(5, dtype=dtype)
            sgd_momentum_(weight, -special.to(dtype), buffer, 1.0, seed=seed)
            assert weight.tolist()[:2] == [torch.inf, -torch.inf] and weight[2].isnan()
            assert weight.tolist()[3:] == [0.0, 0.0]
        every_bit = torch.tensor([0x7FFF, -1] * 9, dtype=torch.int16, device=backend.device).view(torch.bfloat16)
        weight, buffer = torch.zeros_like(every_bit), torch.zeros_like(every_bit)
        sgd_momentum_(weight, every_bit, buffer, 1.0, seed=seed)
        assert weight.isnan().all() and buffer.isnan().all()


def test_runs_without_no_grad_and_increments_versions():
    weight = torch.nn.Parameter(torch.ones(5))
    buffer = torch.zeros(5)
    before = weight._version, buffer._version
    loss = (weight * weight).sum()
    sgd_momentum_(weight, torch.ones(5), buffer, 0.1)
    assert weight.is_leaf and weight.requires_grad and weight.grad_fn is None
    assert weight._version > before[0] and buffer._version > before[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck(backend):
    state = State([(5,), (2, 3)], torch.float32, device=backend.device)
    numbers = [torch.tensor(number, dtype=torch.float64, device=backend.device) for number in (0.1, 0.9, 5e-4)]
    backend.opcheck(operator, (*state.lists, *numbers, None, None, []))
    casts = [x.bfloat16() for x in state.lists[0]]
    backend.opcheck(operator, (*state.lists, *numbers, None, None, casts))
    if backend.name != "interpreter":
        state = State([(5,), (2, 3)], torch.bfloat16, device=backend.device)
        backend.opcheck(operator, (*state.lists, *numbers, torch.tensor(3, device=backend.device), [8, 3], []))


def test_compiles_into_one_graph():
    def step(weights, grads, buffers, lr):
        sgd_momentum_(weights, [2 * g for g in grads], buffers, lr, weight_decay=0.1)
        return sum(w.sum() for w in weights)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes in ([(5,), (2, 3)], [(7,), (4, 9)]):
        ours = State(sizes, torch.float32)
        theirs = copy.deepcopy(ours)
        lr = torch.tensor(0.1)
        assert torch.equal(compiled(*ours.lists, lr), step(*theirs.lists, lr))
        assert ours == theirs


@pytest.mark.gpu
def test_captured_graph_takes_new_rates_and_seeds():
    ours = State([(1025,), (64, 3)], torch.bfloat16, device="cuda")
    theirs = copy.deepcopy(ours)
    options = {name: torch.tensor(0.1, device="cuda") for name in HYPER} | {"seed": torch.tensor(1, device="cuda")}
    ours.step(**options)  # compiles
    theirs.step(reference.sgd_momentum_, **dict.fromkeys(HYPER, 0.1), seed=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step(**options)
    for number in (2, 3):
        for name in HYPER:
            options[name].fill_(0.1 / number)
        options["seed"].fill_(number)
        graph.replay()
        assert ours == theirs.step(reference.sgd_momentum_, **{name: x.clone() for name, x in options.items()})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_gpu_and_cpu_give_the_same_bits(dtype):
    seed = 3 if dtype == torch.bfloat16 else None
    ours, theirs = State(SIZES, dtype).step(seed=seed), State(SIZES, dtype, device="cuda").step(seed=seed)
    theirs.lists = [[x.cpu() for x in tensors] for tensors in theirs.lists]
    assert ours == theirs
