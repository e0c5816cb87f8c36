"""A CLIP cut in two: its encoders, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..checks import warn_caller
from ..options import AttentionName
from ..towers import Cut, ImageTower, Memory, Reduction, TextTower, UnsupportedModel, build_towers
from ..towers.attention import SDPA, AttentionBackend
from ..towers.base import Tower
from ..towers.block import FusedBlock, fuse_blocks, read_block
from ..towers.watch import Containers, Watched
from .checks import Trainable, check_vocabulary
from .images import ImageEncoder
from .texts import ClassTexts, FixedTexts
from .verify import verify

_ADAPTERS = ("peft", "loralib", "adapters")  # packages of adapter modules, with weights beside the model's own


@dataclass(frozen=True)
class CutOptions:
    """Arguments of SkipCLIP that concern the towers."""

    skip_layers: Any  # as in SkipCLIP; `skip_of` resolves it
    memory: Memory
    attention: AttentionName
    trainable: Trainable
    train_text: bool
    train_logit_scale: bool

    def __post_init__(self) -> None:
        for name, allowed in (("memory", Memory), ("attention", AttentionName), ("trainable", Trainable)):
            if (value := getattr(self, name)) not in get_args(allowed):
                raise ValueError(f"SkipCLIP: {name} must be one of {', '.join(get_args(allowed))}; got {value!r}.")
        if isinstance(self.skip_layers, tuple) and len(self.skip_layers) != 2:
            raise ValueError(
                f"SkipCLIP: skip_layers must be one number or a pair (image, text); got {self.skip_layers!r}."
            )

    def skip_of(self, tower: Tower) -> int | float:
        """Number or share of the blocks that a tower skips; every block of a text tower that does not train."""
        image, text = self.skip_layers if isinstance(self.skip_layers, tuple) else (self.skip_layers, self.skip_layers)
        if isinstance(tower, ImageTower):
            return image
        return text if self.train_text else 1.0


class CutModel:
    """The model with its two encoders, which the constructor compares with the model itself.

    Args:
        model: A CLIP. Its blocks are fused in place.
        tokens: [C, L] or [C, T, L], as kept by SkipCLIP.
        options: Number of blocks below the cut, and others of the towers.
        chunk: Images or prompts that run below the cut at a time.
        text_cache: Folder of the text features, or None.
        lower_device: Device of the modules below the cut, or None for that of the model.
    """

    images: ImageEncoder
    texts: ClassTexts

    def __init__(
        self,
        model: Any,
        tokens: Tensor,
        options: CutOptions,
        *,
        chunk: int,
        text_cache: str | Path | None = None,
        lower_device: torch.device | str | None = None,
    ):
        self.model, self.tokens, self.options = model, tokens, options
        self._chunk = chunk
        self._folder = None if text_cache is None else Path(text_cache).absolute()  # of the working directory of now
        self._lower_device = None if lower_device is None else torch.device(lower_device)
        # Option `trainable`, and names of the parameters that train, without adapters; see `freeze_for_adapters`
        self._without_adapters: tuple[Trainable, set[str]] | None = None
        with restored_after_error(model):
            self._build()
        # The text features of all classes are computed by now, so the lower text tower can move to another device.
        self._move_lower()

    def refresh(self) -> None:
        """Read the model again; prototypes stay."""
        self._build(self.texts.prototypes)
        self._move_lower()

    def _build(self, prototypes: Tensor | None = None) -> None:
        """Read the model, and compare it with its encoders; prototypes are computed unless given."""
        image, text = build_towers(self.model)
        # 1. Fuse the blocks, cut the towers, and freeze what is below the cut
        self._containers = Containers(self.model, image, text)
        self._containers.refuse_overrides()
        cut_towers(image, text, self.options)
        set_trainable(self.model, image, text, self.options)
        with torch.autocast(self._device.type, enabled=False):
            # 2. Text features at the cut, and prototypes: embeddings of all classes before tuning
            self.images, self.texts = ImageEncoder(image, self._chunk), self._texts_of(text, self.tokens)
            if prototypes is None:
                self.texts.compute_prototypes()
            else:
                self.texts.prototypes = prototypes
            # 3. Comparison with the model itself
            verify(self.model, self.images, self.texts, self.tokens)

    def set_tokens(self, tokens: Tensor) -> None:
        """Replace the classes; their prototypes are computed with the current weights."""
        if self._folder is not None:
            raise RuntimeError(
                "SkipCLIP: set_classes cannot replace the classes of a text_cache. Create SkipCLIP again with another "
                "text_cache."
            )
        tower = self.texts.tower
        texts = self._texts_of(tower, tokens)
        with torch.autocast(self._device.type, enabled=False):
            texts.compute_prototypes()
            if tower.lower_device is None:  # verify runs the model itself, which must be on one device
                verify(self.model, self.images, texts, tokens)
        self.tokens, self.texts = tokens, texts
        self._move_lower()

    def _texts_of(self, tower: TextTower, tokens: Tensor) -> ClassTexts:
        check_vocabulary("SkipCLIP", "tokens", tokens, tower.vocabulary)
        kind = ClassTexts if self.options.train_text else FixedTexts
        return kind(tower, tokens.to(self._device, torch.int64), self._chunk, self._folder)

    @property
    def _device(self) -> torch.device:
        """Device above the cut."""
        device: torch.device = self.model.logit_scale.device
        return device

    def check_model(self) -> None:
        """Compare the model with what was read; see `SkipCLIP.check_model`."""
        self._containers.compare()
        self.images.check_contents()
        self.texts.check_contents()
        check_trained(self.images.tower, self.texts.tower, self.options)

    @property
    def reductions(self) -> dict[str, Reduction]:
        """Exact reductions of both towers by name, as they are now."""
        image, text = self.images.tower, self.texts.tower
        of_templates = [text.reductions(prompts) for prompts in self.texts.templates]
        # The state for the first template for which a reduction is disabled, or else for the first of all
        of_texts = {name: min((each[name] for each in of_templates), key=_is_enabled) for name in of_templates[0]}
        states: dict[str, Reduction] = {}
        for prefix, tower, found in (("image", image, image.reductions), ("text", text, of_texts)):
            states |= {f"{prefix}.{name}": reduction for name, reduction in found.items()}
            if tower.skip == len(tower.blocks):
                reason = "every block is skipped: the last runs once, for every token"
                states[f"{prefix}.pooled_last_block"] = Reduction(False, reason)
            no_cut = None if tower.skip else "nothing is skipped (skip_layers=0), so the embedding trains"
            states[f"{prefix}.no_input_gradient"] = Reduction.unless(no_cut)
        states["text.features_kept"] = states["text.no_input_gradient"]
        return states

    # ---- parameters --------------------------------------------------------------------------------------------------

    def trained(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the parameters of the text side and of the image side that train."""
        check_trained(self.images.tower, self.texts.tower, self.options)
        text = list(self.texts.tower.upper_parameters()) if self.options.train_text else []
        image = list(self.images.tower.upper_parameters())
        if self.options.trainable == "as_is":
            text, image = ([p for p in side if p.requires_grad] for side in (text, image))
        return [*text, *([self.model.logit_scale] if self.model.logit_scale.requires_grad else [])], image

    def freeze_for_adapters(self) -> None:
        """Freeze every parameter, so that only adapters train that are added before the next `refresh`."""
        names = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self._without_adapters = self.options.trainable, names
        self.model.requires_grad_(False)
        self.options = replace(self.options, trainable="as_is")

    def train_without_adapters(self) -> None:
        """Train what trained before `freeze_for_adapters`, after adapters were removed; nothing without that call."""
        trainable, names = self._without_adapters or ("as_is", set())
        self._without_adapters = None
        self.options = replace(self.options, trainable=trainable)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in names)

    # ---- memory and devices ------------------------------------------------------------------------------------------

    def save_memory(self, enable: bool) -> None:
        """Save only the inputs of the blocks above the cut; else what `memory` is, or "auto" if that is "min"."""
        usual: Memory = "auto" if self.options.memory == "min" else self.options.memory
        for tower in (self.images.tower, self.texts.tower):
            tower.cut = replace(tower.cut, memory="min" if enable else usual)

    def _move_lower(self) -> None:
        """Move the modules below the cut to their device. Texts that do not train go to the CPU."""
        text_device = self._lower_device
        if not self.options.train_text:
            self.texts.drop()
            text_device = None if self._device.type == "cpu" else torch.device("cpu")
        for tower, device in ((self.images.tower, self._lower_device), (self.texts.tower, text_device)):
            tower.cut = replace(tower.cut, lower_device=device)
            tower.move_lower()

    @contextmanager
    def converted(self, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Follow a conversion or move of every module by `fn`, which the caller does within this context."""
        encoders = self.images, self.texts
        valid = [encoder for encoder in encoders if encoder.watched is not None and not encoder.is_stale()]
        yield
        for encoder in encoders:
            encoder.tower.move_lower()
            encoder.convert(fn)
        for encoder in valid:  # its features stay valid; the converted weights have other digests
            encoder.watched = Watched(encoder.tower.lower_parts)


def _is_enabled(reduction: Reduction) -> bool:
    return reduction.enabled


# ---- the cut of the towers -------------------------------------------------------------------------------------------


def cut_towers(image: ImageTower, text: TextTower, options: CutOptions) -> None:
    """Fuse the blocks of both towers in place, and cut the towers."""
    fuse_blocks([*image.blocks, *text.blocks])
    backend = SDPA if options.attention == "sdpa" else _xformers(image, text)
    for tower, name in ((image, "image"), (text, "text")):
        skip = blocks_to_skip(options.skip_of(tower), len(tower.blocks), name)
        tower.cut = Cut(skip, options.memory, backend)


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
            read = read_block(block)
            proj = read.weights.proj
            reason = xformers.why_unavailable(device, proj.dtype, proj.shape[0] // read.heads)
            if reason is not None:
                raise ValueError(
                    f'SkipCLIP: attention="xformers" cannot be used here: {reason} Leave it at "sdpa", or use a GPU '
                    "and an xformers that was built for this PyTorch."
                )
    return xformers.backend()


@contextmanager
def restored_after_error(model: nn.Module) -> Iterator[None]:
    """Restore the classes of the blocks of a model, and `requires_grad` of its parameters, after an error."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []  # else `build_towers` raises
    kinds = [(module, type(module)) for module in modules]
    required_grad = [(p, p.requires_grad) for module in modules for p in module.parameters(recurse=False)]
    try:
        yield
    except BaseException:
        for parameter, requires_grad in required_grad:
            parameter.requires_grad_(requires_grad)
        for module, kind in kinds:
            module.__class__ = kind  # of a block that was fused
        raise


# ---- parameters that train -------------------------------------------------------------------------------------------


def set_trainable(model: Any, image: ImageTower, text: TextTower, options: CutOptions) -> None:
    """Set `requires_grad` of every parameter of the model."""
    lower = {id(parameter) for tower in (image, text) for parameter in tower.lower_parameters()}
    trained = (image, text) if options.train_text else (image,)
    upper = {id(parameter): parameter for tower in trained for parameter in tower.upper_parameters()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for key in upper:
        if key in lower:
            raise UnsupportedModel(
                f"SkipCLIP: parameter {names[key]} is used on both sides of the cut, so training it would change "
                "cached features. Untie it, or use skip_layers=0."
            )
    if options.trainable == "upper":
        _check_all_may_train(model, list(upper.values()))
    else:
        below = [p for p in model.parameters() if id(p) in lower and p.requires_grad]
        if below and any(not p.requires_grad for p in model.parameters()):
            warn_caller(
                f"SkipCLIP: {len(below)} trainable parameters below the cut are frozen ({_numbers(below)}), "
                f"{names[id(below[0])]} among them: features at the cut are constants. Put adapters above the cut, or "
                "lower skip_layers."
            )
    # Other parameters are frozen too: a bias of all logits, which a softmax cancels, and the decoder of CoCa.
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in upper and (options.trainable == "upper" or parameter.requires_grad))
    model.logit_scale.requires_grad_(options.train_logit_scale)
    trains = options.train_logit_scale or any(p.requires_grad for p in upper.values())
    if upper and not trains:  # with nothing above the cut there is nothing to warn of
        warn_caller("SkipCLIP: nothing trains: every parameter above the cut is frozen.")


def _check_all_may_train(model: nn.Module, upper: list[nn.Parameter]) -> None:
    """Refuse adapters, since their base weights should stay frozen; warn of frozen parameters above the cut."""
    adapter = next((name for name, module in model.named_modules() if _is_adapter(module)), None)
    if adapter is not None:
        raise UnsupportedModel(
            f'SkipCLIP: {adapter} is an adapter, and trainable="upper" would train the weights beside it as well. Pass '
            'trainable="as_is".'
        )
    frozen = [p for p in upper if not p.requires_grad]
    if frozen:
        warn_caller(
            f'SkipCLIP: trainable="upper" sets requires_grad of {len(frozen)} parameters above the cut that were '
            f'frozen ({_numbers(frozen)}). Pass trainable="as_is" to leave them frozen.'
        )


def _numbers(parameters: list[nn.Parameter]) -> str:
    return f"{sum(parameter.numel() for parameter in parameters):,} numbers"


def _is_adapter(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] in _ADAPTERS or any("lora_" in name for name in module._parameters)


def check_trained(image: ImageTower, text: TextTower, options: CutOptions) -> None:
    """Raise a RuntimeError if parameters below the cut train, or the first block above it was frozen."""
    frozen = [*image.lower_parameters(), *text.lower_parameters()]
    frozen += [] if options.train_text else text.upper_parameters()
    if any(p.requires_grad for p in frozen):
        raise RuntimeError(
            "SkipCLIP: requires_grad was set on parameters below the cut, which get no gradient. Set it to False "
            "again, or call clip.refresh(), which does; to train them, make a SkipCLIP with fewer skip_layers."
        )
    for tower in (image, text) if options.trainable == "upper" else ():
        first = tower.blocks[tower.skip : tower.skip + 1]
        if not all(any(p.requires_grad for p in block.parameters()) for block in first):
            raise RuntimeError(
                "SkipCLIP: the first block above the cut was frozen after SkipCLIP was made, such as by another "
                "SkipCLIP on the same model, with more skip_layers. Use the other one, or call clip.refresh(); to "
                'freeze blocks above the cut, pass trainable="as_is".'
            )
