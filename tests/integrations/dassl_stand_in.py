"""A stand-in for Dassl, which is on no package index: the parts of its interface that a trainer builds on.

A registry, `TrainerX` with its loop over labelled batches, which it shuffles, an optimizer and a schedule. It saves and
prints nothing, and configurations are plain objects.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from tests.integrations.problems import Problem


def config(problem: Problem, **options: Any) -> Any:
    """A configuration with what trainers of this file read. `options` are those of TRAINER.SKIPKERNELS."""
    rates = {name.upper(): rate for name, rate in problem.rates().items()}
    defaults = {"SKIP_LAYERS": problem.skip_layers, "KEEP_RATIO": problem.keep_ratio}
    trainer = Node(SKIPKERNELS=Node(**(defaults | rates | options)))
    settings = {name.upper(): value for name, value in problem.settings().items()}
    return Node(
        SEED=0,
        TRAINER=trainer,
        DATASET=Node(NAME="Caltech101"),
        DATALOADER=Node(TRAIN_X=Node(SAMPLER="RandomSampler", BATCH_SIZE=problem.batch_size)),
        INPUT=Node(),
        MODEL=Node(BACKBONE=Node(NAME="pictogram-tiny"), INIT_WEIGHTS=""),
        OPTIM=Node(
            MAX_EPOCH=1,
            LR=1e-3,
            LR_SCHEDULER="cosine",
            STAGED_LR=False,
            WARMUP_EPOCH=-1,
            WARMUP_RECOUNT=True,
            **settings,
        ),
    )


class Node(SimpleNamespace):
    """A node of a configuration."""

    def merge_from_list(self, options: list[Any]) -> None:
        for name, value in zip(options[::2], options[1::2], strict=True):
            *path, last = name.split(".")
            node: Any = self
            for part in path:
                node = getattr(node, part)
            setattr(node, last, value)


class Registry(dict):
    """Trainers by name."""

    def register(self) -> Any:
        return lambda cls: self.setdefault(cls.__name__, cls)


@contextmanager
def engine() -> Iterator[Registry]:
    """Make the stand-in importable as `dassl`."""
    registry = Registry()
    package, parts = ModuleType("dassl"), {name: ModuleType(f"dassl.{name}") for name in ("engine", "optim", "utils")}
    package.__path__ = []
    vars(parts["engine"]).update(TRAINER_REGISTRY=registry, TrainerX=TrainerX)
    vars(parts["optim"]).update(build_optimizer=build_optimizer, build_lr_scheduler=build_lr_scheduler)
    vars(parts["utils"]).update(load_checkpoint=torch.load)
    ours = "skipkernels.integrations.dassl"
    sys.modules.pop(ours, None)
    sys.modules["dassl"] = package
    sys.modules.update({part.__name__: part for part in parts.values()})
    try:
        yield registry
    finally:
        for name in ("dassl", *(part.__name__ for part in parts.values()), ours):
            sys.modules.pop(name, None)


def build_optimizer(model: Any, optim_cfg: Any, param_groups: Any = None) -> torch.optim.Optimizer:
    options = {"momentum": optim_cfg.MOMENTUM, "weight_decay": optim_cfg.WEIGHT_DECAY}
    return torch.optim.SGD(param_groups or model.parameters(), lr=optim_cfg.LR, **options)


def build_lr_scheduler(optimizer: torch.optim.Optimizer, optim_cfg: Any) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, float(optim_cfg.MAX_EPOCH))


class Images(Dataset):
    """Labelled images, with the labels in `data_source`."""

    def __init__(self, problem: Problem):
        self.images = problem.images
        self.data_source = [SimpleNamespace(label=label) for label in problem.labels.tolist()]

    def __len__(self) -> int:
        return len(self.data_source)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return {"img": self.images[item], "label": self.data_source[item].label}


class TrainerX:
    """Loop over labelled batches; a subclass has `build_model` and `forward_backward`."""

    def __init__(self, cfg: Any, problem: Problem):
        self.check_cfg(cfg)
        self.cfg, self.device = cfg, torch.device("cpu")
        self.images = Images(problem)
        names = [f"class_{n}" for n in range(len(problem.tokens))]
        self.dm = SimpleNamespace(dataset=SimpleNamespace(classnames=names))
        self._registered: dict[str, tuple[Any, Any, Any]] = {}
        self.build_data_loader()
        self.build_model()

    def check_cfg(self, cfg: Any) -> None:
        """Accept every configuration; a subclass may refuse one."""

    def build_data_loader(self) -> None:
        """Shuffle the training images, and leave out a last batch with fewer."""
        size = self.cfg.DATALOADER.TRAIN_X.BATCH_SIZE
        self.train_loader_x = DataLoader(self.images, size, sampler=RandomSampler(self.images), drop_last=True)

    def register_model(self, name: str, model: Any, optim: Any = None, sched: Any = None) -> None:
        self._registered[name] = model, optim, sched

    def train(self) -> None:
        self.num_batches = len(self.train_loader_x)
        for _ in range(self.cfg.OPTIM.MAX_EPOCH):
            for number, batch in enumerate(self.train_loader_x):
                self.batch_idx = number
                self.forward_backward(batch)

    def model_backward_and_update(self, loss: Tensor) -> None:
        for _, optim, _ in self._registered.values():
            optim.zero_grad()
        loss.backward()
        for _, optim, _ in self._registered.values():
            optim.step()

    def update_lr(self) -> None:
        for _, _, sched in self._registered.values():
            sched.step()
