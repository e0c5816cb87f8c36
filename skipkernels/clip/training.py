"""Training steps of SkipCLIP, and the parameters that they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..selection import ClassSelection, select_ranks
from ..towers import Memory
from .base import SkipCLIPBase
from .batch import (
    check_images,
    check_label_range,
    check_labels,
    one_batch,
    refuse_export,
)
from .graphed import GraphedStep
from .multi_label import sigmoid_loss
from .output import SkipOutput
from .pairs import pair_loss
from .sharded_step import sharded_step


class Training(SkipCLIPBase):
    """Base of `SkipCLIP`: its steps."""

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
        if self._parallel is not None and self.training:
            return sharded_step(self, (x, pixel_values, images), labels, return_logits)
        x = one_batch(x, pixel_values, images)
        refuse_export()
        self._check_step(x, labels)
        assert labels is not None
        if not self.training:
            return self._evaluate(self._image_encoder.encode(x), labels, self.model.logit_scale.exp())
        return self._step(x, labels, self.sampler.draw_on, return_logits=return_logits)

    def _check_step(self, x: Any, labels: Any) -> None:
        """Check a batch of images with one label each, and the model, on the host."""
        self._check_batch(x)
        check_labels(labels, len(x))
        if self.training:
            self._label_order.see(labels)
        elif labels.device.type == "cpu":  # in training `class_scores` checks them
            check_label_range(labels, self._num_classes)
        self._check_draw(len(x))

    def _check_batch(self, x: Any) -> None:
        """Check images and the model on the host, and move what belongs to no module to the device of the images."""
        check_images(x)
        self._image_encoder.are_images(x)
        self._check_unaltered(lower_image=True)
        self._follow(x.device)

    def _check_draw(self, labels: int) -> None:
        """Raise a RuntimeError if the step of a number of labels would draw other classes than its first forward."""
        classes = self._num_classes
        in_backward = self.training and torch._C._current_graph_task_id() != -1
        if in_backward and self.sampler.plan(classes, labels)[0] < classes:  # the step would draw from the tail
            raise RuntimeError(
                "SkipCLIP: the step was called again within a backward pass, as activation checkpointing does; it "
                'would draw other classes than the first time. Use memory="min" instead.'
            )

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

    def _embeddings_of_all(self, image: Tensor) -> Tensor:
        """Embeddings [C, D] of all classes for image embeddings; cached ones if there is no gradient."""
        if not torch.is_grad_enabled():
            return self._class_embeddings().to(image.dtype)
        self._refuse_parallel("an evaluation with gradients", "Call it under torch.no_grad().")
        return self._text_encoder.encode(torch.arange(self._num_classes, device=image.device))

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

    @torch.no_grad()
    def _scores(self, image: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores of the classes that this process has prototypes of; see `functional.class_scores`."""
        with torch.autocast(image.device.type, enabled=False):  # which would cast all prototypes in each step
            return functional.class_scores(image.to(self.prototypes.dtype), self.prototypes, labels)

    # ---- losses -------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def pair_loss(self, x: Tensor, captions: Tensor) -> Tensor:
        """Symmetric contrastive loss [] of pairs of an image and a caption, see `functional.contrastive_loss`.

        No classes are selected; `label_smoothing` and `class_weight` are refused. A caption is a negative for every
        image of the batch but its own, as in open_clip; with `process_group`, of all processes. See docs/method.md,
        Pairs.

        Args:
            x: Images [B, 3, height, width], or features at the cut [B, N, W].
            captions: [B] int64, the caption of each image as an index of the `tokens` that SkipCLIP was made with;
                their features at the cut are cached. Or tokens [B, L] of any captions, which run below the cut in each
                call, cropped to the longest. On a GPU both need a host sync, to read the number of tokens.

        Example:
            >>> import skipkernels as sk
            >>> from skipkernels.app.demo import glyph_tiny
            >>> model, _, tokenizer = glyph_tiny.load()
            >>> captions = tokenizer([f"a small {n}" for n in range(10)])
            >>> clip = sk.SkipCLIP(model, captions, skip_layers=0.5)
            >>> images, ids = torch.rand(4, 3, 32, 32), torch.tensor([3, 0, 9, 1])
            >>> torch.allclose(clip.pair_loss(images, ids), clip.pair_loss(images, captions[ids]), atol=1e-4)
            True
        """
        return pair_loss(self, x, captions)

    @torch.compiler.disable
    def sigmoid_loss(
        self, x: Tensor, labels: Tensor, *, max_labels: int, logit_bias: Tensor | float | None = None
    ) -> SkipOutput:
        """Binary cross-entropy of each image with each selected class, for any number of labels per image.

            loss = −1/(B·K) · Σ_b Σ_k log σ(±(logit_scale · ⟨x̂_b, t̂_k⟩ + logit_bias)),  + if k is a label of b, else −

        The classes of a step are selected as in `forward`, with all labels of the batch: m is at least
        min(C, B · max_labels). In evaluation mode all classes are compared. The loss of SigLIP (Zhai et al., ICCV 2023,
        arXiv 2303.15343) is K times this one. With `process_group` a training step is collective, without logits.
        `label_smoothing` and `class_weight` are refused.

        Args:
            x: Images [B, 3, height, width], or features at the cut [B, N, W].
            labels: [B, C] bool, integer or floating-point, 1 where an image has a class and 0 elsewhere. An image may
                have no label.
            max_labels: Largest number of labels of an image. On a GPU it is not compared with the labels, which would
                be a host sync: labels beyond it may be left out of the loss.
            logit_bias: Bias of the logits, a number or a tensor of one element that may train; default: that of the
                model, a constant, or 0; see docs/method.md, Pairs and several labels.

        Returns:
            SkipOutput: the loss, the logits [B, K] with the bias, the selected classes, and their labels, bool [B, K].

        Example:
            >>> import skipkernels as sk
            >>> from skipkernels.app.demo import glyph_tiny
            >>> model, _, tokenizer = glyph_tiny.load()
            >>> tokens = tokenizer([f"the digit {n}." for n in range(10)])
            >>> clip = sk.SkipCLIP(model, tokens, skip_layers=0.5, keep_ratio=0.2)
            >>> labels = torch.zeros(2, 10)
            >>> labels[0, [3, 7]] = labels[1, 3] = 1
            >>> out = clip.sigmoid_loss(torch.rand(2, 3, 32, 32), labels, max_labels=2, logit_bias=-10.0)
            >>> out.loss.shape, out.class_ids[out.targets[0]].tolist(), out.class_ids[out.targets[1]].tolist()
            (torch.Size([]), [3, 7], [3])
        """
        return sigmoid_loss(self, x, labels, max_labels, logit_bias)

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
        if not {id(p) for p in (*text, *image)} <= {id(p) for p in self.model.parameters()}:
            raise RuntimeError(
                "SkipCLIP: the model's parameters were replaced by others (load_state_dict with assign=True does "
                "that), so they would not train. Call clip.refresh(), or load without assign."
            )
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
