"""`ShardedSkipCLIP` on two processes that differ: an error on each, before one waits for the other."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import skipkernels as sk
from skipkernels.parallel import pair_loss, sharded_clip, sigmoid_loss
from tests.models import tiny_batch, tiny_clip, tiny_tokens
from tests.parallel.sharded import CLASSES, small_clip
from tests.processes import run_in_processes


class Process:
    """A process r, and what it calls; `wrong_images` and `wrong_labels` are wrong on process 1 alone."""

    def __init__(self, rank: int):
        self.r, self.clip = rank, small_clip(dist.group.WORLD)
        self.images, self.labels = tiny_batch(2, CLASSES)
        self.wrong_images = self.images * torch.nan if rank else self.images
        self.wrong_labels = self.labels + CLASSES * rank

    def construct(self, tokens: int = 0, seed: int = 0, weights: int = 0, **options: Any) -> None:
        options = {"skip_layers": 1, "generator": torch.Generator().manual_seed(seed), **options}
        model, group = tiny_clip(seed=weights), dist.group.WORLD
        sk.parallel.ShardedSkipCLIP(model, tiny_tokens(CLASSES, seed=tokens), process_group=group, **options)

    def draw(self, **options: Any) -> None:
        """Run a step after a change of the sampler."""
        clip = copy.deepcopy(self.clip)
        clip.sampler.generator.manual_seed(options.pop("seed", 5))
        vars(clip.sampler).update(options)
        clip(self.images, self.labels)

    def set_classes_without_memory(self) -> None:
        error = ValueError("not enough memory")
        build = mock.Mock(side_effect=error) if self.r else sharded_clip.build_texts
        with mock.patch.object(sharded_clip, "build_texts", build):
            self.clip.set_classes(tiny_tokens(6))


Call = Callable[[Process], object]

# A call that process 1 refuses, and words of its error there
OF_ONE: dict[str, tuple[Call, str]] = {
    "images": (lambda p: p.clip(p.wrong_images, p.labels), "NaN"),
    "labels": (lambda p: p.clip(p.images, p.wrong_labels), "labels must be"),
    "labels of loss": (lambda p: p.clip.loss(p.clip.encode_image(p.images), p.wrong_labels), "labels must be"),
    "captions": (lambda p: pair_loss(p.clip, p.images, p.wrong_labels), "pair_loss: captions"),
    "chunk": (lambda p: pair_loss(p.clip, p.images, p.labels, chunk=1 - p.r), "pair_loss: chunk must be"),
    "short captions": (
        lambda p: pair_loss(p.clip, p.images, tiny_tokens(CLASSES)[p.labels, : 8 if p.r else None]),
        "as long as the model's context",
    ),
    "several labels": (
        lambda p: sigmoid_loss(p.clip, p.images, torch.eye(CLASSES)[p.labels] * (1 + p.r), max_labels=1),
        "sigmoid_loss: labels must be 0 or 1",
    ),
    "k": (lambda p: p.clip.top_k(p.images, 1 + p.r * CLASSES), "k must be"),
    "predict": (lambda p: p.clip.predict(p.wrong_images), "NaN"),
    "new tokens": (
        lambda p: p.clip.set_classes(tiny_tokens(6).float() if p.r else tiny_tokens(6)),
        "SkipCLIP: tokens must be",
    ),
    "new texts": (Process.set_classes_without_memory, "not enough memory"),
}

NO_LABELS = torch.zeros(2, CLASSES)
UNKNOWN = tiny_tokens(6).index_put((torch.tensor(1), torch.tensor(1)), torch.tensor(10**6))  # of a class of process 1

# A call in which the processes differ, or that all refuse, and words of the error on each
OF_BOTH: dict[str, tuple[Call, list[str]]] = {
    "tokens": (lambda p: p.construct(tokens=p.r), ["tokens must be equal on all processes"] * 2),
    "generator": (lambda p: p.construct(seed=p.r), ["generator must be equal on all processes"] * 2),
    "weights": (lambda p: p.construct(weights=p.r), ["weights must be equal on all processes"] * 2),
    "skip_layers": (
        lambda p: p.construct(skip_layers=1 + p.r),
        ["skip_layers and the trained parameters must be equal"] * 2,
    ),
    "options": (
        lambda p: p.construct(keep_ratio=0.4 + p.r / 10),
        ["options of the selection must be equal on all processes"] * 2,
    ),
    "max_labels": (
        lambda p: sigmoid_loss(p.clip, p.images, NO_LABELS, max_labels=1 + p.r),
        [f"process {1 - r} .* does not call sigmoid_loss with max_labels={1 + r}" for r in (0, 1)],
    ),
    "bias of labels": (
        lambda p: sigmoid_loss(p.clip, p.images, NO_LABELS, max_labels=1, logit_bias=-1.0 - p.r),
        [rf"does not call sigmoid_loss with max_labels=1 and logit_bias={b}" for b in (-1.0, -2.0)],
    ),
    "bias of pairs": (
        lambda p: pair_loss(p.clip, p.images, p.labels, loss="sigmoid", logit_bias=-1.0 - p.r),
        [rf"does not call pair_loss with loss='sigmoid', logit_bias={b}" for b in (-1.0, -2.0)],
    ),
    "set_classes": (
        lambda p: p.clip.set_classes(tiny_tokens(6, seed=p.r)),
        ["tokens must be equal on all processes"] * 2,
    ),
    "unknown token": (lambda p: p.clip.set_classes(UNKNOWN), ["tokens must be ids in"] * 2),
    "pairs": (
        lambda p: sk.pairs.pair_loss(p.clip, p.images, p.labels),
        ["got ShardedSkipCLIP with 9 of them. Call parallel.pair_loss"] * 2,
    ),
    "several labels of pairs": (  # images are not looked at
        lambda p: sk.pairs.sigmoid_loss(p.clip, p.images * torch.nan, NO_LABELS, max_labels=1),
        ["got ShardedSkipCLIP with 9 of them. Call parallel.sigmoid_loss"] * 2,
    ),
    "methods": (
        lambda p: p.clip.predict(p.images) if p.r else p.clip(p.images, p.labels),
        ["process 1 .* does not call a training step, as process 0 does", "process 0 .* does not call predict"],
    ),
    "draws": (lambda p: p.draw(seed=p.r), [f"sampler of process {r} of .* has another state" for r in (1, 0)]),
    "decay": (lambda p: p.draw(decay=0.3 + p.r), [f"sampler of process {r} of .* has another state" for r in (1, 0)]),
}


def caught(call: Call, process: Process) -> str:
    try:
        call(process)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def errors(rank: int) -> dict[str, Any]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    process = Process(rank)
    found: dict[str, Any] = {name: caught(call, process) for name, (call, _) in (OF_ONE | OF_BOTH).items()}
    clip = process.clip
    with torch.no_grad():
        found["evaluation"] = caught(lambda p: clip.eval()(p.wrong_images, p.labels), process)
        found["works"] = clip.num_classes == CLASSES and clip(process.images, process.labels).loss.item() > 0
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    """Errors on each process, by name."""
    return run_in_processes(2, tmp_path_factory.mktemp("errors"), errors)


@pytest.mark.parametrize("name", OF_ONE)
def test_error_of_one_process_is_raised_on_every_process(found, name):
    """Before a message that others wait for; the next calls work."""
    first, second = (got[name] for got in found)
    assert first.startswith("RuntimeError: ShardedSkipCLIP: process 1 of process_group refused its arguments of ")
    assert re.match(f"ValueError: .*{OF_ONE[name][1]}", second)


@pytest.mark.parametrize("name", OF_BOTH)
def test_difference_is_raised_on_every_process(found, name):
    for got, words in zip(found, OF_BOTH[name][1], strict=True):
        assert re.search(words, got[name])


def test_error_of_one_process_in_evaluation_is_its_own(found):
    assert found[0]["evaluation"] == "" and "NaN" in found[1]["evaluation"]


def test_task_is_in_use_after_the_errors(found):
    assert all(got["works"] for got in found)
