"""Benchmark of `rotary_embedding`: query, key and value of EVA-02-B/16 and PE-Core-L/14, and pairs of halves."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from skipkernels import functional, reference

from ..measure import CPU, OURS
from . import Arguments, Case, Random, Work, case
from .record import Call, Record, on_meta


class Shape(NamedTuple):
    """Images, tokens, heads and their width; pairs are neighbours, or of both halves of a head."""

    N: int
    T: int
    H: int
    E: int
    interleaved: bool = True


SHAPES = (Shape(4, 197, 12, 64), Shape(4, 577, 16, 64), Shape(4, 577, 16, 64, interleaved=False))


def eager(x: Tensor, cos: Tensor, sin: Tensor, heads: int, interleaved: bool) -> Tensor:
    """Rotate as timm does, with the cosine and sine of each column."""
    T, E = cos.shape[0], 2 * cos.shape[1]
    cos, sin = (half.repeat_interleave(2, 1) if interleaved else half.repeat(1, 2) for half in (cos, sin))  # [T, E]
    rotated, copied = x.split([heads * E, x.shape[1] - heads * E], dim=1)
    rotated = rotated.view(-1, T, heads, E)
    if interleaved:
        turned = torch.stack([-rotated[..., 1::2], rotated[..., ::2]], dim=-1).flatten(3)
    else:
        first, second = rotated.chunk(2, dim=3)
        turned = torch.cat([-second, first], dim=3)
    result = (rotated * cos[:, None] + turned * sin[:, None]).to(x.dtype)
    return torch.cat([result.flatten(0, 1).flatten(1), copied], dim=1)


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    random = Random(dtype, device)
    for N, T, H, E, interleaved in SHAPES:
        angles = random(T, E // 2, dtype=torch.float32)
        yield case(
            f"N{N}-T{T}-H{H}-E{E}" + ("" if interleaved else "-halves"),
            {OURS: functional.rotary_embedding, "eager": eager},
            reference.rotary_embedding,
            Arguments(
                [random(N * T, 3 * H * E)],
                [random(N * T, 3 * H * E)],
                {"cos": angles.cos(), "sin": angles.sin(), "heads": 2 * H, "interleaved": interleaved},
            ),
            # Forward and backward read one and write one, and the cosines and sines.
            Work(4 * N * T * 3 * H * E * dtype.itemsize + 4 * angles.nbytes),
        )


LAUNCHED = (Shape(4, 577, 16, 64), Shape(3, 5, 6, 80), Shape(4, 577, 16, 64, interleaved=False))


def launches(dtype: torch.dtype, shapes: Sequence[Shape] = LAUNCHED) -> Iterator[Call]:
    """Query, key and value of PE-Core's L/14; heads that are no power of two; the gradient, with pairs of halves."""
    for N, T, H, E, interleaved in shapes:
        x, angles = on_meta(N * T, 3 * H * E, dtype=dtype), on_meta(T, E // 2, dtype=torch.float32)
        form = "" if interleaved else "-halves-inverse"
        yield Call(f"N{N}-T{T}-H{H}-E{E}{form}", (x, angles, angles, 2 * H, interleaved, not interleaved))


WIDTHS = [
    Shape(4, 50, 4, E, interleaved) for E in (16, 32, 48, 64, 80, 96, 128, 256, 512) for interleaved in (True, False)
]
RECORD = Record(
    cases=cases,
    launches={"rotary_embedding": launches},
    widths={"rotary_embedding": functools.partial(launches, shapes=WIDTHS)},
    small_calls={
        "rotary_embedding": lambda randn: ({"x": randn(6, 12)}, {"cos": randn(3, 2), "sin": randn(3, 2), "heads": 2})
    },
)
