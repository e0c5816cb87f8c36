"""A small call of each public operator, with all of its tensors, for properties of all operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from skipkernels import functional, reference


class SmallCall(NamedTuple):
    function: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    """Differentiable arguments, which come first."""
    rest: tuple[Any, ...]
    options: dict[str, Any]

    def on(self, device: torch.device) -> SmallCall:
        """The same call on a device."""
        return SmallCall(*tree_map_only(Tensor, lambda x: x.to(device), tuple(self)))

    def total(self, *inputs: Tensor, reference: bool = False) -> Tensor:
        """Sum of the squared results of the operator, or of its reference, for `inputs` (default: its own)."""
        function = self.reference if reference else self.function
        out = function(*(inputs or self.inputs), *self.rest, **self.options)
        results = out if isinstance(out, tuple) else (out,)
        return sum((x.square().sum() for x in results if x is not None), start=torch.zeros(()))


def _labels_last(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda image, text, *numbers_and_labels, **options: function(
        image, text, numbers_and_labels[-1], *numbers_and_labels[:-1], **options
    )


def small_call(name: str) -> SmallCall:
    """A small call of a function in `functional.__all__`."""
    rng = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    ids, scale = torch.tensor([0, 2, 3]), torch.tensor(5.0)
    weight = [x.abs() for x in (randn(4, 3), randn(3))]
    calls: dict[str, tuple[tuple[Tensor, ...], tuple[Any, ...], dict[str, Any]]] = {
        "class_sampled_ce": (
            (randn(2, 4), randn(5, 4), scale),
            (torch.tensor([0, 3]),),
            {"class_ids": ids, "class_weight": torch.ones(5), "label_smoothing": 0.1},
        ),
        "class_sampled_logits": ((randn(2, 4), randn(5, 4), scale), (), {"class_ids": ids}),
        "contrastive_loss": ((randn(3, 4), randn(3, 4), scale), (), {}),
        "pairwise_sigmoid": ((randn(2, 4), randn(5, 4), scale, -scale), (torch.tensor([-1, 3]),), {}),
        "pairwise_sigmoid_loss": ((randn(3, 4), randn(3, 4), scale, -scale), (), {}),
        "class_scores": ((), (randn(2, 4), randn(5, 4), torch.tensor([0, 3])), {}),
        "add_layer_norm": ((randn(3, 4), randn(3, 4), randn(4), randn(4)), (), {}),
        "add_rms_norm": ((randn(3, 4), randn(3, 4), randn(4)), (), {}),
        "mlp_activation": ((randn(3, 4), randn(4)), ("gelu",), {}),
        "rotary_embedding": ((randn(6, 12),), (randn(3, 2), randn(3, 2)), {"heads": 2}),
        "shared_prefix_attention": (
            (randn(7, 24),),
            (),
            {"heads": 2, "prefix_length": 2, "offsets": torch.tensor([0, 2, 5]), "max_length": 3},
        ),
        "pooled_attention": (
            (randn(2, 2, 4), randn(2, 3, 2, 4), randn(2, 3, 2, 4)),
            (),
            {"lengths": torch.tensor([3, 2])},
        ),
        "sgd_momentum_": ((), (weight, [x.clone() for x in weight], [x.clone() for x in weight], 1e-9), {}),
    }
    functions = getattr(functional, name), getattr(reference, name, None)
    if name in ("class_sampled_ce", "pairwise_sigmoid"):
        functions = tuple(map(_labels_last, functions))
    return SmallCall(*functions, *calls[name])
