"""Weights of a fused block: read from the modules of a family, prepared for the stages, and their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import casts
from ...ops import launching
from ...ops.row_sums import MAX_ROWS, column_sums


@dataclass(eq=False, kw_only=True)
class BlockWeights:
    """Parameters of a block in order of use, as its stages read them; None where it has none.

    Those of products are in the dtype of the products. Layer scales are multiplied into W_o, b_o and W_p, b_p.
    """

    norm_1: Tensor  # [W]
    norm_1_bias: Tensor | None = None
    in_proj: Tensor  # [3W, W]: query, key, value
    in_proj_bias: Tensor | None = None
    query_norm: Tensor | None = None  # [E]
    query_norm_bias: Tensor | None = None
    key_norm: Tensor | None = None  # [E]
    key_norm_bias: Tensor | None = None
    attention_norm: Tensor | None = None  # [W]
    attention_norm_bias: Tensor | None = None
    out_proj: Tensor  # [W, W]
    out_proj_bias: Tensor | None = None
    norm_2: Tensor  # [W]
    norm_2_bias: Tensor | None = None
    mlp_in: Tensor  # [M, W]; [2M, W] for SwiGLU: gate, value
    mlp_in_bias: Tensor | None = None
    mlp_norm: Tensor | None = None  # [M]
    mlp_norm_bias: Tensor | None = None
    mlp_out: Tensor  # [W, M]
    mlp_out_bias: Tensor | None = None

    def layer(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a layer that the block has."""
        return getattr(self, name), getattr(self, f"{name}_bias")


# What a family reads: weights by their fields in `BlockWeights`, or in parts of equal height, one below the other.
# Parts are joined in each pass and not here: what autograd saves is then the caller's parameters, and no copy of them.
GivenWeights = dict[str, Tensor]
PARTS = {"in_proj": ("query", "key", "value"), "mlp_in": ("mlp_gate", "mlp_value")}
PARTS |= {f"{name}_bias": tuple(f"{part}_bias" for part in parts) for name, parts in PARTS.items()}
_WHOLE = {part: name for name, parts in PARTS.items() for part in parts}  # field that a part belongs to

# Fields that products read. The operators upcast the others: that of the activation adds mlp_in_bias.
_OF_PRODUCTS = ("in_proj", "in_proj_bias", "out_proj", "out_proj_bias", "mlp_in", "mlp_out", "mlp_out_bias")

# Norms within attention: autograd computes their gradients.
ATTENTION_NORMS = tuple(f"{name}_norm{end}" for name in ("query", "key", "attention") for end in ("", "_bias"))


class BlockSettings(NamedTuple):
    """Settings of a block."""

    activation: str  # Name of the activation in `functional.mlp_activation`
    eps: Mapping[str, float]  # Epsilon of each norm, by its field in `BlockWeights`
    heads: int  # H
    rms: bool = False  # The norms are RMSNorms


# ---- reading of modules, for the families ----------------------------------------------------------------------------


def weights_of(name: str, layer: Any, scale: Tensor | None = None) -> GivenWeights:
    """Weight and bias of a layer, as `name` and `name_bias`.

    They are multiplied by the layer scale [W] that follows the layer, if there is one. They are attributes, as the
    layer reads them: a bias may be a parameter, a buffer, or a view of a flat parameter.
    """
    weight, bias = layer.weight, getattr(layer, "bias", None)  # RMSNorm has none
    if scale is not None:
        weight, bias = scale[:, None] * weight, None if bias is None else scale * bias
    return {name: weight} if bias is None else {name: weight, f"{name}_bias": bias}


def weights_of_parts(name: str, layers: Sequence[Any]) -> GivenWeights:
    """Weights and biases of layers that are the parts of a field; zeros for a bias that one of them lacks."""
    found: GivenWeights = {}
    for part, layer in zip(PARTS[name], layers, strict=True):
        found |= weights_of(part, layer)
    if len(found) > len(layers):  # some have a bias
        found = {f"{part}_bias": found[part].new_zeros(len(found[part])) for part in PARTS[name]} | found
    return found


def layer_scale(module: Any) -> Tensor | None:
    """Factors [W] of a module that scales a branch; None for an identity."""
    return None if module is None or isinstance(module, nn.Identity) else module.gamma


def activation(module: nn.Module, names: Mapping[type, str]) -> str:
    """Name of an activation in `functional.mlp_activation`; `names` by type, if its options do not change it."""
    if getattr(module, "approximate", "none") == "tanh":
        return "gelu_tanh"
    kind = type(module)
    if kind not in names and kind.__name__ == "QuickGELU":  # each package has one of its own
        return "quick_gelu"
    if kind not in names:
        known = ", ".join(sorted(set(names.values())))
        raise TypeError(f"fused block: the activation must be one of {known}; got a {kind.__name__}.")
    return names[kind]


# ---- what the stages read --------------------------------------------------------------------------------------------


@torch.no_grad()
def prepare(given: Mapping[str, Tensor], dtype: torch.dtype) -> BlockWeights:
    """Join weights in parts, and cast those of products to their dtype, all by one launch.

    A captured step, and the eager ones before its capture, take the casts that their update renews (`casts.py`).
    """
    parts_of: dict[str, list[Tensor]] = {}
    for name, x in given.items():
        parts_of.setdefault(_WHOLE.get(name, name), []).append(x)
    weights: dict[str, Tensor] = {}
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for name, parts in parts_of.items():
        wanted = dtype if name in _OF_PRODUCTS else parts[0].dtype
        if len(parts) == 1 and parts[0].dtype == wanted:
            weights[name] = parts[0]
            continue
        joint = casts.of_product(parts, wanted)
        if joint is None:
            lengths = [len(part) for part in parts]
            joint = parts[0].new_empty(sum(lengths), *parts[0].shape[1:], dtype=wanted)
            targets += joint.split(lengths)
            sources += parts
        weights[name] = joint
    if sources:
        torch._foreach_copy_(targets, sources)
    return BlockWeights(**weights)


# ---- gradients -------------------------------------------------------------------------------------------------------


class Gradients:
    """Gradients of weights that a backward pass computes, by the fields of `BlockWeights`.

    Those of matrices are in `dtype` or in that of the products, those of vectors in any dtype.

    Args:
        needed: Whether each given weight needs a gradient. Those of others may be computed as well.
        needs_hidden: True if those of the inputs of the block are needed.
        dtype: Dtype of the matrices.
        sums_dtype: Dtype of sums over rows.
        partial: True where kernels are launched: operators leave their sums over rows partial, as rows of fewer terms,
            and `complete` adds those of all operators by one launch.
    """

    def __init__(
        self,
        needed: Mapping[str, bool],
        *,
        needs_hidden: bool,
        dtype: torch.dtype,
        sums_dtype: torch.dtype,
        partial: bool,
    ):
        self.needs_hidden, self.partial = needs_hidden, partial
        self._given, self._fields = needed, {_WHOLE.get(name, name) for name, need in needed.items() if need}
        self._dtype, self._sums_dtype = dtype, sums_dtype
        self._found: dict[str, Tensor] = {}
        # Vectors that are column sums of the matrices, side by side: the width of each by its field
        self._widths: dict[str, int] = {}
        self._matrices: list[Tensor] = []

    def needs(self, *fields: str) -> bool:
        """Return True if the gradient of one of these fields is needed."""
        return not self._fields.isdisjoint(fields)

    @property
    def depend_on_attention(self) -> bool:
        """True if a gradient depends on that of the result of attention."""
        return self.needs_hidden or self.needs("norm_1", "norm_1_bias", "in_proj", "in_proj_bias", *ATTENTION_NORMS)

    def set(self, name: str, gradient: Tensor) -> None:
        """Set a gradient, if it is needed."""
        if self.needs(name):
            self._found[name] = gradient

    def set_product(self, name: str, *pairs: tuple[Tensor, Tensor]) -> None:
        """Set the gradient of a matrix, if it is needed.

        A pair has d_out [R, out], the gradient of results of a layer, and their inputs [R, in]: d_W = d_outᵀ · inputs.
        Those of several pairs are one below the other.
        """
        if self.needs(name):
            self._found[name] = joint_product(pairs, self._dtype)

    def set_sums(self, sums: Mapping[str, Tensor], partial_sums: Tensor) -> None:
        """Set gradients of vectors of equal width that an operator has summed.

        Or `partial_sums` of them, if not empty: rows with those of all vectors side by side, in the order of `sums`.
        """
        if partial_sums.numel() > 0:
            self._add(list(sums), [partial_sums])
        else:
            for name, total in sums.items():
                self.set(name, total)

    def set_column_sums(self, name: str, matrices: Sequence[Tensor]) -> None:
        """Set the gradient of a vector, if it is needed: the column sums of one or more matrices, side by side."""
        if not self.needs(name):
            return
        if self.partial and len(matrices[-1]) <= MAX_ROWS:
            self._add([name], matrices)
            return
        # On a CPU a sum in another dtype would convert all rows first.
        dtype = matrices[0].dtype if matrices[0].is_cpu else self._sums_dtype
        sums = [x.sum(0, dtype=dtype) for x in matrices]
        self._found[name] = torch.cat(sums) if len(sums) > 1 else sums[0]

    def _add(self, names: Sequence[str], matrices: Sequence[Tensor]) -> None:
        """Add vectors of equal width to those that `complete` sums."""
        width = sum(x.shape[1] for x in matrices) // len(names)
        self._widths |= dict.fromkeys(names, width)
        self._matrices += matrices

    def complete(self) -> list[Tensor | None]:
        """Return the gradients of the given weights in their order, None for those that need none."""
        if self._widths:
            totals = column_sums(self._matrices, self._sums_dtype).split(list(self._widths.values()))
            self._found |= zip(self._widths, totals, strict=True)
        for name, parts in PARTS.items():
            if name in self._found and parts[0] in self._given:
                self._found |= zip(parts, self._found[name].chunk(len(parts)), strict=True)
        return [self._found[name] if need else None for name, need in self._given.items()]


def joint_product(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """d_outᵀ · inputs of pairs [R, out], [R, in], one below the other, [sum of out, in].

    In `dtype` if that is fp32 and the device can write a product of 16-bit tensors in it by one launch, else in the
    dtype of the pairs.
    """
    d_out, inputs = pairs[0]
    is_16_bit = inputs.dtype in (torch.bfloat16, torch.float16)
    widens = is_16_bit and dtype == torch.float32 and launching.products_widen(inputs.device.type)
    options: dict[str, Any] = {"out_dtype": dtype} if widens else {}
    if len(pairs) == 1:
        return torch.mm(d_out.T, inputs, **options)
    heights = [d_out.shape[1] for d_out, _ in pairs]
    joint = inputs.new_empty(sum(heights), inputs.shape[1], dtype=dtype if widens else inputs.dtype)
    for (d_out, inputs), out in zip(pairs, joint.split(heights), strict=True):
        torch.mm(d_out.T, inputs, out=out, **options)
    return joint
