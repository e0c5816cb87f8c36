"""The tests that all operators of a loss, a norm or attention share.

A file `test_NAME.py` describes its operator with `Operator`, makes a class of tests with `shared_tests`, and adds what
is particular to the operator.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from skipkernels import functional, reference
from skipkernels.testing import SLACK, relative_error
from tests.layouts import LAYOUTS, laid_out
from tests.ops.backends import BACKENDS, GPU, Backend

Results = dict[str, Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Absolute error of a cosine, computed in at least fp32; that of a logit or log-probability is logit_scale times larger.
COSINE = {torch.float64: 1e-15, torch.float32: 1.2e-7, torch.bfloat16: 1.2e-7, torch.float16: 1.2e-7}


class Case(NamedTuple):
    """Arguments of one call."""

    inputs: dict[str, Tensor]  # the arguments that the operator differentiates, or would if it could
    options: dict[str, Any]

    def to(self, *target: Any) -> Case:
        """Fresh leaves on a device, in a dtype, or both; tensors among the options keep their dtype."""
        inputs = {name: x.detach().to(*target).requires_grad_(x.requires_grad) for name, x in self.inputs.items()}
        device = next(iter(inputs.values())).device
        return Case(inputs, tree_map_only(Tensor, lambda x: x.to(device), self.options))

    def with_inputs(self, **inputs: Tensor) -> Case:
        """Fresh leaves, some of which have new values."""
        changed = {name: inputs.get(name, x).detach() for name, x in self.inputs.items()}
        return self._replace(
            inputs={name: x.requires_grad_(self.inputs[name].requires_grad) for name, x in changed.items()}
        )

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.inputs.values())).dtype


def eighths(case: Case, results: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the results: multiples of 1/8 from −3.75 to 3.75, which every dtype represents."""
    numbers = (torch.arange(i, i + x.numel(), device=x.device) * 37 % 61 for i, x in enumerate(results))
    return [((n - 30) / 8).view(x.shape).to(x.dtype) for n, x in zip(numbers, results, strict=True)]


@dataclass(frozen=True)
class Operator:
    """A public operator, its eager form, and the calls that it is tested with.

    `make(*shape, dtype=…, seed=…, **options)` returns a call on the CPU, with inputs rounded to the dtype, so that
    reference, eager and kernel start from the same numbers. `eager` has the arguments of the public function.
    """

    name: str
    make: Callable[..., Case]
    eager: Callable[..., Any]
    sizes: str  # names of the sizes of a shape, for the ids of tests
    shapes: Sequence[tuple[Any, ...]]  # of the comparison with eager; other tests take the third and the fourth
    small: tuple[Any, ...]  # shape of a call that takes milliseconds on every backend
    large: Sequence[tuple[Any, ...]]  # shapes that several threads share
    features: tuple[str, ...]  # inputs that autocast casts
    variants: Sequence[dict[str, Any]] = ({},)  # options of `make` that select other code
    wide: Sequence[dict[str, Any]] = ()  # options of `make` with vectors in fp32 beside features of 16 bits
    empty: tuple[Any, ...] | None = None  # a shape without rows, where it is allowed
    results: tuple[str, ...] = ("out",)
    result_dtype: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype
    upstream: Callable[[Case, Sequence[Tensor]], list[Tensor]] = eighths
    parts: Callable[[Case, Results], Results] = lambda case, results: results  # compared one by one
    slack: Callable[[Case, Results], dict[str, float]] = lambda case, exact: {}  # beside that of the dtype
    saves: Callable[[Case], list[int]] | None = None  # sizes of saved tensors that are no arguments
    too_slow: Callable[..., bool] = lambda *shape: False  # for the interpreter
    gradients: Sequence[Sequence[str]] | None = None  # inputs of each gradient of the backward operator

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(functional, self.name)

    @property
    def reference(self) -> Callable[..., Any]:
        return getattr(reference, self.name)

    def id_of(self, shape: Sequence[Any]) -> str:
        return "-".join(f"{size}{n}" for size, n in zip(self.sizes.split(), shape, strict=True) if n is not None)

    def case(self, shape: Sequence[Any], *target: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
        return self.make(*shape, dtype=dtype, **options).to(*target)

    def run(self, function: Callable[..., Any], case: Case) -> Results:
        """Results that have a gradient, and the gradients of the inputs; all results without gradients."""
        out = function(**case.inputs, **case.options)
        named = dict(zip(self.results, out if isinstance(out, tuple) else (out,), strict=True))
        recorded = {name: x for name, x in named.items() if x.grad_fn is not None}
        if not recorded:
            return named
        wanted = {name: x for name, x in case.inputs.items() if x.requires_grad}
        outputs = list(recorded.values())
        found = torch.autograd.grad(outputs, list(wanted.values()), self.upstream(case, outputs))
        return recorded | {f"d_{name}": x for name, x in zip(wanted, found, strict=True)}

    def kernel(self, case: Case) -> Results:
        return self.run(self.function, case)

    def truth(self, case: Case) -> Results:
        return self.run(self.reference, case.to(torch.float64))

    def check_no_worse_than_eager(self, case: Case) -> None:
        """err(kernel) ≤ err(eager) + slack, against the reference in fp64, for each result and gradient."""
        exact = self.truth(case)
        slack, ours = self.slack(case, exact), self.kernel(case)
        assert all(ours[name].dtype == self.result_dtype(case.dtype) for name in self.results if name in ours)
        ours, theirs, exact = (self.parts(case, results) for results in (ours, self.run(self.eager, case), exact))
        for name, right in exact.items():
            error, bound = (relative_error(x[name], right) for x in (ours, theirs))
            allowed = bound + SLACK[ours[name].dtype] + slack.get(name, 0.0)
            assert error <= allowed, f"{name}: {error:.2e} against eager's {bound:.2e}, with slack {allowed:.2e}"

    def calls(self, case: Case) -> list[tuple[Any, tuple[Any, ...]]]:
        """The registered operators that forward and backward call, with their arguments."""
        with Calls() as mode:
            self.kernel(case)
        return mode.found

    def saved(self, case: Case) -> list[int]:
        """Sizes of the tensors saved for backward that are no arguments."""
        found: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(x) or x, lambda x: x):
            self.function(**case.inputs, **case.options)
        given = {x.data_ptr() for x in self.static_tensors(case)}
        return [x.numel() for x in found if x.data_ptr() not in given and x.numel() > 0]

    def static_tensors(self, case: Case) -> list[Tensor]:
        """The tensors that a CUDA graph reads."""
        return [*case.inputs.values(), *(x for x in tree_leaves(case.options) if isinstance(x, Tensor))]


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "skipkernels":
            self.found.append((function, args))
        return function(*args, **kwargs or {})


def log_probability_slack(case: Case, exact: Results, results: Sequence[str]) -> dict[str, float]:
    """Slack of results that are log-probabilities of scaled cosines, and of their gradients.

    Rounded cosines give a log-probability an absolute error of scale · COSINE. The results and the gradients of the
    logits have the same error, the gradients of the rows scale/|row| times that. It dominates where the gradients of
    a confident image are nearly 0.
    """
    scale = abs(case.inputs["logit_scale"].item())
    sizes = dict.fromkeys((*results, "d_logit_scale"), 1.0)
    for name in ("image", "text"):
        lengths = case.inputs[name].detach().double().norm(dim=1)  # [n], of the rows
        sizes[f"d_{name}"] = scale / lengths.min().item()
    logit = scale * COSINE[case.dtype]
    return {name: logit * (1 + size / max(exact[name].norm().item(), 1e-300)) for name, size in sizes.items()}


def subsets(names: Sequence[str]) -> Iterator[list[str]]:
    """Each name alone, and all but one."""
    for name in names:
        yield [name]
        if len(names) > 1:
            yield [other for other in names if other != name]


def equal(ours: Results, theirs: Results) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


def shared_tests(operator: Operator) -> type:
    """The class of the tests of an operator on every backend."""
    each_variant = pytest.mark.parametrize("variant", operator.variants, ids=_id_of_options)

    class SharedTests:
        @pytest.mark.parametrize(("backend", "shape", "dtype"), list(_runs(operator)), indirect=["backend"])
        def test_no_worse_than_eager(self, backend: Backend, shape, dtype):
            operator.check_no_worse_than_eager(operator.case(shape, backend.device, dtype=dtype))

        @pytest.mark.parametrize("variant", [*operator.variants, *operator.wide], ids=_id_of_options)
        def test_variants_no_worse_than_eager(self, backend: Backend, variant):
            for shape, dtype in itertools.product((operator.small, operator.shapes[3]), backend.dtypes):
                operator.check_no_worse_than_eager(operator.case(shape, backend.device, dtype=dtype, **variant))

        @each_variant
        def test_reference_equals_eager_in_fp64(self, variant):
            for shape in (operator.small, *operator.shapes[2:4]):
                case = operator.case(shape, dtype=torch.float64, **variant)
                theirs = operator.run(operator.eager, case)
                for name, x in operator.truth(case).items():
                    torch.testing.assert_close(x, theirs[name], rtol=1e-10, atol=1e-12)

        if operator.empty is not None:

            def test_no_rows(self, backend: Backend):
                """Gradients of weights are zero."""
                case = operator.case(operator.empty, backend.device)
                theirs = operator.run(operator.eager, case)
                for name, x in operator.kernel(case).items():
                    assert x.shape == theirs[name].shape and not x.any()

        @pytest.mark.parametrize(("layout", "variant"), list(_layouts(operator)))
        def test_any_strides(self, backend: Backend, layout, variant):
            """Results are those of contiguous copies, and contiguous."""
            case = operator.case(operator.small, backend.device, **variant)
            inputs = {name: laid_out(x.detach(), layout) for name, x in case.inputs.items()}
            vectors = {k: x for k, x in case.options.items() if isinstance(x, Tensor) and x.dim() == 1}
            integers = {name: laid_out(x, layout) for name, x in vectors.items()}
            strided = case.with_inputs(**inputs)._replace(options=case.options | integers)
            plain = case.with_inputs(**{k: x.clone(memory_format=torch.contiguous_format) for k, x in inputs.items()})
            exact = operator.kernel(plain)
            for name, value in operator.kernel(strided).items():
                if backend.name == "reference":  # PyTorch sums columns that are not contiguous in another order
                    assert relative_error(value, exact[name]) <= 1e-5, name
                else:
                    assert torch.equal(value, exact[name]) and value.is_contiguous(), name

        @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
        @pytest.mark.parametrize("large", operator.large, ids=operator.id_of)
        @pytest.mark.parametrize("backend", ["cpp"], indirect=True)
        def test_bits_do_not_depend_on_threads(self, backend: Backend, large, dtype, products_depend_on_threads):
            case, found = operator.case(large, dtype=dtype), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(operator.kernel(case))
            assert equal(found[0], found[1]) and equal(found[0], found[2])

        @each_variant
        def test_every_element_is_written(self, backend: Backend, variant, request: pytest.FixtureRequest):
            """Unwritten results would be NaN."""
            case = operator.case(operator.small, backend.device, **variant)
            plain = operator.kernel(case)
            request.getfixturevalue("poisoned_memory")
            assert equal(plain, operator.kernel(case))

        @each_variant
        def test_opcheck(self, backend: Backend, variant):
            case = operator.case(operator.small, backend.device, **variant)
            (forward, arguments), *backward = operator.calls(case)
            leaves = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), arguments)
            backend.opcheck(forward, leaves)
            for function, arguments in backward:
                backend.opcheck(function, tree_map_only(Tensor, Tensor.detach, arguments), compiled=False)

        @each_variant
        def test_only_needed_gradients_are_computed(self, backend: Backend, variant):
            case = operator.case(operator.small, backend.device, **variant)
            names = [name for name, x in case.inputs.items() if x.requires_grad]
            gradients = [[name] for name in names] if operator.gradients is None else operator.gradients
            everything = operator.kernel(case)
            for wanted in subsets(names):
                inputs = {name: x.detach().requires_grad_(name in wanted) for name, x in case.inputs.items()}
                with Calls() as mode:
                    found = operator.kernel(case._replace(inputs=inputs))
                assert [f"d_{name}" for name in wanted] == [name for name in found if name.startswith("d_")]
                # Formed in another order where the gradient of an input may come from that of another.
                assert all(relative_error(x, everything[name]) <= 1e-5 for name, x in found.items())
                backward, arguments = mode.found[-1]
                computed = [x.numel() > 0 for x in tree_leaves(backward(*arguments))]
                assert computed[: len(gradients)] == [any(name in wanted for name in own) for own in gradients]
                assert not any(computed[len(gradients) :])

        if operator.saves is not None:

            @each_variant
            def test_saves_the_documented_tensors(self, backend: Backend, variant):
                case = operator.case(operator.small, backend.device, **variant)
                assert sorted(operator.saved(case)) == sorted(operator.saves(case))

        @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
        def test_autocast_casts_features_only(self, backend: Backend, dtype):
            """Neither a logit scale nor the weights of a norm, and nothing in fp64."""
            backend.skip_unless_supported(dtype)
            case = operator.case(operator.small, backend.device)
            features = {name: case.inputs[name].detach().to(dtype) for name in operator.features if name in case.inputs}

            def under_autocast(**arguments: Any) -> Any:
                with torch.autocast(backend.device.type, dtype=dtype):
                    return operator.function(**arguments)

            expected = operator.kernel(case.with_inputs(**features))
            for name, x in operator.run(under_autocast, case).items():
                own = case.inputs[name[2:]].dtype if name.startswith("d_") else x.dtype
                assert x.dtype == own and torch.equal(x, expected[name].to(own)), name
            in_fp64 = case.to(torch.float64)
            assert equal(operator.run(under_autocast, in_fp64), operator.kernel(in_fp64))

        @pytest.mark.parametrize("backend", ["cpp", GPU], indirect=True)
        def test_compiles_into_one_graph(self, backend: Backend):
            """Two shapes."""
            first = next(iter(operator.case(operator.small).inputs))

            def step(**arguments: Any) -> Any:
                return operator.function(**(arguments | {first: arguments[first] * 2}))

            torch._dynamo.reset()  # `step` of all operators is one function to Dynamo, which limits its versions
            compiler = "aot_eager" if backend.name == "cpp" else "inductor"
            compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
            for shape in (operator.small, [None if n is None else n + 2 * (n > 2) for n in operator.small]):
                case = operator.case(shape, backend.device)
                assert equal(operator.run(compiled, case), operator.run(step, case))

        @pytest.mark.gpu
        def test_graph_replays(self):
            """Lengths, offsets and labels are read at each replay, and not by the host."""
            (shape, *_) = operator.large
            case, other = (operator.case(shape, "cuda", seed=seed) for seed in (0, 1))
            stream = torch.cuda.Stream()  # backward must be captured on the stream of its warm-up
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                operator.kernel(case)  # kernels are compiled before the capture
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                found = operator.kernel(case)
            for x, value in zip(operator.static_tensors(case), operator.static_tensors(other), strict=True):
                x.data.copy_(value)
            graph.replay()
            assert equal(found, operator.kernel(other))

        @pytest.mark.gpu
        def test_runs_on_the_device_of_its_tensors(self):
            if torch.cuda.device_count() < 2:
                pytest.skip("one device")
            operator.check_no_worse_than_eager(operator.case(operator.small, "cuda:1"))

    return SharedTests


def _runs(operator: Operator) -> Iterator[Any]:
    """Every shape with every dtype in C++ and on a GPU; fewer where they find nothing more.

    The reference is its own truth but for dtypes and gradients of the fallback; the interpreter takes milliseconds for
    every tile, and computes in fp32 whatever it loads.
    """
    for name, backend in BACKENDS.items():
        few = operator.shapes[2:4]
        for shape, dtype in itertools.product(few if name == "reference" else operator.shapes, backend.dtypes):
            if name == "interpreter" and (operator.too_slow(*shape) or dtype == torch.float16 and shape not in few):
                continue
            label, marks = f"{name}-{operator.id_of(shape)}-{str(dtype)[6:]}", [pytest.mark.gpu] * (name == "gpu")
            yield pytest.param(name, shape, dtype, marks=marks, id=label)


def _layouts(operator: Operator) -> Iterator[Any]:
    """Every layout of one variant, and of the others one to be copied and one that some kernels read with strides."""
    first, *others = operator.variants
    for layout, variant in [*((x, first) for x in LAYOUTS), *itertools.product(("transposed", "wider rows"), others)]:
        yield pytest.param(layout, variant, id=f"{layout}-{_id_of_options(variant)}")


def _id_of_options(options: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in options.items()) or "plain"
