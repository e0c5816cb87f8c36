"""SkipCLIP in Lightning: a `LightningModule`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..clip import SkipCLIP, SkipOutput, check_clip
from ..optimizer import FusedSGD

try:
    from lightning.pytorch import LightningModule
except ImportError as error:
    raise ImportError(
        f"skipkernels.integrations.lightning: needs Lightning ({error}). Install it: pip install "
        "'skipkernels[lightning]'."
    ) from error


class SkipModule(LightningModule):
    """Trains a SkipCLIP on batches (images or features at the cut, labels) and logs loss and accuracy.

    The logged names are `train_loss`, `val_loss`, `val_accuracy`, `test_loss` and `test_accuracy`; with several loaders
    for validation or test, `val_loss/dataloader_idx_0` and so on. Override `loss` and `metrics` for another loss. For
    several processes pass `strategy=DDPStrategy(forward_sync_buffers=False)` to the trainer (`broadcast_buffers=False`
    in PyTorch versions without that argument).

    Args:
        clip: The model to tune.
        text_lr: Learning rate of the text tower.
        image_lr: Learning rate of the image tower. Both rates and `options` are the `hparams` of the module.
        optimizer: Class of the optimizer; default SGD.
        schedule: Function from the optimizer to a schedule that is stepped after each epoch, or to a dictionary as
            Lightning takes it, such as {"scheduler": …, "interval": "step"}; None: constant rates. `ReduceLROnPlateau`
            monitors `val_loss`, unless the dictionary has another "monitor".
        options: Further arguments of the optimizer, such as `momentum`. For `FusedSGD`, `in_backward` is False unless
            given, since an update in backward is over before the trainer clips gradients (`gradient_clip_val`).

    Example:
        >>> import skipkernels as sk
        >>> from skipkernels.app.demo import pictogram_tiny
        >>> model, _, tokenizer = pictogram_tiny.load()
        >>> clip = sk.SkipCLIP(model, tokenizer([f"the digit {n}." for n in range(10)]), skip_layers=0.5)
        >>> module = SkipModule(clip, text_lr=2e-5, image_lr=5e-6, momentum=0.9)
        >>> module(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        clip: SkipCLIP,
        *,
        text_lr: float,
        image_lr: float,
        optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
        schedule: Callable[[torch.optim.Optimizer], LRScheduler | dict[str, Any]] | None = None,
        **options: Any,
    ):
        super().__init__()
        check_clip("SkipModule", clip)
        self.clip = clip
        if optimizer is FusedSGD:
            options.setdefault("in_backward", False)
        self._optimizer, self._schedule = optimizer, schedule
        self.save_hyperparameters({"text_lr": text_lr, "image_lr": image_lr} | options)
        self._options = list(options)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] over all classes; see `SkipCLIP.predict`."""
        return self.clip.predict(x)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Loss [] of a training batch, over the classes selected for it."""
        return self.clip(x, labels).loss

    def metrics(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Values [] of a batch by name, for validation and test: loss and accuracy over all classes."""
        out: SkipOutput = self.clip(x, labels, return_logits=True)
        assert out.logits is not None
        expected = labels.argmax(dim=1) if labels.ndim == 2 else labels
        return {"loss": out.loss, "accuracy": (out.logits.argmax(dim=1) == expected).float().mean()}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Log and return `loss`."""
        loss = self.loss(*_pair(batch))
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log `metrics`."""
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log `metrics`."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Logits [B, C] over all classes for images or features, with or without labels."""
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def configure_optimizers(self) -> Any:
        """Optimizer with two parameter groups, and the schedule if there is one."""
        groups = self.clip.parameter_groups(text_lr=self.hparams["text_lr"], image_lr=self.hparams["image_lr"])
        optimizer = self._optimizer(groups, **{name: self.hparams[name] for name in self._options})
        if self._schedule is None:
            return optimizer
        schedule = self._schedule(optimizer)
        config = schedule if isinstance(schedule, dict) else {"scheduler": schedule}
        if isinstance(config["scheduler"], ReduceLROnPlateau):
            config = {"monitor": "val_loss"} | config
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _evaluate(self, name: str, batch: tuple[Tensor, Tensor]) -> None:
        x, labels = _pair(batch)
        values = {f"{name}_{metric}": value for metric, value in self.metrics(x, labels).items()}
        self.log_dict(values, batch_size=len(labels), sync_dist=True, prog_bar=True)


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Images or features, and labels, of a batch."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            f"SkipModule: a batch must be a pair (images or features, labels); got {type(batch).__name__} of "
            f"{len(batch)}. Return pairs from the dataset, or write the steps of a LightningModule of your own."
        )
    return batch[0], batch[1]
