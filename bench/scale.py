"""Predict a training step in many processes: work, messages, memory and time of each. Nothing is measured.

    python -m bench.scale                       print the table; write bench/results/scale.csv and scale.svg
    python -m bench.scale --batch 4 --max-tail 1000 --no-save

For 1 to 64 processes with a GPU each and 1,000 to 1,000,000 classes: ViT-B/16 above block 6, bf16 autocast with fp32
weights, SGD with momentum, and `--batch` images per process. Two ways of training have equal results:

    class-parallel   a process holds and encodes the classes c ≡ r (mod W)
    replicated       every process holds all classes, encodes all kept classes, and computes the loss of its own images

A step takes the larger of its products and bytes at peak rates, and of the launches of the host, as in `bench.counts
--estimate`; then its messages, by the model with which NCCL chooses algorithms. The mean of the gradients is sent
during backward, two thirds of the step. Real steps take longer: the times are for comparing the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from statistics import NormalDist
from typing import Any, NamedTuple

from skipkernels.selection import RankSampler

from . import counts, measure, pictures, tables
from .inputs import positive
from .roofline import GPUS

TABLE, PICTURE = (measure.RESULTS / f"scale.{kind}" for kind in ("csv", "svg"))
PROCESSES, CLASSES = (1, 2, 4, 8, 16, 32, 64), (1_000, 10_000, 100_000, 1_000_000)
WAYS = CLASS_PARALLEL, REPLICATED = "class-parallel", "replicated"


class Model(NamedTuple):
    """Sizes of a CLIP: blocks are those above the cut; a prompt is the shared prefix and `suffix` tokens on average."""

    image_width: int
    image_tokens: int
    image_blocks: int
    text_width: int
    text_blocks: int
    D: int
    prefix: int
    suffix: float
    parameters: int


# Prefix "a photo of a" with start-of-text; two words, a full stop and end-of-text are four tokens or more.
VIT_B_16 = Model(768, 197, 6, 512, 6, 512, prefix=5, suffix=5, parameters=149_620_737)


# Bytes/s in one direction of a GPU's links within a node of eight, and of its network adapter. Data sheets of DGX H100
# (NVLink 900 GB/s in both directions, eight 400 Gb/s adapters) and DGX A100 (600, 200).
CLUSTERS = {"H100": (450e9, 50e9), "A100": (300e9, 25e9)}
# Of NCCL's rings (src/graph/tuning.cc), by protocol: seconds to start, of a hop over NVLink and over the network, and
# share of the bandwidth. The protocol that takes less is used.
PROTOCOLS = {"LL": (3.6e-6, 0.47e-6, 2.7e-6, 1 / 4), "Simple": (8.4e-6, 3.4e-6, 9.6e-6, 1.0)}

# Bytes saved per token in multiples of W, in a block and in the last: fp32 residuals, the rest bf16; in the last block
# of texts also per class. And bf16 copies of the weights of a block, in multiples of W² (towers/fused_block.py).
SAVED_IMAGE, SAVED_TEXT, SAVED_POOLED, CASTS = (24, 8), (22, 12), 16, 24
# Bytes for each class of the task that a selection keeps, and that four passes of a radix sort of the scores move.
SELECTION, SORTED = 4 + 4 + 8, 4 * 2 * (4 + 8)


def trained(model: Model) -> int:
    """Parameters above the cut."""
    towers = ((model.image_width, model.image_blocks), (model.text_width, model.text_blocks))
    return sum(blocks * (12 * W * W + 13 * W) + W * model.D + 2 * W for W, blocks in towers)


class Message(NamedTuple):
    """A collective, and the bytes that each process gives."""

    collective: str
    bytes: int


def messages(W: int, B: int, C: int, K: int, D: int, *, itemsize: int = 2, wide: int = 4) -> list[Message]:
    """Messages of a class-parallel step with B images in all, before the mean of gradients. K does not matter.

    A number of the image embeddings has `itemsize` bytes; scores and gradients have `wide`, 4 or in fp64 8.
    """
    own = -(-B // W)
    scores, sums = Message("all_gather", wide * -(-C // W)), Message("all_gather", 2 * 8 * B)
    return [*_gathers(own, D, itemsize), scores, sums, Message("reduce_scatter", wide * W * own * D)]


def _gathers(images: int, D: int, itemsize: int) -> list[Message]:
    """Gathers of the number of images and the state of the generator, of labels, and of image embeddings."""
    return [Message("all_gather", size) for size in (16, 8 * images, itemsize * images * D)]


def seconds_of(message: Message, W: int, gpu: str) -> float:
    """Seconds of a ring over W processes."""
    if W == 1:
        return 0.0
    nodes, rounds = -(-W // 8), 1 + (message.collective == "all_reduce")
    total = message.bytes * (W if message.collective == "all_gather" else 1)
    moved = rounds * total * (W - 1) / W / CLUSTERS[gpu][nodes > 1]
    near, far = rounds * (W - nodes), rounds * (nodes - 1)
    return min(start + near * link + far * net + moved / share for start, link, net, share in PROTOCOLS.values())


def kept_by_one(K: int, W: int) -> int:
    """Expected number of kept classes of the process with most. Source: Blom's order statistics of a normal sample."""
    largest = NormalDist().inv_cdf((W - 0.375) / (W + 0.25))
    return min(K, math.ceil(K / W + largest * math.sqrt(K / W * (1 - 1 / W))))


def flops(model: Model, b: int, K: int, rows: float, scores: int, logits: int) -> float:
    """Operations of the products of a step, with backward: b images, and K classes with `rows` tokens of suffixes."""
    image, N, n = model.image_width, model.image_tokens, model.image_blocks
    text, m = model.text_width, model.text_blocks
    # Products of a block: 24·W² per token and twice that in backward. The first needs no gradient of its input, except
    # one row for a bias. The last has keys and values of every token, and of texts queries; the rest of pooled tokens.
    images = b * N * image**2 * (72 * (n - 1) - 6 + 12) + 6 * image**2 + 60 * b * image**2
    texts = (rows + model.prefix) * text**2 * (72 * (m - 1) - 6 + 18) + 6 * text**2 + 54 * K * text**2
    # Attention: 14 operations, of which 10 in backward, for each pair of tokens and channel.
    pairs = rows * (model.prefix + (rows / K + 1) / 2) + model.prefix * (model.prefix + 1) / 2
    attention = 14 * (b * image * N * (N * (n - 1) + 1) + text * pairs * m)
    return images + texts + attention + model.D * (6 * (b * image + K * text) + 2 * scores + 6 * logits)


def saved_bytes(model: Model, b: int, K: int, rows: float) -> tuple[float, float]:
    """Bytes saved for backward: by images and weights, and by texts."""
    image, n, text, m = model.image_width, model.image_blocks, model.text_width, model.text_blocks
    images = b * model.image_tokens * image * (SAVED_IMAGE[0] * (n - 1) + SAVED_IMAGE[1])
    texts = (rows + model.prefix) * text * (SAVED_TEXT[0] * (m - 1) + SAVED_TEXT[1]) + SAVED_POOLED * K * text
    return images + CASTS * (n * image**2 + m * text**2), texts


def class_bytes(model: Model, classes: int, length: int) -> dict[str, float]:
    """Bytes for the classes that a process holds: fp32 prototypes and features, int64 layout of prompts of a length."""
    sizes = {"prototypes": 4 * model.D, "features": 4 * model.suffix * model.text_width}
    return {name: size * classes for name, size in (sizes | {"layout": 8 * (length + model.suffix + 5)}).items()}


def predict(way: str, W: int, b: int, C: int, K: int, model: Model = VIT_B_16) -> dict[str, Any]:
    """Predicted columns of one way with b images per process."""
    B, parallel = W * b, way == CLASS_PARALLEL
    own, held = (kept_by_one(K, W), -(-C // W)) if parallel else (K, C)
    sent = messages(W, B, C, K, model.D) if parallel else _gathers(b, model.D, itemsize=2)
    rows, gradients = own * model.suffix, 4 * trained(model)
    work = flops(model, b, own, rows, scores=B * held, logits=own * (B if parallel else b))
    rest, texts = saved_bytes(model, b, own, rows)
    kept = class_bytes(model, held, length=16)
    moved = counts.GRADIENT_PASSES * gradients + counts.SAVED_PASSES * (rest + texts) + kept["prototypes"] + SORTED * C
    row: dict[str, Any] = {"gflop": round(work / 1e9), "sent": (W > 1) * sum(each.bytes for each in sent)}
    row["class_mib"] = round((sum(kept.values()) + SELECTION * C + texts) / 2**20)
    row["rest_mib"] = round((4 * model.parameters + 2 * gradients + rest) / 2**20)  # weights, gradients, momentum
    for gpu in CLUSTERS:
        step = max(work / GPUS[gpu].half + moved / GPUS[gpu].bandwidth, _host_seconds())
        behind = max(0.0, seconds_of(Message("all_reduce", gradients), W, gpu) - 2 / 3 * step)
        row[f"{gpu}_ms"] = round(1e3 * (step + sum(seconds_of(each, W, gpu) for each in sent) + behind), 2)
    return row


@cache
def _host_seconds() -> float:
    """Seconds of the launches of a step: in many processes it has host syncs and is no graph."""
    case = (counts.STEP, "ViT-B-16", "bf16", "fast", counts.SGD)
    same = (row for row in counts.read_table() if (*row[:2], row.precision, row.memory, row.optimizer) == case)
    return counts.estimate(next(same))["host"] / 1e3


def rows_of(batch: int, max_tail: int | None) -> Iterator[dict[str, Any]]:
    """One row for each number of classes and processes."""
    for C in CLASSES:
        for W in PROCESSES:
            K = RankSampler(max_tail=max_tail).expected_keep(C, W * batch)
            both = {way: predict(way, W, batch, C, K) for way in WAYS}
            row = {"C": C, "W": W, "B": W * batch, "K": K}
            row |= {f"{way} {name}": both[way][name] for way in WAYS for name in both[way]}
            for gpu in CLUSTERS:
                own, every = (both[way][f"{gpu}_ms"] for way in WAYS)
                row[f"faster on {gpu}"] = "equal" if own == every else WAYS[own > every]
            yield row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = measure.command(__doc__)
    parser.add_argument("--batch", type=positive, default=32, help="images per process")
    parser.add_argument("--max-tail", type=positive, help="bound on the classes drawn from the tail")
    args = parser.parse_args(arguments)
    rows = list(rows_of(args.batch, args.max_tail))
    columns = [name.replace(CLASS_PARALLEL, "own").replace(REPLICATED, "all") for name in rows[0]]
    tables.show(columns, [list(row.values()) for row in rows], "own: class-parallel, all: replicated", width=240)
    if not args.no_save:
        tables.write_dicts(TABLE, rows)
        PICTURE.write_text(pictures.step_over_processes(rows), encoding="utf-8")
        print(f"wrote {TABLE} and {PICTURE.name}")


if __name__ == "__main__":
    main()
