"""Time an epoch of tuning (features at the cut, steps with updates, evaluation) against the published one.

    python -m bench.epoch                                             ViT-B/32, 40 classes, 4 images of each, 200 tests
    python -m bench.epoch --model ViT-B-16 --classes 50 --shots 16 --precision bf16

    published              features at the cut of the images once, of the texts again in each epoch; the published step
                           (bench/published.py); evaluation encodes all texts again for each 100 test images
    full fine-tuning       every layer, on images, all classes and tokens; the same evaluation
    skipkernels            features in memory, `FusedSGD`, evaluation from features at the cut
    skipkernels, on disk   the same from a `FeatureCache` in bf16

Images and weights are random; the batches are those of the class-pure sampler, the same for all. The mean losses of the
epoch are compared, the published one with ours. A row per implementation is appended to bench/results/DEVICE/epoch.csv
as soon as it is measured. Times are of one epoch, a sum over many steps.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

import skipkernels as sk
from skipkernels.app.train.model import RANDOM, load_model
from skipkernels.features import BatchSampler
from skipkernels.selection import RankSampler

from . import measure
from .budget import NO_TIME, add_budget
from .inputs import autocast, class_names, parser
from .published import PublishedStep
from .training import full_step

_EVALUATED = 100  # images at once, as published
_RATE = {"lr": 1e-5, "momentum": 0.9, "weight_decay": 5e-4}
# Relative difference of the mean loss from the published one: rounding accumulated in training. In bf16 also equal
# rounded scores, which select other classes, and features stored in bf16.
_SLACK = {"fp32": 1e-3, "bf16": 2e-2}
PUBLISHED, FULL, OURS, ON_DISK = "published", "full fine-tuning", "skipkernels", "skipkernels, on disk"
IMPLEMENTATIONS = (OURS, ON_DISK, PUBLISHED, FULL)
_COLUMNS = "implementation model images tests B C skip_layers precision steps features_s training_s".split()
_COLUMNS += "evaluation_s epoch_s step_ms faster loss note".split()

Train = Callable[[Sequence[int]], Tensor]
"""A training step that returns its loss, from the indices of a batch."""
Parts = tuple[Train, Callable[[], Any], float]
"""A training step, an evaluation, and the seconds spent on features."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, model="ViT-B-32", batch=4, classes=40)
    options.add_argument("--shots", type=int, default=4, help="training images of each class")
    options.add_argument("--tests", type=int, default=200, help="test images")
    options.add_argument("--implementation", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    options.add_argument("--longest", type=float, default=180.0, help="seconds that the steps of someone may take")
    add_budget(options)
    args = options.parse_args(arguments)
    task, found = Task(args), {}
    for name in args.implementation:
        left = args.budget.allows(2 * found[OURS]["epoch_s"] if OURS in found else 0.0)
        found[name] = task.run(name) if left else {"note": NO_TIME}
        row: dict[str, Any] = dict.fromkeys(_COLUMNS, "") | {"implementation": name, "model": args.model}
        row |= {
            "images": len(task.train),
            "tests": args.tests,
            "B": args.batch,
            "C": args.classes,
            "skip_layers": args.skip_layers,
        }
        row |= {"precision": args.precision} | found[name]
        if "epoch_s" in found[name] and "epoch_s" in found.get(OURS, {}) and name != OURS:
            row["faster"] = round(row["epoch_s"] / found[OURS]["epoch_s"], 3)
        refuse_another_loss(found, args.precision)
        print(shown(row))
        measure.save(args, [row], "epoch")


def shown(row: dict[str, Any]) -> str:
    """The printed line of a row."""
    if row["note"]:
        return f"{row['implementation']:22} {row['note']}"
    times = f"features {row['features_s']:.1f} s, {row['steps']} steps {row['training_s']:.1f} s, "
    times += f"evaluation {row['evaluation_s']:.1f} s: {row['epoch_s']:.1f} s"
    return f"{row['implementation']:22} {times}, loss {row['loss']:.4f}"


def refuse_another_loss(found: dict[str, dict[str, Any]], precision: str) -> None:
    """Exit if our mean loss differs from the published one."""
    losses = {name: found[name]["loss"] for name in (PUBLISHED, OURS, ON_DISK) if "loss" in found.get(name, {})}
    for name, loss in losses.items():
        slack = _SLACK["bf16" if name == ON_DISK else precision]
        if PUBLISHED in losses and not math.isclose(loss, losses[PUBLISHED], rel_tol=slack):
            raise SystemExit(f"the epoch of {name} has the loss {loss}, and the published one {losses[PUBLISHED]}")


class Images(torch.utils.data.Dataset):
    """Random images [3, height, width], class by class, deterministic by index."""

    def __init__(self, classes: int, each: int, size: tuple[int, int], seed: int):
        self.labels = [label for label in range(classes) for _ in range(each)]
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + item)
        return torch.randn(3, *self.size, generator=generator), self.labels[item]


class Task:
    """The common inputs of all implementations: model, prompts, images, and the order of the batches."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.model, _, tokenizer = load_model(args.model, RANDOM, args.device)
        self.tokens = tokenizer([f"a photo of a {name}." for name in class_names(args.classes)]).to(args.device)
        size = self.model.visual.image_size
        self.train = Images(args.classes, args.shots, size, seed=1)
        tests = Images(args.classes, math.ceil(args.tests / args.classes), size, seed=2)
        self.tests = [tests[item][0] for item in range(args.tests)]

    def batches(self) -> list[list[int]]:
        """Indices of the images of each batch of the epoch."""
        return list(BatchSampler(torch.tensor(self.train.labels), self.args.batch, "class_pure"))

    def sampler(self) -> RankSampler:
        """A sampler of kept classes, with the same draws for every implementation."""
        return RankSampler(generator=torch.Generator().manual_seed(0))

    def images(self, items: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images and labels of a batch of indices."""
        images, labels = zip(*(self.train[item] for item in items), strict=True)
        return torch.stack(images).to(self.args.device), torch.tensor(labels, device=self.args.device)

    def tested(self) -> Iterator[Tensor]:
        """Batches of test images, of the published size."""
        for start in range(0, len(self.tests), _EVALUATED):
            yield torch.stack(self.tests[start : start + _EVALUATED]).to(self.args.device)

    def run(self, name: str) -> dict[str, Any]:
        """Run an epoch and return the columns of its row."""
        with tempfile.TemporaryDirectory() as folder:
            parts = {OURS: self._ours, ON_DISK: self._ours, PUBLISHED: self._published, FULL: self._full}[name]
            train, evaluate, features_s = parts(Path(folder) if name == ON_DISK else None)
            batches, losses, started = self.batches(), [], time.perf_counter()
            for step, batch in enumerate(track(batches, name, transient=True), 1):
                losses.append(train(batch))
                if step == 1 and (time.perf_counter() - started) * len(batches) > self.args.longest:
                    pace = time.perf_counter() - started
                    return {"note": f"left out: {len(batches)} steps of about {pace:.1f} s"}
            mean = torch.stack(losses).mean().item()  # waits for the device
            training_s, started = time.perf_counter() - started, time.perf_counter()
            with torch.no_grad(), self.autocast():
                evaluate()
            measure.synchronize(self.args.device)
            evaluation_s = time.perf_counter() - started
        total = features_s + training_s + evaluation_s
        row = {"steps": len(batches), "loss": round(mean, 6), "step_ms": round(1000 * training_s / len(batches), 1)}
        row |= {"features_s": features_s, "training_s": training_s, "evaluation_s": evaluation_s, "epoch_s": total}
        return {key: round(value, 3) if key.endswith("_s") else value for key, value in row.items()}

    def autocast(self) -> torch.autocast:
        """Autocast of the precision."""
        return autocast(self.args.device, self.args.precision)

    def _ours(self, folder: Path | None) -> Parts:
        started, skip = time.perf_counter(), self.args.skip_layers
        clip = sk.SkipCLIP(copy.deepcopy(self.model), self.tokens, skip_layers=skip, generator=self.sampler().generator)
        with self.autocast():
            if folder is None:
                train = sk.FeatureCache.in_memory(self.train, clip.encode_lower)
            else:
                train = sk.FeatureCache.build(folder, clip, self.train, dtype="bf16", progress=False)
            tested = [clip.encode_lower(images) for images in self.tested()]
        features_s = time.perf_counter() - started
        optimizer = sk.FusedSGD(clip.trainable_parameters(), **_RATE)
        loader = iter(train.loader(self.args.batch, "class_pure", device=self.args.device))
        step = self._step(lambda _: clip(*next(loader)).loss, optimizer)
        return step, lambda: [clip.predict(features) for features in tested], features_s

    def _published(self, _: Path | None) -> Parts:
        started, model = time.perf_counter(), copy.deepcopy(self.model)
        with self.autocast():
            step = PublishedStep(model, self.tokens, self.args.skip_layers, self.sampler())
            every = range(len(self.train))
            parts = [every[start : start + _EVALUATED] for start in range(0, len(every), _EVALUATED)]
            features = torch.cat([step.image_features(self.images(part)[0]) for part in parts])
        features_s = time.perf_counter() - started
        labels = torch.tensor(self.train.labels, device=self.args.device)
        return *self._plain(model, lambda batch: step(features[batch], labels[batch])[0]), features_s

    def _full(self, _: Path | None) -> Parts:
        model = copy.deepcopy(self.model).requires_grad_(True)
        model.logit_scale.requires_grad_(False)
        step = full_step(model, self.tokens)
        return *self._plain(model, lambda batch: step(*self.images(batch))), 0.0

    def _plain(self, model: Any, loss: Callable[[Any], Tensor]) -> tuple[Train, Callable[[], Any]]:
        """A step with `torch.optim.SGD`, and the published evaluation."""
        optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], **_RATE)
        evaluate = lambda: [model.get_logits(images, self.tokens)[0] for images in self.tested()]  # noqa: E731
        return self._step(loss, optimizer), evaluate

    def _step(self, loss_of: Callable[[Any], Tensor], optimizer: torch.optim.Optimizer) -> Train:
        def step(batch: Sequence[int]) -> Tensor:
            with self.autocast():
                loss = loss_of(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step


if __name__ == "__main__":
    main()
