"""SkipCLIP in open_clip's trainer: a model and a loss for its pairs of images and captions.

The captions are the prompts of the classes, and their class ids are looked up by their tokens, so that the usual files
of image and caption work. The trainer of the release (`open_clip_train.train.train_one_epoch`) takes both as they are,
and that of the development version as `open_clip.task.CLIPTask(model, loss=loss)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import warn_caller
from ..clip import SkipCLIP
from .caption_index import CaptionIndex


class ClassModel(nn.Module):
    """Model for open_clip's trainer that trains `clip` on the classes of the captions.

    In training mode it returns the loss over the selected classes, to be passed on by `ClassLoss`. In evaluation mode
    it returns the features of open_clip's own model, so that the trainer's zero-shot and retrieval evaluation work.

    `DistributedDataParallel` wraps this model. With `--accum-freq` the gradients are the mean over the accumulated
    batches: classes are the negatives, so no batch needs the features of another. FSDP2 raises an error.

    Args:
        clip: `SkipCLIP` around an open_clip model, with the prompts of the classes.

    Example:
        >>> import skipkernels as sk
        >>> from skipkernels.app.demo import pictogram_tiny
        >>> model, _, tokenizer = pictogram_tiny.load()
        >>> tokens = tokenizer([f"the digit {n}." for n in range(10)])
        >>> clip = sk.SkipCLIP(model, tokens, skip_layers=0.5)
        >>> model, loss = ClassModel(clip), ClassLoss()
        >>> losses = loss(**model(torch.rand(4, 3, 32, 32), tokens[[3, 3, 7, 7]]), output_dict=True)
        >>> list(losses), losses["class_loss"].requires_grad
        (['class_loss'], True)
    """

    def __init__(self, clip: SkipCLIP):
        super().__init__()
        if not isinstance(clip, SkipCLIP):
            raise TypeError(
                f"ClassModel: clip must be a SkipCLIP; got {type(clip).__name__}. Wrap the ClassModel for parallel "
                "training, not the SkipCLIP."
            )
        self.clip = clip
        self._index: CaptionIndex | None = None
        self._groups: list[dict[str, Any]] = []  # to be checked in the first training step

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:
        """Groups of `SkipCLIP.parameter_groups`, with `lr_scale`: the rate relative to the larger one.

        open_clip 4 multiplies the rate of its schedule, which begins at `max(text_lr, image_lr)`, by `lr_scale`. For
        open_clip 3 see `scaled_schedule`.
        """
        groups = self.clip.parameter_groups(text_lr=text_lr, image_lr=image_lr)
        for group in groups:
            group["lr_scale"] = group["lr"] / (max(text_lr, image_lr) or 1.0)
        self._groups = groups  # an optimizer keeps these dictionaries
        return groups

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Any]:
        """Loss of a batch in training mode, features in evaluation mode.

        Args:
            image: Images [B, 3, height, width], or features at the cut [B, N, W].
            text: Tokens [B, L] of the captions, in training mode each the prompt of a class; or [B] int64, class ids.

        Returns:
            In training mode `class_loss` [1] and `logit_scale` []. In evaluation mode `image_features` and
            `text_features` [B, D], unit norm (None where the input is), and `logit_scale` [].

        A caption that is not the prompt of a class is a ValueError on the CPU, and a device-side assertion on a GPU.
        """
        if text is not None and not isinstance(text, Tensor):
            raise TypeError(
                "ClassModel: text must be a tensor, tokens [B, L] of the captions or class ids [B]; got "
                f"{type(text).__name__}. Tokenize strings with open_clip's tokenizer."
            )
        scale = self.clip.model.logit_scale.exp()
        if self.training:
            return {"class_loss": self._class_loss(image, text), "logit_scale": scale}
        return {
            "image_features": None if image is None else self.encode_image(image, normalize=True),
            "text_features": None if text is None else self.encode_text(text, normalize=True),
            "logit_scale": scale,
        }

    def _class_loss(self, image: Tensor | None, text: Tensor | None) -> Tensor:
        """Loss [1] of a training step."""
        if image is None or text is None:
            raise TypeError("ClassModel: in training mode both images and captions are needed; got only one of them.")
        self._check_rates()
        if not torch.is_grad_enabled():  # the first pass of accumulation, for features of negatives
            return torch.zeros(1, device=image.device)
        labels = text if text.ndim == 1 else self.class_ids(text)
        return self.clip(image, labels).loss.reshape(1)

    def _check_rates(self) -> None:
        """Warn in the first training step if the schedule gave groups of different `lr_scale` the same rate."""
        groups, self._groups = self._groups, []
        rates, scales = ({group[name] for group in groups} for name in ("lr", "lr_scale"))
        if len(rates) < len(scales):
            warn_caller(
                f"ClassModel: the schedule set the learning rate of both towers to {rates.pop():g}, so text_lr and "
                "image_lr have no effect: before version 4, open_clip's schedules ignore lr_scale. Pass "
                "scaled_schedule(schedule, optimizer) to the trainer."
            )

    def class_ids(self, text: Tensor) -> Tensor:
        """Class ids [B] of captions, int64 tokens [B, L]; on a GPU without a host sync but for the first."""
        tokens = self.clip.texts.tokens  # [C, L] or [C, T, L]
        if text.ndim != 2 or text.shape[1] != tokens.shape[-1] or text.is_floating_point():
            raise ValueError(
                f"ClassModel: text must be tokens [B, L={tokens.shape[-1]}] like the prompts of SkipCLIP, or class "
                f"ids [B]; got {text.dtype} {list(text.shape)}. Tokenize both with the same tokenizer."
            )
        if self._index is None or self._index.tokens is not tokens or self._index.device != text.device:
            self._index = CaptionIndex(tokens, text.device)
        class_ids, known = self._index.find(text)
        if text.device.type != "cpu":
            torch._assert_async(known.all(), "ClassModel: a caption is not the prompt of a class.")
        elif not known.all():
            unknown = (~known).nonzero().flatten().tolist()
            raise ValueError(
                f"ClassModel: captions {unknown} of the batch are not the prompt of a class. Give SkipCLIP the "
                "tokens of all captions, each once, in the order of the classes."
            )
        return class_ids

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Image embeddings [B, D] of images or features at the cut."""
        return _normalized(self.clip.encode_image(image), normalize)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Text embeddings [B, D] of any tokens [B, L], by open_clip's own model; or of class ids [B]."""
        embeddings = self.clip.encode_classes(text) if text.ndim == 1 else self.clip.model.encode_text(text)
        return _normalized(embeddings, normalize)

    @property
    def logit_scale(self) -> nn.Parameter:
        """Temperature of the model, which the trainer limits to 100 after each step."""
        return self.clip.model.logit_scale

    @property
    def visual(self) -> nn.Module:
        """Image tower of open_clip's model."""
        return self.clip.model.visual

    @property
    def context_length(self) -> int:
        """Number of tokens of a caption."""
        return self.clip.texts.tokens.shape[-1]

    def set_grad_checkpointing(self, enable: bool = True, impl: str = "inline") -> None:
        """See `SkipCLIP.set_grad_checkpointing`; `impl` of open_clip 4 has no effect."""
        self.clip.set_grad_checkpointing(enable)

    def fsdp_shard_modules(self) -> list[tuple[str, nn.Module]]:
        """Raise an error: open_clip calls this before FSDP2 shards the model."""
        raise NotImplementedError(
            "ClassModel: FSDP2 is not supported in open_clip's trainer, which shards modules that SkipCLIP does not "
            "call. Train with DistributedDataParallel instead."
        )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_index": None, "_groups": []}


def scaled_schedule(schedule: Callable[[int], float], optimizer: torch.optim.Optimizer) -> Callable[[int], float]:
    """Return a schedule of open_clip 3 that multiplies the rate of each group by its `lr_scale`, as in open_clip 4.

    Example:
        >>> from open_clip_train.scheduler import const_lr
        >>> groups = [{"params": [torch.ones(1)], "lr_scale": 1.0}, {"params": [torch.ones(1)], "lr_scale": 0.25}]
        >>> optimizer = torch.optim.SGD(groups)
        >>> schedule = scaled_schedule(const_lr(optimizer, 0.2, 2, 10), optimizer)
        >>> schedule(0), [group["lr"] for group in optimizer.param_groups]
        (0.1, [0.1, 0.025])
    """

    def step(number: int) -> float:
        rate = schedule(number)
        for group in optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):  # which open_clip 4 has scaled
                group["lr"] = rate * group.get("lr_scale", 1.0)
        return rate

    return step


class ClassLoss(nn.Module):
    """Loss for open_clip's trainer that passes on the loss of a `ClassModel`."""

    def forward(self, class_loss: Tensor, logit_scale: Tensor, output_dict: bool = True) -> Any:
        """Loss of a batch.

        Args:
            class_loss: [1], or with accumulation [accum_freq], zero but for the current batch.
            logit_scale: Ignored.
            output_dict: True returns {"class_loss": loss}, False the loss.

        Returns:
            The loss [] of the current batch, with a gradient of 1 / accum_freq.
        """
        loss = class_loss.mean()
        if len(class_loss) > 1:
            loss = loss + (class_loss.sum() - loss).detach()
        return {"class_loss": loss} if output_dict else loss


def _normalized(embedding: Tensor, normalize: bool) -> Tensor:
    return nn.functional.normalize(embedding, dim=-1) if normalize else embedding
