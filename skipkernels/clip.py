"""SkipCLIP: Skip Tuning on a CLIP that the caller already has."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import safetensors.torch
import torch
from torch import Tensor, nn

from . import functional
from .boundary import DEFAULT_CHUNK, LSkipBoundary
from .checks import warn_caller
from .classifier import ImageClassifier
from .selection import ClassSelection, RankSampler, Tail, select_ranks
from .store import digest_tensors, digests
from .towers import Memory, Reduction, UnsupportedModel, build_towers, evaluating, training_without_chance, xformers
from .towers.agreement import Pair, check_agreement
from .towers.attention import SDPA, Attention, Backend
from .towers.base import ImageTower
from .towers.structure import Structure, WeightsSeen, called_modules, containers, fused_modules, refuse_overrides
from .towers.text_store import TextStore, kept_prototypes, telling

Trainable = Literal["upper", "as_is"]
_ADAPTERS = ("peft", "loralib", "adapters")  # packages whose modules hold trainable weights beside the model's own
_STATE_FORMAT = "1"
# Every SkipCLIP on a model: a later one may freeze or train what an earlier one relies on.
_on_model: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[SkipCLIP]] = weakref.WeakKeyDictionary()
_frozen: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()  # by a SkipCLIP, by identity


class SkipOutput(NamedTuple):
    """Loss, logits, and the classes that they are over.

    Attributes:
        loss: [], mean cross-entropy over the batch.
        logits: [B, K]; in training [B, 0] unless asked for.
        class_ids: [K] int64, ascending. In evaluation all classes, K = C.
        targets: [B] int64, positions of the labels in `class_ids`.
    """

    loss: Tensor
    logits: Tensor
    class_ids: Tensor
    targets: Tensor


class SkipCLIP(nn.Module):
    """Tune a CLIP by Skip Tuning: train the blocks above `skip_layers`, on the classes that matter for each batch.

    The caller's model is tuned in place: its parameters are shared and its `state_dict` keeps its keys. What is below
    the cut is frozen (`requires_grad` False), what is above is set to train. At `skip_layers=0` nothing is frozen but
    `logit_scale`: that is full fine-tuning with class skipping.

    In evaluation mode (`clip.eval()`) `clip(x, labels)` compares with all classes, returns [B, C] logits and the loss
    over them, and changes no state. `clip.state_dict()` holds the model, and as `_extra_state` the sampler and the
    prototypes, so that a training resumes with the same draws.

    The model must not be altered after construction (a hook, another layer, mask or head count): that is an error at
    the next call, until `refresh` reads the model again. Weights below the cut are compared by content at each switch
    between training and evaluation mode, and by version in each step.

    `torch.compile(clip)` runs the step as it is and makes nothing faster. Activation checkpointing around SkipCLIP is
    refused, since it would draw other classes: use `memory="min"`.

    In `DistributedDataParallel(clip, forward_sync_buffers=False)` each process
    chooses classes for its part of a batch. With `keep_ratio=1` and equal parts the gradients are those of the whole.

    Args:
        model: An open_clip `CLIP`, `CustomTextCLIP` or `CoCa`, an OpenAI `clip.model.CLIP`, or a Hugging Face
            `CLIPModel` or `SiglipModel`.
        tokens: [C, L] int64, the tokenised prompt of each class.
        skip_layers: Blocks skipped in each tower (ω): a number, a fraction of the tower's blocks, or a pair of either
            (image, text).
        keep_ratio: Share of classes that always stay in a step (up to 1), or their number.
        max_keep: Most classes that always stay, unless a batch has more labels.
        decay: λ, how slowly the chance to stay falls over the other classes.
        tail: "resample" draws the tail of every step anew, "fixed" once per run, as published.
        generator: Source of the draws; seeded with 0 if not given.
        lower_device: Where what is below the cut lives, parameters and buffers, if not with the rest.
        train_logit_scale: Also train the temperature.
        trainable: "upper" sets `requires_grad` of every parameter above the cut, and refuses a model with adapters.
            "as_is" trains those parameters above the cut whose `requires_grad` is set: adapters, norms or biases alone.
            Either way what is below the cut is frozen.
        chunk: Most samples that run below the cut at once.
        memory: What a block above the cut keeps for backward: "fast" all but what is cheap to compute again (about ten
            widths a token), "min" its input alone, and runs again in backward; "auto" is "fast" as long as that takes
            less than half of the free memory. Blocks that run as modules keep what autograd keeps, unless it is "min".
            Results are the same.
        attention: Who computes it: "sdpa" is PyTorch, with our own operators for texts behind a shared prefix and for
            pooled tokens. "xformers" takes the place of the first two on a GPU; where it cannot, that is an error.
        text_cache: Folder to keep the texts' features at the cut in, and not in memory, for very many classes; filled
            the first time, while other processes wait, and opened the next. On a GPU each step then waits for the
            classes that it has drawn.

    Attributes:
        prototypes: [C, D] fp32 (fp64 for an fp64 model), unit-norm text embeddings from before tuning.
        sampler: The `RankSampler`. Its state is part of `state_dict`.

    Raises:
        UnsupportedModel: If no tower handles the model, or a module that SkipCLIP does not call has hooks.
        ValueError: If an argument is out of range.
        RuntimeError: If SkipCLIP's embeddings or gradients differ from the model's own.
        StoreError: If `text_cache` holds the features of other prompts, weights or another model.

    Source: Wu et al., "Skip Tuning", CVPR 2025, arXiv 2412.11509.

    Example:
        >>> import logging; logging.disable()  # open_clip warns of random weights
        >>> import open_clip
        >>> from skipkernels.data import glyph_tiny
        >>> glyph_tiny.register()
        >>> model = open_clip.create_model("glyph-tiny")
        >>> tokens = open_clip.get_tokenizer("glyph-tiny")([f"the digit {n}." for n in range(10)])
        >>> clip = SkipCLIP(model, tokens, skip_layers=0.5)
        >>> out = clip(torch.rand(4, 3, 32, 32), torch.tensor([3, 3, 3, 3]))
        >>> out.loss.shape, out.class_ids.shape, out.class_ids[out.targets].tolist()
        (torch.Size([]), torch.Size([6]), [3, 3, 3, 3])
    """

    model: Any  # the caller's, with the attributes of its family
    prototypes: Tensor
    _text_features: Tensor | None
    _features: tuple[torch.Size, torch.dtype]  # shape of one image's features at the cut, and their dtype
    _trains: frozenset[int]  # identities of the parameters that train

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        *,
        skip_layers: int | float | tuple[int | float, int | float],
        keep_ratio: float = 0.5,
        max_keep: int = 50,
        decay: float = 0.3,
        tail: Tail = "resample",
        generator: torch.Generator | None = None,
        lower_device: torch.device | str | None = None,
        train_logit_scale: bool = False,
        trainable: Trainable = "upper",
        chunk: int = DEFAULT_CHUNK,
        memory: Memory = "auto",
        attention: Attention = "sdpa",
        text_cache: str | Path | None = None,
    ):
        super().__init__()
        if not isinstance(tokens, Tensor):
            raise TypeError(
                f"SkipCLIP: tokens must be an int64 tensor [C, L]; got {type(tokens).__name__}. Tokenise one prompt "
                "for each class; of what a tokenizer of transformers returns take input_ids."
            )
        if tokens.ndim != 2 or tokens.numel() == 0 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"SkipCLIP: tokens must be int64 [C, L] with C ≥ 1 and L ≥ 1; got {tokens.dtype} {list(tokens.shape)}. "
                "Tokenise one prompt for each class with the model's own tokenizer."
            )
        if chunk < 1:
            raise ValueError(f"SkipCLIP: chunk must be at least 1; got {chunk}.")
        if torch.is_inference_mode_enabled():
            raise RuntimeError("SkipCLIP: it cannot be made under torch.inference_mode(): its tensors could not train.")
        if memory not in get_args(Memory):
            raise ValueError(f'SkipCLIP: memory must be "auto", "fast" or "min"; got {memory!r}.')
        if trainable not in get_args(Trainable):
            raise ValueError(f'SkipCLIP: trainable must be "upper" or "as_is"; got {trainable!r}.')
        pair = skip_layers if isinstance(skip_layers, tuple) else (skip_layers, skip_layers)
        if len(pair) != 2:
            raise ValueError(f"SkipCLIP: skip_layers must be one number or a pair (image, text); got {skip_layers!r}.")
        self.model = model
        try:
            self.sampler = RankSampler(keep_ratio, max_keep, decay, tail, generator)
        except ValueError as error:
            raise ValueError(str(error).replace("select_classes:", "SkipCLIP:", 1)) from None
        self.chunk = chunk
        self._settings = _Settings(pair, memory, attention, trainable, train_logit_scale)
        self._tokens = tokens.to("cpu", torch.int32)
        self._image, self._text = build_towers(model, tokens)
        self._class_embeddings: tuple[Tensor, Any] | None = None  # and of which weights
        self._lower_device: torch.device | None = None  # until all classes have passed the lower text blocks
        self._superseded = self._gave_features = False

        self._text_features = None  # no buffer: those are averaged and broadcast, and must be there or not be there
        self._text_store: TextStore | None = None
        self._text_weights = self._lower_image = WeightsSeen(())
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            self._set_up_towers()
            with torch.autocast(self._text.tokens.device.type, enabled=False):
                with evaluating([model]):
                    if text_cache is not None:
                        self._keep_texts(Path(text_cache))
                    prototypes = self._prototypes(text_cache)
                    self.register_buffer("prototypes", prototypes, persistent=False)
                self._check_against_model()
        except BaseException:
            for parameter, requires_grad in trained:  # the model is the caller's, and stays as it was
                parameter.requires_grad_(requires_grad)
            raise

        if lower_device is not None:
            self._lower_device = torch.device(lower_device)
        self._take_over()
        self.register_load_state_dict_post_hook(_after_load)

    # ---- construction ------------------------------------------------------------------------------------------

    def _set_up_towers(self) -> None:
        """Cut the towers, set what trains, and take the snapshot that later calls are compared with."""
        settings, towers = self._settings, (self._image, self._text)
        vocabulary, largest = self._text.vocabulary, int(self._tokens.max())
        if int(self._tokens.min()) < 0 or (vocabulary is not None and largest >= vocabulary):
            raise ValueError(
                f"SkipCLIP: tokens must be ids in [0, {vocabulary}), the model's vocabulary; got "
                f"{int(self._tokens.min())} to {largest}. Use the model's own tokenizer."
            )
        for tower, name, skip in zip(towers, ("image", "text"), settings.skip_layers, strict=True):
            tower.memory, tower.skip = settings.memory, blocks_to_skip(skip, len(tower.blocks), name)
        self._image.attention = self._text.attention = self._backend(settings.attention)
        self._structure: tuple[Structure, Structure] | None = None
        refuse_overrides(self.model, containers(self.model, (self._image, self._text)))
        self._set_trainable()
        self._structure, self._called = self._take_snapshot(), self._see_called()
        for tower, name in zip(towers, ("image", "text"), strict=True):
            fused = tower.reductions["fused_block"]
            if tower.can_fuse and not fused.enabled and settings.trainable == "upper":
                warn_caller(
                    f"SkipCLIP: not every block of the {name} tower is fused ({fused.reason}). It runs as your module: "
                    "the results are the same, time and memory are not."
                )

    def _set_trainable(self) -> None:
        """Set `requires_grad` of every parameter of the model."""
        towers, trainable = (self._image, self._text), self._settings.trainable
        lower = {id(parameter) for tower in towers for parameter in tower.lower_parameters()}
        upper = {id(parameter): parameter for tower in towers for parameter in tower.upper_parameters()}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        by_us = _frozen.setdefault(self.model, set())
        for key in upper:
            if key in lower:
                raise UnsupportedModel(
                    f"SkipCLIP: parameter {names[key]} is used on both sides of the cut, so it would change what is "
                    "cached. Untie it, or use skip_layers=0."
                )
        if trainable == "upper":
            adapter = next((name for name, module in self.model.named_modules() if _is_adapter(module)), None)
            if adapter is not None:
                raise UnsupportedModel(
                    f'SkipCLIP: {adapter} is an adapter, and trainable="upper" would train the weights beside it as '
                    'well. Pass trainable="as_is".'
                )
            frozen = [p for key, p in upper.items() if not p.requires_grad and key not in by_us]
            if frozen:
                warn_caller(
                    f'SkipCLIP: trainable="upper" sets requires_grad of {len(frozen)} parameters above the cut that '
                    f"were frozen ({sum(p.numel() for p in frozen):,} numbers). "
                    'Pass trainable="as_is" to leave them frozen.'
                )
        else:
            below = [p for p in self.model.parameters() if id(p) in lower and p.requires_grad]
            if below and any(not p.requires_grad for p in self.model.parameters()):
                warn_caller(
                    f"SkipCLIP: {len(below)} trainable parameters below the cut are frozen "
                    f"({sum(p.numel() for p in below):,} numbers), {names[id(below[0])]} among them: features at the "
                    "cut are constants. Put adapters above the cut, or lower skip_layers."
                )
        # All else is frozen: a bias of all logits, which a softmax doesn't see, and CoCa's decoder.
        by_us |= {id(p) for p in self.model.parameters() if p.requires_grad and id(p) not in upper}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in upper and (trainable == "upper" or parameter.requires_grad))
        self.model.logit_scale.requires_grad_(self._settings.train_logit_scale)
        if not any(p.requires_grad for p in upper.values()) and not self._settings.train_logit_scale and upper:
            warn_caller("SkipCLIP: nothing trains: every parameter above the cut is frozen.")

    def _supersede_others(self) -> None:
        """Mark every earlier SkipCLIP on this model that trains other parameters than this one."""
        others = _on_model.setdefault(self.model, weakref.WeakSet())
        own = self._trained_ids()
        for other in others - {self}:
            other._superseded = other._superseded or other._trains != own
        self._trains = own
        others.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._trains = self._trained_ids()  # a copy's model is another one
        _on_model.setdefault(self.model, weakref.WeakSet()).add(self)

    def _trained_ids(self) -> frozenset[int]:
        return frozenset(id(p) for p in self.model.parameters() if p.requires_grad)

    # ---- changes to the model ----------------------------------------------------------------------------------

    def _take_snapshot(self) -> tuple[Structure, Structure]:
        """Of what each step relies on, and of the fused image blocks below the cut."""
        image, text = self._image, self._text
        upper = fused_modules(image, range(image.skip, len(image.blocks)))
        every_text = fused_modules(text, range(len(text.blocks)))
        around = containers(self.model, (image, text))
        return Structure([*around, *upper, *every_text]), Structure(fused_modules(image, range(image.skip)))

    def _check_structure(self, *, lower_image: bool = False) -> None:
        """Raise if the model was altered since it was read.

        Raises:
            RuntimeError: If it was, or if another SkipCLIP has changed what trains.
        """
        if self._superseded:
            raise RuntimeError(
                "SkipCLIP: a later SkipCLIP on the same model trains other parameters, so this one would train the "
                "wrong ones. Use the later one, or call refresh() on this one."
            )
        if self._structure is not None:  # it is None in a copy and after a move
            if self._structure[0].is_unchanged() and (not lower_image or self._structure[1].is_unchanged()):
                return
            if any(part.replaced_method() for part in self._structure[: 1 + lower_image]):
                raise RuntimeError(
                    "SkipCLIP: a class of the model's modules was altered after SkipCLIP was made: its forward() is "
                    "another function, and SkipCLIP does not call it. Undo that, or call clip.refresh() to compare "
                    "with the model again."
                )
        try:
            refuse_overrides(self.model, containers(self.model, (self._image, self._text)))
            fresh = build_towers(self.model, self._tokens.long())
        except ValueError as error:
            raise RuntimeError(f"SkipCLIP: the model was altered after SkipCLIP was made. {error}") from error
        for name, old, new in (("image", self._image, fresh[0]), ("text", self._text, fresh[1])):
            was, now = old.summary(), new.summary()
            for what in was:
                if was[what] != now[what]:
                    found = now[what] if isinstance(now[what], list) else []
                    reason = next((x for x in found if isinstance(x, str)), "")
                    raise RuntimeError(
                        f"SkipCLIP: the {name} tower was altered after SkipCLIP was made: {what} changed"
                        f"{f' ({reason})' if reason else ''}. Undo that, or call clip.refresh() to read the model "
                        "again, and make the optimizer anew if parameters were replaced."
                    )
        self._structure = self._take_snapshot()

    def refresh(self) -> None:
        """Read the model again after it was altered on purpose, or after features at the cut were computed anew.

        Every check of the construction is repeated and `requires_grad` is set again. Prototypes and sampler stay. An
        optimizer that holds replaced parameters must be made anew.
        """
        device = self.prototypes.device
        self._image, self._text = build_towers(self.model, self._tokens.to(device).long())
        self._set_up_towers()
        self._class_embeddings, self._text_features = None, None
        if self._text_store is not None:
            self._text_store.check(self._text.lower_identity())
        with torch.autocast(device.type, enabled=False):
            self._check_against_model()
        self._superseded = False
        self._take_over()

    def _take_over(self) -> None:
        """Move what is below the cut, take its weights as those of the features, and end other SkipCLIPs."""
        if self._lower_device is not None:
            for tower in (self._image, self._text):
                tower.move_lower(self._lower_device)
        self._accept_weights()
        self._supersede_others()

    def _accept_weights(self) -> None:
        """Take the image weights below the cut as those of all features that follow."""
        self._lower_image = WeightsSeen(self._image.lower_parts)

    def check_weights(self) -> None:
        """Compare the weights below the cut with those that gave the features at the cut, by content.

        A step compares identities and versions alone, which a change through `.data` or `numpy()` leaves as they are.
        Parameters below the cut that are set to train are an error. This is called at
        each switch between training and evaluation mode; `skipkernels tune` calls it once an epoch. Text features are
        computed again if need be; image features are the caller's, and a later call with them is an error.
        """
        self._lower_image.look()
        if self._text_weights.look():
            self._text_features = None
        self._refuse_training_below()

    def _refuse_training_below(self) -> None:
        if self._lower_image.trains() or self._text_weights.trains():
            raise RuntimeError(
                "SkipCLIP: requires_grad was set on parameters below the cut, which get no gradient. Set it to False "
                "again, or call clip.refresh(), which does; to train them, make a SkipCLIP with fewer skip_layers."
            )

    def train(self, mode: bool = True) -> SkipCLIP:
        """Set training or evaluation mode; at a switch the weights below the cut are compared, see `check_weights`."""
        switched = mode != self.training
        super().train(mode)
        if switched:
            self.check_weights()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SkipCLIP:
        """Convert or move everything, also what the towers hold; prototypes stay in fp32 at least."""
        before, dtype, stale = self.prototypes, self._image.dtype, self._lower_image.changed()
        super()._apply(fn, recurse)
        if self.prototypes.dtype != before.dtype:
            self.prototypes = before.to(self.prototypes.device)
        self._text.apply(fn)
        if self._image.dtype != dtype:
            self._features = self._features[0], self._image.dtype
            if not stale:
                self._accept_weights()
        for tower in (self._image, self._text):  # a parameter may be another object now
            if tower._read:
                tower.read_blocks()
        self._structure = self._class_embeddings = self._text_features = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_structure", "_called", "_class_embeddings", "_text_features")  # of the modules of this process
        return super().__getstate__() | dict.fromkeys(kept)

    # ---- state -------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """State of the sampler and the prototypes as one uint8 tensor, which holds a safetensors file."""
        tensors = {"prototypes": self.prototypes.cpu(), "prompts": self._prompts()} | self.sampler.tensors()
        data = safetensors.torch.save(tensors, metadata={"format": _STATE_FORMAT})
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def _prompts(self) -> Tensor:
        """A digest of the tokens, uint8."""
        return torch.frombuffer(bytearray(digest_tensors([("tokens", self._tokens)]), "ascii"), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Continue from what `get_extra_state` returned.

        Raises:
            ValueError: If it is damaged, or of another number of classes or another width.
        """
        if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.ndim != 1:
            raise ValueError("SkipCLIP: the extra state must be the uint8 tensor of get_extra_state().")
        try:
            tensors = safetensors.torch.load(state.cpu().numpy().tobytes())
            prototypes, prompts = tensors.pop("prototypes"), tensors.pop("prompts", None)
        except (safetensors.SafetensorError, KeyError) as error:
            raise ValueError(f"SkipCLIP: the extra state is damaged: {error}.") from error
        if prototypes.shape != self.prototypes.shape:
            raise ValueError(
                f"SkipCLIP: the extra state has prototypes {list(prototypes.shape)}, and this model and task have "
                f"{list(self.prototypes.shape)}. Load it into a SkipCLIP with the same prompts."
            )
        if prompts is not None and not prompts.equal(self._prompts()):
            raise ValueError(
                "SkipCLIP: the extra state has the prototypes of other prompts, or of the same in another order. Load "
                "it into a SkipCLIP with the same prompts, or load the weights alone into clip.model."
            )
        self.sampler.load_tensors(tensors)
        self.prototypes.copy_(prototypes)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        key = f"{prefix}_extra_state"
        if key in missing:
            missing.remove(key)
            warn_caller(
                "SkipCLIP: the state dict has no sampler and no prototypes (it was saved by an older version, or is "
                "the model's own); the draws continue from where they are."
            )

    def _backend(self, attention: Attention) -> Backend:
        if attention not in get_args(Attention):
            raise ValueError(f'SkipCLIP: attention must be "sdpa" or "xformers"; got {attention!r}.')
        if attention == "sdpa":
            return SDPA
        device = self.model.logit_scale.device
        for tower in (self._image, self._text):
            if tower.is_fused(0):
                parts = tower.parts_of(0)
                weight = parts.weights.fc
                reason = xformers.unusable(device, weight.dtype, weight.shape[1] // parts.heads)
                if reason is not None:
                    raise ValueError(
                        f'SkipCLIP: attention="xformers" cannot serve here: {reason} Leave it at "sdpa", or use a GPU '
                        "and an xformers that was built for this PyTorch."
                    )
        return xformers.backend()

    def _check_against_model(self) -> None:
        """Raise if an embedding or gradient differs from that of the caller's model, in evaluation or training mode."""
        device = self._text.tokens.device
        ids = telling(self._text)
        tokens = self._tokens.to(device).long()[ids]
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(1, 3, *self._image.image_size, generator=generator).to(device, self._image.dtype)

        half = any(torch.finfo(parameter.dtype).bits < 32 for parameter in self._text.upper_parameters())

        def texts() -> Tensor:
            if not half:
                return self._encode_classes(ids)
            # Kept features are rounded to half precision, and the model's own would not be in this comparison.
            lower = self._lower_texts(ids) if self._text.skip else self._text.lower(self._text.tokens[ids])
            return self._text.upper(self._text.rows(lower, ids), ids, of_all=False)

        def encode_image() -> Tensor:
            return self._image.upper(self._encode_lower(self._image, image))

        pairs = [
            Pair("texts", lambda: self._text.own(tokens), texts, list(self._text.upper_parameters())),
            Pair("an image", lambda: self._image.own(image), encode_image, list(self._image.upper_parameters())),
        ]
        with evaluating([self.model]):
            with torch.no_grad():
                features = self._encode_lower(self._image, image)
            self._features = features.shape[1:], features.dtype
            for pair in pairs:
                check_agreement(pair, "evaluation", gradients=False)
        with training_without_chance(self.model):
            for pair in pairs:
                check_agreement(pair, "training", gradients=True)

    @property
    def skip_layers(self) -> tuple[int, int]:
        """Blocks skipped in the image and in the text tower."""
        return self._image.skip, self._text.skip

    @property
    def reductions(self) -> dict[str, Reduction]:
        """The exact reductions by name: `enabled`, or the `reason` why not."""
        no_cut = "nothing is skipped (skip_layers=0), so the embedding trains"
        states: dict[str, Reduction] = {}
        for prefix, tower in (("image", self._image), ("text", self._text)):
            states |= {f"{prefix}.{name}": reduction for name, reduction in tower.reductions.items()}
            if tower.skip == len(tower.blocks):
                states[f"{prefix}.pooled_last_block"] = Reduction(
                    False, "every block is skipped: the last runs once, for every token"
                )
            states[f"{prefix}.no_input_gradient"] = Reduction.unless(None if tower.skip else no_cut)
        return states | {"text.features_kept": states["text.no_input_gradient"]}

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the model takes."""
        return self._image.image_size

    # ---- towers ------------------------------------------------------------------------------------------------

    def lower_identity(self, tower: Literal["image", "text"]) -> dict[str, str | int]:
        """What the features of a tower at the cut depend on, by name; it changes when what is below the cut does."""
        if tower == "image":  # the features that are asked about are those of these weights
            self._accept_weights()
        return (self._image if tower == "image" else self._text).lower_identity()

    def lower_copy(self) -> Callable[[Tensor], Tensor]:
        """`encode_lower` for another thread: on copies of the modules that share the weights and stay in evaluation."""
        self._gave_features = True
        tower = self._sharing_weights(self._image)
        for part in tower.lower_parts:
            if isinstance(part, nn.Module):
                part.eval()
        return partial(self._encode_lower, tower)

    def _sharing_weights(self, part: Any) -> Any:
        """A copy of the modules of a part of the model, each with a mode of its own, on the same tensors."""
        return copy.deepcopy(part, {id(x): x for x in (*self.model.parameters(), *self.model.buffers())})

    def encode_lower(self, images: Tensor, *, drop_patches: bool = False) -> Tensor:
        """Images [B, 3, height, width] to features at the cut, [B, N, W], the constants that a cache may keep.

        Of a convolutional tower they are maps, as its blocks pass them on. Below the cut nothing is in training mode:
        no dropout, batch norms as they are. Patches are dropped only if asked for, from a model in training mode whose
        image tower does that; such features are a sample, and not for a cache.
        """
        _check_images(images)
        self._check_structure(lower_image=True)
        self._gave_features = True
        return self._encode_lower(self._image, images, drop_patches)

    def _encode_lower(self, tower: ImageTower, images: Tensor, drop_patches: bool = False) -> Tensor:
        try:
            return self._run_lower(tower, images, drop_patches)
        except RuntimeError as error:
            if tuple(images.shape[1:]) == (3, *tower.image_size):
                raise
            height, width = tower.image_size
            raise ValueError(
                f"SkipCLIP: images must be [B, 3, {height}, {width}], the size that the model takes; got "
                f"{list(images.shape)}. Use the model's image transform."
            ) from error

    def _run_lower(self, tower: ImageTower, images: Tensor, drop_patches: bool) -> Tensor:
        lower, device = partial(tower.lower, draw=drop_patches), images.device
        images = images.to(tower.dtype)
        if tower.skip == 0:
            return lower(images)
        return LSkipBoundary.apply(lower, images.to(self._lower_device or device), self.chunk).to(device)

    def encode_upper(self, features: Tensor) -> Tensor:
        """Features at the cut [B, N, W] to image embeddings [B, D], not normalised."""
        self._check_structure()
        return self._image.upper(features)

    def encode_image(self, x: Tensor) -> Tensor:
        """Images [B, 3, height, width], or features at the cut [B, N, W], to image embeddings [B, D], not normalised.

        From images of a model in training mode patches are dropped, if its image tower does that.

        Raises:
            ValueError: If x is neither, or is features although nothing is skipped.
        """
        _check_images(x)
        self._check_shape(x)
        self._check_structure(lower_image=True)
        return self._encode_image(x)

    def _check_shape(self, x: Tensor) -> bool:
        """True for images, False for features at the cut; a ValueError for anything else."""
        shape, _ = self._features
        sample = self._image.patch_dropout is not None and x.ndim == 3 and x.shape[2] == shape[1]
        are_features = x.shape[1:] == shape or sample
        if x.ndim == 4 and x.shape[1] == 3 and not are_features:
            return True
        if self._image.skip == 0:
            raise ValueError(
                "SkipCLIP: with skip_layers=0 the embedding trains, so features can't be kept; pass images "
                f"[B, 3, height, width]; got {list(x.shape)}."
            )
        if not are_features:
            raise ValueError(
                "SkipCLIP: x must be images [B, 3, height, width] or features at the cut "
                f"[B, {', '.join(map(str, shape))}]; got {list(x.shape)}."
            )
        return False

    def _encode_image(self, x: Tensor) -> Tensor:
        if self._check_shape(x):
            return self._image.upper(self._encode_lower(self._image, x, drop_patches=True))
        self._gave_features = True
        if self._lower_image.changed():
            raise RuntimeError(
                "SkipCLIP: the weights below the cut have changed since SkipCLIP was made, so features at the cut from "
                "before are of another model. Compute them again, then call clip.refresh()."
            )
        return self._image.upper(x.to(self._features[1]))

    def _keep_texts(self, folder: Path) -> None:
        """Keep the texts' features at the cut in a folder."""
        if self._text.skip == 0:
            raise ValueError("SkipCLIP: text_cache is for what is below a cut; with skip_layers=0 there is nothing.")
        self._text_store = TextStore(folder / "features", self._text, self._lower_texts, self.chunk)
        self._text_weights = WeightsSeen(self._text.lower_parts)

    def _prototypes(self, folder: str | Path | None) -> Tensor:
        """Embeddings [C, D] of all classes from before tuning."""
        if folder is None:
            return self._encode_all_classes()
        return kept_prototypes(Path(folder, "prototypes"), self._text, self._unit_embeddings)

    def _lower_texts(self, class_ids: Tensor | None = None) -> Tensor:
        """Hidden states [n, L, W] at the cut of the prompts of some classes, or of all, without autocast."""
        tokens = self._text.tokens if class_ids is None else self._text.tokens[class_ids]
        with torch.autocast(tokens.device.type, enabled=False):
            lower_tokens = tokens.to(self._lower_device or tokens.device)
            return LSkipBoundary.apply(self._text.lower, lower_tokens, self.chunk).to(tokens.device)

    def _follow_called(self) -> None:
        """Forget what is kept of texts if a module that the text tower calls was given hooks or other settings."""
        if self._called is not None:
            if self._called[0].is_unchanged():
                return
            if self._text_store is not None and not self._called[1].is_unchanged():
                raise RuntimeError(
                    "SkipCLIP: a module below the cut of the text tower was given hooks or other settings, which the "
                    "features of text_cache are without. Undo that, or call clip.refresh() to compare with the model "
                    "again."
                )
        self._class_embeddings = self._text_features = None
        self._called = self._see_called()

    def _see_called(self) -> tuple[Structure, Structure]:
        """Of the modules that the text tower calls, and of those below the cut alone."""
        return Structure(called_modules(self._text)), Structure(called_modules(self._text, lower=True))

    def _encode_kept(self) -> Callable[[Tensor], Tensor]:
        """Class ids [K] to embeddings [K, D], from text features at the cut that are kept.

        They are rows [R, W] of all classes, for as long as the weights below the cut are the same, or a folder.
        """
        text = self._text
        self._follow_called()
        if self._text_store is not None:
            if self._text_weights.changed():
                self._text_store.check(text.lower_identity())
                self._text_weights = WeightsSeen(text.lower_parts)
            kept = self._text_store
            return lambda class_ids: text.upper(kept.gather(text.places(class_ids)), class_ids, of_all=False)
        if self._text_features is None or self._text_weights.changed():
            with torch.inference_mode(False), torch.no_grad():  # they outlive the caller's context
                self._text_features = text.rows(self._lower_texts())
            self._text_weights = WeightsSeen(text.lower_parts)
        rows = self._text_features
        return lambda class_ids: text.upper(rows, class_ids)

    def encode_classes(self, class_ids: Tensor) -> Tensor:
        """Class ids [K] to text embeddings [K, D], not normalised."""
        self._check_structure()
        return self._encode_classes(class_ids)

    def _encode_classes(self, class_ids: Tensor) -> Tensor:
        if self._text.skip > 0:
            return self._encode_kept()(class_ids)
        hidden = self._text.lower(self._text.tokens[class_ids])
        return self._text.upper(self._text.rows(hidden, class_ids), class_ids, of_all=False)

    def _encode_all_classes(self) -> Tensor:
        """Unit-norm embeddings [C, D] of all classes, without gradient."""
        return self._unit_embeddings(torch.arange(len(self._text.tokens), device=self._text.tokens.device))

    def _unit_embeddings(self, class_ids: Tensor) -> Tensor:
        """Class ids [n] to unit-norm embeddings [n, D], without gradient, in chunks."""
        with torch.no_grad():
            encode = self._encode_classes if self._text.skip == 0 else self._encode_kept()
            embeddings = torch.cat([encode(chunk) for chunk in class_ids.split(self.chunk)])
            wide = torch.promote_types(embeddings.dtype, torch.float32)
            return nn.functional.normalize(embeddings.to(wide), dim=-1)

    # ---- training ----------------------------------------------------------------------------------------------

    @torch.compiler.disable  # blocks hold graphs of their own, which a compiler would cut to pieces
    def forward(
        self,
        x: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        images: Tensor | None = None,
        return_logits: bool = False,
    ) -> SkipOutput:
        """One step: embed the images, choose the classes, embed those, and compare.

        In evaluation mode every class takes part, nothing is drawn, and the logits are [B, C].

        Args:
            x: Images [B, 3, height, width], or features at the cut [B, N, W].
            labels: [B] int64, classes of the images.
            pixel_values: Another name of x, for trainers that pass their batch by name.
            images: Another name of x.
            return_logits: In training, also return the [B, K] logits; the loss does not need them.

        Returns:
            SkipOutput: the mean cross-entropy over the classes that take part, and which they are.

        Raises:
            TypeError: If x or labels are no tensors, or of the wrong dtype.
            ValueError: If shapes don't fit, the batch is empty, an image is not finite, or a label is out of range.
            RuntimeError: If the model was altered, or in training if this is called within a backward pass.
        """
        given = [value for value in (x, pixel_values, images) if value is not None]
        if len(given) != 1:
            raise TypeError(
                "SkipCLIP: pass images or features as one of x, pixel_values and images; got "
                f"{'more than one' if given else 'none'}."
            )
        (x,) = given
        self._check_batch(x, labels)
        assert labels is not None
        self._check_structure(lower_image=True)
        self._follow(x.device)
        if self.training and torch._C._current_graph_task_id() != -1 and self._draws(len(x)):
            raise RuntimeError(
                "SkipCLIP: the step was called again within a backward pass, as activation checkpointing does; it "
                'would draw other classes than the first time. Use memory="min" in its place.'
            )
        image = self._encode_image(x)
        scale = self.model.logit_scale.exp()
        if not self.training:
            return self._evaluate(image, labels, scale)
        try:
            class_ids, targets = self.select(image, labels)
        except ValueError:
            self._check_labels(labels)  # in other words
            raise
        text = self._encode_classes(class_ids)
        loss = functional.class_sampled_cross_entropy(image, text, targets, scale)
        logits = functional.class_sampled_logits(image, text, scale) if return_logits else loss.new_empty(len(x), 0)
        return SkipOutput(loss, logits, class_ids, targets)

    def _evaluate(self, image: Tensor, labels: Tensor, scale: Tensor) -> SkipOutput:
        """Loss and logits over all classes. Without gradients the class embeddings are computed once."""
        every = torch.arange(len(self.prototypes), device=image.device)
        text = self._encode_classes(every) if torch.is_grad_enabled() else self.class_embeddings().to(image.dtype)
        loss = functional.class_sampled_cross_entropy(image, text, labels, scale)
        return SkipOutput(loss, functional.class_sampled_logits(image, text, scale), every, labels)

    def _draws(self, batch_size: int) -> bool:
        classes = len(self.prototypes)
        return self.sampler.plan(classes, batch_size)[0] < classes

    def _check_batch(self, x: Any, labels: Any) -> None:
        """Refuse what is no batch. Values are looked at on the CPU alone: elsewhere that would wait for the device."""
        _check_images(x)
        self._check_shape(x)
        if not isinstance(labels, Tensor):
            raise TypeError(
                f"SkipCLIP: labels must be an int64 tensor [B]; got {type(labels).__name__}. Without labels use "
                "clip.predict(x)."
            )
        if labels.ndim == 2:
            raise ValueError(
                f"SkipCLIP: labels must be class ids, int64 [B={len(x)}]; got {labels.dtype} {list(labels.shape)}. "
                "One-hot, mixed or multiple labels are not handled; of one-hot labels pass labels.argmax(dim=1)."
            )
        if labels.shape != (len(x),) or labels.dtype != torch.int64:
            raise ValueError(
                f"SkipCLIP: labels must be int64 [B={len(x)}], one for each image; got {labels.dtype} "
                f"{list(labels.shape)}."
            )
        if not self.training and labels.device.type == "cpu":  # in training `class_scores` looks
            self._check_labels(labels)

    def _check_labels(self, labels: Tensor) -> None:
        low, high = (int(x) for x in torch.aminmax(labels))
        if low < 0 or high >= len(self.prototypes):
            raise ValueError(
                f"SkipCLIP: labels must be in [0, C={len(self.prototypes)}); got {low} to {high}. Leave images "
                "without a class out of the batch; ignore_index is not handled."
            )

    def _follow(self, device: torch.device) -> None:
        """Move what is beside the model to where the images are, after the model alone was moved."""
        if self.prototypes.device != device and self.model.logit_scale.device == device:
            self.prototypes = self.prototypes.to(device)
            self._text.apply(lambda x: x.to(device))
            self._class_embeddings = self._text_features = None

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **options: Any) -> None:
        """Set `memory="min"`: every block above the cut keeps its input alone and runs again in backward.

        Options of transformers (`every_n_layers`, `offload`) are taken and have no effect.
        """
        self.set_grad_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Set `memory` back to what it was at construction, or to "auto" if that was "min"."""
        self.set_grad_checkpointing(False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """The same under open_clip's name."""
        otherwise: Memory = "auto" if self._settings.memory == "min" else self._settings.memory
        self._image.memory = self._text.memory = "min" if enable else otherwise

    @torch.no_grad()
    def select(self, image: Tensor, labels: Tensor) -> ClassSelection:
        """The classes that take part in a step of image embeddings [B, D] with labels [B]; draws the tail."""
        scores = functional.class_scores(image.to(self.prototypes.dtype), self.prototypes, labels)
        return select_ranks(scores, labels, self.sampler.draw(len(self.prototypes), len(labels)))

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Every parameter that trains."""
        return [p for group in self.parameter_groups(text_lr=0.0, image_lr=0.0) for p in group["params"]]

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:
        """Groups for a `torch.optim` optimizer: the text tower and the image tower, each at its own learning rate.

        The temperature, if it trains, is in the text tower's group.

        Raises:
            RuntimeError: If parameters are no longer the model's.
        """
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
        self._check_structure()
        return [{"name": "text", "params": text, "lr": text_lr}, {"name": "image", "params": image, "lr": image_lr}]

    # ---- inference ---------------------------------------------------------------------------------------------

    def class_embeddings(self) -> Tensor:
        """Unit-norm text embeddings [C, D] of all classes with the weights as they are, without gradient.

        They are those of evaluation mode, are kept, and computed again only when the text tower's weights have changed,
        by whatever means.
        """
        self._check_structure()
        device = self.model.logit_scale.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self._follow_called()
        if self._text_weights.look():  # a change past the version counter
            self._text_features = None
        parts = (*self._text.upper_parameters(), *self._text.lower_parameters())
        seen = autocast, digests(x.detach() for x in parts)
        if self._class_embeddings is None or self._class_embeddings[1] != seen:
            with torch.inference_mode(False), evaluating([self.model]):
                self._class_embeddings = self._encode_all_classes(), seen
        return self._class_embeddings[0]

    def classifier(self) -> nn.Module:
        """A plain module, images [B, 3, height, width] to logits [B, C], with the class embeddings as they are now.

        It shares the weights of the image tower, runs in evaluation mode, and holds no SkipCLIP: `torch.export` and
        ONNX take it. Make it again after further training.
        """
        self._check_structure()
        with torch.no_grad():
            encoder = self._sharing_weights(self._image.encoder())
            return ImageClassifier(encoder, self.class_embeddings(), self.model.logit_scale.exp()).eval()

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Logits [B, C] of images [B, 3, height, width] or features at the cut [B, N, W] over all classes.

        They are those of evaluation mode, whatever mode the model is in.
        """
        _check_images(x)
        self._check_structure(lower_image=True)
        self._follow(x.device)
        classes = self.class_embeddings()
        with evaluating([self.model]):
            image = self._encode_image(x)
        with torch.autocast(image.device.type, enabled=False):  # bf16 logits at a scale of 100 are half a unit apart
            image = nn.functional.normalize(image.to(classes.dtype), dim=-1)
            return self.model.logit_scale.exp().to(classes.dtype) * image @ classes.T


def blocks_to_skip(skip: int | float, depth: int, tower: str) -> int:
    """How many of the `depth` blocks of a tower are skipped.

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


class _Settings(NamedTuple):
    """Arguments of SkipCLIP that `refresh` needs again."""

    skip_layers: tuple[int | float, int | float]
    memory: Memory
    attention: Attention
    trainable: Trainable
    train_logit_scale: bool


def _after_load(clip: SkipCLIP, keys: Any) -> None:
    """Take the loaded weights below the cut as those of all features, if none were computed with the ones before."""
    if not clip._gave_features:
        clip._accept_weights()


def _check_images(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"SkipCLIP: x must be a tensor, images [B, 3, height, width] or features at the cut; got "
            f"{type(x).__name__}. Stack a list of images with torch.stack."
        )
    if not x.is_floating_point():
        raise TypeError(
            f"SkipCLIP: images must be floating-point and normalised as the model's image transform does it; got "
            f"{x.dtype}. Apply the transform, or (images / 255 − mean) / std."
        )
    if x.ndim < 3:
        raise ValueError(
            f"SkipCLIP: x must be images [B, 3, height, width] or features at the cut [B, N, W]; got {list(x.shape)}."
        )
    if len(x) == 0:
        raise ValueError(f"SkipCLIP: a batch must have at least one image; got {list(x.shape)}.")
    if x.ndim == 4 and x.shape[1] == 3 and x.device.type == "cpu" and not x.isfinite().all():
        bad = (~x.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(f"SkipCLIP: images must be finite; NaN or infinity in images {bad} of the batch.")


def _is_adapter(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] in _ADAPTERS or any("lora_" in name for name in module._parameters)
