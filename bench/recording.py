"""Launches of a step on a GPU, for which the meta device stands in: names, bytes, FLOPs and shapes of products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

import skipkernels as sk
from skipkernels.app.devices import autocast
from skipkernels.casts import Casts
from skipkernels.ops import registration
from skipkernels.selection import RankSampler

from .flops import formulas
from .inputs import random_inputs
from .launches import ARCHITECTURES, triton_launches
from .measure import CPU
from .meta_device import PRODUCTS, WithoutProducts, meta_as_gpu

_aten = torch.ops.aten
_READS_SOME_ROWS = (_aten.index, _aten.index_select)
_INDEXED = (_aten.index, _aten.index_put, _aten.index_put_)
_DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Operators that only allocate. Views are known by their schema.
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}


class Launch(NamedTuple):
    """A launch of a step.

    Attributes:
        name: Operator of PyTorch, or Triton kernel.
        triton: It is a Triton kernel.
        nbytes: Bytes of its tensors.
        flops: Operations of its products.
        dtype: Type of its products.
        shape: Batch, rows, columns and inner dimension of a product; None of other launches.
        warps: Warps of all programs of a Triton kernel; None of other launches.
    """

    name: str
    triton: bool
    nbytes: int
    flops: int
    dtype: torch.dtype
    shape: tuple[int, int, int, int] | None
    warps: int | None = None


class Recording(TorchDispatchMode):
    """Record what runs on a device, as it would run on a GPU: calls of operators, their launches, and host syncs.

    Args:
        device: "meta", or "cpu" for work that reads values.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.calls = self.waits = 0
        self._device = device

    def counts(self) -> dict[str, int]:
        """Numbers of calls, launches, launches of Triton kernels and host syncs."""
        triton = sum(launch.triton for launch in self.launches)
        return {"calls": self.calls, "launches": len(self.launches), "triton": triton, "waits": self.waits}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = operator(*args, **kwargs)
        if any(isinstance(x, Tensor) and x.device.type == self._device for x in tree_leaves((args, kwargs, out))):
            if operator.namespace == registration.NAMESPACE:
                self.launches += launches_of_ours(operator, args, out)
                self.calls += 1
            else:
                self.waits += waits(operator, args)
                if launches_a_kernel(operator, args, out):
                    self.launches.append(self._of_torch(operator, args, kwargs, out))
                    self.calls += 1
        return out

    def _of_torch(self, operator: Any, args: Any, kwargs: Any, out: Any) -> Launch:
        packet = operator.overloadpacket
        if packet in _READS_SOME_ROWS:
            moved = 2 * bytes_of(out, self._device)
        else:
            moved = bytes_of((args, kwargs, out), self._device)
        flops, shape, dtype = 0, None, torch.float32
        if packet in flop_registry:  # products and attention
            flops, dtype = flop_registry[packet](*args, **kwargs, out_val=out), args[0].dtype
        if packet in PRODUCTS:
            left, right = [x for x in args if isinstance(x, Tensor)][-2:]
            *batch, rows, inner = left.shape
            shape, dtype = (math.prod(batch), rows, right.shape[-1], inner), left.dtype
        return Launch(packet.__name__, False, moved, flops, dtype, shape)


def launches_of_ours(operator: Any, args: Any, out: Any) -> Iterator[Launch]:
    """The kernels of one of our operators, and those of PyTorch in its launcher."""
    formula = formulas().get(operator.overloadpacket)
    shapes, out_shape = tree_map_only(Tensor, lambda x: x.shape, (args, out))
    flops = formula(*shapes, out_shape=out_shape) if formula else 0
    args = tree_map_only(Tensor, lambda x: x if x.is_meta else x.detach().to("meta"), args)
    of_torch = Recording()
    with triton_launches(ARCHITECTURES["sm_90"]) as launches, of_torch:
        registration.definitions[operator._opname].launch(*args)
    dtypes = [x.dtype for x in tree_leaves(args) if isinstance(x, Tensor) and x.is_floating_point()]
    dtype = dtypes[0] if dtypes else torch.float32
    for launch in launches:
        name, warps = launch.kernel.fn.__name__, math.prod(launch.grid) * launch.options["num_warps"]
        moved = bytes_of_update(*args) if name == "_sgd_momentum_kernel" else bytes_of(launch.arguments)
        yield Launch(name, True, moved, flops // len(launches), dtype, None, warps)
    yield from of_torch.launches


def bytes_of_update(weights: Any, grads: Any, buffers: Any, *options: Any) -> int:
    """Bytes of the kernel of `sgd_momentum_`: it takes tables of addresses. The last of `options` are casts."""
    return 2 * bytes_of((weights, buffers)) + bytes_of((grads, options[-1]))  # the first two are read and written


def bytes_of(values: Any, device: str = "meta") -> int:
    """Bytes of the tensors on a device among some values: each view once, and of each memory at most its bytes."""
    views: dict[int, dict[Any, int]] = {}  # bytes by memory, then by place
    limits: dict[int, int] = {}
    for x in tree_leaves(values):
        if isinstance(x, Tensor) and x.device.type == device:
            memory = id(x if x._base is None else x._base)
            views.setdefault(memory, {})[x.storage_offset(), x.shape, x.stride()] = x.numel() * x.element_size()
            limits[memory] = x.untyped_storage().nbytes()
    return sum(min(sum(sizes.values()), limits[memory]) for memory, sizes in views.items())


def waits(operator: torch._ops.OpOverload, args: Sequence[Any]) -> bool:
    """True if the host of a GPU would wait for values of the call."""
    if operator.overloadpacket in _INDEXED:  # by a mask: its true elements have to be counted
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return not _DEPENDS_ON_VALUES.isdisjoint(operator.tags)


def launches_a_kernel(operator: torch._ops.OpOverload, args: Sequence[Any], out: Any) -> bool:
    """True unless a PyTorch operator makes a view, only allocates, or copies from the host, as kept ranks are copied.

    One that launches several kernels counts once.
    """
    if operator.overloadpacket in (_aten.copy_, _aten._to_copy):
        return all(x.device == out.device for x in args if isinstance(x, Tensor))
    if operator is torch.ops.aten.contiguous.default:
        return not args[0].is_contiguous()
    return not operator.is_view and operator.overloadpacket.__name__ not in _ALLOCATIONS


# ---- steps -----------------------------------------------------------------------------------------------------------


def without_tail(classes: int, batch: int) -> tuple[int, dict[str, Any]]:
    """The default number of kept classes, and options of SkipCLIP that keep as many without a random tail.

    Which classes are drawn depends on the machine, and their prompts have different lengths.
    """
    K = RankSampler().expected_keep(classes, batch)
    return K, {"keep_ratio": K - 1, "max_keep": K - 1, "decay": 1e-6}


def skip_clip(
    model: str, skip_layers: int, batch: int, classes: int, memory: str = "fast"
) -> tuple[sk.SkipCLIP, Tensor, Tensor]:
    """SkipCLIP with text features, features at the cut and labels, on the CPU without computing products."""
    inputs = random_inputs(model, batch, classes, CPU)
    _, sampling = without_tail(classes, batch)
    with WithoutProducts():
        clip = sk.SkipCLIP(inputs.model, inputs.tokens, skip_layers=skip_layers, memory=memory, **sampling)
        features = clip.encode_lower(inputs.images)
        clip(features, inputs.labels)  # caches the text features at the cut, which needs values
    return clip, features, inputs.labels


def record_step(clip: sk.SkipCLIP, features: Tensor, labels: Tensor, precision: str) -> Recording:
    """Record a step in a graph, with its update in backward, which in bf16 writes the casts. Moves `clip` to meta."""
    clip.to("meta")
    features, labels = features.to("meta"), labels.to("meta")
    sgd = sk.FusedSGD(clip.parameter_groups(text_lr=0.0, image_lr=0.0), momentum=0.9)
    step = sk.graphed(clip, sgd, batch_size=len(labels))
    with Casts(clip.trainable_parameters() if precision == "bf16" else ()).active():
        found = record_second_call(lambda: step(features, labels), precision)
    sgd.close()
    return found


def record_second_call(step: Callable[[], Any], precision: str) -> Recording:
    """Record the second call of a step; the first makes the state of its optimizer."""
    found = Recording()
    with meta_as_gpu(), autocast(precision, CPU):
        step()
        with found:
            step()
    return found
