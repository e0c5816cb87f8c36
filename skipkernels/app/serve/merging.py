"""A tuned model as a plain CLIP, which other libraries can load, and the head that classifies its image embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...lora import merge_lora
from ..data import InputError
from ..methods.base import TunedModel
from ..methods.clip_adapter import CLIPAdapter, adapted
from ..methods.coop import CoOp
from ..methods.linear_probe import LinearProbe
from ..methods.lora import LoRA
from ..methods.zero_shot import ZeroShot
from ..train.description import Description, preprocessing
from .loading import TEST, load_run


class CosineHead(nn.Module):
    """Image embeddings [B, D] of any norm → logits exp(logit_scale) · ⟨x̂_b, t̂_c⟩ [B, C], and x̂ [B, D].

    With a CLIP-Adapter, x̂ is the adapted embedding.
    """

    def __init__(self, class_embeddings: Tensor, logit_scale: Tensor, adapter: CLIPAdapter | None = None):
        super().__init__()
        self.register_buffer("class_embeddings", class_embeddings)
        self.register_buffer("scale", logit_scale.detach().float().exp(), persistent=False)
        self.adapted = adapter is not None
        if adapter is not None:
            self.register_buffer("down", adapter.down.weight.detach())
            self.register_buffer("up", adapter.up.weight.detach())
            self.register_buffer("ratio", torch.tensor(adapter.ratio))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits and the embeddings."""
        if self.adapted:
            image = adapted(image, self.down, self.up, self.ratio)  # type: ignore[arg-type]
        embedding = F.normalize(image, dim=-1)
        return self.scale * embedding @ self.class_embeddings.T, embedding  # type: ignore[operator]


class LinearHead(nn.Module):
    """Image embeddings x [B, D] of any norm → logits W x + b [B, C], and unit-norm embeddings [B, D]."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits and the embeddings."""
        return F.linear(image, self.weight, self.bias), F.normalize(image, dim=-1)  # type: ignore[arg-type]


class PlainModel(NamedTuple):
    """A tuned model without its method."""

    described: Description
    model: Any  # CLIP with the tuned weights, in evaluation mode, in fp32 on the CPU
    tokenizer: Any
    prompts: tuple[list[str], ...]  # Prompts by template and class
    head: nn.Module  # Classifies the image embeddings of `model`: a `CosineHead` or a `LinearHead`
    learned_head: bool  # True if the head has weights that `model` does not have


def plain_model(folder: Path, *, trust: bool = False) -> PlainModel:
    """Load a run as a plain model; see `Classifier.load` for `trust`. LoRA is merged into the weights."""
    run = load_run(folder, device="cpu", precision="fp32", trust=trust)
    method = run.method
    if isinstance(method, LinearProbe):
        head: nn.Module = LinearHead(method.weight, method.bias)
    elif isinstance(method, (TunedModel, ZeroShot, CoOp, CLIPAdapter, LoRA)):
        adapter = method if isinstance(method, CLIPAdapter) else None
        head = CosineHead(method.class_embeddings(TEST).float(), method.model.logit_scale, adapter)
    else:
        raise InputError(
            f"export: run must be of a method of skipkernels; {method.name} is registered by another module. Use "
            "sk.Classifier.",
            "run",
        )
    if isinstance(method, LoRA):
        merge_lora(method.clip)
    model = run.model.float().eval().requires_grad_(False)
    described = replace(run.described, preprocessing=preprocessing(model))  # of the model, not of the file
    learned = isinstance(method, (LinearProbe, CoOp, CLIPAdapter))
    return PlainModel(described, model, run.tokenizer, run.prompts, head, learned)
