"""Selection of the parameters that train, and detection of a later SkipCLIP that trains other parameters."""

from __future__ import annotations

import weakref

from torch import nn

from ..checks import warn_caller
from ..towers import ImageTower, TextTower, UnsupportedModel
from .settings import Settings

_ADAPTERS = ("peft", "loralib", "adapters")  # packages of adapter modules, with weights beside the model's own
_frozen: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()  # ids that a SkipCLIP froze


def set_trainable(model: nn.Module, image: ImageTower, text: TextTower, settings: Settings) -> None:
    """Set `requires_grad` of every parameter of the model."""
    lower = {id(parameter) for tower in (image, text) for parameter in tower.lower_parameters()}
    upper = {id(parameter): parameter for tower in (image, text) for parameter in tower.upper_parameters()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    frozen_here = _frozen.setdefault(model, set())
    for key in upper:
        if key in lower:
            raise UnsupportedModel(
                f"SkipCLIP: parameter {names[key]} is used on both sides of the cut, so training it would change "
                "cached features. Untie it, or use skip_layers=0."
            )
    if settings.trainable == "upper":
        adapter = next((name for name, module in model.named_modules() if _is_adapter(module)), None)
        if adapter is not None:
            raise UnsupportedModel(
                f'SkipCLIP: {adapter} is an adapter, and trainable="upper" would train the weights beside it as '
                'well. Pass trainable="as_is".'
            )
        frozen = [p for key, p in upper.items() if not p.requires_grad and key not in frozen_here]
        if frozen:
            warn_caller(
                f'SkipCLIP: trainable="upper" sets requires_grad of {len(frozen)} parameters above the cut that '
                f'were frozen ({_numbers(frozen)}). Pass trainable="as_is" to leave them frozen.'
            )
    else:
        below = [p for p in model.parameters() if id(p) in lower and p.requires_grad]
        if below and any(not p.requires_grad for p in model.parameters()):
            warn_caller(
                f"SkipCLIP: {len(below)} trainable parameters below the cut are frozen ({_numbers(below)}), "
                f"{names[id(below[0])]} among them: features at the cut are constants. Put adapters above the cut, or "
                "lower skip_layers."
            )
    # Other parameters are frozen too: a bias of all logits, which a softmax cancels, and the decoder of CoCa.
    frozen_here |= {id(p) for p in model.parameters() if p.requires_grad and id(p) not in upper}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in upper and (settings.trainable == "upper" or parameter.requires_grad))
    image.model.logit_scale.requires_grad_(settings.train_logit_scale)
    if not any(p.requires_grad for p in upper.values()) and not settings.train_logit_scale and upper:
        warn_caller("SkipCLIP: nothing trains: every parameter above the cut is frozen.")


def _numbers(parameters: list[nn.Parameter]) -> str:
    return f"{sum(parameter.numel() for parameter in parameters):,} numbers"


def _is_adapter(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] in _ADAPTERS or any("lora_" in name for name in module._parameters)


class TrainedParameters:
    """Identities of the parameters that one SkipCLIP trains; `superseded` once a later one trains others."""

    superseded = False
    _ids: frozenset[int] = frozenset()

    def register(self, model: nn.Module) -> None:
        """Record the parameters of a model that train now."""
        self._ids = frozenset(id(p) for p in model.parameters() if p.requires_grad)
        _on_model.setdefault(model, weakref.WeakSet()).add(self)

    def supersede_others(self, model: nn.Module) -> None:
        """Register, and mark every earlier SkipCLIP on the model that trains other parameters as superseded."""
        self.superseded = False
        self.register(model)
        for other in _on_model[model]:
            other.superseded = other.superseded or other._ids != self._ids


_on_model: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[TrainedParameters]] = weakref.WeakKeyDictionary()
