"""`ShardedSkipCLIP`: several processes train as one process does with the images of all."""

from __future__ import annotations

import contextlib
import copy
import io
import runpy
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import skipkernels as sk
from skipkernels.clip import SkipOutput
from skipkernels.digests import digests
from skipkernels.towers import watch
from tests.models import tiny_batch, tiny_tokens
from tests.parallel.sharded import CLASSES, small_clip, tokens_of
from tests.processes import run_in_processes
from tests.reference_step import assert_close_by_name

STEPS = 2
SIZES = (2, 4)
EXAMPLE = Path(__file__).parents[2] / "examples" / "many_processes.py"
FP64 = 1e-10  # relative: sums in another order, through a few blocks

# Settings of each training, and its labels: by default random, in batches of 8 images.
TRAININGS: dict[str, dict[str, Any]] = {
    "resample": {},
    "ragged": {"batches": [7, 5], "tail": "fixed", "memory": "min"},
    "uncut_every_class": {"skip_layers": 0, "keep_ratio": 1.0},
    "fewer_images_than_processes": {"batches": [3, 1], "wrap": True},
    # Five classes are kept, four of which belong to process 0: others have no label, and at most one has a class.
    "one_owner": {
        "keep_ratio": 2,
        "decay": 0.01,
        "batches": [4] * 2,
        "labels": [0, 4, 8, 16],
        "label_smoothing": 0.1,
        "wrap": True,
    },
    "templates_weights": {"templates": 2, "weights": True, "label_smoothing": 0.2, "train_logit_scale": True},
    "ddp_no_sync": {"wrap": True, "accumulate": 2, "train_logit_scale": True},
    "set_classes": {"replace": 21, "batches": [8]},
    "pairs": {"loss": "pairs", "batches": [9, 3], "train_logit_scale": True, "templates": 2},
    "captions": {"loss": "captions", "batches": [7, 3]},
    "pairs_sigmoid": {"loss": "pairs", "of_pairs": {"loss": "sigmoid", "logit_bias": -1.5}, "batches": [9, 3]},
    "pairs_chunked": {"loss": "pairs", "of_pairs": {"chunk": 1}, "batches": [9, 3], "train_logit_scale": True},
    "captions_sigmoid_chunked": {
        "loss": "captions",
        "of_pairs": {"loss": "sigmoid", "chunk": 2},
        "batches": [7, 3],
        "train_logit_scale": True,
    },
    "sigmoid": {"loss": "sigmoid", "batches": [7, 3], "train_logit_scale": True},
    "image_only": {"train_text": False, "batches": [7, 3]},
}
OF_TWO = ("resample", "ragged", "ddp_no_sync", "pairs", "sigmoid")  # trainings that two processes run too


def part(x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    return x.tensor_split(size)[rank]


def train(
    clip: sk.SkipCLIP,
    rank: int = 0,
    size: int = 1,
    *,
    batches: list[int] | None = None,
    labels: list[int] | None = None,
    wrap: bool = False,
    accumulate: int = 1,
    loss: str = "",
    of_pairs: dict[str, Any] | None = None,
    first: int = 0,
    last: int = STEPS,
) -> dict[str, Any]:
    """Train some steps with this process's part of each batch; return losses, classes, gradients and weights."""
    sharded = isinstance(clip, sk.parallel.ShardedSkipCLIP)
    forward = DistributedDataParallel(clip) if wrap and sharded else clip
    optimizer = torch.optim.SGD(clip.parameter_groups(text_lr=0.05, image_lr=0.05), momentum=0.9)
    losses, ids = [], []
    for step in range(first, min(last, len(batches or [8] * STEPS))):
        images, drawn = tiny_batch((batches or [8] * STEPS)[step], CLASSES, seed=step)
        drawn = drawn if labels is None else torch.tensor(labels)
        for number in range(accumulate):
            own = [part(part(x, number, accumulate), rank, size) for x in (images.to(clip.images.tower.dtype), drawn)]
            waits = wrap and sharded and number + 1 < accumulate
            with forward.no_sync() if waits else contextlib.nullcontext():
                out = output(forward, loss, *own, **of_pairs or {})
                (out.loss / accumulate).backward()
            losses.append(out.loss.item())
            ids.append(out.class_ids)
        if sharded and not wrap:
            sk.parallel.all_reduce_gradients(clip)
        gradients = {name: p.grad.clone() for name, p in clip.model.named_parameters() if p.requires_grad}
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "ids": ids, "gradients": gradients, "weights": dict(clip.model.state_dict())}


def losses_of(clip: Any) -> Any:
    return sk.parallel if isinstance(clip, sk.parallel.ShardedSkipCLIP) else sk.pairs


def output(forward: Any, kind: str, images: torch.Tensor, labels: torch.Tensor, **options: Any) -> SkipOutput:
    """A step of one of the losses."""
    losses = losses_of(forward)
    if kind == "sigmoid":
        multiple = sum(torch.nn.functional.one_hot(x % CLASSES, CLASSES) for x in (labels, labels + 5))
        out = losses.sigmoid_loss(forward, images, multiple, max_labels=2, logit_bias=-1.5)
        assert out.targets.equal(multiple[:, out.class_ids].bool())
    elif kind:
        captions = labels if kind == "pairs" else tokens_of(1)[labels]
        out = SkipOutput(losses.pair_loss(forward, images, captions, **options), images, labels.new_empty(0), labels)
    else:
        out = forward(images, labels)
        assert out.class_ids[out.targets].equal(labels)
    return out


def split(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of `train`, and those of SkipCLIP."""
    names = ("batches", "labels", "wrap", "accumulate", "loss", "of_pairs")
    return {k: v for k, v in settings.items() if k in names}, {k: v for k, v in settings.items() if k not in names}


def alone(settings: dict[str, Any]) -> dict[str, Any]:
    options, of_clip = split(settings)
    return train(small_clip(**of_clip), **options)


# ---- in each process ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, int]]]:
    """Names of the collectives, and bytes that each process gives."""
    messages: list[tuple[str, int]] = []
    names = [name for name in ("all_gather_single", "reduce_scatter_single") if hasattr(dist, name)]
    names = names or ["all_gather_into_tensor", "reduce_scatter_tensor"]
    before = {name: getattr(dist, name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in before.items():

            def record(out, x, *, name=name, function=function, **options):
                messages.append((name.partition("_single")[0], x.nbytes))
                return function(out, x, **options)

            patch.setattr(dist, name, record)
        yield messages


def in_process(rank: int, size: int, folder: Path) -> dict[str, Any]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = dist.group.WORLD
    found: dict[str, Any] = {}
    for name in OF_TWO if size == 2 else TRAININGS:
        options, of_clip = split(TRAININGS[name])
        found[name] = train(small_clip(group, **of_clip), rank, size, **options)

    images, labels = tiny_batch(8, CLASSES)
    own = part(images, rank, size), part(labels, rank, size)
    clip = small_clip(group, dtype=torch.float32)
    with recorded() as found["messages"]:
        clip(own[0].float(), own[1]).loss.backward()
    clip = small_clip(group)
    found["loss"] = clip.loss(clip.encode_image(own[0]), own[1]).item()
    clip = small_clip(group)
    clip(*own)
    found["copy"] = copy.deepcopy(clip)(*own).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        found["bf16"] = small_clip(group, dtype=torch.float32)(own[0].float(), own[1]).loss.item()
    with torch.no_grad():
        clip = small_clip(group).eval()
        found["class_embeddings"] = clip.class_embeddings()
        clip.class_embeddings().zero_()  # a copy
        found["evaluated"] = clip(images, labels).loss.item()
        others = tiny_tokens(5, seed=4)
        found["other_classes"] = clip.predict(images, tokens=others), clip.predict(images[:0], tokens=others)
        found["evaluation"] = evaluations(clip, rank, size)
        found["ties"] = ties(clip, rank, size)
    found["text_cache"] = text_caches(group, own, folder / f"texts {size}")

    # A state saved by process 0, then loaded by each.
    clip, file = small_clip(group), folder / f"state of {size}.pt"
    train(clip, rank, size, last=1)
    if rank == 0:
        torch.save(clip.state_dict(), file)
    dist.barrier()
    clip = small_clip(group)
    clip.load_state_dict(torch.load(file))
    found["resumed"] = train(clip, rank, size, first=1)
    dist.destroy_process_group()
    return found


def evaluations(clip: sk.SkipCLIP, rank: int, size: int) -> list[Any]:
    """Logits and classes of the own images among seven, and among three: fewer than processes."""
    found: list[Any] = []
    for batch in (7, 3):
        own = part(tiny_batch(batch, CLASSES)[0], rank, size)
        found.append([clip.predict(own), *(clip.top_k(own, k) for k in (1, 5, CLASSES))])
    assert len(clip.texts.kept_embeddings()) <= -(-CLASSES // size), "no [C, D]"
    return found


def integers() -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings with many equal logits."""
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randint(-1, 2, (n, 3), generator=generator).double() for n in (8, CLASSES))
    return image, text


def ties(clip: sk.SkipCLIP, rank: int, size: int) -> Any:
    image, text = integers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "_scaled_image_and_classes", lambda x: (part(image, rank, size), text[rank::size]))
        return [clip.top_k(part(image, rank, size), k) for k in (1, 2, 7, CLASSES)]


def text_caches(group: Any, own: tuple[torch.Tensor, torch.Tensor], folder: Path) -> list[tuple[float, float]]:
    """Losses of two steps without a folder, with a new one and with the same."""
    found = []
    for text_cache in (None, folder, folder):
        clip = small_clip(group, dtype=torch.float32, text_cache=text_cache)
        found.append(tuple(clip(own[0].float(), own[1]).loss.item() for _ in range(2)))
    return found


# ---- their results -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def results(folder) -> dict[int, list[dict[str, Any]]]:
    return {size: run_in_processes(size, folder, in_process, size, folder) for size in reversed(SIZES)}


def assert_same_training(processes: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for got in processes:
        assert got["losses"] == processes[0]["losses"], "to the bit"
        assert all(map(torch.equal, got["ids"], expected["ids"]))
        assert got["losses"] == pytest.approx(expected["losses"], rel=FP64)
        for kind in ("gradients", "weights"):
            assert_close_by_name(got[kind], expected[kind], FP64)
    for name, weight in processes[0]["weights"].items():
        assert all(other["weights"][name].equal(weight) for other in processes), name


@pytest.mark.parametrize("name", TRAININGS)
def test_training_matches_one_process(results, name):
    expected = alone(TRAININGS[name])
    for size in SIZES if name in OF_TWO else (4,):
        assert_same_training([got[name] for got in results[size]], expected)


def test_autocast_matches_one_process(results):
    images, labels = tiny_batch(8, CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        expected = small_clip(dtype=torch.float32)(images.float(), labels).loss.item()
    for processes in results.values():
        # Parts of a batch round cosines to 8 bits in other places; the temperature multiplies them by 14.
        assert [got["bf16"] for got in processes] == pytest.approx([expected] * len(processes), abs=14 * 2**-8)


def test_evaluation_matches_one_process(results):
    clip = small_clip().eval()
    images, labels = tiny_batch(8, CLASSES)
    with torch.no_grad():
        loss, classes = clip(images, labels).loss.item(), clip.class_embeddings()
        others = clip.predict(images, tokens=tiny_tokens(5, seed=4))
    for processes in results.values():
        for got in processes:
            assert got["evaluated"] == pytest.approx(loss, rel=FP64)
            torch.testing.assert_close(got["class_embeddings"], classes, rtol=FP64, atol=FP64)
            found, of_none = got["other_classes"]
            torch.testing.assert_close(found, others, rtol=FP64, atol=FP64)  # of another number of threads
            assert of_none.shape == (0, 5)


EVALUATIONS: dict[str, Callable[[sk.SkipCLIP], object]] = {
    "step": lambda clip: clip(*tiny_batch(2, CLASSES)),
    "loss": lambda clip: clip.loss(torch.ones(2, clip.prototypes.shape[1]).double(), torch.tensor([3, 4])),
    "predict": lambda clip: clip.predict(tiny_batch(2, CLASSES)[0]),
    "sigmoid_loss": lambda clip: losses_of(clip).sigmoid_loss(
        clip, tiny_batch(2, CLASSES)[0], torch.zeros(2, CLASSES), max_labels=1
    ),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation_reads_the_weights_as_often_as_one_process(group, monkeypatch, name):
    reads: list[int] = []
    clips = small_clip(group).eval(), small_clip().eval()
    monkeypatch.setattr(watch, "digests", lambda tensors: reads.append(1) or digests(tensors))
    counts = []
    for clip in clips:
        with torch.no_grad():
            EVALUATIONS[name](clip)
            reads.clear()
            EVALUATIONS[name](clip)
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0


def test_predict_and_top_k_match_one_process(results):
    expected = evaluations(small_clip().eval(), 0, 1)
    image, text = integers()
    order = (image @ text.T).sort(dim=1, descending=True, stable=True)
    for size, processes in results.items():
        for rank, got in enumerate(processes):
            for (logits, *top), (whole, *top_of_all) in zip(got["evaluation"], expected, strict=True):
                torch.testing.assert_close(logits, part(whole, rank, size), rtol=FP64, atol=FP64)
                for (values, ids), (all_values, all_ids) in zip(top, top_of_all, strict=True):
                    torch.testing.assert_close(values, part(all_values, rank, size), rtol=FP64, atol=FP64)
                    assert ids.equal(part(all_ids, rank, size))
            for values, ids in got["ties"]:  # of equal logits the lower class first
                k = ids.shape[1]
                assert values.equal(part(order.values[:, :k], rank, size))
                assert ids.equal(part(order.indices[:, :k], rank, size))


def test_loss_of_embeddings_matches_one_process(results):
    clip, (images, labels) = small_clip(), tiny_batch(8, CLASSES)
    expected = clip.loss(clip.encode_image(images), labels).item()
    for processes in results.values():
        assert [got["loss"] for got in processes] == pytest.approx([expected] * len(processes), rel=FP64)


def test_text_cache_is_shared_out(results, folder):
    """Each process opens the rows of its own classes; the results are those without a folder, to the bit."""
    for size, processes in results.items():
        for got in processes:
            assert len(set(got["text_cache"])) == 1
        texts = folder / f"texts {size}"
        parts = sorted(path.name for path in texts.iterdir())
        assert parts == [f"process_{rank}_of_{size}" for rank in range(size)]
        assert all((texts / name / "features").is_dir() for name in parts)


def test_copy_continues_with_the_processes(results):
    clip = small_clip()
    batch = tiny_batch(8, CLASSES)
    clip(*batch)
    expected = clip(*batch).loss.item()
    for processes in results.values():
        assert [got["copy"] for got in processes] == pytest.approx([expected] * len(processes), rel=FP64)


def test_messages_of_a_step(results):
    """Bytes that a process sends in a step with 8 images, besides gradients; docs/many-processes.md."""
    for size, processes in results.items():
        B, D, own = 8, 12, -(-8 // size)
        # Sizes and draws, labels, image embeddings, scores, shares of the loss
        sent = [24, 8 * own, 4 * own * D, 4 * -(-CLASSES // size), 16 * B]
        expected = [*(("all_gather", number) for number in sent), ("reduce_scatter", 4 * size * own * D)]
        assert [[tuple(x) for x in got["messages"]] for got in processes] == [expected] * size


def test_state_of_one_process_continues_in_all(results, folder):
    expected = small_clip()
    train(expected, last=1)
    expected = train(expected, first=1)
    for size in SIZES:
        assert_same_training([got["resumed"] for got in results[size]], expected)
    with pytest.raises(ValueError, match=r"is of other processes; got .*processes=4.*, expected .*processes=1"):
        small_clip().load_state_dict(torch.load(folder / "state of 4.pt"))


# ---- the example ----------------------------------------------------------------------------------------------------


def example(rank: int) -> str:
    sys.argv = ["many_processes.py", "--epochs", "1", "--max-classes", "5"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return printed.getvalue()


def test_example_matches_one_process(group, tmp_path):
    printed, of_second = run_in_processes(2, tmp_path, example)
    assert of_second == ""
    loss, accuracy = runpy.run_path(str(EXAMPLE))["tune"](torch.device("cpu"), epochs=1, max_classes=5)
    assert printed == f"loss {loss:.4f}, accuracy {accuracy:.1%}\n"
