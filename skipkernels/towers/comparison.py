"""Comparison of fused blocks with their own forward, by `sk.fuse`; tolerances, which `clip.verify` shares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import wide_dtype, without_autocast
from .block import FusedBlock
from .fused_classes import unfused

# Largest distance between two unit-norm embeddings, or relative error of the output of a block. Another order of
# operations changes about 1e-6 in fp32 over twelve blocks; some fp64 models compute a softmax in fp32. A wrong
# activation in one block changes at least 2e-3.
OUTPUT_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
# Largest relative error of a gradient; in fp32, at most 5e-4 was measured for norms and biases over all of open_clip.
GRADIENT_TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-3}
_NEGLIGIBLE = 0.01  # of the largest gradient: that of a key's bias is 0 up to rounding


def compare_with_own_forward(blocks: Iterable[FusedBlock]) -> None:
    """Compare output and gradients of one block of each kind with those of its own forward, with random weights.

    The weights themselves may be unloaded, and are not read. Blocks on the meta device and shards are not compared.
    """
    seen: set[Any] = set()
    for block in blocks:
        tensors = [x for _, _, x in _tensors(block)]
        if (kind := _kind(block)) in seen or any(x.is_meta or hasattr(x, "placements") for x in tensors):
            continue
        seen.add(kind)
        with torch.inference_mode(False), torch.enable_grad(), without_autocast(tensors[0].device):
            _compare(block)


def _tensors(block: Any) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Parameters, buffers and other tensors of a block, each with the dictionary that holds it and its name there."""
    for module in block.modules():
        for table in (module._parameters, module._buffers, vars(module)):
            yield from ((table, name, x) for name, x in table.items() if isinstance(x, Tensor))


def _kind(block: Any) -> Any:
    """Types of a block and its modules, their settings, and names, shapes and dtypes of their tensors."""
    settings = [
        (type(module), *((name, x) for name, x in vars(module).items() if isinstance(x, (bool, int, float, str))))
        for module in block.modules()
    ]
    return (*settings, *((name, x.shape, x.dtype, type(x)) for _, name, x in _tensors(block)))


def _compare(block: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    with _random_weights(block, generator) as trained:
        like = next(iter(trained.values()))

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cpu").to(like)

        arguments = block.example_input(draw, len(block.read_weights()[0]["out_proj"]))
        if arguments is None:
            return
        trained["the input"] = arguments[0].requires_grad_()
        with unfused([block]):
            expected, *d_expected = _differentiated(block, arguments, trained)
        got, *d_got = _differentiated(block, arguments, trained)
    what = f"fuse: a fused {type(block).__name__} differs from its own forward"
    error = ((got - expected).norm() / expected.norm()).item()
    raise_if_above(what, "relative error of the output", error, OUTPUT_TOLERANCE[got.dtype])
    smallest = _NEGLIGIBLE * max(x.norm() for x in d_expected)
    for name, found, own in zip(trained, d_got, d_expected, strict=True):
        error = ((found - own).norm() / (own.norm() + smallest)).item()
        raise_if_above(what, f"relative error of the gradient of {name}", error, GRADIENT_TOLERANCE[got.dtype])


def _differentiated(block: Any, arguments: tuple[Any, ...], trained: dict[str, Tensor]) -> list[Tensor]:
    """Output of a block, without the hooks on it, and its gradients."""
    out = block.forward(*arguments)
    out = out if isinstance(out, Tensor) else out[0]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(out)
    return [out.detach(), *torch.autograd.grad(out, list(trained.values()), upstream, materialize_grads=True)]


@contextmanager
def _random_weights(block: Any, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Put random parameters in the place of those of a block, and copies in that of other tensors, at least fp32.

    Half precision would hide a wrong activation, and a new model's biases of zero a missing bias. The caller's tensors,
    their hooks and gradients are not touched. Yields the tensors that train, by name.
    """
    before = list(_tensors(block))
    copies: dict[int, tuple[str, Tensor]] = {}  # a tensor may be in several places
    for _, name, x in before:
        dtype = wide_dtype(x.dtype) if x.is_floating_point() else x.dtype
        copy = x.detach().to(dtype, copy=True)
        if isinstance(x, nn.Parameter):
            random = torch.randn(x.shape, generator=generator, device="cpu")
            copy = nn.Parameter(copy.copy_(1 + 0.1 * random if x.ndim < 2 else random / x.shape[-1] ** 0.5))
        elif x.requires_grad:
            copy.requires_grad_()
        copies.setdefault(id(x), (name, copy))
    try:
        for table, name, x in before:
            table[name] = copies[id(x)][1]
        paths = {id(x): path for path, x in block.named_parameters()}
        yield {paths.get(id(x), name): x for name, x in copies.values() if x.requires_grad}
    finally:
        for table, name, x in before:
            table[name] = x


def raise_if_above(what: str, measure: str, value: float, allowed: float) -> None:
    """Raise a RuntimeError if a difference from the caller's model is above its tolerance, or not a number."""
    if not value <= allowed:
        raise RuntimeError(
            f"{what}: {measure} {value:.2e}, allowed {allowed:.0e}. A part of the model (a hook, a changed forward, a "
            "mask or activation) is not what its type implies, so training would be silently wrong."
        )
