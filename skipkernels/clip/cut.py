"""A CLIP cut in two: its encoders, which parameters train, and whether the model is still what was read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..checks import warn_caller
from ..options import AttentionName
from ..towers import ImageTower, Memory, Reduction, TextTower, UnsupportedModel, build_towers
from ..towers.attention import SDPA, AttentionBackend
from ..towers.base import Tower
from ..towers.block import FusedBlock, fuse_blocks
from ..towers.watch import Containers
from .checks import Trainable, check_vocabulary
from .images import ImageEncoder
from .texts import ClassTexts, FixedTexts
from .verify import verify

_ADAPTERS = ("peft", "loralib", "adapters")  # packages of adapter modules, with weights beside the model's own


@dataclass(frozen=True)
class CutOptions:
    """Arguments of SkipCLIP that concern the towers."""

    skip_layers: Any  # as in SkipCLIP; `of` resolves it
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

    def of(self, tower: Tower) -> Any:
        """Number or share of the blocks that a tower skips."""
        is_text = isinstance(tower, TextTower)
        if is_text and not self.train_text:
            return 1.0
        return self.skip_layers[is_text] if isinstance(self.skip_layers, tuple) else self.skip_layers


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
        # Option `trainable`, and names of the parameters that trained, before `add_lora`; for `merge_lora`
        self.before_lora: tuple[Trainable, list[str]] | None = None
        with restored_after_error(model):
            # 1. Cut the towers, fuse their blocks, and freeze what is below the cut
            image, text = self._read()
            # 2. Text features at the cut, and prototypes: embeddings of all classes before tuning
            device = next(model.parameters()).device
            self.images = ImageEncoder(image, chunk)
            kind = ClassTexts if options.train_text else FixedTexts
            self.texts = kind(text, tokens.to(device, torch.int64), chunk, text_cache)
            with torch.autocast(device.type, enabled=False):
                self.texts.compute_prototypes()
                # 3. Comparison with the model itself
                verify(model, self.images, self.texts, tokens)
        # The text features of all classes are computed by now, so the lower text tower can move to another device.
        self._move_lower(None if lower_device is None else torch.device(lower_device))

    def _read(self) -> tuple[Any, Any]:
        """Build the towers, cut them, and set which parameters train."""
        image, text = build_towers(self.model)
        check_vocabulary(self.tokens, text.vocabulary)
        self._containers = Containers(self.model, image, text)
        self._containers.refuse_overrides()
        cut_towers(self.model, image, text, self.options)
        return image, text

    def refresh(self) -> None:
        """Read the model again; prototypes stay."""
        old, lower_device = self.texts, self.images.tower.lower_device
        self.images.tower, text = self._read()
        self.texts = type(old)(text, self.tokens.to(old.device, torch.int64), old.chunk, old.folder)
        self.texts.prototypes = old.prototypes
        with torch.autocast(old.device.type, enabled=False):
            verify(self.model, self.images, self.texts, self.tokens)
        self._move_lower(lower_device)
        self.images.forget()

    def set_tokens(self, tokens: Tensor) -> None:
        """Replace the classes; their prototypes are computed with the current weights."""
        if self.texts.folder is not None:
            raise RuntimeError(
                "SkipCLIP: set_classes cannot replace the classes of a text_cache. Create SkipCLIP again with another "
                "text_cache."
            )
        texts = self.texts.with_prompts(tokens)
        with torch.autocast(texts.device.type, enabled=False):
            texts.compute_prototypes()
            if texts.tower.lower_device is None:  # verify runs the model itself, which must be on one device
                verify(self.model, self.images, texts, tokens)
        self.tokens, self.texts = tokens, texts
        self._move_lower(self.images.tower.lower_device)

    # ---- comparison with what was read -------------------------------------------------------------------------------

    def compare(self) -> None:
        """Compare contents and settings below the cut, and hooks, methods, masks and order of what is around it."""
        self._containers.compare()
        self.images.compare()
        self.texts.compare()
        self.check_trained()

    def check_trained(self) -> None:
        """Raise a RuntimeError if parameters below the cut train, or the first block above it was frozen."""
        refuse_training_below(self.images.tower, self.texts.tower, train_text=self.options.train_text)
        if self.options.trainable == "upper":
            refuse_frozen_above(self.images.tower, self.texts.tower)

    @property
    def reductions(self) -> dict[str, Reduction]:
        """Exact reductions of both towers by name, as they are now."""
        first, *others = (self.texts.tower.reductions(prompts) for prompts in self.texts.groups)
        of_texts = {  # those that are enabled for every template
            name: next((each[name] for each in others if not each[name].enabled and found.enabled), found)
            for name, found in first.items()
        }
        states: dict[str, Reduction] = {}
        image = self.images.tower
        for prefix, tower, found in (("image", image, image.reductions), ("text", self.texts.tower, of_texts)):
            states |= {f"{prefix}.{name}": reduction for name, reduction in found.items()}
            if tower.skip == len(tower.blocks):
                reason = "every block is skipped: the last runs once, for every token"
                states[f"{prefix}.pooled_last_block"] = Reduction(False, reason)
            no_cut = None if tower.skip else "nothing is skipped (skip_layers=0), so the embedding trains"
            states[f"{prefix}.no_input_gradient"] = Reduction.unless(no_cut)
        states["text.features_kept"] = states["text.no_input_gradient"]
        return states

    # ---- parameters, memory, devices ---------------------------------------------------------------------------------

    def trained(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the parameters of the text side and of the image side that train."""
        self.check_trained()
        text = list(self.texts.tower.upper_parameters()) if self.options.train_text else []
        image = list(self.images.tower.upper_parameters())
        if self.options.trainable == "as_is":
            text, image = ([p for p in side if p.requires_grad] for side in (text, image))
        return [*text, *([self.model.logit_scale] if self.model.logit_scale.requires_grad else [])], image

    def set_memory(self, memory: Memory) -> None:
        """Set what the blocks above the cut save for backward."""
        self.images.tower.memory = self.texts.tower.memory = memory

    def _move_lower(self, lower_device: torch.device | None) -> None:
        """Set the device of the modules below the cut, and move them there. Texts that do not train go to the CPU."""
        texts = lower_device
        if not self.options.train_text:
            self.texts.drop()
            texts = None if self.texts.device.type == "cpu" else torch.device("cpu")
        for tower, device in ((self.images.tower, lower_device), (self.texts.tower, texts)):
            tower.lower_device = device
            tower.move_lower()

    def convert(self, convert_modules: Callable[[], object], fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a move or conversion of the model by `convert_modules`, of every tensor by `fn`."""
        stale = self.images.is_stale(), self.texts.is_stale()
        convert_modules()
        for encoder in (self.images, self.texts):
            encoder.tower.move_lower()
        self.images.moved(keep=not stale[0])
        self.texts.apply(fn, keep=not stale[1])


# ---- the cut of the towers -------------------------------------------------------------------------------------------


def cut_towers(model: nn.Module, image: ImageTower, text: TextTower, options: CutOptions) -> None:
    """Fuse the blocks, cut both towers, and set which parameters train."""
    fuse_blocks([*image.blocks, *text.blocks])
    backend = SDPA if options.attention == "sdpa" else _xformers(image, text)
    for tower, name in ((image, "image"), (text, "text")):
        tower.skip = blocks_to_skip(options.of(tower), len(tower.blocks), name)
        tower.memory, tower.attention_backend = options.memory, backend
    _set_trainable(model, image, text, options)


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
            read = block._read()
            proj = read.weights.proj
            reason = xformers.why_unavailable(device, proj.dtype, proj.shape[0] // read.heads)
            if reason is not None:
                raise ValueError(
                    f'SkipCLIP: attention="xformers" cannot be used here: {reason} Leave it at "sdpa", or use a GPU '
                    "and an xformers that was built for this PyTorch."
                )
    return xformers.backend()


# ---- which parameters train ------------------------------------------------------------------------------------------


def _set_trainable(model: nn.Module, image: ImageTower, text: TextTower, options: CutOptions) -> None:
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
    if not any(p.requires_grad for p in upper.values()) and not options.train_logit_scale and upper:
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


def refuse_training_below(image: ImageTower, text: TextTower, *, train_text: bool) -> None:
    """Raise a RuntimeError if a parameter below the cut requires grad."""
    frozen = [*image.lower_parameters(), *text.lower_parameters()]
    frozen += [] if train_text else text.upper_parameters()
    if any(p.requires_grad for p in frozen):
        raise RuntimeError(
            "SkipCLIP: requires_grad was set on parameters below the cut, which get no gradient. Set it to False "
            "again, or call clip.refresh(), which does; to train them, make a SkipCLIP with fewer skip_layers."
        )


def refuse_frozen_above(image: ImageTower, text: TextTower) -> None:
    """Raise a RuntimeError if the first block above the cut was frozen, as by another SkipCLIP on the model."""
    for tower in (image, text):
        first = tower.blocks[tower.skip : tower.skip + 1]
        if not all(any(p.requires_grad for p in block.parameters()) for block in first):
            raise RuntimeError(
                "SkipCLIP: the first block above the cut was frozen after SkipCLIP was made, such as by another "
                "SkipCLIP on the same model, with more skip_layers. Use the other one, or call clip.refresh(); to "
                'freeze blocks above the cut, pass trainable="as_is".'
            )


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
