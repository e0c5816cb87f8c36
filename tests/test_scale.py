"""bench.scale: its formulas against counts of a step in one process, and against arithmetic by hand."""

from __future__ import annotations

import csv

import open_clip
import pytest
import torch

import skipkernels as sk
from bench import counts, scale
from bench import step_model as cost
from bench.flops import flops_of
from bench.inputs import class_names, random_inputs
from bench.step_model import CLASS_PARALLEL, REPLICATED, VIT_B_16, Message
from skipkernels.selection import RankSampler


@pytest.mark.parametrize(("B", "C"), [(2, 300), (3, 40)])
def test_formulas_equal_counts_of_a_step(B, C):
    """FLOPs of products, parameters, and bytes of the tensors of each class."""
    inputs = random_inputs("vit-tiny", B, C, torch.device("cpu"))
    with counts.WithoutProducts():
        clip = sk.SkipCLIP(inputs.model, inputs.tokens, skip_layers=3, memory="fast")
        features, found = clip.encode_lower(inputs.images), []
        clip(features, inputs.labels)  # features of texts at the cut
        counted = flops_of(lambda: found.append(clip(features, inputs.labels)) or found[0].loss.backward())
    K, prompts = len(found[0].class_ids), clip._text.prompts
    rows, mean = int(prompts.lengths[found[0].class_ids].sum()), prompts.lengths.double().mean().item()
    tiny = cost.Model(128, 65, 3, 96, 1, 128, prefix=prompts.prefix_length, suffix=mean, parameters=0)
    assert cost.trained(tiny) == sum(p.numel() for p in clip.trainable_parameters())
    predicted = cost.flops(tiny, B, K, rows, scores=B * C, logits=B * K)
    assert predicted == pytest.approx(counted, rel=1e-6)  # pairs of attention are rounded
    sizes = cost.class_bytes(tiny, C, length=prompts.tokens.shape[1])
    rows_bytes, prefix = clip._text_encoder.templates[0].rows.nbytes, 4 * 96 * prompts.prefix_length
    layout = sum(tensor.nbytes for tensor in prompts.tensors().values())
    assert sizes["prototypes"] == clip.prototypes.nbytes
    assert sizes["features"] == pytest.approx(rows_bytes - prefix, rel=1e-9)
    assert layout - 200 <= sizes["layout"] <= layout  # less the positions of the prefix, and two segments


STEP = (counts.STEP, "ViT-B-16", "bf16", "fast", counts.SGD)
ROWS = [row for row in counts.read_table() if (*row[:2], row.precision, row.memory, row.optimizer) == STEP]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"C{row.C}")
def test_formulas_equal_the_table_of_counts(row):
    tokens = open_clip.get_tokenizer("ViT-B-16")([f"a photo of a {name}." for name in class_names(row.C)])
    rows = float((tokens.argmax(dim=1) + 1 - VIT_B_16.prefix)[: row.K].sum())  # the first classes are kept
    predicted = cost.flops(VIT_B_16, row.B, row.K, rows, scores=row.B * row.C, logits=row.B * row.K)
    assert predicted == pytest.approx(row.flops, rel=1e-3)  # one of the kept classes is the label
    assert sum(cost.saved_bytes(VIT_B_16, row.B, row.K, rows)) == pytest.approx(row.saved_bytes, rel=0.03)
    assert 4 * cost.trained(VIT_B_16) == row.gradient_bytes


def test_messages_by_hand():
    """Seven images in two processes, four and three; the smaller share is padded."""
    gathers = [Message("all_gather", size) for size in (16, 4 * 8, 4 * 12 * 8, 10 * 8, 7 * 16)]
    expected = [*gathers, Message("reduce_scatter", 8 * 12 * 8)]
    assert cost.messages(CLASS_PARALLEL, 2, 7, 19, 12, itemsize=8, wide=8) == expected
    assert cost.messages(REPLICATED, 64, 2048, 1_000_000, 512)[2:] == [
        Message("all_gather", 2 * 32 * 512),
        Message("all_gather", 4 * 15_625),
        Message("all_gather", 8),
    ]


def test_seconds_of_by_hand():
    """Within a node small messages take the low-latency protocol, large ones the bandwidth."""
    assert cost.seconds_of(Message("all_gather", 1 << 20), 1, "H100") == 0
    assert cost.seconds_of(Message("all_gather", 0), 8, "H100") == pytest.approx(3.6e-6 + 7 * 0.47e-6)
    large = cost.seconds_of(Message("all_reduce", 450_000_000), 8, "H100")
    assert large == pytest.approx(8.4e-6 + 14 * 3.4e-6 + 2 * 7 / 8 * 1e-3)
    across = cost.seconds_of(Message("reduce_scatter", 0), 16, "A100")
    assert across == pytest.approx(3.6e-6 + 14 * 0.47e-6 + 2.7e-6)


def test_predict_class_memory_is_shared_out():
    """With a quarter of 200,000 classes, and their part of the kept ones, a process holds at most 0.35 of the bytes."""
    K = RankSampler().expected_keep(200_000, 32)
    one, four = (cost.predict(CLASS_PARALLEL, W, 32 // W, 200_000, K) for W in (1, 4))
    assert 0.25 < four.class_bytes / one.class_bytes < 0.35
    whole = cost.predict(REPLICATED, 4, 8, 200_000, K)
    assert whole.class_bytes == one.class_bytes - 150_000 * 4 * 512 and whole.flops > 3 * four.flops


def test_time_of_the_host_is_that_of_the_counted_launches():
    row = ROWS[0]
    host = 5e-6 * (row.launches - row.triton) + 12e-6 * row.triton
    assert host == pytest.approx(12 * cost.HOST_SECONDS, rel=1e-3)


def test_table_is_that_of_the_formulas():
    rows = list(scale.rows_of(32, None))
    with scale.TABLE.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [{name: str(value) for name, value in row.items()} for row in rows] == table, "run python -m bench.scale"
    assert {row["faster on H100"] for row in rows if row["C"] == 1_000_000 and row["W"] > 1} == {CLASS_PARALLEL}
    assert {row["faster on H100"] for row in rows if row["W"] == 1} == {"equal"}
