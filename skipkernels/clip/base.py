"""State of SkipCLIP: its parts, the detection of changes to the model, moves, and the extra state of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import functional
from ..checks import warn_caller
from ..parallel import ClassParallel
from ..selection import RankSampler
from ..towers import ImageTower, Reduction, TextTower
from ..towers.block import fuse_blocks
from ..towers.changes import Containers
from ..towers.reductions import of_every_template
from .batch import check_images
from .image_encoder import ImageEncoder
from .settings import Settings, Trainable
from .state import Shard, pack_state, prompts_digest, refuse_low_rank_updates, unpack_state
from .text_encoder import TextEncoder

if TYPE_CHECKING:
    from typing_extensions import Self  # of Python 3.11


class SkipCLIPBase(nn.Module):
    """Base of `SkipCLIP`: the model, its encoders, the sampler and the prototypes, which `SkipCLIP` sets."""

    model: Any  # nn.Module; its attributes depend on its library
    sampler: RankSampler
    prototypes: Tensor
    class_weight: Tensor | None
    label_smoothing: float
    _settings: Settings
    _parallel: ClassParallel | None
    _prompts: str | None  # digest of the prompts of all classes, with `_parallel`
    _tokens: Tensor  # prompts that this process holds
    _image_encoder: ImageEncoder
    _text_encoder: TextEncoder
    _containers: Containers | None  # None in a copy and after a move
    _before_lora: tuple[Trainable, list[str]] | None = None  # set by `add_lora`, for `merge_lora`

    @property
    def skip_layers(self) -> tuple[int, int]:
        """Number of blocks skipped in the image tower and in the text tower."""
        return self._image.skip, self._text.skip

    @property
    def reductions(self) -> dict[str, Reduction]:
        """Exact reductions of time and memory by name: `enabled`, or the `reason` why not."""
        no_cut = "nothing is skipped (skip_layers=0), so the embedding trains"
        states: dict[str, Reduction] = {}
        texts = of_every_template([text.reductions for text in self._text_encoder.towers])
        images = self._image.reductions
        for prefix, tower, reductions in (("image", self._image, images), ("text", self._text, texts)):
            states |= {f"{prefix}.{name}": reduction for name, reduction in reductions.items()}
            if tower.skip == len(tower.blocks):
                states[f"{prefix}.pooled_last_block"] = Reduction(
                    False, "every block is skipped: the last runs once, for every token"
                )
            states[f"{prefix}.no_input_gradient"] = Reduction.unless(None if tower.skip else no_cut)
        states["text.features_kept"] = states["text.no_input_gradient"]
        if self._parallel is not None:
            replicated = "class_parallel is False" if self._parallel.replicated else None
            states["text.class_parallel"] = Reduction.unless(replicated)
        return states

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the model takes."""
        return self._image.image_size

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

    @property
    def _owned_of_held(self) -> slice:
        return slice(None) if self._parallel is None else self._parallel.owned_of_held

    # ---- embeddings of classes ----------------------------------------------------------------------------------

    def _class_embeddings(self) -> Tensor:
        """Cached embeddings [C, D] of all classes, not to be changed."""
        own = self._own_embeddings()
        return own if self._parallel is None else self._parallel.class_embeddings(own)

    def _own_embeddings(self) -> Tensor:
        """Cached embeddings [C/W, D] of the classes that this process owns, not to be changed."""
        return self._text_encoder.class_embeddings(self._owned_of_held)

    def _embeddings_of_all(self, image: Tensor) -> Tensor:
        """Embeddings [C, D] of all classes for image embeddings; cached ones if there is no gradient."""
        if not torch.is_grad_enabled():
            return self._class_embeddings().to(image.dtype)
        self._refuse_parallel("an evaluation with gradients", "Call it under torch.no_grad().")
        return self._text_encoder.encode(torch.arange(self._num_classes, device=image.device))

    @torch.no_grad()
    def _scores(self, image: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores of the classes that this process has prototypes of; see `functional.class_scores`."""
        with torch.autocast(image.device.type, enabled=False):  # which would cast all prototypes in each step
            return functional.class_scores(image.to(self.prototypes.dtype), self.prototypes, labels)

    # ---- checks of a step ----------------------------------------------------------------------------------------

    def _check_batch(self, x: Any) -> None:
        """Check images and the model on the host, and move what belongs to no module to the device of the images."""
        check_images(x)
        self._image_encoder.are_images(x)
        self._check_unaltered()
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

    # ---- changes to the model -----------------------------------------------------------------------------------

    def check_weights(self) -> None:
        """Compare the content of the weights below the cut with those that computed the features at the cut.

        Called at each switch between training and evaluation mode; a step compares only identities and versions, which
        do not show a change through `.data` or `numpy()`. After a change, text features are computed again, and calls
        with image features computed before raise an error.
        """
        self._image_encoder.weights.content_changed()
        self._text_encoder.compare_weights()
        self._refuse_training_below()

    def _refuse_parallel(self, name: str, remedy: str = "Create SkipCLIP without process_group.") -> None:
        if self._parallel is not None:
            raise RuntimeError(f"SkipCLIP: {name} is not supported with process_group. {remedy}")

    def _refuse_training_below(self) -> None:
        if self._image_encoder.weights.requires_grad() or self._text_encoder.weights.requires_grad():
            raise RuntimeError(
                "SkipCLIP: requires_grad was set on parameters below the cut, which get no gradient. Set it to False "
                "again, or call clip.refresh(), which does; to train them, make a SkipCLIP with fewer skip_layers."
            )

    def _check_unaltered(self) -> None:
        """Raise a RuntimeError if the blocks of the model, or a module around them, were altered."""
        if self._containers is None or not self._containers.unchanged():
            containers = Containers(self.model, (self._image, *self._text_encoder.towers))
            containers.check(self._tokens)
            fuse_blocks([*self._image.blocks, *self._text.blocks])  # those that were replaced
            self._containers = containers

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
        dtype, stale = self._image.dtype, [encoder.weights.changed() for encoder in encoders]
        keeps_text = not stale[1]
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
            if encoder.lower_device is not None:
                encoder.tower.move_lower(encoder.lower_device)
            if not is_stale:  # the digests of another device or dtype differ
                encoder.accept_weights()
        self._text_encoder.apply(fn, keep=keeps_text)
        if self._image.dtype != dtype:
            self._image_encoder.features = self._image_encoder.features[0], self._image.dtype
        self._containers = None
        return self

    # ---- state --------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """Return the state of the sampler and the prototypes of this process as a uint8 tensor: a safetensors file."""
        prompts = self._prompts or prompts_digest(self._tokens)
        return pack_state(self.prototypes, prompts, self.sampler.tensors(), self._shard)

    def set_extra_state(self, state: Any) -> None:
        """Continue from the result of `get_extra_state`, of any process of any number of them.

        Raises:
            ValueError: If it is damaged, or of other prompts, another model, or other weights before tuning.
        """
        prompts = self._prompts or prompts_digest(self._tokens)
        prototypes, sampler = unpack_state(state, self.prototypes, prompts, self._shard, self._text.dtype)
        self.sampler.load_tensors(sampler)
        self.prototypes.copy_(prototypes)

    @property
    def _shard(self) -> Shard:
        rank, size = (0, 1) if self._parallel is None else (self._parallel.rank, self._parallel.size)
        return Shard(rank, size, self._num_classes)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        refuse_low_rank_updates(self.model, state_dict, f"{prefix}model.")
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

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_containers": None}  # it refers to modules of this process
