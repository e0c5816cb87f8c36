"""Peers: functions of other packages that do the same job, or the reason why they cannot run here. All are optional.

The functions of one job have one signature. They are called as these versions are: cut-cross-entropy 25.1.1,
liger-kernel 0.8.5, xformers 0.0.35. Results are checked before timing, which shows if another version behaves
differently.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Peer(NamedTuple):
    """The function and the version of its package, or None and the reason."""

    function: Callable[..., Tensor] | None
    note: str = ""


def adapted(peers: dict[str, Peer], adapt: Callable[[Any], Callable[..., Any]]) -> dict[str, Peer]:
    """The peers with functions that `adapt` returns for theirs."""
    return {name: peer._replace(function=peer.function and adapt(peer.function)) for name, peer in peers.items()}


def cross_entropies(device: torch.device, dtype: torch.dtype) -> dict[str, Peer]:
    """Peers for the mean cross-entropy of `image @ text.T`, from (image [B, D], text [K, D], labels int64 [B])."""
    too_wide = "" if dtype in (torch.bfloat16, torch.float16) else "its backward is for bf16 and fp16"

    def exact(module: Any) -> Callable[..., Tensor]:  # by default it drops gradients below a threshold
        return functools.partial(module.linear_cross_entropy, filter_eps=None)

    return {
        "linear_cross_entropy": _linear_cross_entropy(),
        "cut-cross-entropy": _package(device, "cut-cross-entropy", "cut_cross_entropy", exact, cannot=too_wide),
        "Liger": _liger(device, "liger_fused_linear_cross_entropy"),
    }


def layer_norms(device: torch.device) -> dict[str, Peer]:
    """Peers for LayerNorm, from (x [T, W], weight [W], bias [W], eps). None adds the residual in the same pass."""
    return {"add, then Liger": _liger(device, "liger_layer_norm")}


def attentions(device: torch.device) -> dict[str, Peer]:
    """Peers for attention, from (query [B, M, H, E], key [B, N, H, E], value, causal), aligned at the last key."""

    def efficient(module: Any) -> Callable[..., Tensor]:
        mask = module.fmha.attn_bias.LowerTriangularFromBottomRightMask

        def attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
            return module.memory_efficient_attention(query, key, value, attn_bias=mask() if causal else None)

        return attention

    return {"xformers": _package(device, "xformers", "xformers.ops", efficient)}


def _linear_cross_entropy() -> Peer:
    if not hasattr(F, "linear_cross_entropy"):
        return Peer(None, "F.linear_cross_entropy needs torch 2.13")
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=False)
    return Peer(functools.partial(F.linear_cross_entropy, options=options))


def _liger(device: torch.device, name: str) -> Peer:
    module = "liger_kernel.transformers.functional"
    return _package(device, "liger-kernel", module, lambda module: getattr(module, name))


def _package(
    device: torch.device,
    distribution: str,
    module: str,
    function_of: Callable[[Any], Callable[..., Tensor]],
    *,
    cannot: str = "",
) -> Peer:
    """A peer from a package with GPU kernels; `cannot` is the reason why it does not support this case."""
    if device.type != "cuda":
        return Peer(None, "needs a GPU")
    if cannot:
        return Peer(None, cannot)
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return Peer(None, f"not installed: pip install {distribution}")
    try:
        function = function_of(importlib.import_module(module))
        return Peer(function, f"{distribution} {metadata.version(distribution)}")
    except Exception as error:  # any error of the import is the reason
        return Peer(None, f"cannot be imported: {type(error).__name__}: {error}")
