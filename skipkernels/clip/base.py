"""State of SkipCLIP: settings, encoders, detection of changes to the model, moves, and its part of a state dict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn

from .. import functional
from ..checks import warn_caller
from ..options import AttentionName
from ..selection import ClassSelection, RankSampler, classes_at_ranks, ranked_selection
from ..towers import ImageTower, Memory, Reduction, TextTower, evaluating
from ..towers.attention import SDPA, AttentionBackend
from ..towers.block import FusedBlock
from ..towers.changes import Containers
from .image import ImageEncoder, check_images
from .state import Origin, pack_state, unpack_state
from .text import TextEncoder

if TYPE_CHECKING:
    from typing_extensions import Self  # of Python 3.11

    from ..parallel import ClassParallel

Trainable = Literal["upper", "as_is"]
Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Apply `torch.compiler.disable`, which has no types, to a function, and keep its types for editors."""
    return torch.compiler.disable(function)


class _Fields(NamedTuple):
    loss: Tensor
    kept_logits: Tensor | None
    class_ids: Tensor
    targets: Tensor


class SkipOutput(_Fields):
    """Result of a step: a named tuple.

    Attributes:
        loss: [], mean cross-entropy over the batch, weighted if SkipCLIP has class weights; of `sigmoid_loss`, the mean
            over images and classes.
        logits: [B, K]. In training they are computed with `return_logits`, for soft labels and by `sigmoid_loss` only;
            else the item `kept_logits` of the tuple is None, and reading the attribute raises an AttributeError.
        class_ids: [K] int64, ascending, the kept classes; in evaluation all classes, K = C.
        targets: [B] int64, positions of the labels in `class_ids`; of soft labels and of `sigmoid_loss` [B, K], the
            labels themselves.
    """

    __slots__ = ()

    @property
    def logits(self) -> Tensor:  # noqa: D102
        if (logits := self.kept_logits) is None:
            raise AttributeError(
                "SkipOutput.logits: this training step did not compute logits. Call clip(x, labels, "
                "return_logits=True) for those of the kept classes, or clip.predict(x) for those of all classes."
            )
        return logits


class Settings(NamedTuple):
    """Arguments of SkipCLIP that construction and `refresh` apply to the towers."""

    skip_layers: tuple[int | float, int | float]
    memory: Memory
    attention: AttentionName
    trainable: Trainable
    train_text: bool
    train_logit_scale: bool

    @classmethod
    def checked(
        cls,
        skip_layers: Any,
        memory: Memory,
        attention: AttentionName,
        trainable: Trainable,
        train_text: bool,
        train_logit_scale: bool,
    ) -> Settings:
        """Return settings, or raise if an argument is invalid for every model."""
        for name, value, allowed in (
            ("memory", memory, Memory), ("attention", attention, AttentionName), ("trainable", trainable, Trainable)
        ):  # fmt: skip
            if value not in get_args(allowed):
                raise ValueError(f"SkipCLIP: {name} must be one of {', '.join(get_args(allowed))}; got {value!r}.")
        pair = skip_layers if isinstance(skip_layers, tuple) else (skip_layers, skip_layers)
        if len(pair) != 2:
            raise ValueError(f"SkipCLIP: skip_layers must be one number or a pair (image, text); got {skip_layers!r}.")
        if not train_text:
            pair = pair[0], 1.0  # all blocks of the text tower
        return cls(pair, memory, attention, trainable, train_text, train_logit_scale)

    def apply(self, image: ImageTower, texts: Sequence[TextTower]) -> None:
        """Set cut, memory mode and attention backend of the towers; raise a ValueError if a tower can't use one."""
        backend = SDPA if self.attention == "sdpa" else _xformers(image, texts[0])
        for tower, name in ((image, "image"), *((text, "text") for text in texts)):
            skip = blocks_to_skip(self.skip_layers[name == "text"], len(tower.blocks), name)
            tower.memory, tower.skip, tower.attention_backend = self.memory, skip, backend


def blocks_to_skip(skip: int | float, depth: int, tower: str) -> int:
    """Number of skipped blocks among the `depth` blocks of a tower.

    >>> blocks_to_skip(0.5, 12, "image"), blocks_to_skip(5, 12, "text")
    (6, 5)
    """
    number = not isinstance(skip, bool) and isinstance(skip, (int, float))
    blocks = round(skip * depth) if isinstance(skip, float) and 0.0 <= skip <= 1.0 else skip
    if not (number and 0 <= blocks <= depth and blocks == int(blocks)):
        raise ValueError(
            f"SkipCLIP: skip_layers must be a whole number from 0 to {depth} for the {tower} tower, or a fraction of "
            f"its blocks such as 0.5, or a tuple (image, text) of either; got {skip!r}."
        )
    return int(blocks)


def _xformers(image: ImageTower, text: TextTower) -> AttentionBackend:
    from ..towers import xformers

    device = image.model.logit_scale.device
    for tower in (image, text):
        block = tower.blocks[0]
        if isinstance(block, FusedBlock) and block.why_not_fused() is None:
            weights, _, _, heads, *_ = block._read()
            reason = xformers.why_unavailable(device, weights.proj.dtype, weights.proj.shape[0] // heads)
            if reason is not None:
                raise ValueError(
                    f'SkipCLIP: attention="xformers" cannot be used here: {reason} Leave it at "sdpa", or use a GPU '
                    "and an xformers that was built for this PyTorch."
                )
    return xformers.backend()


class SkipCLIPBase(nn.Module):
    """Base of `SkipCLIP`: the model, its encoders, the sampler and the prototypes, which `SkipCLIP` sets."""

    model: Any  # nn.Module; its attributes depend on its library
    sampler: RankSampler
    prototypes: Tensor
    class_weight: Tensor | None
    label_smoothing: float
    _settings: Settings
    _parallel: ClassParallel | None
    _prompts: str  # digest of the prompts of all classes
    _tokens: Tensor  # prompts that this process holds
    _image_encoder: ImageEncoder
    _text_encoder: TextEncoder
    _containers: Containers
    _shares_classes = False  # within `same_classes`
    _shared_classes: Tensor | None = None  # [K], those of the first step there
    _before_lora: tuple[Trainable, list[str]] | None = None  # set by `add_lora`, for `merge_lora`

    def extra_repr(self) -> str:  # noqa: D102
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        where = f"dtype={self._image.dtype}, device={self.prototypes.device}"
        return f"classes={self._num_classes}, skip_layers={self.skip_layers}, trainable={trainable:,}, {where}"

    @property
    def skip_layers(self) -> tuple[int, int]:
        """Number of blocks skipped in the image tower and in the text tower."""
        return self._image.skip, self._text.skip

    @property
    def reductions(self) -> dict[str, Reduction]:
        """Exact reductions of time and memory by name: `enabled`, or the `reason` why not."""
        no_cut = "nothing is skipped (skip_layers=0), so the embedding trains"
        states: dict[str, Reduction] = {}
        first, *others = (text.reductions for text in self._text_encoder.towers)
        texts = {  # those that are enabled for every template
            name: next((each[name] for each in others if not each[name].enabled and found.enabled), found)
            for name, found in first.items()
        }
        images = self._image.reductions
        for prefix, tower, reductions in (("image", self._image, images), ("text", self._text, texts)):
            states |= {f"{prefix}.{name}": reduction for name, reduction in reductions.items()}
            if tower.skip == len(tower.blocks):
                states[f"{prefix}.pooled_last_block"] = Reduction(
                    False, "every block is skipped: the last runs once, for every token"
                )
            states[f"{prefix}.no_input_gradient"] = Reduction.unless(None if tower.skip else no_cut)
        states["text.features_kept"] = states["text.no_input_gradient"]
        return states

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the model takes."""
        return self._image.image_size

    @property
    def config(self) -> Any:
        """Configuration of a Hugging Face model, for the model card of its trainer; None of other models."""
        return getattr(self.model, "config", None)

    @property
    def process_group(self) -> torch.distributed.ProcessGroup | None:
        """The processes that train together, or None."""
        return None if self._parallel is None else self._parallel.group

    @property
    def _image(self) -> ImageTower:
        return self._image_encoder.tower

    @property
    def _text(self) -> TextTower:
        return self._text_encoder.tower

    @property
    def _num_classes(self) -> int:
        return len(self.prototypes) if self._parallel is None else self._parallel.num_classes

    # ---- embeddings of classes ----------------------------------------------------------------------------------

    def _class_embeddings(self) -> Tensor:
        """Cached embeddings [C, D] of all classes, not to be changed."""
        own = self._own_class_embeddings()
        return own if self._parallel is None else self._parallel.class_embeddings(own)

    def _embeddings_of_all(self, image: Tensor) -> Tensor:
        """Embeddings [C, D] of all classes for image embeddings; cached ones if there is no gradient."""
        if not torch.is_grad_enabled():
            return self._class_embeddings().to(image.dtype)
        self._refuse_parallel("an evaluation with gradients", "Call it under torch.no_grad().")
        return self._encode_classes(torch.arange(self._num_classes, device=image.device), image.dtype)

    def _own_class_embeddings(self) -> Tensor:
        """Cached unit-norm embeddings of the classes of this process, not to be changed."""
        return self._text_encoder.class_embeddings() if self._settings.train_text else self.prototypes

    def _encode_classes(self, class_ids: Tensor, dtype: torch.dtype, *, exact: bool = False) -> Tensor:
        """Embeddings [K, D] of classes of this process, with gradient; constants in `dtype` if texts do not train."""
        if self._settings.train_text:
            return self._text_encoder.encode(class_ids, exact=exact)
        return self.prototypes.index_select(0, class_ids).to(dtype)

    def _scaled_embeddings(self, x: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Unit-norm image embeddings [B, D] times exp(logit_scale), and unit-norm class embeddings, by default own."""
        check_images(x)
        self._check_unaltered()
        self._follow(x.device)
        classes = self._own_class_embeddings() if classes is None else classes
        with evaluating([self.model]):
            image = self._image_encoder.encode(x)
        with torch.autocast(image.device.type, enabled=False):
            image = nn.functional.normalize(image.to(classes.dtype), dim=-1)
            return self.model.logit_scale.exp().to(classes.dtype) * image, classes

    @torch.no_grad()
    def _scores(self, image: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores of the classes that this process has prototypes of; see `functional.class_scores`."""
        with torch.autocast(image.device.type, enabled=False):  # which would cast all prototypes in each step
            return functional.class_scores(image.to(self.prototypes.dtype), self.prototypes, labels)

    def _select(
        self, image: Tensor, labels: Tensor, draw_on: Callable[[torch.device, int, int], Tensor]
    ) -> ClassSelection:
        """Select the classes of a step on the ranks of `draw_on`(device, C, number of labels).

        Targets are the positions [B] of labels [B], or the columns [B, K] of soft labels [B, C].
        """
        num_classes = len(self.prototypes)
        if labels.ndim == 2:
            is_label = (labels != 0).any(dim=0)  # [C]
            class_ids = self._select_with(image, is_label, max(len(labels), int(is_label.sum())))
            return ClassSelection(class_ids, labels.index_select(1, class_ids))
        if self._shares_classes:
            is_label = torch.zeros(num_classes, dtype=torch.bool, device=labels.device).index_fill_(0, labels, True)
            class_ids = self._select_with(image, is_label, len(labels))
            return ClassSelection(class_ids, torch.searchsorted(class_ids, labels))
        ranks = draw_on(image.device, num_classes, len(labels))
        return ranked_selection(self._scores(image, labels), labels, ranks)

    def _select_with(self, image: Tensor, is_label: Tensor, labels: int) -> Tensor:
        """Select the classes [K] of a step, with all of `is_label`, bool [C], of which at most `labels` are true."""
        if self._shared_classes is not None:
            return self._checked_shared_classes(is_label)
        ranks = self.sampler.draw_on(image.device, len(is_label), labels)
        # Labels rank first. K does not depend on which classes they are.
        class_ids = classes_at_ranks(self._scores(image).masked_fill(is_label, math.inf), ranks)
        if self._shares_classes:
            self._shared_classes = class_ids
        return class_ids

    def _checked_shared_classes(self, is_label: Tensor) -> Tensor:
        """Classes [K] of the first step within `same_classes`, which must have all labels, bool [C]."""
        assert self._shared_classes is not None
        missing = is_label.index_fill(0, self._shared_classes, False)  # [C]
        expected = "within same_classes() labels must be among the classes that its first step kept"
        if missing.device.type != "cpu":
            torch._assert_async(~missing.any(), f"SkipCLIP: {expected}.")
        elif missing.any():
            raise ValueError(
                f"SkipCLIP: {expected}, {len(self._shared_classes)} of {len(missing)}; got {missing.count_nonzero()} "
                f"others, such as {int(missing.nonzero()[0])}. Enter same_classes() again for each batch."
            )
        return self._shared_classes

    # ---- checks of a step ----------------------------------------------------------------------------------------

    def _check_batch(self, x: Any) -> None:
        """Check images and the model on the host, and move what belongs to no module to the device of the images."""
        check_images(x)
        self._image_encoder.are_images(x)
        self._check_model(x.device)

    def _check_model(self, device: torch.device) -> None:
        """Check the model on the host, and move what belongs to no module to a device."""
        self._check_unaltered()
        if self.training:
            self._refuse_frozen_above()
            if self._text_encoder.trains_below() or self._image_encoder.trains_below():
                self._refuse_training_below()
        self._follow(device)

    def _check_draw(self, labels: int) -> None:
        """Raise a RuntimeError if the step of a number of labels would draw other classes than its first forward."""
        classes = self._num_classes
        draws = self.training and self._shared_classes is None
        in_backward = draws and torch._C._current_graph_task_id() != -1
        if in_backward and self.sampler.plan(classes, labels)[0] < classes:  # the step would draw from the tail
            raise RuntimeError(
                "SkipCLIP: the step was called again within a backward pass, as activation checkpointing does; it "
                'would draw other classes than the first time. Use memory="min" instead.'
            )

    def _refuse_frozen_above(self) -> None:
        """Raise a RuntimeError if the first block above the cut was frozen, as by another SkipCLIP on the model."""
        for tower in (self._image, self._text) if self._settings.trainable == "upper" else ():
            first = tower.blocks[tower.skip : tower.skip + 1]
            if not all(any(p.requires_grad for p in block.parameters()) for block in first):
                raise RuntimeError(
                    "SkipCLIP: the first block above the cut was frozen after SkipCLIP was made, such as by another "
                    "SkipCLIP on the same model, with more skip_layers. Use the other one, or call clip.refresh(); to "
                    'freeze blocks above the cut, pass trainable="as_is".'
                )

    # ---- changes to the model -----------------------------------------------------------------------------------

    def check_weights(self) -> None:
        """Compare the content of the weights below the cut with those that computed the features at the cut.

        Called at each switch between training and evaluation mode; a step compares only identities and versions, which
        do not show a change through `.data` or `numpy()`. After a change, text features are computed again, and calls
        with image features computed before raise an error.
        """
        self._image_encoder.compare_weights()
        self._text_encoder.compare_weights()
        self._refuse_training_below()

    def _refuse_parallel(self, name: str, remedy: str = "Create SkipCLIP without process_group.") -> None:
        if self._parallel is not None:
            raise RuntimeError(f"SkipCLIP: {name} is not supported with process_group. {remedy}")

    def _refuse_training_below(self) -> None:
        frozen = [*self._image.lower_parameters(), *self._text.lower_parameters()]
        frozen += [] if self._settings.train_text else self._text.upper_parameters()
        if any(p.requires_grad for p in frozen):
            raise RuntimeError(
                "SkipCLIP: requires_grad was set on parameters below the cut, which get no gradient. Set it to False "
                "again, or call clip.refresh(), which does; to train them, make a SkipCLIP with fewer skip_layers."
            )

    def _check_unaltered(self) -> None:
        """Raise a RuntimeError if a module around the blocks of the model was altered."""
        self._containers.check()

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; a switch compares the weights below the cut, see `check_weights`."""
        switched = mode != self.training
        super().train(mode)
        if switched:
            self.check_weights()
        return self

    def _follow(self, device: torch.device) -> None:
        """Move the tensors beside the model to the device of the images, after the model alone was moved."""
        if self.prototypes.device != device and self.model.logit_scale.device == device:
            self.prototypes = self.prototypes.to(device)
            self.class_weight = None if self.class_weight is None else self.class_weight.to(device)
            self._text_encoder.apply(lambda x: x.to(device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert or move everything, including tensors of the towers; prototypes and weights stay at least fp32."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        encoders: tuple[ImageEncoder | TextEncoder, ...] = self._image_encoder, self._text_encoder
        dtype, stale = self._image.dtype, [encoder.is_stale() for encoder in encoders]
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            converted = getattr(self, name)
            if buffer.dtype != converted.dtype:
                setattr(self, name, buffer.to(converted.device))
        if self._parallel is not None:
            moved = fn(self.prototypes)
            keeps_dtype = moved.dtype == self.prototypes.dtype
            self.prototypes = moved if keeps_dtype else self.prototypes.to(moved.device)
        for encoder, is_stale in zip(encoders, stale, strict=True):
            encoder.tower.move_lower()
            if not is_stale:  # the digests of another device or dtype differ
                encoder.accept_weights()
        self._text_encoder.apply(fn, keep=not stale[1])
        if self._image.dtype != dtype:
            self._image_encoder.features = self._image_encoder.features[0], self._image.dtype
        return self

    # ---- state --------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """Return the state of the sampler and the prototypes as a uint8 tensor, see clip/state.py."""
        return pack_state(self._origin, self.prototypes, self.sampler.state_dict())

    def set_extra_state(self, state: Any) -> None:
        """Continue from the result of `get_extra_state`, of any process of as many.

        Raises:
            ValueError: If it is damaged, or of other prompts, another model or another number of processes.
        """
        prototypes, sampler = unpack_state(state, self._origin)
        self.sampler.load_state_dict(sampler)
        if prototypes is not None:
            self.prototypes.copy_(prototypes)

    @property
    def _origin(self) -> Origin:
        return Origin(self._prompts, self.prototypes.shape[1], 1 if self._parallel is None else self._parallel.size)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        key = f"{prefix}_extra_state"
        if key in missing:
            missing.remove(key)
            warn_caller(
                "SkipCLIP: the state dict has no sampler and no prototypes (it was saved by an older version, or is "
                "the model's own); the sampler keeps its current state."
            )

    def _replicate_for_data_parallel(self) -> Self:
        raise RuntimeError(
            "SkipCLIP: torch.nn.DataParallel copies the module in each step, so draws and cached texts would be lost. "
            "Use DistributedDataParallel, with a process for each GPU (torchrun, accelerate launch), or one GPU "
            "(CUDA_VISIBLE_DEVICES=0)."
        )
