"""Construction of SkipCLIP: towers are fused and cut, parameters frozen, and encoders compared with the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import without_autocast
from ..options import AttentionName, Memory
from ..towers import registry, xformers
from ..towers.base import Cut
from ..towers.fused_classes import fuse_blocks
from ..towers.image import ImageTower
from ..towers.rows import SDPA
from ..towers.text import TextTower
from .checks import as_pair, blocks_to_skip, check_vocabulary
from .containers import Containers
from .images import ImageEncoder
from .texts import ClassTexts, FixedTexts
from .trainable import TrainOptions, set_trainable
from .verify import verify


def read_cut(memory: Memory, attention: AttentionName, chunk: int, lower_device: torch.device | str | None) -> Cut:
    """Cut of a tower at block 0, from arguments of SkipCLIP."""
    backend = SDPA if attention == "sdpa" else xformers.XFORMERS
    device = None if lower_device is None else torch.device(lower_device)
    return Cut(memory=memory, backend=backend, chunk=int(chunk), lower_device=device)


def build(
    model: Any,
    tokens: Tensor,
    skip_layers: int | float | tuple[int | float, int | float],
    cut: Cut,
    options: TrainOptions,
    *,
    folder: str | Path | None = None,
    prototypes: Tensor | None = None,
) -> tuple[ImageEncoder, ClassTexts, Containers]:
    """Read a model, fuse its blocks in place, freeze what is below the cut, and compare the result with the model.

    The lower parts move to their device at the end, since the model itself runs on one.

    `cut` has the settings of the cuts of both towers, and `skip_layers` says where they are. Prototypes are computed
    unless the classes have them already.
    """
    # 1. Towers
    image, text = _cut_towers(model, tokens, skip_layers, cut, options)
    containers = Containers(model, image, text)  # raises for hooks that would have no effect
    set_trainable(model, image, text, options)
    # 2. Encoders: text features at the cut, and prototypes, which are embeddings of all classes before tuning
    with without_autocast(model.logit_scale.device):
        images = ImageEncoder(image)
        folder = None if folder is None else Path(folder).absolute()  # of the working directory of now
        texts = _texts_of(text, tokens, options, folder, prototypes)
        # 3. Comparison with the model itself
        verify(model, texts, images)
    # 4. Devices
    image.move_lower()
    _move_texts(texts, options)
    return images, texts, containers


def build_again(
    model: Any, images: ImageEncoder, texts: ClassTexts, options: TrainOptions
) -> tuple[ImageEncoder, ClassTexts, Containers]:
    """Read a model again; prototypes stay."""
    for tower in (images.tower, texts.tower):
        tower.move_lower(model.logit_scale.device)
    skip_layers = images.tower.skip, texts.tower.skip
    return build(
        model, texts.tokens, skip_layers, images.tower.cut, options, folder=texts.folder, prototypes=texts.prototypes
    )


def build_texts(model: Any, texts: ClassTexts, tokens: Tensor, options: TrainOptions) -> ClassTexts:
    """Make the texts of other classes; their prototypes are computed with the current weights."""
    if texts.folder is not None:
        raise RuntimeError(
            "SkipCLIP: set_classes cannot replace the classes of a text_cache. Create SkipCLIP again with another "
            "text_cache."
        )
    tower = copy.copy(texts.tower)
    tower.cut = replace(tower.cut, runs=_number_of_templates(tokens))
    with without_autocast(model.logit_scale.device):
        found = _texts_of(tower, tokens, options)
        if tower.cut.lower_device is None:  # else the model itself cannot run
            verify(model, found)
    _move_texts(found, options)
    return found


def _cut_towers(
    model: Any, tokens: Tensor, skip_layers: Any, cut: Cut, options: TrainOptions
) -> tuple[ImageTower, TextTower]:
    """Build the towers of a model, fuse their blocks in place, and cut them; constant texts skip every block."""
    image, text = registry.build_towers(model)
    fuse_blocks([*image.blocks, *text.blocks])
    if cut.backend != SDPA:
        xformers.check_available(image, text)
    image_skip, text_skip = as_pair(skip_layers)
    image.cut = replace(cut, skip=blocks_to_skip(image_skip, len(image.blocks), "image"))
    templates = _number_of_templates(tokens)
    if options.train_text:
        text.cut = replace(cut, skip=blocks_to_skip(text_skip, len(text.blocks), "text"), runs=templates)
    else:  # used at the construction alone, and then on the CPU
        lower_device = None if model.logit_scale.device.type == "cpu" else torch.device("cpu")
        text.cut = replace(cut, skip=len(text.blocks), runs=templates, lower_device=lower_device)
    return image, text


def _number_of_templates(tokens: Tensor) -> int:
    return tokens.shape[1] if tokens.ndim == 3 else 1


def _texts_of(
    tower: TextTower,
    tokens: Tensor,
    options: TrainOptions,
    folder: Path | None = None,
    prototypes: Tensor | None = None,
) -> ClassTexts:
    check_vocabulary("SkipCLIP", "tokens", tokens, tower.vocabulary)
    kind = ClassTexts if options.train_text else FixedTexts
    return kind(tower, tokens, folder, prototypes)


def _move_texts(texts: ClassTexts, options: TrainOptions) -> None:
    """Move the lower text tower to its device: its features of all classes are computed by now."""
    if not options.train_text:
        texts.drop()
    texts.tower.move_lower()


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
