"""A problem for all trainers, and a plain module with SkipCLIP's signature.

A module of `runners/` has `train(module, problem, folder)`, which trains for `problem.steps` steps in one process, in
fp32, with `problem.optimizer` and without evaluation. It must call the module, so that the hook of `losses_of` runs.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import skipkernels as sk
from bench.inputs import class_names
from bench.measure import CPU
from bench.published import choose_classes, freeze
from skipkernels.app.train.model import RANDOM, load_model
from skipkernels.selection import RankSampler

Train = Callable[[nn.Module, "Problem", Path], None]

# Over 20 steps in fp32: 16 steps of 2⁻²³ in each gradient, which grow through the updates.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 1e-3


class NaiveCLIP(nn.Module):
    """The caller's open_clip CLIP, called plainly, with the signature of SkipCLIP.

    Every layer runs in every step, on all tokens. What is below the cut is frozen. Selected classes as published, or
    all classes with `keep_ratio=1`, in training; all classes in evaluation.
    """

    tokens: Tensor
    prototypes: Tensor | None  # [C, D], unit-norm text embeddings from before tuning

    def __init__(self, model: Any, tokens: Tensor, skip_layers: int, keep_ratio: float = 0.5):
        super().__init__()
        self.model, self.sampler = model, RankSampler(keep_ratio)
        freeze(model, skip_layers, skip_layers)
        self.register_buffer("tokens", tokens, persistent=False)
        with torch.no_grad():
            chosen = None if keep_ratio == 1 else torch.cat([self._texts(chunk) for chunk in tokens.split(64)])
        self.register_buffer("prototypes", chosen, persistent=False)

    def _texts(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens, normalize=True)

    def forward(
        self,
        x: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        images: Tensor | None = None,
    ) -> sk.SkipOutput:
        x = next(each for each in (x, pixel_values, images) if each is not None)
        assert labels is not None
        image = self.model.encode_image(x, normalize=True)
        if self.prototypes is None or not self.training:
            class_ids, targets = torch.arange(len(self.tokens), device=x.device), labels
        else:
            class_ids = choose_classes(image, self.prototypes, labels, self.sampler)
            targets = torch.searchsorted(class_ids, labels)
        logits = self.model.logit_scale.exp() * image @ self._texts(self.tokens[class_ids]).T
        return sk.SkipOutput(F.cross_entropy(logits, targets), logits, class_ids, targets)

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:
        groups = {"text": text_lr, "image": image_lr}
        params: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                params["image" if name.startswith("visual.") else "text"].append(parameter)
        return [{"name": name, "params": params[name], "lr": lr} for name, lr in groups.items()]


class Problem(NamedTuple):
    """A model, and the batches of a run, in their order unless the trainer shuffles; one class in a batch."""

    name: str
    model: Any  # an open_clip CLIP, of which each run trains a copy
    tokens: Tensor  # [C, L]
    images: Tensor  # [steps · batch_size, 3, height, width]
    labels: Tensor  # [steps · batch_size]
    batch_size: int
    skip_layers: int
    keep_ratio: float
    learning_rate: float  # of the text tower; the image tower has half of it

    @property
    def steps(self) -> int:
        return len(self.images) // self.batch_size

    @property
    def dataset(self) -> TensorDataset:
        """(image, label) pairs."""
        return TensorDataset(self.images, self.labels)

    def implementations(self) -> dict[str, Callable[[], nn.Module]]:
        """Functions that make a module with a copy of the model."""
        tokens, skip, keep = self.tokens, self.skip_layers, self.keep_ratio
        return {
            "naive": lambda: NaiveCLIP(copy.deepcopy(self.model), tokens, skip, keep),
            "skipkernels": lambda: sk.SkipCLIP(
                copy.deepcopy(self.model), tokens, skip_layers=skip, keep_ratio=keep, memory="fast"
            ),
        }

    def rates(self) -> dict[str, float]:
        """Arguments of `parameter_groups`."""
        return {"text_lr": self.learning_rate, "image_lr": self.learning_rate / 2}

    def settings(self) -> dict[str, float]:
        """Arguments of SGD, the optimizer of every trainer."""
        return {"momentum": 0.9, "weight_decay": 5e-4}

    def optimizer(self, module: Any) -> torch.optim.Optimizer:
        """SGD with two learning rates."""
        return torch.optim.SGD(module.parameter_groups(**self.rates()), **self.settings())


def small_problem(steps: int = 20, classes: int = 12, batch_size: int = 2) -> Problem:
    """vit-tiny with random weights and images; all classes are kept."""
    model, _, tokenizer = load_model("vit-tiny", RANDOM, CPU)
    tokens = tokenizer([f"a photo of a {name}." for name in class_names(classes)])
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(steps * batch_size, 3, *model.visual.image_size, generator=generator)
    labels = torch.randint(classes, (steps,), generator=generator).repeat_interleave(batch_size)
    return Problem("vit-tiny", model, tokens, images, labels, batch_size, 2, 1.0, 1e-2)


def trained(module: nn.Module) -> Tensor:
    """All parameters that train, by name, in one vector."""
    named = sorted((name, p) for name, p in module.named_parameters() if p.requires_grad)
    return torch.cat([parameter.detach().flatten() for _, parameter in named])


def losses_of(train: Train, module: nn.Module, problem: Problem) -> list[float]:
    """Train a module with a trainer, which runs unmodified; return the losses of its steps."""
    losses: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, out: losses.append(out.loss.detach()))
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        train(module, problem, Path(folder))
    handle.remove()
    assert len(losses) == problem.steps
    return [loss.item() for loss in losses]
