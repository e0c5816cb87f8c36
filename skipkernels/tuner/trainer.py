"""Epochs of steps: optimizer, schedule and order of images, and what a checkpoint keeps of them."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..data import InputError
from ..data.files import format_names
from ..features import BatchSampler, FeatureCache
from ..store import digest_tensors
from . import optimizers
from .config import TuneConfig
from .methods import Method, StepOutput
from .methods.base import TunedModel
from .precision import REMEDY, Arithmetic
from .schedule import cosine_with_warmup
from .stage_timer import Budget
from .state_checks import check_like, check_optimizer, check_types


class Trainer:
    """Trains a method, an epoch each time. Within an epoch nothing waits for the device but `losses.read`.

    Args:
        config: The run, resolved.
        method: What trains.
        arithmetic: The precision of the run.
        train: The training images as the method's steps take them.
        classes: Their names by label, for messages.

    Attributes:
        steps: Of an epoch.
        weights: That train.
    """

    def __init__(
        self, config: TuneConfig, method: Method, arithmetic: Arithmetic, train: FeatureCache, classes: list[str]
    ):
        assert config.epochs and config.optimizer and config.batch_size and config.sampler
        self._config, self._method, self._arithmetic, self._classes = config, method, arithmetic, classes
        self._labels, self._device = train.labels, torch.device(config.device)
        groups = method.parameter_groups(text_lr=config.text_lr or 0.0, image_lr=config.image_lr or 0.0)
        self._optimizer = optimizers.make(
            config.optimizer,
            arithmetic.groups(groups),
            in_backward=config.fused_optimizer,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            seed=config.seed,
        )
        self._schedule = cosine_with_warmup(
            self._optimizer,
            epochs=config.epochs,
            warmup_epochs=config.warmup_epochs or 0,
            warmup_lr=config.warmup_lr or 0.0,
        )
        order = torch.Generator().manual_seed(config.seed)
        self._batches = train.loader(config.batch_size, config.sampler, generator=order, device=self._device)
        self.steps = len(self._batches)
        self.weights = [weight for group in groups for weight in group["params"]]
        self._draws = method.clip.sampler if isinstance(method, TunedModel) else None
        self._budget = Budget(self._device)

    @property
    def epochs(self) -> int:
        """That are over."""
        return self._schedule.last_epoch

    def epoch(self, on_step: Callable[[], None], on_loss: Callable[[float], None]) -> dict[str, Any]:
        """One pass over the training images; its row of metrics.jsonl but for the accuracy.

        Args:
            on_step: Called after each step; it must not wait for the device.
            on_loss: Called every `log_every` steps with the mean loss of those.

        Raises:
            FloatingPointError: If the loss or a weight is not finite; says in which batch.
        """
        started, waited, order = time.perf_counter(), self._batches.seconds_waited, self._batches.state_dict()
        losses, compared = Losses(self.steps, self._device), Counter[int]()
        rates = {group["name"]: group["lr"] for group in self._optimizer.param_groups}
        to_training_mode(self._method)
        for step, (inputs, labels) in enumerate(self._batches, 1):
            out = self._step(inputs, labels)
            losses.add(out.loss, len(labels))
            compared[out.classes] += 1
            on_step()
            if step % self._config.log_every == 0 or step == self.steps:
                on_loss(self._read(losses, order))
        self._check_weights()
        self._schedule.step()
        waited = self._batches.seconds_waited - waited
        return {
            "epoch": self.epochs,
            "loss": losses.mean,
            "lr": rates,
            "steps": self.steps,
            "kept_classes": sum(classes * steps for classes, steps in compared.items()) / self.steps,
            "kept_histogram": {str(classes): compared[classes] for classes in sorted(compared)},
            "seconds": time.perf_counter() - started,
            "seconds_waiting_for_features": waited,
            "budget": {"data": waited} | self._budget.read(),
        }

    def _step(self, inputs: Tensor, labels: Tensor) -> StepOutput:
        """Forward, backward and update."""
        with self._budget("forward"), self._arithmetic.autocast():
            out = self._method.step(inputs, labels)
        with self._budget("backward"):
            self._arithmetic.backward(out.loss)
        with self._budget("update"):
            self._arithmetic.update(self._optimizer, self._config.clip_grad_norm)
            self._optimizer.zero_grad()
        return out

    def _read(self, losses: Losses, order: dict[str, Any]) -> float:
        """Mean of the losses since they were read, all of which are numbers.

        Args:
            losses: Of this epoch.
            order: State of the loader when it began.
        """
        first, values = losses.read()
        for step, value in enumerate(values, first):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"tune: the loss of batch {step + 1} of epoch {self.epochs + 1} is {value}. It holds "
                    f"{self._described(step, order)}. {REMEDY}"
                )
        return sum(values) / len(values)

    def _described(self, step: int, order: dict[str, Any]) -> str:
        """Images of a batch, which the sampler gives again, and their classes."""
        config = self._config
        assert config.batch_size and config.sampler
        again = BatchSampler(self._labels, config.batch_size, config.sampler, torch.Generator())
        again.load_state_dict(order)
        images = next(islice(again, step, None))
        classes = dict.fromkeys(self._classes[label] for label in self._labels[images].tolist())
        return f"training images {format_names(list(map(str, images)))} of {format_names(list(classes))}"

    def _check_weights(self) -> None:
        finite = torch.stack([weight.detach().isfinite().all() for weight in self.weights])
        if not finite.all():
            raise FloatingPointError(
                f"tune: after the last batch of epoch {self.epochs + 1} weights are not finite, though its loss is. "
                f"{REMEDY}"
            )

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on, besides the weights and the configuration."""
        random = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self._device)
        return {
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "batches": self._batches.state_dict(),
            "images": digest_tensors([("labels", self._labels)]),
            "draws": self._draws.state_dict() if self._draws is not None else {},
            "arithmetic": self._arithmetic.state_dict(),
            "random": random,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            InputError: If the training images are others.
            ValueError: If it is not the state of such a trainer.
        """
        own = self.state_dict()
        check_types(state, {name: "mapping" for name in own if name != "images"} | {"images": "text"}, "trainer")
        check_optimizer(state["optimizer"], own["optimizer"], self.weights)
        # A run may go on on another device, whose generators have other states.
        for name in ("schedule", "batches", "draws", "arithmetic"):
            check_like(state[name], own[name], f"trainer.{name}")
        check_like(state["random"].get("cpu"), own["random"]["cpu"], "trainer.random.cpu")
        if state["images"] != own["images"]:
            raise InputError("--resume: the training images are others than those of the run; choose another folder.")
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._batches.load_state_dict(state["batches"])
        if self._draws is not None:
            self._draws.load_state_dict(state["draws"])
        self._arithmetic.load_state_dict(state["arithmetic"])
        torch.set_rng_state(state["random"]["cpu"])
        if self._device.type == "cuda" and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], self._device)


def to_training_mode(method: Method) -> None:
    """What trains is in training mode, but for batch norms: images of one class are no sample to normalise by."""
    method.train(True)
    for module in method.model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


class Losses:
    """Losses of the steps of an epoch, which stay on the device until they are read.

    Args:
        steps: Of the epoch.
        device: Where they are computed.

    Example:
        >>> losses = Losses(3, torch.device("cpu"))
        >>> losses.add(torch.tensor(2.0), images=4); losses.add(torch.tensor(5.0), images=2)
        >>> losses.read(), losses.read(), losses.mean
        ((0, [2.0, 5.0]), (2, []), 3.0)
    """

    def __init__(self, steps: int, device: torch.device):
        self._there = torch.zeros(steps, device=device)
        self._images: list[int] = []
        self._here: list[float] = []

    def add(self, loss: Tensor, images: int) -> None:
        """Keep the loss of a step of so many images."""
        self._there[len(self._images)] = loss.detach()
        self._images.append(images)

    def read(self) -> tuple[int, list[float]]:
        """The number of the first that was not read yet, and those; waits for the device."""
        first = len(self._here)
        new = self._there[first : len(self._images)].tolist()
        self._here += new
        return first, new

    @property
    def mean(self) -> float:
        """Over the images of all steps that were read."""
        weighted = (loss * images for loss, images in zip(self._here, self._images, strict=True))
        return sum(weighted) / sum(self._images)
