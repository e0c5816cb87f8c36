"""SkipCLIP on several processes: images shared out by batch, classes by c ≡ r (mod W).

Calls that send messages are collective: every process must make them equally often, with an empty batch if it has no
images. docs/many-processes.md lists the messages.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..clip import SkipCLIP, SkipOutput
from ..clip.builder import build_texts
from ..clip.checks import as_class_weight, as_tokens, check_labels, check_vocabulary, refuse_inference_mode
from ..clip.state import Origin
from ..clip.step import LossOptions
from ..digests import digest_json, digest_tensors, digests
from ..dtypes import without_autocast
from ..retrieval import check_k
from . import checks
from .checks import announced_errors, compare_calls, gather_sizes, refuse_soft_labels
from .class_shards import ClassShards, sharded_logits, sharded_top_k
from .gathers import filled, gather_rows, own_rows
from .loss import sharded_cross_entropy


class ShardedSkipCLIP(SkipCLIP):
    """SkipCLIP with the step of one process that has the images of all.

    Each process has its own part of every batch, and the texts of its own classes. A training step, and an evaluation
    over all classes, are collective. Selected classes and loss are those of all images; `targets`, and the loss in
    evaluation mode, are those of this process. Gradients are averaged by `DistributedDataParallel`, or by
    `all_reduce_gradients`. A batch of a training step, `predict` or `top_k` may be empty on some of the processes.

    The other arguments are those of SkipCLIP, with all classes, and equal on all processes. These raise an error:

        encode_classes                                  use class_embeddings()
        soft labels or return_logits in training mode   call clip.eval(), or use SkipCLIP on one process
        an evaluation with gradients                    call it under torch.no_grad()

    Args:
        process_group: Processes that train together, with gloo or NCCL.

    Attributes:
        prototypes, texts: Those of the classes of this process: row i is class r + i · W on process r of W.
        shards: The classes of each process, for the code of this package.

    Source: docs/many-processes.md.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        *,
        process_group: dist.ProcessGroup,
        text_cache: str | Path | None = None,
        **options: Any,
    ):
        tokens = as_tokens(tokens)
        checks.check_group(process_group, model)
        self.shards = shards = ClassShards(process_group, len(tokens))
        self._digest = digest_tensors([("tokens", tokens)])
        self._gathered: tuple[Tensor, Tensor] | None = None  # embeddings of own classes, and of all
        if text_cache is not None:
            text_cache = Path(text_cache) / f"process_{shards.rank}_of_{shards.size}"
        super().__init__(model, tokens[shards.owned], text_cache=text_cache, **options)
        self._check_agreement(shards, self._digest, self.class_weight)

    @property
    def num_classes(self) -> int:
        """C, the number of classes of all processes."""
        return self.shards.num_classes

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The processes that train together."""
        return self.shards.group

    # ---- the step ----------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # as SkipCLIP
    def forward(self, pixel_values: Tensor, labels: Tensor, *, return_logits: bool = False) -> SkipOutput:
        """Run one step on the images of all processes; in evaluation mode on those of this one."""
        if not self.training:
            text = self.evaluation_embeddings()  # collective: before an error of this process
            self.check_inputs(pixel_values)
            check_labels(labels, pixel_values, self.num_classes)
            return self._compare(self.images.encode(pixel_values), labels, return_logits, text)
        with announced_errors(self):
            refuse_soft_labels(labels, return_logits)
            x, y = filled(pixel_values, labels)
            self.check_inputs(x)
            check_labels(y, x, self.num_classes)
        sizes = gather_sizes(self, "a training step", len(pixel_values), draws=True)
        return self._step(self.images.encode(x)[: len(pixel_values)], labels, sizes)

    @torch.compiler.disable
    def loss(self, image: Tensor, labels: Tensor) -> Tensor:
        """Loss [] of image embeddings, see `SkipCLIP.loss`."""
        if not self.training:
            text = self.evaluation_embeddings()
            self._check_embeddings(image, labels)
            return self._compare(image, labels, False, text).loss
        with announced_errors(self):
            refuse_soft_labels(labels)
            self._check_embeddings(*filled(image, labels))
        sizes = gather_sizes(self, "a training step", len(image), draws=True)
        return self._step(image, labels, sizes).loss

    def _step(self, image: Tensor, labels: Tensor, sizes: list[int]) -> SkipOutput:
        """Run one step on embeddings [b, D] and labels [b] of this process, `sizes` of them on each."""
        group = self.process_group
        # 1. The labels and image embeddings of all processes: [B], [B, D]
        labels, image = gather_rows(labels, sizes, group), gather_rows(image, sizes, group)
        # 2. The same selection on every process, and text embeddings of own selected classes
        text, class_ids, targets, positions = self.select_and_encode_own(image, labels)
        # 3. The loss over all images
        options, text = LossOptions(self.label_smoothing, self.class_weight), text.to(image.dtype)
        loss = sharded_cross_entropy(image, text, positions, class_ids, targets, self.scale, options, group)
        return SkipOutput(loss, None, class_ids, targets[own_rows(sizes, group)])

    def select_and_encode_own(
        self, image: Tensor, labels: Tensor, max_labels: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Select classes for images [B, D] of all processes, and embed those of this process; collective.

        `labels` are [B], of all images, or [b, C], of those of this process; for `max_labels` see `RankSampler.select`.

        Returns:
            Text embeddings [K_r, D] of the selected classes of this process; without any, those of a class that is not
            used, so that gradients are zero, not None.
            The selected classes [K] of all processes.
            Positions of the labels among these, [B]; or their columns of the labels, [b, K].
            Positions [K_r] of the classes of this process among these.
        """
        scores = self.shards.gather(self.texts.scores(image, None))  # [C/W] of each process -> [C]
        if labels.ndim == 1:
            scores = scores.index_fill(0, labels, torch.inf)
        else:
            is_label = labels.any(dim=0).byte()  # [C]
            dist.all_reduce(is_label, dist.ReduceOp.MAX, group=self.process_group)
            scores = scores.masked_fill(is_label.bool(), torch.inf)
        class_ids, targets = self.sampler.select(scores, labels, max_labels)
        positions, own_ids = self.shards.find_own(class_ids)
        return self.texts.encode(*filled(own_ids)), class_ids, targets, positions

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluation_embeddings(self) -> Tensor:  # noqa: D102
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ShardedSkipCLIP: an evaluation with gradients is not supported. Call it under torch.no_grad()."
            )
        return self._all_embeddings()

    @torch.no_grad()
    def predict(
        self, pixel_values: Tensor, *, tokens: Tensor | None = None, class_embeddings: Tensor | None = None
    ) -> Tensor:
        """Logits [b, C] of the images of this process over all classes, collective; or over other classes."""
        if tokens is not None or class_embeddings is not None:
            (x,) = filled(pixel_values)  # may be empty here too
            return super().predict(x, tokens=tokens, class_embeddings=class_embeddings)[: len(pixel_values)]
        image, classes, sizes = self._gathered_image_and_classes(pixel_values, "predict")
        with without_autocast(image.device):
            return sharded_logits(image, classes, sizes, self.shards)

    @torch.no_grad()
    def top_k(self, pixel_values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits [b, k] of the images of this process, and their classes; collective."""
        with announced_errors(self):
            check_k(k, self.num_classes)
        image, classes, sizes = self._gathered_image_and_classes(pixel_values, f"top_k with k={k}")
        with without_autocast(image.device):
            return sharded_top_k(image, classes, k, sizes, self.shards)

    def _gathered_image_and_classes(self, pixel_values: Tensor, call: str) -> tuple[Tensor, Tensor, list[int]]:
        """Scaled image embeddings [B, D] of all processes, own class embeddings, and image counts; collective."""
        with announced_errors(self):
            image, classes = self._scaled_image_and_classes(*filled(pixel_values))
        sizes = gather_sizes(self, call, len(pixel_values))
        return gather_rows(image[: len(pixel_values)], sizes, self.process_group), classes, sizes

    def class_embeddings(self, tokens: Tensor | None = None) -> Tensor:
        """Unit-norm text embeddings [C, D] of all classes, collective after a change of the weights; or of others."""
        return self._all_embeddings().clone() if tokens is None else super().class_embeddings(tokens)

    def _all_embeddings(self) -> Tensor:
        """Unit-norm text embeddings [C, D] of all classes, kept until a weight changes."""
        own = self.texts.kept_embeddings()  # the same tensor until a weight changes
        if self._gathered is None or self._gathered[0] is not own:
            compare_calls(self, "class_embeddings")
            self._gathered = own, self.shards.gather(own)
        return self._gathered[1]

    def encode_classes(self, class_ids: Tensor) -> Tensor:
        """Not supported: a process has the texts of its own classes alone."""
        raise RuntimeError("ShardedSkipCLIP: encode_classes is not supported. Read them from class_embeddings().")

    # ---- the classes -------------------------------------------------------------------------------------------------

    def set_classes(self, tokens: Tensor, class_weight: Tensor | None = None) -> None:
        """Replace the classes of the task in place, on every process; see `SkipCLIP.set_classes`."""
        with announced_errors(self):
            refuse_inference_mode("ShardedSkipCLIP: set_classes cannot be called")
            tokens = as_tokens(tokens)
            check_vocabulary("ShardedSkipCLIP", "tokens", tokens, self.texts.tower.vocabulary)
            shards = replace(self.shards, num_classes=len(tokens))
            weight = as_class_weight(class_weight, self.prototypes, len(tokens))
        compare_calls(self, "set_classes")
        digest = digest_tensors([("tokens", tokens)])
        self._check_agreement(shards, digest, weight)
        with announced_errors(self):  # such as too little memory on one process: all keep their classes
            texts = build_texts(self.model, self.texts, tokens[shards.owned], self.train_options)
        compare_calls(self, "set_classes")
        self.texts, self.shards, self._digest, self.class_weight = texts, shards, digest, weight

    def _origin(self) -> Origin:
        return Origin(self._digest, self.prototypes.shape[1], self.shards.size)

    def _check_agreement(self, shards: ClassShards, digest: str, class_weight: Tensor | None) -> None:
        """Raise an error on every process for batch norms, or unless all have the same inputs and weights."""
        model = self.model
        if shards.size > 1:
            checks.refuse_batch_norms(self.images.tower, self.texts.tower)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        weights = [] if class_weight is None else [("class_weight", class_weight)]
        tensors = [x.detach() for x in (*model.parameters(), *model.buffers())]
        digest_of = {
            "tokens": digest,
            "skip_layers and the trained parameters": digest_json([self.skip_layers, trained]),
            "options of the selection": digest_json(self.sampler.options()),
            "generator": digest_tensors(sorted(self.sampler.state_dict().items())),
            "label_smoothing and class_weight": digest_json([self.label_smoothing, digest_tensors(weights)]),
            "weights": digest_json(digests(tensors)),
        }
        checks.check_equal(digest_of, shards.group, self.prototypes.device)  # the model may be on two devices


def check_sharded(function: str, clip: object) -> None:
    """Raise a TypeError unless clip is a ShardedSkipCLIP."""
    if not isinstance(clip, ShardedSkipCLIP):
        raise TypeError(f"parallel.{function}: clip must be a ShardedSkipCLIP; got {type(clip).__name__}.")
