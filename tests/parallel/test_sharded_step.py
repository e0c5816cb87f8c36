"""`ShardedSkipCLIP`: several processes train as one process does with the images of all."""

from __future__ import annotations

import contextlib
import copy
import io
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import skipkernels as sk
from skipkernels.clip import SkipOutput
from skipkernels.digests import digests
from skipkernels.towers import watch
from tests.models import tiny_batch, tiny_tokens
from tests.parallel.sharded import CLASSES, small_clip, tokens_of
from tests.processes import run_in_processes
from tests.reference_step import assert_close_by_name

SIZES = (2, 4)
EXAMPLE = Path(__file__).parents[2] / "examples" / "many_processes.py"
FP64 = 1e-10  # relative: sums in another order, through a few blocks


class Process(NamedTuple):
    """Process `rank` of `size`, which has its part of each batch."""

    rank: int = 0
    size: int = 1

    def clip(self, **settings: Any) -> Any:
        """A ShardedSkipCLIP, or the SkipCLIP of one process."""
        return small_clip(dist.group.WORLD if self.size > 1 else None, **settings)

    def part(self, x: Tensor) -> Tensor:
        return x.tensor_split(self.size)[self.rank]

    def batch(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """The own images and labels of eight."""
        images, labels = tiny_batch(8, CLASSES, dtype)
        return self.part(images), self.part(labels)


ALONE = Process()

# ---- trainings -------------------------------------------------------------------------------------------------------


class Training(NamedTuple):
    """Steps of a SkipCLIP."""

    clip: dict[str, Any] = {}  # options of `small_clip`
    batches: Sequence[int] = (8, 8)  # images of all processes in each step
    labels: Sequence[int] | None = None  # of each batch; None: random
    loss: str = "classes"  # or "pairs", "captions" or "sigmoid"
    of_pairs: dict[str, Any] = {}  # options of `pair_loss`
    wrap: bool = False  # in DistributedDataParallel
    accumulate: int = 1  # parts of a batch


SCALE = {"train_logit_scale": True}
TRAININGS = {
    "resample": Training(),
    "ragged": Training({"tail": "fixed", "memory": "min"}, (7, 5)),
    "uncut_every_class": Training({"skip_layers": 0, "keep_ratio": 1.0}),
    "fewer_images_than_processes": Training(batches=(3, 1), wrap=True),
    # Five classes are kept, four of which belong to process 0: others have no label, and at most one has a class.
    "one_owner": Training(
        {"keep_ratio": 2, "decay": 0.01, "label_smoothing": 0.1}, (4, 4), labels=(0, 4, 8, 16), wrap=True
    ),
    "templates_weights": Training({"templates": 2, "weights": True, "label_smoothing": 0.2, **SCALE}),
    "ddp_no_sync": Training(SCALE, wrap=True, accumulate=2),
    "set_classes": Training({"replace": 21}, (8,)),
    "pairs": Training({"templates": 2, **SCALE}, (9, 3), loss="pairs"),
    "captions": Training(batches=(7, 3), loss="captions"),
    "pairs_sigmoid": Training(batches=(9, 3), loss="pairs", of_pairs={"loss": "sigmoid", "logit_bias": -1.5}),
    "pairs_chunked": Training(SCALE, (9, 3), loss="pairs", of_pairs={"chunk": 1}),
    "captions_sigmoid_chunked": Training(SCALE, (7, 3), loss="captions", of_pairs={"loss": "sigmoid", "chunk": 2}),
    "sigmoid": Training(SCALE, (7, 3), loss="sigmoid"),
    "image_only": Training({"train_text": False}, (7, 3)),
}
OF_TWO = ("resample", "ragged", "ddp_no_sync", "pairs", "sigmoid")  # trainings that two processes run too


def train(
    process: Process, training: Training, clip: Any = None, first: int = 0, last: int | None = None
) -> dict[str, Any]:
    """Train some of the steps with own parts of their batches; return losses, classes, gradients and weights."""
    clip = process.clip(**training.clip) if clip is None else clip
    sharded = process.size > 1
    forward = DistributedDataParallel(clip) if training.wrap and sharded else clip
    optimizer = torch.optim.SGD(clip.parameter_groups(text_lr=0.05, image_lr=0.05), momentum=0.9)
    losses, ids = [], []
    for step, count in list(enumerate(training.batches))[first:last]:
        images, labels = tiny_batch(count, CLASSES, seed=step)
        labels = labels if training.labels is None else torch.tensor(training.labels)
        parts = list(zip(*(x.tensor_split(training.accumulate) for x in (images, labels)), strict=True))
        for number, (some, their_labels) in enumerate(parts):
            waits = training.wrap and sharded and number + 1 < len(parts)
            with forward.no_sync() if waits else contextlib.nullcontext():
                out = output(forward, training, process.part(some), process.part(their_labels))
                (out.loss / len(parts)).backward()
            losses.append(out.loss.item())
            ids.append(out.class_ids)
        if sharded and not training.wrap:
            sk.parallel.all_reduce_gradients(clip)
        gradients = {name: p.grad.clone() for name, p in clip.model.named_parameters() if p.requires_grad}
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "ids": ids, "gradients": gradients, "weights": dict(clip.model.state_dict())}


def losses_of(clip: Any) -> Any:
    return sk.parallel if isinstance(clip, sk.parallel.ShardedSkipCLIP) else sk.pairs


def output(forward: Any, training: Training, images: Tensor, labels: Tensor) -> SkipOutput:
    """A step of the loss of a training."""
    if training.loss == "classes":
        out = forward(images, labels)
        assert out.class_ids[out.targets].equal(labels)
        return out
    losses = losses_of(forward)
    if training.loss == "sigmoid":
        multiple = sum(torch.nn.functional.one_hot(x % CLASSES, CLASSES) for x in (labels, labels + 5))
        out = losses.sigmoid_loss(forward, images, multiple, max_labels=2, logit_bias=-1.5)
        assert out.targets.equal(multiple[:, out.class_ids].bool())
        return out
    captions = labels if training.loss == "pairs" else tokens_of(1)[labels]
    loss = losses.pair_loss(forward, images, captions, **training.of_pairs)
    return SkipOutput(loss, None, labels.new_empty(0), labels)


def resumed(process: Process, file: Path) -> dict[str, Any]:
    """Train the second step from the state after the first, saved by process 0 and loaded by each."""
    clip = process.clip()
    train(process, Training(), clip, last=1)
    if process.rank == 0:
        torch.save(clip.state_dict(), file)
    dist.barrier()
    clip = process.clip()
    clip.load_state_dict(torch.load(file))
    return train(process, Training(), clip, first=1)


# ---- other calls -----------------------------------------------------------------------------------------------------


def loss_of_embeddings(process: Process) -> float:
    clip, (images, labels) = process.clip(), process.batch()
    return clip.loss(clip.encode_image(images), labels).item()


def loss_of_a_copy(process: Process) -> float:
    """The second step: the copy continues with the draws."""
    clip = process.clip()
    clip(*process.batch())
    return copy.deepcopy(clip)(*process.batch()).loss.item()


def loss_under_autocast(process: Process) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        return process.clip(dtype=torch.float32)(*process.batch(torch.float32)).loss.item()


def loss_of_evaluation(process: Process) -> float:
    """All images on each process, since the loss is that of one process."""
    with torch.no_grad():
        return process.clip().eval()(*tiny_batch(8, CLASSES)).loss.item()


# Functions, and the largest absolute error that is not `FP64`
LOSSES: dict[str, tuple[Callable[[Process], float], float]] = {
    "embeddings": (loss_of_embeddings, 0.0),
    "copy": (loss_of_a_copy, 0.0),
    "evaluation": (loss_of_evaluation, 0.0),
    # Parts of a batch round cosines to 8 bits in other places; the temperature multiplies them by 14.
    "autocast": (loss_under_autocast, 14 * 2**-8),
}


@torch.no_grad()
def embeddings_of_classes(process: Process) -> list[Tensor]:
    """Embeddings of all classes, and again after a change of what the first call returned."""
    clip = process.clip().eval()
    first = clip.class_embeddings()
    return [first.clone(), first.zero_() + clip.class_embeddings()]


@torch.no_grad()
def predictions(process: Process) -> list[Tensor]:
    """Logits, those of other classes, and k best classes of the own images among seven, and among three."""
    found: list[Tensor] = []
    clip = process.clip().eval()
    for count in (7, 3):
        own = process.part(tiny_batch(count, CLASSES)[0])  # of three images one of four processes has none
        found += [clip.predict(own), clip.predict(own, tokens=tiny_tokens(5, seed=4))]
        for k in (1, 5, CLASSES):
            found += clip.top_k(own, k)
    assert len(clip.texts.kept_embeddings()) <= -(-CLASSES // process.size), "no [C, D]"
    return found


def integers() -> tuple[Tensor, Tensor]:
    """Embeddings with many equal logits."""
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randint(-1, 2, (n, 3), generator=generator).double() for n in (8, CLASSES))
    return image, text


@torch.no_grad()
def top_k_of_ties(process: Process) -> list[Any]:
    clip, (image, text) = process.clip().eval(), integers()
    own = process.part(image), text[process.rank :: process.size]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "_scaled_image_and_classes", lambda x: own)
        return [clip.top_k(own[0], k) for k in (1, 2, 7, CLASSES)]


def losses_with_text_cache(process: Process, folder: Path) -> list[tuple[float, ...]]:
    """Losses of two steps without a folder, with a new one and with the same."""
    found = []
    for text_cache in (None, folder, folder):
        clip = process.clip(dtype=torch.float32, text_cache=text_cache)
        found.append(tuple(clip(*process.batch(torch.float32)).loss.item() for _ in range(2)))
    return found


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, int]]]:
    """Names of the collectives, and bytes that each process gives."""
    messages: list[tuple[str, int]] = []
    names = [name for name in ("all_gather_single", "reduce_scatter_single") if hasattr(dist, name)]
    names = names or ["all_gather_into_tensor", "reduce_scatter_tensor"]  # before PyTorch had those
    before = {name: getattr(dist, name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in before.items():

            def record(out, x, *, name=name, function=function, **options):
                messages.append(("_".join(name.split("_")[:2]), x.nbytes))
                return function(out, x, **options)

            patch.setattr(dist, name, record)
        yield messages


def messages_of_a_step(process: Process) -> list[tuple[str, int]]:
    clip = process.clip(dtype=torch.float32)
    with recorded() as messages:
        clip(*process.batch(torch.float32)).loss.backward()
    return messages


# ---- results of all processes ----------------------------------------------------------------------------------------


def in_process(rank: int, size: int, folder: Path) -> dict[str, Any]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    process = Process(rank, size)
    found: dict[str, Any] = {name: train(process, TRAININGS[name]) for name in (OF_TWO if size == 2 else TRAININGS)}
    found |= {f"loss of {name}": function(process) for name, (function, _) in LOSSES.items()}
    for function in (embeddings_of_classes, predictions, top_k_of_ties, messages_of_a_step):
        found[function.__name__] = function(process)
    found["text_cache"] = losses_with_text_cache(process, folder / f"texts {size}")
    found["resumed"] = resumed(process, folder / f"state of {size}.pt")
    dist.destroy_process_group()
    return found


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
    expected = train(ALONE, TRAININGS[name])
    for size in SIZES if name in OF_TWO else (4,):
        assert_same_training([got[name] for got in results[size]], expected)


def test_state_of_one_process_continues_in_all(results, folder):
    clip = ALONE.clip()
    train(ALONE, Training(), clip, last=1)
    expected = train(ALONE, Training(), clip, first=1)
    for size in SIZES:
        assert_same_training([got["resumed"] for got in results[size]], expected)
    with pytest.raises(ValueError, match=r"is of other processes; got .*processes=4.*, expected .*processes=1"):
        small_clip().load_state_dict(torch.load(folder / "state of 4.pt"))


@pytest.mark.parametrize("name", LOSSES)
def test_loss_matches_one_process(results, name):
    function, error = LOSSES[name]
    expected = function(ALONE)
    for processes in results.values():
        for got in processes:
            assert got[f"loss of {name}"] == pytest.approx(expected, rel=FP64, abs=error)


def test_embeddings_of_classes_match_one_process(results):
    expected = embeddings_of_classes(ALONE)
    for got in (got for processes in results.values() for got in processes):
        torch.testing.assert_close(got["embeddings_of_classes"], expected, rtol=FP64, atol=FP64)


def test_predict_and_top_k_match_one_process(results):
    expected = predictions(ALONE)
    for size, processes in results.items():
        for rank, got in enumerate(processes):
            expected_part = [Process(rank, size).part(x) for x in expected]
            torch.testing.assert_close(got["predictions"], expected_part, rtol=FP64, atol=FP64)


def test_top_k_of_equal_logits_has_the_lower_class_first(results):
    image, text = integers()
    order = (image @ text.T).sort(dim=1, descending=True, stable=True)
    for size, processes in results.items():
        for rank, got in enumerate(processes):
            part = Process(rank, size).part
            for values, ids in got["top_k_of_ties"]:
                k = ids.shape[1]
                assert values.equal(part(order.values[:, :k])) and ids.equal(part(order.indices[:, :k]))


def test_text_cache_is_shared_out(results, folder):
    """Each process opens the rows of its own classes; the results are those without a folder, to the bit."""
    for size, processes in results.items():
        for got in processes:
            assert len(set(got["text_cache"])) == 1
        texts = folder / f"texts {size}"
        parts = sorted(path.name for path in texts.iterdir())
        assert parts == [f"process_{rank}_of_{size}" for rank in range(size)]
        assert all((texts / name / "features").is_dir() for name in parts)


def test_messages_of_a_step(results):
    """Bytes that a process sends in a step with 8 images, besides gradients; docs/many-processes.md."""
    for size, processes in results.items():
        B, D, own = 8, 12, -(-8 // size)
        # Sizes and draws, labels, image embeddings, scores, shares of the loss
        sent = [24, 8 * own, 4 * own * D, 4 * -(-CLASSES // size), 16 * B]
        expected = [*(("all_gather", number) for number in sent), ("reduce_scatter", 4 * size * own * D)]
        assert [[tuple(x) for x in got["messages_of_a_step"]] for got in processes] == [expected] * size


# ---- number of evaluations -------------------------------------------------------------------------------------------


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
