"""The cut of both towers: options, fused blocks of which the first are skipped, and the parameters that train."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from ..checks import warn_caller
from ..options import AttentionName, Memory, Trainable
from ..towers.attention import SDPA, AttentionBackend
from ..towers.base import Cut, ImageTower, Tower, UnsupportedModel
from ..towers.block import FusedBlock, fuse_blocks
from ..towers.text import TextTower

_ADAPTERS = ("peft", "loralib", "adapters")  # packages of adapter modules, with weights beside the model's own


@dataclass(frozen=True)
class TowerOptions:
    """Arguments of SkipCLIP that concern the towers."""

    skip_layers: int | float | tuple[int | float, int | float]  # Of both towers, or (image, text); see `skip_of`
    memory: Memory
    attention: AttentionName
    trainable: Trainable
    train_text: bool
    train_logit_scale: bool
    chunk: int  # Images or prompts that run below the cut at a time

    def __post_init__(self) -> None:
        for name, allowed in (("memory", Memory), ("attention", AttentionName), ("trainable", Trainable)):
            if (value := getattr(self, name)) not in get_args(allowed):
                raise ValueError(f"SkipCLIP: {name} must be one of {', '.join(get_args(allowed))}; got {value!r}.")
        if isinstance(self.skip_layers, tuple) and len(self.skip_layers) != 2:
            raise ValueError(
                f"SkipCLIP: skip_layers must be one number or a pair (image, text); got {self.skip_layers!r}."
            )

    def skip_of(self, tower: Tower) -> int:
        """Number of blocks that a tower skips; all of a text tower that does not train."""
        image, text = self.skip_layers if isinstance(self.skip_layers, tuple) else (self.skip_layers, self.skip_layers)
        if isinstance(tower, ImageTower):
            return blocks_to_skip(image, len(tower.blocks), "image")
        return blocks_to_skip(text, len(tower.blocks), "text") if self.train_text else len(tower.blocks)


def cut_towers(image: ImageTower, text: TextTower, options: TowerOptions) -> None:
    """Fuse the blocks of both towers in place, and cut the towers."""
    fuse_blocks([*image.blocks, *text.blocks])
    backend = SDPA if options.attention == "sdpa" else _xformers(image, text)
    for tower in (image, text):
        tower.cut = Cut(options.skip_of(tower), options.memory, backend, options.chunk)


def blocks_to_skip(skip: int | float, depth: int, tower: str) -> int:
    """Number of skipped blocks among the `depth` blocks of a tower: a float up to 1.0 is a share, so 1 is one block.

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
            weights, settings = block._read()
            width = len(weights.out_proj)
            reason = xformers.why_unavailable(device, weights.out_proj.dtype, width // settings.heads)
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


def set_trainable(model: Any, image: ImageTower, text: TextTower, options: TowerOptions) -> None:
    """Set `requires_grad` of every parameter of the model."""
    lower = {id(parameter) for tower in (image, text) for parameter in tower.lower_parameters()}
    trained = (image, text) if options.train_text else (image,)
    upper = {id(parameter): parameter for tower in trained for parameter in tower.upper_parameters()}
    _check_separate(model, lower, upper)
    if options.trainable == "upper":
        _check_all_may_train(model, list(upper.values()))
    else:
        _warn_of_trained_below(model, lower)
    # Other parameters are frozen too: a bias of all logits, which a softmax cancels, and the decoder of CoCa.
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in upper and (options.trainable == "upper" or parameter.requires_grad))
    model.logit_scale.requires_grad_(options.train_logit_scale)
    trains = options.train_logit_scale or any(p.requires_grad for p in upper.values())
    if upper and not trains:  # with nothing above the cut there is nothing to warn of
        warn_caller("SkipCLIP: nothing trains: every parameter above the cut is frozen.")


def _check_separate(model: nn.Module, lower: Container[int], upper: Container[int]) -> None:
    """Refuse a parameter, by its id, on both sides of the cut."""
    for name, parameter in model.named_parameters():
        if id(parameter) in lower and id(parameter) in upper:
            raise UnsupportedModel(
                f"SkipCLIP: parameter {name} is used on both sides of the cut, so training it would change cached "
                "features. Untie it, or use skip_layers=0."
            )


def _warn_of_trained_below(model: nn.Module, lower: Container[int]) -> None:
    """Warn if parameters below the cut train, unless all of the model do."""
    below = {name: p for name, p in model.named_parameters() if id(p) in lower and p.requires_grad}
    if below and any(not p.requires_grad for p in model.parameters()):
        warn_caller(
            f"SkipCLIP: {len(below)} trainable parameters below the cut are frozen ({_size_text(below.values())}), "
            f"{next(iter(below))} among them: features at the cut are constants. Put adapters above the cut, or lower "
            "skip_layers."
        )


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
            f'frozen ({_size_text(frozen)}). Pass trainable="as_is" to leave them frozen.'
        )


def _size_text(parameters: Iterable[nn.Parameter]) -> str:
    return f"{sum(parameter.numel() for parameter in parameters):,} numbers"


def _is_adapter(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] in _ADAPTERS or any("lora_" in name for name in module._parameters)


def check_trained(image: ImageTower, text: TextTower, options: TowerOptions) -> None:
    """Raise a RuntimeError if parameters below the cut train, or the first block above it was frozen."""
    constants = [*image.lower_parameters(), *text.lower_parameters()]
    constants += [] if options.train_text else text.upper_parameters()
    if any(p.requires_grad for p in constants):
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
