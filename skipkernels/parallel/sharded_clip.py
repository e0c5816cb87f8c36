"""SkipCLIP on several processes: images shared out by batch, classes by c ≡ r (mod P).

Calls that send messages are collective: every process must make them equally often, with an empty batch if it has no
images. docs/many-processes.md lists the messages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..clip import SkipCLIP, SkipOutput
from ..clip.checks import as_class_weight, as_tokens, check_image_embeddings, check_labels, check_vocabulary
from ..clip.state import Origin
from ..clip.step import select_and_encode
from ..digests import digest_json, digest_tensors, digests
from ..retrieval import check_k, largest, top_k_logits
from ..towers.base import Tower, UnsupportedModel
from .class_parallel import ClassParallel, check_group
from .gathers import all_gather, count_of, filled, gather_rows
from .loss import OwnColumns, sharded_cross_entropy
from .own_texts import OwnTexts

Result = TypeVar("Result")


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
        prototypes, texts: Those of the classes of this process: row i is class r + i · P on process r of P.
        shards: Assignment of classes to processes, for the code of this package.

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
        check_group(process_group, next(model.parameters()).device)
        self.shards = shards = ClassParallel(process_group, len(tokens))
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
            self.evaluation_embeddings()  # collective: before an error of this process
            return super().forward(pixel_values, labels, return_logits=return_logits)
        return self._step(pixel_values, labels, self.check_inputs, self.images.encode, return_logits)

    @torch.compiler.disable
    def loss(self, image: Tensor, labels: Tensor) -> Tensor:
        """Loss [] of image embeddings, see `SkipCLIP.loss`."""
        if not self.training:
            self.evaluation_embeddings()
            return super().loss(image, labels)

        def check(x: Tensor) -> None:
            self.check_device()
            check_image_embeddings(x, self.prototypes.shape[1])

        return self._step(image, labels, check, lambda x: x).loss

    def _step(
        self,
        batch: Tensor,
        labels: Tensor,
        check: Callable[[Tensor], None],
        encode: Callable[[Tensor], Tensor],
        return_logits: bool = False,
    ) -> SkipOutput:
        """Run one step on the batches of all processes, which `check` refuses or `encode` maps to embeddings [b, D]."""

        def checked() -> tuple[Tensor, Tensor]:
            _refuse_soft_labels(labels, return_logits)
            x, y = filled(batch, labels)
            check(x)
            check_labels(y, x, self.num_classes)
            return x, y

        # 1. The labels and image embeddings of all processes
        shards, count = self.shards, count_of(batch)
        (x, y), sizes = self.begin("a training step", count, checked, draws=True)
        image = encode(x)[:count]
        labels = gather_rows(y[:count], sizes, shards.group)  # [B]
        image = gather_rows(image, sizes, shards.group)  # [B, D]
        # 2. The same selection on every process, from the scores [C], gathered from [C/P] on each,
        #    and text embeddings of the selected classes that this process owns: [K_r, D], [K], [B]
        texts = OwnTexts(self.texts, shards)
        text, class_ids, targets = select_and_encode(image, labels, texts, self.sampler)
        # 3. The loss over all images
        loss = sharded_cross_entropy(
            image,
            text.to(image.dtype),
            OwnColumns(texts.positions, targets, len(class_ids)),
            self.scale,
            shards.group,
            class_weight=None if self.class_weight is None else self.class_weight[class_ids],
            label_smoothing=self.label_smoothing,
        )
        return SkipOutput(loss, None, class_ids, targets[shards.own_rows(sizes)])

    def begin(
        self, call: str, count: int, check: Callable[[], Result], *, draws: bool = False
    ) -> tuple[Result, list[int]]:
        """Check the arguments of a call on images; see `_check_on_all`."""
        found, sizes = self._check_on_all(call, count, check, draws=draws)
        if sum(sizes) == 0:
            raise ValueError("ShardedSkipCLIP: a batch must have at least one image on one of the processes; got none.")
        return found, sizes

    def _check_on_all(
        self, call: str, count: int, check: Callable[[], Result], *, draws: bool = False
    ) -> tuple[Result, list[int]]:
        """Check the arguments of a call; return what `check` returns, and the number of images of each process.

        Collective: an error of `check` is raised on every process. `draws` if the call selects classes.
        """
        device = self.prototypes.device
        try:
            found = check()
        except Exception:
            self.shards.announce_error(call, device)
            raise
        return found, self.shards.gather_sizes(count, call, device, self.sampler.identity() if draws else b"")

    def evaluation_embeddings(self) -> Tensor:  # noqa: D102
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ShardedSkipCLIP: an evaluation with gradients is not supported. Call it under torch.no_grad()."
            )
        return self._all_embeddings()

    # ---- evaluation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(
        self, pixel_values: Tensor, *, tokens: Tensor | None = None, class_embeddings: Tensor | None = None
    ) -> Tensor:
        """Logits [b, C] of the images of this process over all classes, collective; or over other classes.

        Each process sends every other process the logits [b, C/P] of that process's images for its own classes.
        """
        if tokens is not None or class_embeddings is not None:
            count = count_of(pixel_values)  # 0 is allowed here too
            (rows,) = filled(pixel_values)
            return super().predict(rows, tokens=tokens, class_embeddings=class_embeddings)[:count]
        shards = self.shards
        image, classes, sizes = self._gathered_image_and_classes(pixel_values, "predict")
        longest, width = max(sizes), max(shards.sizes)
        sent = image.new_empty(shards.size, longest, width)
        with torch.autocast(image.device.type, enabled=False):
            for part, rows in zip(sent, image.split(sizes), strict=True):
                part[: len(rows), : len(classes)] = rows @ classes.T
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=shards.group)
        logits = image.new_empty(sizes[shards.rank], self.num_classes)
        for rank, (part, owned) in enumerate(zip(received, shards.sizes, strict=True)):
            logits[:, rank :: shards.size] = part[: len(logits), :owned]
        return logits

    @torch.no_grad()
    def top_k(self, pixel_values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits [b, k] of the images of this process, and their classes; collective.

        Each process sends the k best of its classes for the images of all processes: [B, k] logits and class ids.
        """
        check_k(k, self.num_classes)
        shards = self.shards
        image, classes, sizes = self._gathered_image_and_classes(pixel_values, f"top_k with k={k}")
        width, own_rows = min(k, max(shards.sizes)), shards.own_rows(sizes)
        with torch.autocast(image.device.type, enabled=False):
            # 1. The k best own classes, for the images of all processes: [B, width], −∞ where this process has fewer
            logits, positions = top_k_logits(image, classes, min(k, len(classes)))
        class_ids = positions * shards.size + shards.rank
        missing = width - logits.shape[1]  # padding, sorted behind every class
        logits = nn.functional.pad(logits, (0, missing), value=-torch.inf)
        class_ids = nn.functional.pad(class_ids, (0, missing), value=self.num_classes)
        # 2. The candidates of all processes, for the images of this one: [b, P · width]
        logits = torch.cat(all_gather(logits, shards.group).unbind(), 1)[own_rows]
        class_ids = torch.cat(all_gather(class_ids, shards.group).unbind(), 1)[own_rows]
        # 3. The k best of them: [b, k]
        class_ids, order = class_ids.sort(dim=1)  # so that a lower position is a lower class among equal logits
        found, positions = largest(logits.gather(1, order), k)
        return found, class_ids.gather(1, positions)

    def class_embeddings(self, tokens: Tensor | None = None) -> Tensor:
        """Unit-norm text embeddings [C, D] of all classes, collective after a change of the weights; or of others."""
        return self._all_embeddings().clone() if tokens is None else super().class_embeddings(tokens)

    def _all_embeddings(self) -> Tensor:
        """Unit-norm text embeddings [C, D] of all classes, kept until a weight changes."""
        own = self.texts.kept_embeddings()  # the same tensor until a weight changes
        if self._gathered is None or self._gathered[0] is not own:
            self.shards.gather_sizes(0, "class_embeddings", own.device)
            self._gathered = own, self.shards.gather_classes(own)
        return self._gathered[1]

    def encode_classes(self, class_ids: Tensor) -> Tensor:
        """Not supported: a process has the texts of its own classes alone."""
        raise RuntimeError("ShardedSkipCLIP: encode_classes is not supported. Read them from class_embeddings().")

    def set_classes(self, tokens: Tensor, class_weight: Tensor | None = None) -> None:
        """Replace the classes of the task in place, on every process; see `SkipCLIP.set_classes`."""

        def check() -> tuple[Tensor, ClassParallel, Tensor | None]:
            found = as_tokens(tokens)
            check_vocabulary("ShardedSkipCLIP", "tokens", found, self.texts.tower.vocabulary)
            shards = replace(self.shards, num_classes=len(found))
            return found, shards, as_class_weight(class_weight, self.prototypes, len(found))

        (tokens, shards, weight), _ = self._check_on_all("set_classes", 0, check)
        digest = digest_tensors([("tokens", tokens)])
        self._check_agreement(shards, digest, weight)
        super().set_classes(tokens[shards.owned])
        self.shards, self._digest, self.class_weight = shards, digest, weight

    def _origin(self) -> Origin:
        return Origin(self._digest, self.prototypes.shape[1], self.shards.size)

    def _gathered_image_and_classes(self, pixel_values: Any, call: str) -> tuple[Tensor, Tensor, list[int]]:
        """Scaled image embeddings [B, D] of all processes, own class embeddings, and image counts; collective."""
        count = count_of(pixel_values)
        local = partial(self._scaled_image_and_classes, *filled(pixel_values))
        (image, classes), sizes = self.begin(call, count, local)
        return gather_rows(image[:count], sizes, self.shards.group), classes, sizes

    def _check_agreement(self, shards: ClassParallel, digest: str, class_weight: Tensor | None) -> None:
        """Raise an error on every process for batch norms, or unless all have the same inputs and weights."""
        model = self.model
        if shards.size > 1:
            _refuse_batch_norms(self.images.tower)
            _refuse_batch_norms(self.texts.tower)
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
        shards.check_equal(list(digest_of.items()), self.prototypes.device)  # the model may be on two devices


def check_sharded(function: str, clip: object) -> None:
    """Raise a TypeError unless clip is a ShardedSkipCLIP."""
    if not isinstance(clip, ShardedSkipCLIP):
        raise TypeError(f"parallel.{function}: clip must be a ShardedSkipCLIP; got {type(clip).__name__}.")


def _refuse_soft_labels(labels: Any, return_logits: bool) -> None:
    if return_logits or (isinstance(labels, Tensor) and labels.ndim == 2):
        raise ValueError(
            "ShardedSkipCLIP: labels must be class ids [B] and return_logits False, since no process has the "
            "embeddings of all selected classes. Use clip.eval(), or SkipCLIP on one process."
        )


def _refuse_batch_norms(tower: Tower) -> None:
    """Raise if a module above the cut is a batch norm other than `SyncBatchNorm`."""
    for part in tower.upper_parts():
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
                raise UnsupportedModel(
                    "ShardedSkipCLIP: batch norms above the cut must use the images of all processes; got "
                    f"{type(module).__name__}. Convert the model with "
                    "torch.nn.SyncBatchNorm.convert_sync_batchnorm, on a GPU, or raise skip_layers."
                )
