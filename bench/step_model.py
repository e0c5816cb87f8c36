"""Predicted work, messages, memory and time of a training step in many processes, by formulas: nothing is measured.

Two ways of training have equal results:

    class-parallel   a process holds and encodes the classes c ≡ r (mod W)
    replicated       every process holds the prompts of all classes, encodes all kept classes, and computes the loss of
                     its own images; as in class-parallel, a process computes the scores of the
                     classes c ≡ r (mod W)

A step (bf16 autocast, fp32 weights, SGD) takes the longer of two times: its products and memory traffic at peak rates,
and the launches of the host. The time of its messages is added, by the model with which NCCL chooses algorithms. The
mean of the gradients is sent during backward, two thirds of the step. Real steps take longer: the times are for
comparing the two ways.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

WAYS = CLASS_PARALLEL, REPLICATED = "class-parallel", "replicated"
IMAGES = 32  # images per process that are assumed before the first batch


class Model(NamedTuple):
    """Sizes of a CLIP. Only blocks above the cut count; a prompt has the prefix and on average `suffix` tokens."""

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


class Gpu(NamedTuple):
    """Rates by data sheets: matrix units in bf16, FLOP/s; memory, and links in one direction, bytes/s."""

    half: float
    bandwidth: float
    link: float
    network: float


# Links within a node of eight, and the network adapter of each GPU: DGX H100 (NVLink 900 GB/s in both directions, eight
# 400 Gb/s adapters) and DGX A100 (600, 200).
GPUS = {"H100": Gpu(989.4e12, 3.35e12, 450e9, 50e9), "A100": Gpu(312e12, 2.039e12, 300e9, 25e9)}
# Launches of a step with 12 blocks above the cut, in counts.csv: 5 µs for a call of PyTorch and 12 µs for a Triton
# launch (assumed, typical values). In many processes a step has host syncs and is not captured in a graph.
HOST_SECONDS = 2.499e-3 / 12
# Times that a step reads or writes each gradient (written once, and read by the update, which reads and writes weight
# and momentum), and each saved byte.
GRADIENT_PASSES, SAVED_PASSES = 6, 2

# Rings of NCCL (src/graph/tuning.cc), by protocol: seconds to start, seconds of a hop over NVLink and over the network,
# and share of the bandwidth. The faster protocol is used.
PROTOCOLS = {"LL": (3.6e-6, 0.47e-6, 2.7e-6, 1 / 4), "Simple": (8.4e-6, 3.4e-6, 9.6e-6, 1.0)}

# Bytes saved per token in multiples of W (fp32 residuals, the rest bf16): in a block, and in the last block, which for
# texts also saves SAVED_POOLED per class. CASTS: bf16 copies of the weights of a block, in multiples of W²
# (towers/fused_block.py).
SAVED_IMAGE, SAVED_TEXT, SAVED_POOLED, CASTS = (24, 8), (22, 12), 16, 24
# Bytes for each class of the task that a selection keeps, and that four passes of a radix sort of the scores move.
SELECTION, SORTED = 4 + 4 + 8, 4 * 2 * (4 + 8)


def trained(model: Model) -> int:
    """Parameters above the cut."""
    towers = ((model.image_width, model.image_blocks), (model.text_width, model.text_blocks))
    return sum(blocks * (12 * W * W + 13 * W) + W * model.D + 2 * W for W, blocks in towers)


class Message(NamedTuple):
    """A collective, and the bytes that each process contributes."""

    collective: str
    bytes: int


def messages(
    way: str, W: int, B: int, C: int, D: int, *, itemsize: int = 2, wide: int = 4, smoothing: bool = False
) -> list[Message]:
    """Messages of a step with B images in all processes, without the mean of the gradients.

    An element of the image embeddings has `itemsize` bytes; an element of scores and gradients has `wide`, 4 (in fp64
    8).
    """
    own = -(-B // W)
    numbers = [16, 8 * own, itemsize * own * D, wide * -(-C // W)]  # sizes and draws, labels, embeddings, scores
    if way == REPLICATED:
        return [Message("all_gather", size) for size in (*numbers, 8)]
    gathers = [Message("all_gather", size) for size in (*numbers, (3 if smoothing else 2) * 8 * B)]
    return [*gathers, Message("reduce_scatter", wide * W * own * D)]


def seconds_of(message: Message, W: int, gpu: str) -> float:
    """Seconds of a ring over W processes."""
    if W == 1:
        return 0.0
    nodes, rounds = -(-W // 8), 1 + (message.collective == "all_reduce")
    total = message.bytes * (W if message.collective == "all_gather" else 1)
    moved = rounds * total * (W - 1) / W / GPUS[gpu][2 + (nodes > 1)]
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
    # Products of a block: 24·W² per token and twice that in backward. The first block needs no gradient of its input.
    # The last computes keys and values (of texts also queries) of every token, and all else of pooled tokens only.
    images = b * N * image**2 * (72 * (n - 1) - 6 + 12) + 60 * b * image**2
    texts = (rows + model.prefix) * text**2 * (72 * (m - 1) - 6 + 18) + 54 * K * text**2
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
    return {name: size * classes for name, size in (sizes | {"layout": 8 * (length + 3)}).items()}


class Prediction(NamedTuple):
    """Prediction for each process."""

    flops: float  # of products
    sent: int  # bytes that the process sends, without gradients of parameters
    class_bytes: float  # memory for classes
    rest_bytes: float  # memory for weights, their gradients, momentum, and images
    moved: float  # bytes read and written
    messages: list[Message]
    gradient_bytes: int  # of parameters


def predict(way: str, W: int, b: int, C: int, K: int, model: Model = VIT_B_16) -> Prediction:
    """Predict one way with b images per process."""
    B, owned = W * b, -(-C // W)
    own, held = (kept_by_one(K, W), owned) if way == CLASS_PARALLEL else (K, C)
    sent = messages(way, W, B, C, model.D)
    rows, gradients = own * model.suffix, 4 * trained(model)
    work = flops(model, b, own, rows, scores=B * owned, logits=own * (B if way == CLASS_PARALLEL else b))
    rest, texts = saved_bytes(model, b, own, rows)
    kept = class_bytes(model, held, length=16)
    kept["prototypes"] *= owned / held
    moved = GRADIENT_PASSES * gradients + SAVED_PASSES * (rest + texts) + kept["prototypes"] + SORTED * C
    of_classes = sum(kept.values()) + SELECTION * C + texts
    of_rest = 4 * model.parameters + 2 * gradients + rest  # weights, gradients, momentum
    return Prediction(work, (W > 1) * sum(x.bytes for x in sent), of_classes, of_rest, moved, sent, gradients)


def step_seconds(prediction: Prediction, W: int, model: Model, gpu: str) -> float:
    """Predicted seconds of a step on W GPUs of one kind."""
    products = prediction.flops / GPUS[gpu].half + prediction.moved / GPUS[gpu].bandwidth
    step = max(products, HOST_SECONDS * (model.image_blocks + model.text_blocks))
    behind = max(0.0, seconds_of(Message("all_reduce", prediction.gradient_bytes), W, gpu) - 2 / 3 * step)
    return step + sum(seconds_of(each, W, gpu) for each in prediction.messages) + behind


def faster_way(W: int, b: int, C: int, K: int, model: Model, gpu: str) -> str:
    """Return the way with the shorter predicted step; if they are equal, class-parallel, which takes less memory."""
    own, every = (step_seconds(predict(way, W, b, C, K, model), W, model, gpu) for way in WAYS)
    return WAYS[every < own]
