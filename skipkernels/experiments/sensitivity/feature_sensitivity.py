"""Feature sensitivity (FS): relative change of each block's output when every layer of a CLIP is fine-tuned.

    FS_l = mean over samples and tokens of ‖h'_l − h_l‖ / ‖h_l‖

where h_l and h'_l are the outputs of block l before and after fine-tuning, each model running on its own hidden states.
The residual stream carries the changes of earlier blocks into FS_l, so the residual branch d_l = h_l − h_{l−1} is
measured too, by the mean of ‖d'_l − d_l‖ / ‖d_l‖. With a causal mask, padding after the end of a prompt is not counted:
the embedding of the prompt does not depend on it.

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

TEXT_CHUNK = 64  # prompts per forward pass

Count = Callable[[int], None]


@dataclass(frozen=True)
class FeatureSensitivity:
    """FS of every block of both towers, from first to last.

    Attributes:
        image: FS of the image blocks' outputs.
        text: FS of the text blocks' outputs.
        image_added: FS of the image blocks' residual branches.
        text_added: FS of the text blocks' residual branches.
        image_entered: FS of the input of the first image block: the embedding is fine-tuned too.
        text_entered: FS of the input of the first text block.
    """

    image: list[float]
    text: list[float]
    image_added: list[float]
    text_added: list[float]
    image_entered: float
    text_entered: float


def measure_feature_sensitivity(
    before: nn.Module,
    after: nn.Module,
    images: Iterable[Tensor],
    tokens: Tensor,
    *,
    progress: Count = lambda count: None,
) -> FeatureSensitivity:
    """Compare the hidden states of two models of the same architecture.

    Both models run in evaluation mode. Hidden states of one batch at a time are in memory.

    Args:
        before: open_clip `CLIP` or `CustomTextCLIP` with transformer towers.
        after: The same model after fine-tuning.
        images: Batches [B, 3, height, width] of preprocessed images.
        tokens: Tokenized prompts, [C, L] int64.
        progress: Called with the number of images or prompts processed since the last call.

    Raises:
        InputError: If a model is not supported, the parameters of the models differ in shape, or there are no images.

    Source: Wu et al., "Skip Tuning", CVPR 2025, arXiv 2412.11509.

    Example:
        >>> import copy
        >>> from skipkernels.experiments import glyph_tiny
        >>> before, _, tokenizer = glyph_tiny.load()
        >>> after = copy.deepcopy(before)
        >>> with torch.no_grad():
        ...     _ = after.visual.transformer.resblocks[4].mlp.c_proj.bias.add_(0.1)
        >>> tokens = tokenizer(["one.", "two."])
        >>> sensitivity = measure_feature_sensitivity(before, after, torch.rand(4, 3, 32, 32).split(2), tokens)
        >>> [value > 0 for value in sensitivity.image], sensitivity.text
        ([False, False, False, False, True, True], [0.0, 0.0, 0.0, 0.0])
    """
    if _shapes(before) != _shapes(after):
        raise InputError(
            "measure_feature_sensitivity: after must have the same parameters as before, with the same shapes. "
            "Fine-tune a copy."
        )
    image, text = _towers(before, tokens)
    image_after, text_after = _towers(after, tokens)
    image_sums, text_sums = _TowerSums(image, image_after, "image"), _TowerSums(text, text_after, "text")
    sees_padding = not text.reductions["text_crop"].enabled
    with torch.no_grad(), evaluating([before, after]):
        for batch in images:
            if batch.ndim != 4:
                raise InputError(
                    f"measure_feature_sensitivity: images must be batches [B, 3, height, width]; got one of "
                    f"{list(batch.shape)}. Split a tensor of images: images.split(32)."
                )
            image_sums.add(batch)
            progress(len(batch))
        on_device = tokens.to(text.tokens.device)
        for chunk, ends in zip(on_device.split(TEXT_CHUNK), text.pooled.split(TEXT_CHUNK), strict=True):
            text_sums.add(chunk, None if sees_padding else ends)
            progress(len(chunk))
    (image_fs, image_added), (text_fs, text_added) = image_sums.means(), text_sums.means()
    return FeatureSensitivity(image_fs[1:], text_fs[1:], image_added[1:], text_added[1:], image_fs[0], text_fs[0])


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _towers(model: nn.Module, tokens: Tensor) -> tuple[ImageTower, TextTower]:
    if type(model) not in (CLIP, CustomTextCLIP):
        raise InputError(
            "measure_feature_sensitivity: models must be open_clip's CLIP or CustomTextCLIP; got "
            f"{type(model).__name__}. Load it with open_clip.create_model."
        )
    try:
        image, (text,) = build_towers(model, tokens)
        return image, text
    except UnsupportedModel as error:
        raise InputError(str(error)) from error


class _TowerSums:
    """Sums over batches of the relative changes of the blocks of a tower."""

    def __init__(self, before: Any, after: Any, name: str):
        self.before, self.after, self.name = before, after, name
        self.sums = torch.zeros(2, len(before.blocks) + 1, dtype=torch.float64)  # the embedding is block 0
        self.count = 0

    def add(self, inputs: Tensor, ends: Tensor | None = None) -> None:
        """Add a batch. `ends` [B] is the last token to count of each prompt; by default all tokens count."""
        pairs = list(zip(self._states(self.before, inputs), self._states(self.after, inputs), strict=True))
        tokens = pairs[0][0].shape[1]
        seen = slice(None) if ends is None else torch.arange(tokens, device=ends.device) <= ends[:, None]
        previous: Tensor | float = 0.0
        previous_after: Tensor | float = 0.0
        for block, pair in enumerate(pairs):
            output, output_after = (state[seen].flatten(0, -2) for state in pair)
            self.sums[0, block] += _relative(output, output_after)
            self.sums[1, block] += _relative(output - previous, output_after - previous_after)
            previous, previous_after = output, output_after
        self.count += len(output)

    def means(self) -> list[list[float]]:
        """FS of outputs and FS of residual branches, [2][1 + blocks]; entry 0 is the embedding."""
        if self.count == 0:
            raise InputError(f"measure_feature_sensitivity: there must be at least one {self.name} input; got none.")
        return (self.sums / self.count).tolist()

    def _states(self, tower: Any, inputs: Tensor) -> list[Tensor]:
        """Run the model's own forward; return the input of the first block and the output of each, [B, tokens, W]."""
        states: list[Tensor] = []

        def keep(block: nn.Module, arguments: tuple[Tensor, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            states.extend((hidden,) if states else (arguments[0], hidden))

        with contextlib.ExitStack() as hooks:
            for block in tower.blocks:
                hooks.callback(block.register_forward_hook(keep).remove)
            tower.reference_forward(inputs)
        shapes = [state.shape for state in states]
        if any(len(shape) != 3 or shape != shapes[0] or shape[0] != len(inputs) for shape in shapes):
            raise InputError(
                f"measure_feature_sensitivity: {self.name} blocks must all return [{len(inputs)}, tokens, W]; "
                f"got {', '.join(str(list(shape)) for shape in dict.fromkeys(shapes))}. Use a plain transformer."
            )
        return [state.to(torch.promote_types(state.dtype, torch.float32)) for state in states]


def _relative(before: Tensor, after: Tensor) -> Tensor:
    """Sum over rows of ‖after − before‖ / ‖before‖, fp64 on the CPU."""
    # clamp_min: the result is finite also for a residual branch that was 0 before fine-tuning.
    ratio = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-12)
    return ratio.sum(dtype=torch.float64).cpu()
