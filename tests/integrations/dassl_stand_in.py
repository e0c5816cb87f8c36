"""A stand-in for Dassl, which is on no package index: the parts of its interface that a trainer builds on.

`TrainerX` with its loop over labelled batches, which it shuffles, an optimizer and a schedule. It saves and prints
nothing, and configurations are plain objects. `MODULES` has the names that its modules export.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import DataLoader, RandomSampler

from tests.integrations.problems import Problem


class Node(SimpleNamespace):
    """A node of a configuration."""

    def merge_from_list(self, options: list[Any]) -> None:
        for name, value in zip(options[::2], options[1::2], strict=True):
            *path, last = name.split(".")
            node: Any = self
            for part in path:
                node = getattr(node, part)
            setattr(node, last, value)


def config(problem: Problem, **options: Any) -> Any:
    """A configuration of an epoch of a problem. `options` are those of TRAINER.SKIPKERNELS."""
    of_problem = {"skip_layers": problem.skip_layers, "keep_ratio": problem.keep_ratio} | problem.rates()
    own = {name.upper(): value for name, value in of_problem.items()} | options
    sgd = {name.upper(): value for name, value in problem.settings().items()}
    warm_up = {"WARMUP_EPOCH": -1, "WARMUP_RECOUNT": True}
    return Node(
        SEED=0,
        TRAINER=Node(SKIPKERNELS=Node(**own)),
        DATASET=Node(NAME="Caltech101"),
        DATALOADER=Node(TRAIN_X=Node(SAMPLER="RandomSampler", BATCH_SIZE=problem.batch_size)),
        INPUT=Node(),
        MODEL=Node(BACKBONE=Node(NAME="pictogram-tiny"), INIT_WEIGHTS=""),
        OPTIM=Node(MAX_EPOCH=1, LR=1e-3, LR_SCHEDULER="cosine", STAGED_LR=False, **warm_up, **sgd),
    )


class Images(list[dict[str, Any]]):
    """Items of a problem, with the labels in `data_source`."""

    def __init__(self, problem: Problem):
        labels = problem.labels.tolist()
        super().__init__({"img": image, "label": label} for image, label in zip(problem.images, labels, strict=True))
        self.data_source = [SimpleNamespace(label=label) for label in labels]


class TrainerX:
    """Loop over shuffled batches; a subclass has `check_cfg`, `build_model` and `forward_backward`."""

    check_cfg: Any
    build_model: Any
    forward_backward: Any

    def __init__(self, cfg: Any, problem: Problem):
        self.check_cfg(cfg)
        self.cfg, self.device, self.images = cfg, torch.device("cpu"), Images(problem)
        names = [f"class_{n}" for n in range(len(problem.tokens))]
        self.dm = SimpleNamespace(dataset=SimpleNamespace(classnames=names))
        self.build_data_loader()
        self.build_model()

    def build_data_loader(self) -> None:
        """Shuffle the training images, and leave out a last batch with fewer."""
        size = self.cfg.DATALOADER.TRAIN_X.BATCH_SIZE
        self.train_loader_x = DataLoader(self.images, size, sampler=RandomSampler(self.images), drop_last=True)

    def register_model(self, name: str, model: Any, optim: Any, sched: Any) -> None:
        self.registered = optim, sched

    def train(self) -> None:
        self.num_batches = len(self.train_loader_x)
        for _ in range(self.cfg.OPTIM.MAX_EPOCH):
            for number, batch in enumerate(self.train_loader_x):
                self.batch_idx = number
                self.forward_backward(batch)

    def model_backward_and_update(self, loss: Tensor) -> None:
        optim, _ = self.registered
        optim.zero_grad()
        loss.backward()
        optim.step()

    def update_lr(self) -> None:
        _, sched = self.registered
        sched.step()


def build_optimizer(model: Any, optim_cfg: Any, param_groups: Any) -> torch.optim.Optimizer:
    options = {"momentum": optim_cfg.MOMENTUM, "weight_decay": optim_cfg.WEIGHT_DECAY}
    return torch.optim.SGD(param_groups, lr=optim_cfg.LR, **options)


def build_lr_scheduler(optimizer: torch.optim.Optimizer, optim_cfg: Any) -> LRScheduler:
    return CosineAnnealingLR(optimizer, float(optim_cfg.MAX_EPOCH))


REGISTERED: dict[str, type] = {}
REGISTRY = SimpleNamespace(register=lambda: lambda kind: REGISTERED.setdefault(kind.__name__, kind))
MODULES: dict[str, dict[str, Any]] = {
    "dassl": {"__path__": []},
    "dassl.engine": {"TRAINER_REGISTRY": REGISTRY, "TrainerX": TrainerX},
    "dassl.optim": {"build_optimizer": build_optimizer, "build_lr_scheduler": build_lr_scheduler},
    "dassl.utils": {"load_checkpoint": torch.load},
}
