"""Predicted memory of training on a GPU, counted from a model without weights. Nothing is downloaded or measured.

Forward and backward of a step run on the meta device, which stands in for a GPU: the operators, what they save for
backward, and the sizes of what they return are those of a real step.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional, testing
from ...boundary import DEFAULT_CHUNK
from ...clip.base import Settings
from ...clip.image import ImageEncoder
from ...clip.text import PromptFeatures
from ...options import Precision
from ...selection import RankSampler
from ...towers import build_towers
from ...towers.block import fuse_blocks
from ..methods.base import cosine_logits, unit_norm
from .errors import argument_error
from .meta_device import meta_as_gpu
from .model import load_model
from .precision import MixedPrecision
from .setup import BATCH

Saved = Literal["fast", "min"]
"""Saved for backward by a block: `memory` of SkipCLIP without "auto"."""

RESERVED = 1 << 30
"""Assumed bytes for CUDA, its libraries, and gaps between allocations."""
_META = torch.device("meta")
_WORDS = "a photo of a", "cat", "dog"  # of the prompts; each word is a token


@dataclass(frozen=True)
class StepMemory:
    """Predicted memory in bytes.

    Attributes:
        weights: Weights and buffers of the model.
        momentum: Momentum buffers of SGD; AdamW has two such buffers.
        text_features: Text features at the cut of all classes, their layout, and prototypes.
        image_features: Features of the images that are kept in memory.
        gradients: Gradients of the weights that train. Part of `step`.
        saved_images: Saved for backward by the image tower. Part of `step`.
        saved_texts: Saved for backward by the text tower and the loss. Part of `step`.
        step: Largest sum in a step: what is saved, gradients and temporary tensors.
        evaluation: Largest sum without gradients: features and embeddings of images, 64 at a time, and of texts.
        total: All at once. Steps in a CUDA graph keep their memory during evaluation.
    """

    weights: int
    momentum: int
    text_features: int
    image_features: int
    gradients: int
    saved_images: int
    saved_texts: int
    step: int
    evaluation: int
    total: int


class MemoryModel:
    """A model on the meta device that predicts the memory of its training.

    Args:
        name: Model, as for `load_model`; "hf-hub:" downloads its configuration and tokenizer, but no weights.
        method: "skip", or "full": full fine-tuning in plain PyTorch.
        skip_layers: As for SkipCLIP.
        train_text: As for SkipCLIP.
        sampler: Its settings determine K, the number of kept classes.
        precision: "auto" is that of most GPUs, bf16.
        name_tokens: Tokens of a class name. Prompts are "a photo of a NAME."
        trust: As for `load_model`.

    Example:
        >>> model = MemoryModel("pictogram-tiny", precision="fp32")
        >>> few, many = (model.predict(16, classes, "fast") for classes in (100, 1000))
        >>> few.weights == many.weights, few.saved_images == many.saved_images, few.saved_texts < many.saved_texts
        (True, True, True)
    """

    def __init__(
        self,
        name: str,
        *,
        method: Literal["skip", "full"] = "skip",
        skip_layers: int | float = 0.5,
        train_text: bool = True,
        sampler: RankSampler | None = None,
        precision: Precision = "auto",
        name_tokens: int = 4,
        trust: bool = False,
    ):
        cpu = torch.device("cpu")
        model, _, tokenizer = load_model(name, None, cpu, architecture_only=True, trust=trust)
        self._model: Any = model
        self._method, self._train_text, self._sampler = method, train_text, sampler or RankSampler()
        self._precision = MixedPrecision("bf16" if precision == "auto" else precision, cpu)
        self._precision.prepare(model)
        tokens = _prompts(tokenizer, name_tokens)
        image, texts = build_towers(model, tokens)
        settings = Settings.checked(skip_layers if method == "skip" else 0, "fast", "sdpa", "upper", train_text, False)
        settings.apply(image, texts)
        if method == "skip":
            fuse_blocks([*image.blocks, *texts[0].blocks])
        model.to(_META)
        texts[0].apply(lambda tensor: tensor.to(_META))
        model.requires_grad_(False)
        trained = (image, texts[0]) if train_text or method == "full" else (image,)
        for parameter in itertools.chain.from_iterable(tower.upper_parameters() for tower in trained):
            parameter.requires_grad_(True)
        self._image, self._text = ImageEncoder(image, DEFAULT_CHUNK), PromptFeatures(texts[0], DEFAULT_CHUNK)
        self._tokens = tokens.to(_META)
        self._peaks: dict[tuple[int, int, Saved], tuple[int, int, int]] = {}  # results of `_step`
        self._evaluations: dict[int, int] = {}  # results of `_evaluation`
        with self._as_on_a_gpu(), torch.no_grad():
            self._feature = self._image.lower(self._images(1))[0]
            self._image.features = self._feature.shape, self._image.tower.dtype
            if texts[0].skip:
                self._text.compute()
            self._width = self._encode_texts(1).shape[1]

    @property
    def _cut(self) -> bool:
        """True if images have features at the cut."""
        return self._image.tower.skip > 0

    def kept(self, classes: int, batch_size: int) -> int:
        """K, the number of classes of a step."""
        whole = self._method == "full" or not self._train_text
        return classes if whole else self._sampler.expected_keep(classes, batch_size)

    def feature_bytes(self) -> int:
        """Bytes of the features of one image; of the image itself if nothing is skipped."""
        return self._feature.nbytes if self._cut else self._images(1).nbytes

    def predict(self, batch_size: int, classes: int, memory: Saved, *, images: int = 0) -> StepMemory:
        """Predict the memory of training with a batch size and a number of classes, and `images` in memory."""
        saved_images, saved, step = self._step(batch_size, self.kept(classes, batch_size), memory)
        parameters = list(self._model.parameters())
        gradients = sum(p.nbytes for p in parameters if p.requires_grad)
        weights = sum(tensor.nbytes for tensor in (*parameters, *self._model.buffers()))
        texts, features = self._of_classes(classes), images * self.feature_bytes()
        held, evaluation = weights + gradients + texts + features, self._evaluation(min(classes, DEFAULT_CHUNK))
        total = held + (step + evaluation if self._method == "skip" else max(step, evaluation))
        return StepMemory(
            weights=weights,
            momentum=gradients,  # one buffer in the dtype of each weight
            text_features=texts,
            image_features=features,
            gradients=gradients,
            saved_images=saved_images,
            saved_texts=saved - saved_images,
            step=step,
            evaluation=evaluation,
            total=total,
        )

    # ---- parts of a step -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _as_on_a_gpu(self) -> Iterator[None]:
        with meta_as_gpu(), self._precision.autocast():
            yield

    def _images(self, count: int) -> Tensor:
        return torch.empty(count, 3, *self._image.tower.image_size, device=_META)

    def _encode_images(self, count: int) -> Tensor:
        """Embeddings [count, D], from features at the cut if there are any."""
        if self._method == "full":
            return self._model.encode_image(self._images(count), normalize=False)
        features = self._feature.new_empty(count, *self._feature.shape) if self._cut else None
        return self._image.upper(self._image.lower(self._images(count)) if features is None else features)

    def _encode_texts(self, count: int) -> Tensor:
        """Embeddings [count, D] of the texts of a step."""
        if self._method == "full":
            return self._model.encode_text(self._tokens[:1].expand(count, -1), normalize=False)
        class_ids = torch.empty(count, dtype=torch.int64, device=_META)
        encode = self._text.encode_uncached if self._text.rows is None else self._text.encode
        return encode(class_ids)

    def _loss(self, batch_size: int, K: int) -> Tensor:
        """Loss of a step, without the selection of its classes."""
        image, labels = self._encode_images(batch_size), torch.empty(batch_size, dtype=torch.int64, device=_META)
        scale = self._model.logit_scale
        if self._method == "full":
            return F.cross_entropy(cosine_logits(image, unit_norm(self._encode_texts(K)), scale), labels)
        text = self._encode_texts(K) if self._train_text else image.new_empty(K, self._width)
        return functional.class_sampled_ce(image, text, labels, scale.exp())

    def _step(self, batch_size: int, K: int, memory: Saved) -> tuple[int, int, int]:
        """Bytes saved by the image tower and by all, and the largest sum of a step."""
        key = batch_size, K, memory
        if key not in self._peaks:
            self._image.tower.memory = self._text.tower.memory = memory
            with self._as_on_a_gpu():
                self._peaks[key] = (
                    testing.saved_bytes(lambda: self._encode_images(batch_size)),
                    testing.saved_bytes(lambda: self._loss(batch_size, K)),
                    testing.allocated_bytes(lambda: self._loss(batch_size, K).backward()),
                )
            self._model.zero_grad()
        return self._peaks[key]

    def _of_classes(self, classes: int) -> int:
        """Bytes that stay in memory for the classes of the task."""
        if self._method == "full":
            return classes * self._tokens[0].nbytes
        prompts, rows = self._text.tower.prompts, self._text.rows
        of_class = sum(tensor.nbytes for tensor in prompts.tensors().values()) // len(self._tokens)
        of_class += 4 * self._width  # prototypes, fp32
        if rows is not None and self._train_text:
            of_class += prompts.max_length * rows[0].nbytes
            return classes * of_class + prompts.prefix_length * rows[0].nbytes
        return classes * of_class

    def _evaluation(self, texts: int) -> int:
        """Largest sum of tensors without gradients: features of images and texts, and embeddings from these."""
        if texts in self._evaluations:
            return self._evaluations[texts]
        parts: list[Callable[[], Any]] = [lambda: self._encode_images(BATCH), lambda: self._encode_texts(texts)]
        if self._cut:
            parts.append(lambda: self._image.lower(self._images(BATCH)))
        if self._text.tower.skip:
            parts.append(lambda: self._text.lower(torch.empty(texts, dtype=torch.int64, device=_META)))
        with self._as_on_a_gpu(), torch.no_grad():
            self._evaluations[texts] = max(testing.allocated_bytes(part) for part in parts)
        return self._evaluations[texts]


def _prompts(tokenizer: Callable[[list[str]], Tensor], name_tokens: int) -> Tensor:
    """Tokens [2, L] of the prompts of two classes that have names of this length."""
    template, *words = _WORDS
    tokens, other = tokenizer([f"{template} {' '.join([word] * name_tokens)}." for word in words])
    longer = tokenizer([f"{template} {' '.join([words[0]] * (name_tokens + 1))}."])[0]
    if tokens.equal(longer):
        raise argument_error(
            "name_tokens",
            f"must leave room for the prompt in the {len(tokens)} tokens of the model; got {name_tokens}.",
        )
    start = int((tokens != other).int().argmax())
    second = tokens.clone()
    second[start] = other[start]
    return torch.stack([tokens, second])


def largest(total: Callable[[int], int], budget: int, start: int, most: int) -> int:
    """Return the largest n up to `most` with total(n) ≤ budget, to within 1 %, or 0; total is nearly linear.

    >>> largest(lambda n: 100 + 7 * n, 10_000, 4, 10**6), largest(lambda n: n, 5, 8, 100), largest(lambda n: 9, 5, 1, 9)
    (1414, 5, 0)
    """
    fits, over, n = 0, most + 1, min(start, most)
    before: tuple[int, int] | None = None
    while over - fits > max(1, fits // 100):
        found = total(n)
        fits, over = (n, over) if found <= budget else (fits, n)
        if before is None or before[1] == found:
            following = 2 * n if found <= budget else n // 2
        else:  # on the line through the last two
            following = n + (budget - found) * (n - before[0]) // (found - before[1])
        before = n, found
        n = min(max(following, fits + max(1, fits // 100)), over - 1)
    return fits
