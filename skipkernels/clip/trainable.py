"""Which parameters train: those above the cut, or those that required gradients before."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from ..checks import warn_caller
from ..options import Trainable
from ..towers.base import UnsupportedModel

if TYPE_CHECKING:
    from ..towers.image import ImageTower
    from ..towers.text import TextTower

_ADAPTERS = ("peft", "loralib", "adapters")  # packages of adapter modules, with weights beside the model's own


class TrainOptions(NamedTuple):
    """Arguments of SkipCLIP that determine which parameters train."""

    trainable: Trainable = "upper"
    train_text: bool = True
    train_logit_scale: bool = False


def set_trainable(model: Any, image: ImageTower, text: TextTower, options: TrainOptions) -> None:
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
    # With nothing above the cut there is nothing to warn of.
    if upper and not any(parameter.requires_grad for parameter in model.parameters()):
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


def trained_parameters(
    model: Any, image: ImageTower, text: TextTower, options: TrainOptions
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters of the text side and of the image side that train; see `check_trained`."""
    check_trained(image, text, options)
    text_side, image_side = [*text.upper_parameters(), model.logit_scale], image.upper_parameters()
    return [p for p in text_side if p.requires_grad], [p for p in image_side if p.requires_grad]


def check_trained(image: ImageTower, text: TextTower, options: TrainOptions) -> None:
    """Raise a RuntimeError if parameters below the cut train, or the first block above it was frozen."""
    constants = [*image.lower_parameters(), *text.lower_parameters()]
    constants += [] if options.train_text else text.upper_parameters()
    if any(p.requires_grad for p in constants):
        raise RuntimeError(
            "SkipCLIP: requires_grad was set on parameters below the cut, which get no gradient. Set it to False "
            "again, or call clip.refresh(), which does; to train them, make a SkipCLIP with fewer skip_layers."
        )
    for tower in (image, text) if options.trainable == "upper" else ():
        first = tower.upper_blocks[:1]
        if not all(any(p.requires_grad for p in block.parameters()) for block in first):
            raise RuntimeError(
                "SkipCLIP: the first block above the cut was frozen after SkipCLIP was made, such as by another "
                "SkipCLIP on the same model, with more skip_layers. Use the other one, or call clip.refresh(); to "
                'freeze blocks above the cut, pass trainable="as_is".'
            )
