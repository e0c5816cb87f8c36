"""A tuned model as a plain CLIP, which other libraries can load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ...lora import merge_lora
from ..data import InputError
from ..methods.base import TunedModel
from ..methods.coop import CoOp
from ..methods.lora import LoRA
from ..methods.zero_shot import ZeroShot
from ..train.description import Description, preprocessing
from .loading import TEST, load_run


class PlainModel(NamedTuple):
    """A tuned model without its method."""

    described: Description
    model: Any  # CLIP with the tuned weights, in evaluation mode, in fp32 on the CPU
    tokenizer: Any
    prompts: tuple[list[str], ...]  # Prompts by template and class
    text: Tensor  # Unit-norm embeddings of the classes, [C, D]
    learned_text: bool  # True if `text` does not come from the model's own text tower


def plain_model(folder: Path, *, trust: bool = False) -> PlainModel:
    """Load a run as a plain model; see `Classifier.load` for `trust`. LoRA is merged into the weights."""
    run = load_run(folder, device="cpu", precision="fp32", trust=trust)
    method = run.method
    if not isinstance(method, (TunedModel, ZeroShot, CoOp, LoRA)):
        raise InputError(
            f"export: run must be of a method that gives a CLIP; {method.name} has a module of its own after the "
            "image tower. Use sk.Classifier.",
            "run",
        )
    text = method.class_embeddings(TEST).float()
    if isinstance(method, LoRA):
        merge_lora(method.clip)
    model = run.model.float().eval().requires_grad_(False)
    described = replace(run.described, preprocessing=preprocessing(model))  # of the model, not of the file
    return PlainModel(described, model, run.tokenizer, run.prompts, text, isinstance(method, CoOp))
