"""FS, feature sensitivity: how much each block's output moves when every layer of a CLIP is fine-tuned.

    FS_l = mean over samples and tokens of ‖h'_l − h_l‖ / ‖h_l‖

with h_l what leaves block l before fine-tuning and h'_l after it, both models run from their own inputs on. A block
passes on what entered it, so FS also has what came before; d_l = h_l − h_{l−1}, what block l itself adds, has the same
measure of its own: the mean of ‖d'_l − d_l‖ / ‖d_l‖. Of a prompt those tokens count that its embedding can depend on:
the padding behind the end of a prompt does not, where the mask is causal.

Source: Wu et al., "Skip Tuning", CVPR 2025, arXiv 2412.11509; the relative distance is a choice made here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

from ...data import InputError
from ...towers import ImageTower, TextTower, UnsupportedModel, build_towers, evaluating

TEXT_CHUNK = 64  # prompts that run at once

Count = Callable[[int], None]


@dataclass(frozen=True)
class FeatureShift:
    """FS of every block of both towers, from the first to the last.

    Attributes:
        image: Of what leaves each block.
        text: The same.
        image_added: Of what each block itself adds.
        text_added: The same.
        image_entered: Of what enters the first block: the embedding trains too, and all blocks pass its change on.
        text_entered: The same.
    """

    image: list[float]
    text: list[float]
    image_added: list[float]
    text_added: list[float]
    image_entered: float
    text_entered: float


def feature_shift(
    before: nn.Module,
    after: nn.Module,
    images: Iterable[Tensor],
    tokens: Tensor,
    *,
    progress: Count = lambda count: None,
) -> FeatureShift:
    """Compare the hidden states of two models of the same architecture, batch by batch.

    Both run in evaluation mode, as they are; of no more than one batch are hidden states in memory.

    Args:
        before: An open_clip `CLIP` or `CustomTextCLIP` whose towers have blocks over tokens.
        after: The same, fine-tuned.
        images: Batches [B, 3, height, width] as the models take them.
        tokens: [C, L] int64, prompts.
        progress: Called with the number of images or prompts that are done.

    Raises:
        InputError: If the models are of another kind, or differ in their blocks, or there is no image.

    Source: Wu et al., "Skip Tuning", CVPR 2025, arXiv 2412.11509.

    Example:
        >>> import copy, logging; logging.disable()  # open_clip warns of random weights
        >>> import open_clip
        >>> from skipkernels.experiments import glyph_tiny
        >>> glyph_tiny.register()
        >>> before = open_clip.create_model("glyph-tiny")
        >>> after = copy.deepcopy(before)
        >>> with torch.no_grad():
        ...     _ = after.visual.transformer.resblocks[4].mlp.c_proj.bias.add_(0.1)
        >>> tokens = open_clip.get_tokenizer("glyph-tiny")(["one.", "two."])
        >>> shift = feature_shift(before, after, torch.rand(4, 3, 32, 32).split(2), tokens)
        >>> [value > 0 for value in shift.image], shift.text
        ([False, False, False, False, True, True], [0.0, 0.0, 0.0, 0.0])
    """
    if _shapes(before) != _shapes(after):
        raise InputError(
            "feature_shift: after must have the parameters of before, with other values; fine-tune a copy."
        )
    image, text = _towers(before, tokens)
    image_after, text_after = _towers(after, tokens)
    image_shift, text_shift = _Shift(image, image_after, "image"), _Shift(text, text_after, "text")
    all_seen = not text.reductions["text_crop"].enabled
    with torch.no_grad(), evaluating([before, after]):
        for batch in images:
            if batch.ndim != 4:
                raise InputError(
                    f"feature_shift: images must be batches [B, 3, height, width]; got one of {list(batch.shape)}. "
                    "Split a tensor of images: images.split(32)."
                )
            image_shift.add(batch)
            progress(len(batch))
        on_device = tokens.to(text.tokens.device)
        for chunk, ends in zip(on_device.split(TEXT_CHUNK), text.pooled.split(TEXT_CHUNK), strict=True):
            text_shift.add(chunk, None if all_seen else ends)
            progress(len(chunk))
    (image_fs, image_added), (text_fs, text_added) = image_shift.means(), text_shift.means()
    return FeatureShift(image_fs[1:], text_fs[1:], image_added[1:], text_added[1:], image_fs[0], text_fs[0])


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _towers(model: nn.Module, tokens: Tensor) -> tuple[ImageTower, TextTower]:
    if type(model) not in (CLIP, CustomTextCLIP):
        raise InputError(
            f"feature_shift: models must be open_clip's CLIP or CustomTextCLIP; got {type(model).__name__}. Load it "
            "with open_clip.create_model."
        )
    try:
        return build_towers(model, tokens)
    except UnsupportedModel as error:
        raise InputError(str(error)) from error


class _Shift:
    """Both measures of the blocks of one tower, summed up over batches."""

    def __init__(self, before: Any, after: Any, name: str):
        self.before, self.after, self.name = before, after, name
        self.sums = torch.zeros(2, len(before.blocks) + 1, dtype=torch.float64)  # the embedding is block 0
        self.count = 0

    def add(self, inputs: Tensor, ends: Tensor | None = None) -> None:
        """Run a batch through both towers; of each sample the tokens up to its end [B] count, or all."""
        pairs = list(zip(self._states(self.before, inputs), self._states(self.after, inputs), strict=True))
        tokens = pairs[0][0].shape[1]
        seen = slice(None) if ends is None else torch.arange(tokens, device=ends.device) <= ends[:, None]
        entered: Tensor | float = 0.0
        entered_after: Tensor | float = 0.0
        for block, pair in enumerate(pairs):
            left, left_after = (state[seen].flatten(0, -2) for state in pair)
            self.sums[0, block] += _relative(left, left_after)
            self.sums[1, block] += _relative(left - entered, left_after - entered_after)
            entered, entered_after = left, left_after
        self.count += len(left)

    def means(self) -> list[list[float]]:
        """FS of the embedding and of every block, and that of what each adds."""
        if self.count == 0:
            raise InputError(
                f"feature_shift: there must be an {self.name} input to compare hidden states of; got none."
            )
        return (self.sums / self.count).tolist()

    def _states(self, tower: Any, inputs: Tensor) -> list[Tensor]:
        """What enters the first block and what leaves each, as the model itself runs: [B, tokens, W], fp32 or fp64."""
        states: list[Tensor] = []

        def keep(block: nn.Module, arguments: tuple[Tensor, ...], output: Any) -> None:
            left = output[0] if isinstance(output, tuple) else output
            states.extend((left,) if states else (arguments[0], left))

        with contextlib.ExitStack() as hooks:
            for block in tower.blocks:
                hooks.callback(block.register_forward_hook(keep).remove)
            tower.reference_forward(inputs)
        shapes = [state.shape for state in states]
        if any(len(shape) != 3 or shape != shapes[0] or shape[0] != len(inputs) for shape in shapes):
            raise InputError(
                f"feature_shift: {self.name} blocks must pass on [{len(inputs)}, tokens, W], all of them the same; "
                f"got {', '.join(str(list(shape)) for shape in dict.fromkeys(shapes))}. Use a plain transformer."
            )
        return [state.to(torch.promote_types(state.dtype, torch.float32)) for state in states]


def _relative(before: Tensor, after: Tensor) -> Tensor:
    """Sum over rows of ‖after − before‖ / ‖before‖, fp64 on the CPU."""
    # Where nothing was before, a block adds something for the first time: a large number then, and not infinity.
    ratio = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-12)
    return ratio.sum(dtype=torch.float64).cpu()
