"""A tuned model as a plain CLIP, which other libraries can load, with the head that classifies its embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..heads import Head
from ..train.description import Description, preprocessing
from .loading import load_run


class PlainModel(NamedTuple):
    """A tuned model without its method."""

    described: Description
    model: Any  # CLIP with the tuned weights, in evaluation mode, in fp32 on the CPU
    tokenizer: Any
    prompts: tuple[list[str], ...]  # Prompts by template and class
    head: nn.Module  # Classifies the image embeddings of `model`; see `Method.head`
    head_code: str  # Does the same; empty if `model` has all of the weights of the head
    fitted: Head | None  # Of the run, if it has one


def plain_model(folder: Path, *, trust: bool = False) -> PlainModel:
    """Load a run as a plain model; see `Classifier.load` for `trust`. LoRA is merged into the weights."""
    run = load_run(folder, device="cpu", precision="fp32", trust=trust)
    head, code = run.method.export_head()
    run.method.merge()
    model = run.model.float().eval().requires_grad_(False)
    described = replace(run.described, preprocessing=preprocessing(model))  # of the model, not of the file
    return PlainModel(described, model, run.tokenizer, run.prompts, head, code, run.method.fitted)
