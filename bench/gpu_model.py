"""Estimate the time of a training step on a GPU from the launches that it makes. Nothing is measured.

    python -m bench.gpu_model              write bench/results/gpu_model.csv
    python -m bench.gpu_model --no-save    print only

The steps run on the meta device, and every launch is recorded with the bytes of its tensors, its FLOPs and the shape of
its product. A launch takes

    START + max(bytes / bandwidth, FLOPs / rate)

A Triton kernel with few warps does not reach the whole bandwidth. A product is divided into tiles, and the slowest
multiprocessor determines its time: of the tiles in TILES and the ways to split the inner dimension, the fastest counts.
The L2 cache is left out: a step moves many times its size.

    floor     FLOPs at the rate of a large product, and bytes at the bandwidth of the memory, without START
    serial    the launches of a CUDA graph one after the other, GAP between them
    packed    the same, but backward and update of the two towers, which are on two streams, fill each other's gaps:
              as long as the longer side, or as the work of both without START and GAP
    eager     the longer of the launches on the device, one after the other, and of the calls on the host

A graph takes between `packed`, which no schedule beats, and `serial`, without any overlap. The published step is eager.
The constants below describe an H100 SXM. They are assumptions: one run of bench/gpu.sh on a device can correct them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

import skipkernels as sk
from skipkernels import casts, optimizer
from skipkernels.casts import Casts
from skipkernels.ops import launching, registration
from skipkernels.ops.sgd_momentum import tables_of_graph
from skipkernels.selection import RankSampler

from . import measure, tables
from .counts import launches_a_kernel, without_tail
from .flops import formulas
from .inputs import autocast, random_inputs
from .launches import ARCHITECTURES, recording
from .meta_device import PRODUCTS, WithoutProducts, meta_as_gpu
from .published import PublishedStep
from .rows import RESULTS, command

TABLE = RESULTS / "gpu_model.csv"
MODEL, SKIP_LAYERS = "ViT-B-16", 6
TITLE = "Estimated for an H100; nothing is measured"
BATCHES, CLASSES, PRECISIONS = (4, 32), (100, 1000, 10_000), ("bf16", "fp32")
_CPU = torch.device("cpu")

# ---- assumptions about the GPU ---------------------------------------------------------------------------------------

PROCESSORS = 132  # multiprocessors of an H100 SXM
RATES = {  # FLOP/s of products
    torch.bfloat16: 750e12,
    torch.float16: 750e12,
    torch.float32: 55e12,
    torch.float64: 55e12,
}
BANDWIDTH = 2.9e12  # bytes/s of the memory, read or written
WARPS = 8  # for each multiprocessor, which need to be loading for the whole bandwidth
START = 1.5e-6  # seconds until the programs of a kernel run at full speed, and until the last one ends
GAP = 1.1e-6  # seconds between two nodes of a graph
HOST_TORCH, HOST_TRITON = 5e-6, 12e-6  # seconds of the host for a call of PyTorch, and for a launch of Triton
TILES = {(128, 256): 0.9, (128, 128): 0.8, (128, 64): 0.6, (64, 64): 0.4}  # of products: share of the rate
SPLITS = (1, 2, 4, 8)  # of the inner dimension
ATTENTION = 0.4  # share of the rate that attention reaches


class Launch(NamedTuple):
    """A launch of a step.

    Attributes:
        name: Operator of PyTorch, or Triton kernel.
        triton: It is a Triton kernel.
        nbytes: Bytes of its tensors.
        flops: Operations of its products.
        dtype: Type of its products.
        shape: Batch, rows, columns and inner dimension of a product; None of other launches.
        warps: Warps of all programs of a Triton kernel; None of other launches, which are assumed to fill the GPU.
        side: "image" or "text" in backward and update of the blocks of a tower.
    """

    name: str
    triton: bool
    nbytes: int
    flops: int
    dtype: torch.dtype
    shape: tuple[int, int, int, int] | None
    warps: int | None = None
    side: str = ""

    @property
    def seconds(self) -> float:
        """Time of the launch on the device."""
        filled = 1.0 if self.warps is None else min(1.0, self.warps / (PROCESSORS * WARPS))
        computing = seconds_of_product(*self.shape, self.dtype) if self.shape else self.flops / ATTENTION / self.rate
        return START + max(self.nbytes / (filled * BANDWIDTH), computing)

    @property
    def rate(self) -> float:
        """FLOP/s of a large product."""
        return RATES[self.dtype]

    @property
    def floor(self) -> float:
        """Time at full speed."""
        return max(self.nbytes / BANDWIDTH, self.flops / self.rate)


def seconds_of_product(batch: int, rows: int, columns: int, inner: int, dtype: torch.dtype) -> float:
    """Time of a product on the multiprocessors, with the best of TILES and SPLITS.

    >>> 1e6 * seconds_of_product(1, 8192, 8192, 8192, torch.bfloat16)  # 1466 at full rate
    1640.4...
    """
    of_processor = RATES[dtype] / PROCESSORS

    def seconds(tile: tuple[int, int], split: int) -> float:
        (height, width), share = tile, TILES[tile]
        tiles = batch * math.ceil(rows / height) * math.ceil(columns / width) * split
        of_tile = 2 * height * width * math.ceil(inner / split)
        return math.ceil(tiles / PROCESSORS) * of_tile / (share * of_processor)

    return min(seconds(tile, split) for tile, split in product(TILES, SPLITS))


# ---- recording -------------------------------------------------------------------------------------------------------

_aten = torch.ops.aten
_PRODUCTS = {product.overloadpacket for product in PRODUCTS}
_ATTENTION = tuple(op for op in flop_registry if "attention" in str(op))
_READS_SOME_ROWS = (_aten.index, _aten.index_select)


def nbytes_of(values: Any) -> int:
    """Bytes of the tensors among some values, each memory once."""
    tensors = {(id(x._base) if x._base is not None else id(x)): x for x in tree_leaves(values) if isinstance(x, Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values() if x.is_meta)


class Recording(TorchDispatchMode):
    """Record the launches of what runs on the meta device, which stands in for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.side = ""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = operator(*args, **kwargs)
        if any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves((args, kwargs, out))):
            found: list[Launch] = []
            if operator.namespace == registration.NAMESPACE:
                found += self._ours(operator, args, out)
            elif launches_a_kernel(operator, args, out):
                found.append(self._of_torch(operator, args, kwargs, out))
            self.launches += [launch._replace(side=self.side) for launch in found]
        return out

    def _of_torch(self, operator: Any, args: Any, kwargs: Any, out: Any) -> Launch:
        packet, moved = operator.overloadpacket, nbytes_of((args, kwargs, out))
        if packet in _READS_SOME_ROWS:
            moved = 2 * nbytes_of(out)
        flops, shape, dtype = 0, None, torch.float32
        if packet in _PRODUCTS:
            left, right = [x for x in args if isinstance(x, Tensor)][-2:]
            *batch, rows, inner = left.shape
            shape, dtype = (math.prod(batch), rows, right.shape[-1], inner), left.dtype
            flops = 2 * math.prod(shape)
        elif packet in _ATTENTION:
            flops, dtype = flop_registry[packet](*args, **kwargs, out_val=out), args[0].dtype
        return Launch(packet.__name__, False, moved, flops, dtype, shape)

    def _ours(self, operator: Any, args: Any, out: Any) -> Iterator[Launch]:
        """The kernels of one of our operators, and those of PyTorch in its launcher."""
        formula = formulas().get(operator.overloadpacket)
        shapes = tree_map_only(Tensor, lambda x: x.shape, (args, out))
        flops = formula(*shapes[0], out_shape=shapes[1]) if formula else 0
        within = Recording()
        with recording(ARCHITECTURES["sm_90"]) as launches, within:
            registration.definitions[operator._opname].launch(*args)
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        dtype = next((x.dtype for x in tensors if x.is_floating_point()), torch.float32)
        for launch in launches:
            name, arguments = launch.kernel.fn.__name__, launch.arguments
            moved = moved_by(name, arguments, args)
            warps = math.prod(launch.grid) * launch.options["num_warps"]
            yield Launch(name, True, moved, flops // len(launches), dtype, None, warps)
        yield from within.launches


def moved_by(kernel: str, arguments: dict[str, Any], args: Any) -> int:
    """Bytes that a Triton kernel reads and writes: its tensors."""
    if kernel == "_sgd_momentum_kernel":  # the tensors are in a table of addresses
        weights, grads, buffers, copies = *args[:3], args[-1]
        return 2 * nbytes_of(weights) + nbytes_of(grads) + 2 * nbytes_of(buffers) + nbytes_of(copies)
    return nbytes_of(arguments)


# ---- steps -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def skip_clip(model: str, skip_layers: int, batch: int, classes: int) -> tuple[sk.SkipCLIP, Tensor, Tensor]:
    """SkipCLIP, features at the cut and labels, on the meta device."""
    inputs = random_inputs(model, batch, classes, _CPU)
    _, sampling = without_tail(classes, batch)
    with WithoutProducts():
        clip = sk.SkipCLIP(inputs.model, inputs.tokens, skip_layers=skip_layers, memory="fast", **sampling)
        features = clip.encode_lower(inputs.images)
        clip(features, inputs.labels)  # caches the text features at the cut, which needs values
    clip.to("meta")
    return clip, features.to("meta"), inputs.labels.to("meta")


def launches_of_ours(batch: int, classes: int, precision: str) -> list[Launch]:
    """Launches of our step in a graph, each with its side; the update is in backward, and in bf16 writes the casts."""
    clip, features, labels = skip_clip(MODEL, SKIP_LAYERS, batch, classes)
    groups = clip.parameter_groups(text_lr=0.0, image_lr=0.0)
    sgd = sk.FusedSGD(groups, momentum=0.9)
    step = sk.graphed(clip, sgd, batch_size=batch)
    with casts.used(Casts(clip.trainable_parameters()) if precision == "bf16" else None):
        launches = recorded(lambda: step(features, labels), precision, clip)
    sgd.close()
    return launches


def launches_of_published(batch: int, classes: int, precision: str) -> list[Launch]:
    """Launches of the published step and of PyTorch's update."""
    inputs = random_inputs(MODEL, batch, classes, _CPU)
    model, (tokens, images, labels) = inputs.model.to("meta"), (x.to("meta") for x in inputs[1:])
    step = PublishedStep(model, tokens, SKIP_LAYERS, RankSampler())
    features = step.image_features(images)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], momentum=0.9, foreach=True)

    def run() -> None:
        loss, _ = step(features, labels)
        loss.backward()
        sgd.step()
        sgd.zero_grad()

    return recorded(run, precision)


def recorded(step: Callable[[], Any], precision: str, clip: sk.SkipCLIP | None = None) -> list[Launch]:
    """Launches of the second call of a step; the first makes the state of its optimizer. `clip` has two sides."""
    recording = Recording()
    with meta_as_gpu(), autocast(_CPU, precision), _sides(recording, clip) if clip else nullcontext():
        step()
        recording.side = ""
        with tables_of_graph(), recording:  # tables of the update are no nodes of a graph
            step()
    return recording.launches


@contextmanager
def _sides(recording: Recording, clip: sk.SkipCLIP) -> Iterator[None]:
    """Set the side of a recording when backward reaches the embeddings of a tower: first the text's, then the image's.

    Gradients that are gathered for an update are those of one side, as on two streams; at the end of backward, of none.
    """
    flush_all = optimizer.FusedSGD._flush_all

    def at_the_end(sgd: sk.FusedSGD) -> None:
        recording.side = ""
        flush_all(sgd)

    def marked(side: str, encode: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any) -> Tensor:
            embedding = encode(*args)
            embedding.register_hook(lambda _: setattr(recording, "side", side))
            return embedding

        return run

    image = clip.images
    with (
        mock.patch.object(image, "encode", marked("image", image.encode)),
        mock.patch.object(clip.texts, "encode", marked("text", clip.texts.encode)),
        mock.patch.object(optimizer.FusedSGD, "_flush_all", at_the_end),
        mock.patch.object(launching, "current_stream", lambda device: hash(recording.side)),
    ):
        yield


# ---- the table -------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A case: our step and the published one; times in microseconds."""

    B: int
    C: int
    precision: str
    launches: int
    floor_us: int
    packed_us: int
    serial_us: int
    eager_us: int
    published_us: int
    torch: str


def serial(launches: Sequence[Launch]) -> float:
    """Time of the launches one after the other in a graph."""
    return sum(launch.seconds + GAP for launch in launches)


def packed(launches: Sequence[Launch]) -> float:
    """Time of a graph in which the launches of the two sides run beside each other, without a pause."""
    side = {name: [launch for launch in launches if launch.side == name] for name in ("", "image", "text")}
    both = [*side["image"], *side["text"]]
    work = sum(launch.seconds - START for launch in both)
    return serial(side[""]) + max(serial(side["image"]), serial(side["text"]), work)


def eager(launches: Sequence[Launch]) -> float:
    """Time of an eager step, on the device or on the host."""
    host = sum(HOST_TRITON if launch.triton else HOST_TORCH for launch in launches)
    return max(serial(launches), host)


def row_of(batch: int, classes: int, precision: str) -> Row:
    ours = launches_of_ours(batch, classes, precision)
    published = launches_of_published(batch, classes, precision)
    floor = sum(launch.floor for launch in ours)
    seconds = floor, packed(ours), serial(ours), eager(ours), eager(published)
    version = ".".join(torch.__version__.split(".")[:2])
    return Row(batch, classes, precision, len(ours), *(round(1e6 * s) for s in seconds), version)


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the cases."""
    lines = []
    for row in rows:
        times = row.floor_us, row.packed_us, row.serial_us, row.eager_us, row.published_us
        ratios = (f"{row.published_us / ours:.1f}" for ours in (row.serial_us, row.packed_us))
        case = str(row.B), f"{row.C:,}", row.precision, str(row.launches)
        lines.append([*case, *(f"{us / 1000:.2f}" for us in times), " to ".join(ratios)])
    header = ["B", "C", "precision", "launches", *(f"{name}, ms" for name in "floor packed serial eager".split())]
    return [*header, "published, ms", "published over graph"], lines


def main(arguments: Sequence[str] | None = None) -> None:
    args = command(__doc__).parse_args(arguments)
    measure.keep_freed_memory()
    rows = [row_of(*case) for case in product(BATCHES, CLASSES, PRECISIONS)]
    tables.show(*cells(rows), TITLE)
    if not args.no_save:
        tables.write(TABLE, rows)
        print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()
