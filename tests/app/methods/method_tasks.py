"""Small task and model: two tests, two templates, random images in a cluster per class."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels.app.data import Task, TestSet
from skipkernels.app.methods import METHODS, Method
from tests.models import tiny_clip

CONTEXT = 12
FAMILIES = (open_clip.CLIP, open_clip.CustomTextCLIP)
BASE = ["ash", "birch tree", "cedar", "dwarf fir", "elm"]
NEW = ["fig", "grey alder tree", "hazel"]
TEMPLATES = ("a photo of {}.", "{} in winter.")
START, END = 57, 59
STEPS = [name for name, method in METHODS.items() if method.recipe("ViT-B-16").epochs != 0]


def tokenizer(texts: list[str]) -> Tensor:
    """Tokens [n, 12] of `tiny_clip`: one per word and full stop, truncated like in open_clip."""
    rows = torch.zeros(len(texts), CONTEXT, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        words = [6 + zlib.crc32(word.encode()) % 50 for word in text.replace(".", " .").split()]
        ids = [START, *words][: CONTEXT - 1] + [END]
        row[: len(ids)] = torch.tensor(ids)
    return rows


class Examples(list):
    """Items (image, label)."""

    @property
    def labels(self) -> list[int]:
        return [label for _, label in self]


def examples(classes: int, each: int, *, seed: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = torch.randn(each, classes, 3, 16, 16, generator=generator, dtype=torch.float64)
    return Examples([(centers[label] + 0.5 * noise[n, label], label) for label in range(classes) for n in range(each)])


def stacked(data: Any) -> tuple[Tensor, Tensor]:
    """Images [n, 3, H, W] and labels [n]."""
    return torch.stack([image for image, _ in data]), torch.tensor(data.labels)


def tiny_task(templates: int = 2, *, new: list[str] = NEW, shots: int = 4, base: list[str] = BASE) -> Task:
    def test(name: str, classes: list[str]) -> TestSet:
        return TestSet(name, classes, TEMPLATES[:templates], examples(len(classes), 2, seed=2))

    return Task("trees", "base-to-new", examples(len(base), shots, seed=3), (test("base", base), test("new", new)))


def tiny_model(family: type = open_clip.CLIP, *, dtype: torch.dtype = torch.float64, seed: int = 0, **text: Any) -> Any:
    return tiny_clip(dtype, seed=seed, text={"context_length": CONTEXT, **text}, family=family).eval()


def made(name: str, model: Any = None, task: Task | None = None, **settings: Any) -> Method:
    return METHODS[name](tiny_model() if model is None else model, tokenizer, task or tiny_task(), **settings)


def trained(method: Method, *, steps: int = 3, rate: float = 0.05, images: int | None = None) -> list[float]:
    """Train some steps on the first training images, or fit; return the losses."""
    images, labels = (part[:images] for part in stacked(method.task.train))
    inputs = method.encode_frozen(images)
    if method.name not in STEPS:
        method.fit(inputs, labels)
        return []
    optimizer = torch.optim.SGD(method.parameter_groups(text_lr=rate, image_lr=rate), momentum=0.9)
    losses = []
    method.train(True)
    for _ in range(steps):
        loss, _ = method.step(inputs, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    method.train(False)
    return losses


def answers(method: Method) -> dict[str, Tensor | None]:
    """Logits of each test."""
    return {
        test.name: method.logits(test.name, method.encode_frozen(stacked(test.images)[0])) for test in method.task.tests
    }


def embeddings(model: Any, images: Tensor, prompts: Sequence[list[str]]) -> tuple[Tensor, Tensor]:
    """Embeddings [n, D] of images, and [C, D] of classes, summed over templates."""
    return model.encode_image(images), sum(model.encode_text(tokenizer(texts), normalize=True) for texts in prompts)


def logits_of(model: Any, image: Tensor, text: Tensor) -> Tensor:
    return model.logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T


def zero_shot(model: Any, images: Tensor, prompts: Sequence[list[str]]) -> Tensor:
    return logits_of(model, *embeddings(model, images, prompts)).detach()
