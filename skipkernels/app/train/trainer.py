"""Training: optimizer, learning rates and order of images over the epochs, and their state in a checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ...digests import digest_tensors
from ...features import BatchSampler, FeatureCache
from ...optimizer import FusedSGD
from ...published import cosine_with_warmup
from ..config import TuneConfig
from ..data import InputError
from ..devices import autocast
from ..methods import Method, StepOutput

# Of gradients in fp16. PyTorch's default of 65,536 times CLIP's logit scale of 100 overflows: the first steps would be
# skipped until it has been halved enough, to 8,192 on pictogram-tiny. Other models may need less.
_INITIAL_SCALE = 2.0**10
REMEDY = (
    "Lower `text_lr` and `image_lr`, or use `precision=fp32`. The checkpoint of the last good epoch, if any, is kept."
)
_READ_EVERY = 50  # steps between displays and checks of the loss


class Trainer:
    """Train a method, one epoch per call. Within an epoch, only reading the losses needs a host sync.

    Attributes:
        steps: Number of steps per epoch.
        not_graphed: Reason why steps are not captured in a CUDA graph, although `graph` is set and the device is a GPU.
    """

    def __init__(self, config: TuneConfig, method: Method, train: FeatureCache):
        assert config.epochs and config.optimizer and config.batch_size and config.sampler
        self._config, self._method = config, method
        self._labels, self._device = train.labels, torch.device(config.device)
        # In fp16 an update is skipped if a scaled gradient is not finite, and the scale adapts.
        fp16 = config.precision == "fp16"
        self._scaler = torch.amp.GradScaler(self._device.type, init_scale=_INITIAL_SCALE, enabled=fp16)
        groups = method.parameter_groups(text_lr=config.text_lr or 0.0, image_lr=config.image_lr or 0.0)
        self._optimizer = make_optimizer(config, groups)
        self._schedule = cosine_with_warmup(
            self._optimizer,
            epochs=config.epochs,
            warmup_epochs=config.warmup_epochs or 0,
            warmup_lr=config.warmup_lr or 0.0,
        )
        generator = torch.Generator().manual_seed(config.seed)
        sampler = BatchSampler(train.labels, config.batch_size, config.sampler, generator)
        self._loader = train.loader(sampler=sampler, device=self._device)
        self.steps = len(self._loader)
        self._weights = [weight for group in groups for weight in group["params"]]
        self._class_sampler = method.class_sampler
        graph = config.graph and _captures(self._device)
        self._graphed, self.not_graphed = self._graphed_step(config.batch_size) if graph else (None, None)

    def _graphed_step(self, batch_size: int) -> tuple[Callable[[Tensor, Tensor], StepOutput] | None, str | None]:
        """Return the captured step of the method, or the reason why it is not captured; neither if there is none."""
        try:
            step = self._method.graphed(self._optimizer, batch_size)
        except ValueError as error:
            return None, str(error)
        if step is not None and self._scaler.is_enabled():
            return None, "the gradient scaler of fp16 has a host sync in each step."
        return step, None

    @property
    def epochs(self) -> int:
        """Number of completed epochs."""
        return self._schedule.last_epoch

    def epoch(self, on_step: Callable[[], None], on_loss: Callable[[float], None]) -> dict[str, Any]:
        """Train for one epoch; return its row of metrics.jsonl, without the accuracy.

        Calls `on_step` after each step, and `on_loss` every 50 steps with their mean loss.
        """
        started, waited = time.perf_counter(), self._loader.seconds_waited
        losses: list[float] = []
        unread: list[Tensor] = []  # losses on the device
        images, kept = [], 0
        rates = {group["name"]: group["lr"] for group in self._optimizer.param_groups}
        to_training_mode(self._method)
        for step, (inputs, labels) in enumerate(self._loader, 1):
            out = self._step(inputs, labels)
            unread.append(out.loss.detach().clone())  # a CUDA graph writes the next one to the same tensor
            images.append(len(labels))
            kept += out.classes
            on_step()
            if step % _READ_EVERY == 0 or step == self.steps:
                new = torch.stack(unread).tolist()
                self._check_losses(new, len(losses))
                on_loss(sum(new) / len(new))
                losses += new
                unread.clear()
        self._check_weights()
        self._schedule.step()
        return {
            "epoch": self.epochs,
            "loss": sum(loss * count for loss, count in zip(losses, images, strict=True)) / sum(images),
            "lr": rates,
            "steps": self.steps,
            "kept_classes": kept / self.steps,
            "seconds": time.perf_counter() - started,
            "seconds_waiting_for_features": self._loader.seconds_waited - waited,
        }

    def _step(self, inputs: Tensor, labels: Tensor) -> StepOutput:
        with autocast(self._config.precision, self._device):
            if self._graphed is not None:
                return self._graphed(inputs, labels)
            out = self._method.step(inputs, labels)
        self._scaler.scale(out.loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        return out

    def _check_losses(self, values: Sequence[float], done: int) -> None:
        """Check that the losses of the batches after the first `done` are finite."""
        for batch, value in enumerate(values, done + 1):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"tune: the loss of batch {batch} of epoch {self.epochs + 1} is {value}. {REMEDY}"
                )

    def _check_weights(self) -> None:
        finite = torch.stack([weight.detach().isfinite().all() for weight in self._weights])
        if not finite.all():
            raise FloatingPointError(
                f"tune: after the last batch of epoch {self.epochs + 1} weights are not finite, although the loss of "
                f"the batch is. {REMEDY}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the next epoch depends on, besides the weights and the configuration."""
        random = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self._device)
        return {
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "loader": self._loader.state_dict(),
            "labels": digest_tensors([("labels", self._labels)]),
            "class_sampler": self._class_sampler.state_dict() if self._class_sampler is not None else {},
            "precision": self._scaler.state_dict(),
            "random": random,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        if state["labels"] != digest_tensors([("labels", self._labels)]):
            raise InputError(
                "the training images differ from those of the run; choose another folder.", "resume", "tune"
            )
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._loader.load_state_dict(state["loader"])
        if self._class_sampler is not None:
            self._class_sampler.load_state_dict(state["class_sampler"])
        self._scaler.load_state_dict(state["precision"])
        torch.set_rng_state(state["random"]["cpu"])
        if self._device.type == "cuda" and "cuda" in state["random"]:  # the run may be resumed on another device
            torch.cuda.set_rng_state(state["random"]["cuda"], self._device)


def make_optimizer(config: TuneConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Construct the optimizer of a resolved configuration."""
    assert config.weight_decay is not None
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    momentum, seed = config.momentum or 0.0, config.seed
    return FusedSGD(groups, momentum=momentum, weight_decay=config.weight_decay, seed=seed, in_backward=False)


def _captures(device: torch.device) -> bool:
    return device.type == "cuda"


def to_training_mode(method: Method) -> None:
    """Set training mode, except for batch norms: a batch of one class has no representative statistics."""
    method.train(True)
    for module in method.model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
