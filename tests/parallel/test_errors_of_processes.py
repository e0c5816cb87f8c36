"""`ShardedSkipCLIP` on two processes that differ: an error on each, before one waits for the other."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import skipkernels as sk
from skipkernels.parallel import sharded_clip
from tests.models import tiny_batch, tiny_clip, tiny_tokens
from tests.parallel.sharded import CLASSES, small_clip
from tests.processes import run_in_processes


def caught(function, *arguments, **options) -> str:
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def errors(rank: int) -> dict[str, Any]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = dist.group.WORLD
    images, labels = tiny_batch(2, CLASSES)

    def construct(tokens=0, seed=0, weights=0, skip=1 / 3, **settings):
        generator = torch.Generator().manual_seed(seed)
        sk.parallel.ShardedSkipCLIP(
            tiny_clip(seed=weights),
            tiny_tokens(CLASSES, seed=tokens),
            skip_layers=skip,
            generator=generator,
            process_group=group,
            **settings,
        )

    found = {
        "tokens": caught(construct, tokens=rank),
        "generator": caught(construct, seed=rank),
        "weights": caught(construct, weights=rank),
        "skip_layers": caught(construct, skip=1 + rank),
        "options": caught(construct, keep_ratio=0.5 if rank else 0.4),
    }
    clip = small_clip(group)
    found["max_labels"] = caught(sk.parallel.sigmoid_loss, clip, images, torch.zeros(2, CLASSES), max_labels=1 + rank)
    bias = {"logit_bias": -1.0 - rank}
    found["bias of labels"] = caught(
        sk.parallel.sigmoid_loss, clip, images, torch.zeros(2, CLASSES), max_labels=1, **bias
    )
    found["bias of pairs"] = caught(sk.parallel.pair_loss, clip, images, labels, loss="sigmoid", **bias)
    found["set_classes"] = caught(clip.set_classes, tiny_tokens(6, seed=rank))
    tokens = tiny_tokens(6)
    found["new tokens of one"] = caught(clip.set_classes, tokens.float() if rank else tokens)
    build = sharded_clip.build_texts
    if rank:
        sharded_clip.build_texts = mock.Mock(side_effect=ValueError("not enough memory"))
    found["new texts of one"] = caught(clip.set_classes, tokens)
    sharded_clip.build_texts = build
    unknown = tokens.index_put((torch.tensor(1), torch.tensor(1)), torch.tensor(10**6))  # of a class of process 1
    found["unknown token"] = caught(clip.set_classes, unknown)
    found["classes"] = clip.num_classes
    found["pairs"] = caught(sk.pairs.pair_loss, clip, images, labels)
    nan = images * torch.nan  # not looked at
    found["several labels"] = caught(sk.pairs.sigmoid_loss, clip, nan, torch.zeros(2, CLASSES), max_labels=1)
    if rank:
        clip.sampler.generator.manual_seed(5)
    found["draws"] = caught(clip, images, labels)
    clip.sampler.generator.manual_seed(5)
    clip.sampler.decay = 0.3 + rank
    found["decay"] = caught(clip, images, labels)
    found["modes"] = caught(clip.predict, images) if rank else caught(clip, images, labels)
    # Arguments that are wrong on process 1 alone
    clip = small_clip(group)
    x, y = (images * torch.nan, labels + CLASSES) if rank else (images, labels)
    found["images of one"], found["labels of one"] = caught(clip, x, labels), caught(clip, images, y)
    found["labels of loss"] = caught(clip.loss, clip.encode_image(images), y)
    found["captions of one"] = caught(sk.parallel.pair_loss, clip, images, y)
    found["chunk of one"] = caught(sk.parallel.pair_loss, clip, images, labels, chunk=1 - rank)
    short = tiny_tokens(CLASSES)[labels, : 8 if rank else None]
    found["short captions of one"] = caught(sk.parallel.pair_loss, clip, images, short)
    found["many of one"] = caught(
        sk.parallel.sigmoid_loss, clip, images, torch.eye(CLASSES)[labels] * (1 + rank), max_labels=1
    )
    found["k of one"] = caught(clip.top_k, images, 1 + rank * CLASSES)
    found["predict of one"] = caught(clip.predict, x)
    with torch.no_grad():
        found["evaluation of one"] = caught(clip.eval(), x, labels), clip(images, labels).loss.item() > 0
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    """Errors on each process, by name."""
    return run_in_processes(2, tmp_path_factory.mktemp("errors"), errors)


# Arguments of process 1 alone, and words of its error
OF_ONE = {
    "images of one": "NaN",
    "labels of one": "labels must be",
    "labels of loss": "labels must be",
    "captions of one": "pair_loss: captions",
    "chunk of one": "pair_loss: chunk must be",
    "short captions of one": "as long as the model's context",
    "many of one": "sigmoid_loss: labels must be 0 or 1",
    "k of one": "k must be",
    "predict of one": "NaN",
    "new tokens of one": "SkipCLIP: tokens must be",
    "new texts of one": "not enough memory",
}


@pytest.mark.parametrize(("name", "words"), OF_ONE.items(), ids=OF_ONE)
def test_error_of_one_process_is_raised_on_every_process(found, name, words):
    """Before a message that others wait for; the next calls work."""
    first, second = (got[name] for got in found)
    assert first.startswith("RuntimeError: ShardedSkipCLIP: process 1 of process_group refused its arguments of ")
    assert re.match(f"ValueError: .*{words}", second)


def test_error_of_one_process_in_evaluation_is_its_own(found):
    (first, works), (second, _) = (got["evaluation of one"] for got in found)
    assert first == "" and works and "NaN" in second


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("tokens", ["tokens must be equal on all processes"] * 2),
        ("generator", ["generator must be equal on all processes"] * 2),
        ("weights", ["weights must be equal on all processes"] * 2),
        ("skip_layers", ["skip_layers and the trained parameters must be equal"] * 2),
        ("options", ["options of the selection must be equal on all processes"] * 2),
        ("max_labels", [f"process {1 - r} .* does not call sigmoid_loss with max_labels={1 + r}" for r in (0, 1)]),
        ("bias of labels", [rf"does not call sigmoid_loss with max_labels=1 and logit_bias={b}" for b in (-1.0, -2.0)]),
        ("bias of pairs", [rf"does not call pair_loss with loss='sigmoid', logit_bias={b}" for b in (-1.0, -2.0)]),
        ("set_classes", ["tokens must be equal on all processes"] * 2),
        ("unknown token", ["tokens must be ids in"] * 2),
        ("classes", ["^18$"] * 2),  # after these errors the previous classes are in use
        ("pairs", ["got ShardedSkipCLIP with 9 of them. Call parallel.pair_loss"] * 2),
        ("several labels", ["got ShardedSkipCLIP with 9 of them. Call parallel.sigmoid_loss"] * 2),
        ("modes", ["process 1 .* does not call a training step, as process 0 does", "process 0 .* not call predict"]),
        ("draws", [f"sampler of process {other} of process_group has another state" for other in (1, 0)]),
        ("decay", [f"sampler of process {other} of process_group has another state" for other in (1, 0)]),
    ],
)
def test_difference_is_raised_on_every_process(found, name, messages):
    for got, message in zip(found, messages, strict=True):
        assert re.search(message, str(got[name]))
