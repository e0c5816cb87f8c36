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
from bench.flops import flops_of
from skipkernels.clip import SkipOutput
from skipkernels.features.table import Layout
from skipkernels.parallel.class_parallel import ClassParallel
from skipkernels.towers.base import UnsupportedModel
from tests.models import tiny_batch, tiny_clip, tiny_tokens, uncompared
from tests.processes import run_in_processes

CLASSES, STEPS = 18, 2
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


def tokens_of(templates: int) -> torch.Tensor:
    every = [tiny_tokens(CLASSES, seed=seed + 1) for seed in range(templates)]  # without equal prompts, which tie
    return torch.stack(every, dim=1) if templates > 1 else every[0]


def small_clip(group: Any = None, *, templates: int = 1, dtype: torch.dtype = torch.float64, **settings) -> sk.SkipCLIP:
    settings = {"skip_layers": 1 / 3, "keep_ratio": 4, "decay": 0.3} | settings
    if settings.pop("weights", False):
        settings["class_weight"] = torch.arange(1, CLASSES + 1) / 4
    replace = settings.pop("replace", None)
    model, tokens = tiny_clip(dtype), tokens_of(templates)
    if group is None:
        clip = sk.SkipCLIP(model, tokens, **settings)
    else:
        clip = sk.parallel.ShardedSkipCLIP(model, tokens, process_group=group, **settings)
    if replace is not None:
        clip.set_classes(tiny_tokens(replace, seed=7))
    return clip


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


def caught(function, *arguments, **options) -> str:
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@uncompared()
def in_process(rank: int, size: int, folder: Path) -> dict[str, Any]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = dist.group.WORLD
    found: dict[str, Any] = {}
    for name in OF_TWO if size == 2 else TRAININGS:
        options, of_clip = split(TRAININGS[name])
        found[name] = train(small_clip(group, **of_clip), rank, size, **options)

    clip = small_clip(group)
    images, labels = tiny_batch(8, CLASSES)
    own = part(images, rank, size), part(labels, rank, size)
    with recorded() as sent:
        clip(*own).loss.backward()
    found["messages"] = sent
    found["copy"] = copy.deepcopy(clip)(*own).loss.item()
    clip = small_clip(group, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        clip(own[0].float(), own[1]).loss.backward()
    sk.parallel.all_reduce_gradients(clip)
    found["bf16"] = {name: p.grad for name, p in clip.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        clip = small_clip(group).eval()
        found["class_embeddings"], found["evaluated"] = clip.class_embeddings(), clip(images, labels).loss.item()
        others = tiny_tokens(5, seed=4)
        found["other_classes"] = clip.predict(images, tokens=others), clip.predict(images[:0], tokens=others)
        found["evaluation"] = evaluations(clip, rank, size)
        found["ties"] = ties(clip, rank, size)
    found["text_cache"] = text_caches(group, own, folder / f"texts {size}")
    found["work"] = work_of_a_step(group, own)

    # A state saved by process 0, then loaded by each.
    clip, file = small_clip(group), folder / f"state of {size}.pt"
    train(clip, rank, size, last=1)
    if rank == 0:
        torch.save(clip.state_dict(), file)
    dist.barrier()
    clip = small_clip(group)
    clip.load_state_dict(torch.load(file))
    found["resumed"] = train(clip, rank, size, first=1)
    if size == 2:
        found["wrapped_pairs"] = {
            (sharded, chunk): wrapped_pairs(group if sharded else None, chunk, own)
            for sharded in (False, True)
            for chunk in (None, 3)
        }
        found["errors"] = errors(rank, group)
    dist.destroy_process_group()
    return found


class PairStep(torch.nn.Module):
    """A module that calls `pair_loss` in its forward, for `DistributedDataParallel`."""

    def __init__(self, clip: sk.SkipCLIP, chunk: int | None):
        super().__init__()
        self.clip, self.chunk = clip, chunk

    def forward(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        losses = losses_of(self.clip)
        return losses.pair_loss(self.clip, images, ids, loss="sigmoid", logit_bias=-1.5, chunk=self.chunk)


def wrapped_pairs(group: Any, chunk: int | None, own: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    clip = small_clip(group)
    step = DistributedDataParallel(PairStep(clip, chunk))  # averages gradients while it exists
    step(*own).backward()
    return {name: p.grad for name, p in clip.model.named_parameters() if p.requires_grad}


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


def work_of_a_step(group: Any, own: tuple[torch.Tensor, torch.Tensor]) -> list[Any]:
    """FLOPs of a step, its messages, own classes among the kept ones, and their tokens."""
    clip = small_clip(group, dtype=torch.float32)
    features = clip.encode_lower(own[0].float())
    clip(features, own[1])  # computes the features of texts at the cut
    found: list[Any] = []
    with recorded() as sent:
        flops = flops_of(lambda: found.append(clip(features, own[1])) or found[0].loss.backward())
    class_ids, size = found[0].class_ids, clip.shards.size
    class_ids = class_ids[class_ids % size == clip.shards.rank] // size
    prompts = clip.texts.templates[0]
    return [flops, sent, len(class_ids), int(prompts.suffix_lengths[class_ids].sum()), prompts.prefix_length]


def errors(rank: int, group: Any) -> dict[str, Any]:
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
    found["set_classes"] = caught(clip.set_classes, tiny_tokens(6, seed=rank))
    found["classes"] = clip.num_classes
    found["pairs"] = caught(sk.pairs.pair_loss, clip, images, labels)
    if rank:
        clip.sampler.generator.manual_seed(5)
    found["draws"] = caught(clip, images, labels)
    clip.sampler.generator.manual_seed(5)
    clip.sampler.decay = 0.3 + rank
    found["decay"] = caught(clip, images, labels)
    found["modes"] = caught(clip.predict, images) if rank else caught(clip, images, labels)
    return found


# ---- their results -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def results(folder) -> dict[int, list[dict[str, Any]]]:
    return {size: run_in_processes(size, folder, in_process, size, folder) for size in reversed(SIZES)}


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    largest = max(x.norm() for x in expected.values())
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        # Far below the largest, a gradient is rounding only, such as that of a key's bias.
        assert (got[name] - x).norm() <= tolerance * max(x.norm(), 1e-3 * largest), name


def assert_same_training(processes: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for got in processes:
        assert got["losses"] == processes[0]["losses"], "to the bit"
        assert all(map(torch.equal, got["ids"], expected["ids"]))
        assert got["losses"] == pytest.approx(expected["losses"], rel=FP64)
        for kind in ("gradients", "weights"):
            assert_close(got[kind], expected[kind], FP64)
    for name, weight in processes[0]["weights"].items():
        assert all(other["weights"][name].equal(weight) for other in processes), name


@pytest.mark.parametrize("name", TRAININGS)
def test_training_matches_one_process(results, name):
    expected = alone(TRAININGS[name])
    for size in SIZES if name in OF_TWO else (4,):
        assert_same_training([got[name] for got in results[size]], expected)


def test_chunks_of_pairs_within_distributed_data_parallel(results):
    """Gradients are those of the whole batch: of each process without a group, of all processes with one."""
    clip = small_clip()
    PairStep(clip, None)(*tiny_batch(8, CLASSES)).backward()
    of_all = {name: p.grad for name, p in clip.model.named_parameters() if p.requires_grad}
    for got in (got["wrapped_pairs"] for got in results[2]):
        assert_close(got[False, 3], got[False, None], FP64)
        for chunk in (None, 3):
            assert_close(got[True, chunk], of_all, FP64)


def test_one_owner_leaves_processes_without_classes_and_labels():
    ids = alone(TRAININGS["one_owner"])["ids"]
    assert all(len(x) == 5 and len(set((x % 4).tolist())) <= 2 for x in ids)


def test_draws_differ_between_steps():
    ids = alone(TRAININGS["resample"])["ids"]
    assert len({tuple(x.tolist()) for x in ids}) == STEPS and len(ids[0]) < CLASSES


def test_bf16_gradients_are_no_worse(results):
    """Gradients of the processes, compared with those of one process, are within twice its error in bf16."""
    images, labels = tiny_batch(8, CLASSES)
    exact, one = small_clip(), small_clip(dtype=torch.float32)
    exact(images, labels).loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        one(images.float(), labels).loss.backward()

    def error(gradients):
        return sum((gradients[name].double() - p.grad).norm() ** 2 for name, p in named if p.requires_grad) ** 0.5

    named = list(exact.model.named_parameters())
    slack = 2 * error({name: p.grad for name, p in one.model.named_parameters()})
    for processes in results.values():
        assert all(error(got["bf16"]) <= slack for got in processes)


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
            assert found.equal(others) and of_none.shape == (0, 5)


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


def test_text_cache_is_shared_out(results, folder):
    """Each process opens the rows of its own classes; the results are those without a folder, to the bit."""
    for size, processes in results.items():
        for got in processes:
            assert len(set(got["text_cache"])) == 1
        texts = folder / f"texts {size}"
        parts = sorted(path.name for path in texts.iterdir())
        assert parts == [f"process_{rank}_of_{size}" for rank in range(size)]
        rows = [Layout.read(texts / name / "prototypes").rows for name in parts]
        assert rows == [len(range(rank, CLASSES, size)) for rank in range(size)]


def test_copy_continues_with_the_processes(results):
    clip = small_clip()
    batch = tiny_batch(8, CLASSES)
    clip(*batch)
    expected = clip(*batch).loss.item()
    for processes in results.values():
        assert [got["copy"] for got in processes] == pytest.approx([expected] * len(processes), rel=FP64)


def messages(size: int, itemsize: int, wide: int) -> list[tuple[str, int]]:
    """Bytes that a process sends in a step with 8 images, besides the mean of the gradients; docs/many-processes.md."""
    B, D, own = 8, 12, -(-8 // size)
    # Sizes and draws, labels, image embeddings, scores, shares of the loss
    sent = [16, 8 * own, itemsize * own * D, wide * -(-CLASSES // size), 2 * 8 * B]
    return [*(("all_gather", number) for number in sent), ("reduce_scatter", wide * size * own * D)]


def test_messages_and_work_of_a_step(results):
    for size, processes in results.items():
        for got in processes:
            assert [tuple(x) for x in got["messages"]] == messages(size, itemsize=8, wide=8)
            assert [tuple(x) for x in got["work"][1]] == messages(size, itemsize=4, wide=4)
        kept = [got["work"][2] for got in processes]
        flops = [got["work"][0] for got in processes]
        assert flops[kept.index(max(kept))] > flops[kept.index(min(kept))] or len(set(kept)) == 1


def test_state_of_one_process_continues_in_all(results, folder):
    expected = small_clip()
    train(expected, last=1)
    expected = train(expected, first=1)
    for size in SIZES:
        assert_same_training([got["resumed"] for got in results[size]], expected)
    with pytest.raises(ValueError, match=r"is of other processes; got .*processes=4.*, expected .*processes=1"):
        small_clip().load_state_dict(torch.load(folder / "state of 4.pt"))


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("tokens", ["tokens must be equal on all processes"] * 2),
        ("generator", ["generator must be equal on all processes"] * 2),
        ("weights", ["weights must be equal on all processes"] * 2),
        ("skip_layers", ["skip_layers and the trained parameters must be equal"] * 2),
        ("options", ["options of the selection must be equal on all processes"] * 2),
        ("max_labels", [f"process {1 - r} .* does not call sigmoid_loss with max_labels={1 + r}" for r in (0, 1)]),
        ("set_classes", ["tokens must be equal on all processes"] * 2),
        ("classes", ["^18$"] * 2),  # after this error the previous classes are in use
        ("pairs", ["got ShardedSkipCLIP with 9 of them. Call parallel.pair_loss"] * 2),
        (
            "modes",
            ["process 1 of process_group does not call clip, as process 0 does", "process 0 .* does not call predict"],
        ),
        ("draws", [f"sampler of process {other} of process_group has another state" for other in (1, 0)]),
        ("decay", [f"sampler of process {other} of process_group has another state" for other in (1, 0)]),
    ],
)
def test_difference_is_raised_on_every_process(results, name, messages):
    for got, message in zip(results[2], messages, strict=True):
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(str(got["errors"][name]))


# ---- one process ---------------------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


BATCH = tiny_batch(2, CLASSES)
REFUSED: list[tuple[Callable[[Any], object], type[Exception], str]] = [
    (lambda group: small_clip("gloo"), TypeError, "process_group must be a torch.distributed.ProcessGroup .* got str"),
    (lambda group: sk.graphed(clip := small_clip(group), torch.optim.SGD(clip.parameters()), 2), RuntimeError,
     "graphed: clip must be"),
    (lambda group: small_clip(group).encode_classes(BATCH[1]), RuntimeError, "encode_classes is not supported"),
    (lambda group: small_clip(group).eval()(*BATCH), RuntimeError, "an evaluation with gradients is not supported"),
    (lambda group: small_clip(group)(*BATCH, return_logits=True), ValueError,
     "labels must be class ids .B. and return_logits False"),
    (lambda group: small_clip(group)(BATCH[0], torch.eye(CLASSES)[BATCH[1]] / 2 + 1 / 2 / CLASSES), ValueError,
     "^ShardedSkipCLIP: labels must be class ids"),
    (lambda group: (clip := small_clip(group)).loss(clip.encode_image(BATCH[0]), BATCH[1]), RuntimeError,
     "ShardedSkipCLIP: loss in training mode is not supported"),
    (lambda group: sk.parallel.all_reduce_gradients(small_clip()), ValueError,
     "all_reduce_gradients: clip must have a process_group"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_call_is_refused(group, call, error, words):
    with pytest.raises(error, match=words):
        call(group)


@pytest.mark.parametrize(
    ("function", "value", "words"),
    [
        ("get_backend_config", "cuda:nccl", "must have gloo or NCCL for tensors on cpu, .* got None. Move the model"),
        ("get_backend_config", "cpu:mpi", "must have gloo or NCCL for tensors on cpu, .* got mpi"),
        ("get_world_size", CLASSES + 1, "at least as many classes as processes; got C=18 and 19 processes"),
    ],
)
def test_group_is_refused(group, monkeypatch, function, value, words):
    monkeypatch.setattr(dist, function, lambda group: value)
    with pytest.raises(ValueError, match=words):
        small_clip(group)


def test_batch_norms_above_the_cut_are_refused(group, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    model = tiny_clip(vision={"layers": (1, 1, 1, 1), "width": 8, "image_size": 32, "head_width": 8})
    with pytest.raises(UnsupportedModel, match="batch norms above the cut must use the images of all processes"):
        sk.parallel.ShardedSkipCLIP(model, tiny_tokens(CLASSES), skip_layers=1, process_group=group)
    monkeypatch.setattr(ClassParallel, "check_equal", lambda *arguments: 1 / 0)  # what follows that check
    with pytest.raises(ZeroDivisionError):
        sk.parallel.ShardedSkipCLIP(model, tiny_tokens(CLASSES), skip_layers=(1.0, 1), process_group=group)


def test_move_keeps_dtype_of_prototypes(group):
    clip = small_clip(group, dtype=torch.float32)
    before = clip.prototypes.clone()
    clip.bfloat16()
    assert clip.prototypes.equal(before) and "prototypes" not in dict(clip.named_buffers())


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
