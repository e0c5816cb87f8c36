"""Training steps of SkipCLIP, and the parameters that they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..selection import ClassSelection, select_ranks
from ..towers import Memory
from .batch import one_batch, refuse_export
from .graphed import GraphedStep
from .losses import LabelOrder, Losses, check_label_range, check_labels
from .output import SkipOutput
from .sharded import padded, sharded_step


class Training(Losses):
    """Base of `SkipCLIP`: its steps."""

    _label_order: LabelOrder

    @torch.compiler.disable  # a compiler would break the graph at each fused block
    def forward(
        self,
        x: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        images: Tensor | None = None,
        return_logits: bool = False,
    ) -> SkipOutput:
        """Run one step: embed the images, select classes, embed these, and compute the loss.

        In evaluation mode all classes are compared, nothing is drawn, and the logits are [B, C]. With `process_group` a
        training step is collective: classes and loss are those of the images of all processes. `targets`, and the loss
        in evaluation mode, are those of this process.

        Args:
            x: Images [B, 3, height, width], or features at the cut [B, N, W].
            labels: [B] int64, classes of the images.
            pixel_values: Another name of x, for trainers that pass their batch by name.
            images: Another name of x.
            return_logits: In training, also return the [B, K] logits; the loss does not need them.

        Returns:
            SkipOutput: the cross-entropy over the selected classes, and these classes.
        """
        x = one_batch(x, pixel_values, images)
        refuse_export()
        own, several = 0, self._parallel is not None and self.training
        if several:
            x, labels, own = padded(x, labels)
        self._check_step(x, labels)
        assert x is not None and labels is not None
        if several:
            return sharded_step(self, x, labels, own, return_logits)
        if not self.training:
            return self._evaluate(self._image_encoder.encode(x), labels, self.model.logit_scale.exp())
        return self._step(x, labels, self.sampler.draw_on, return_logits=return_logits)

    def _check_step(self, x: Any, labels: Any) -> None:
        """Check a batch of images with one label each, and the model, on the host."""
        self._check_batch(x)
        check_labels(labels, x)
        if self.training:
            self._label_order.see(labels)
        if labels.device.type == "cpu" and (self._parallel is not None or not self.training):
            check_label_range(labels, self._num_classes)  # elsewhere `class_scores` checks them
        self._check_draw(len(x))

    def _step(
        self,
        x: Tensor,
        labels: Tensor,
        draw_on: Callable[[torch.device, int, int], Tensor],
        *,
        return_logits: bool = False,
    ) -> SkipOutput:
        """Run a training step with the ranks of `draw_on`(device, C, B). With `sampler.take`, no host value enters."""
        image = self._image_encoder.encode(x)  # [B, D]
        scale = self.model.logit_scale.exp()
        classes = len(self.prototypes)
        try:  # [K], [B]
            class_ids, targets = self._select(image, labels, draw_on(image.device, classes, len(labels)))
        except ValueError:
            check_label_range(labels, classes)  # with a message that names SkipCLIP
            raise
        text = self._text_encoder.encode(class_ids)  # [K, D]
        weight = None if self.class_weight is None else self.class_weight.index_select(0, class_ids)
        loss = self._loss(image, text, targets, scale, weight)
        logits = functional.class_sampled_logits(image, text, scale) if return_logits else None
        return SkipOutput(loss, logits, class_ids, targets)

    def _evaluate(self, image: Tensor, labels: Tensor, scale: Tensor) -> SkipOutput:
        """Loss and logits over all classes. Without gradients, cached class embeddings are used."""
        class_ids = torch.arange(self._num_classes, device=image.device)
        text = self._embeddings_of_all(image)
        loss = self._loss(image, text, labels, scale, self.class_weight)
        return SkipOutput(loss, functional.class_sampled_logits(image, text, scale), class_ids, labels)

    def _loss(self, image: Tensor, text: Tensor, targets: Tensor, scale: Tensor, weight: Tensor | None) -> Tensor:
        return functional.class_sampled_ce(
            image, text, targets, scale, class_weight=weight, label_smoothing=self.label_smoothing
        )

    def select(self, image: Tensor, labels: Tensor) -> ClassSelection:
        """Select the classes of a step from image embeddings [B, D] and labels [B]; draws from the tail."""
        self._refuse_parallel("select")
        return self._select(image, labels, self.sampler.draw_on(image.device, len(self.prototypes), len(labels)))

    def _select(self, image: Tensor, labels: Tensor, ranks: Tensor) -> ClassSelection:
        return select_ranks(self._scores(image, labels), labels, ranks)

    def graphed(self, optimizer: torch.optim.Optimizer, *, batch_size: int) -> GraphedStep:
        """Return a function that runs a whole training step: on a GPU, a replay of a CUDA graph. See `GraphedStep`."""
        self._refuse_parallel("graphed", "Run the steps without graphed.")
        return GraphedStep(self, optimizer, batch_size)

    # ---- parameters ---------------------------------------------------------------------------------------------

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return every parameter that trains."""
        return [p for group in self.parameter_groups(text_lr=0.0, image_lr=0.0) for p in group["params"]]

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:
        """Return groups for an optimizer, text tower and image tower; a temperature that trains is with the text."""
        self._refuse_training_below()
        text, image = (
            [p for p in tower.upper_parameters() if p.requires_grad or self._settings.trainable == "upper"]
            for tower in (self._text, self._image)
        )
        if self.model.logit_scale.requires_grad:
            text.append(self.model.logit_scale)
        self._check_unaltered()
        return [{"name": "text", "params": text, "lr": text_lr}, {"name": "image", "params": image, "lr": image_lr}]

    def activation_checkpointing_enable(self, *arguments: Any, **options: Any) -> None:
        """Set `memory="min"`. Options of transformers (`every_n_layers`, `offload`) are accepted without effect."""
        self.set_grad_checkpointing(True)

    def activation_checkpointing_disable(self) -> None:
        """Set `memory` back to its value at construction, or to "auto" if that was "min"."""
        self.set_grad_checkpointing(False)

    # Their names until transformers 6.
    gradient_checkpointing_enable = activation_checkpointing_enable
    gradient_checkpointing_disable = activation_checkpointing_disable

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing, under the name that open_clip uses."""
        disabled: Memory = "auto" if self._settings.memory == "min" else self._settings.memory
        for tower in (self._image, *self._text_encoder.towers):
            tower.memory = "min" if enable else disabled
