"""Check SkipCLIP on every supported model and write the tables of docs/models.md.

    python -m bench.models
    python -m bench.models --no-save --model ViT-B-32 coca_base

Builds every config of `open_clip.list_models()`, and OpenAI's and Hugging Face's own models, with random weights and
few blocks and otherwise unchanged, skips the first block, and compares the loss of a batch over all classes and the
gradient of every weight above the cut with those of the model's own forward. Models without an image and a text tower
are refused by their class, and not built.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import timm
import torch
import transformers
from rich.progress import track

import skipkernels as sk
from skipkernels.testing import gradients
from skipkernels.towers.base import UnsupportedModel
from tests.models import uncompared
from tests.reference_step import reference_gradients

from .pages.cells import filled, table
from .rows import command
from .small_models import OTHERS, make

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
LOSS, GRADIENT = 1e-5, 2e-3  # largest errors, of fp32 as in the tests of the towers


class Row(NamedTuple):
    """The result for a model: the reason why it is refused, or its disabled reductions and largest errors."""

    name: str
    refused: str = ""
    disabled: str = ""
    loss_error: float = 0.0
    gradient_error: float = 0.0


def main() -> None:
    parser = command(__doc__)
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME", help="by default all")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # open_clip warns about random weights
    configs = open_clip.list_models()
    if unknown := set(args.model) - {*configs, *OTHERS}:
        parser.error(f"--model must be a config of open_clip or one of {', '.join(OTHERS)}; got {min(unknown)}.")
    gc.freeze()  # modules are not searched after each model
    rows = [row_of(name) for name in track(args.model or [*sorted(configs, key=str.casefold), *OTHERS])]
    gc.unfreeze()  # else nanobind reports leaks at the end of the process
    print(tables_of(rows))
    wrong = [row.name for row in rows if row.loss_error > LOSS or row.gradient_error > GRADIENT]
    if wrong:
        parser.exit(1, f"larger errors than {LOSS} of the loss or {GRADIENT} of a gradient: {', '.join(wrong)}\n")
    if not (args.no_save or args.model):
        PAGE.write_text(filled(PAGE.read_text(), "models", tables_of(rows)))


def row_of(name: str) -> Row:
    """Make a small model and compare it."""
    try:
        model, tokens = make(name)
        return compare(name, model.eval(), tokens)
    except UnsupportedModel as error:
        return Row(name, str(error).removeprefix("SkipCLIP: "))
    finally:
        gc.collect()


def compare(name: str, model: Any, tokens: torch.Tensor) -> Row:
    """Loss and gradients over all classes, against the model's own forward."""
    with uncompared():
        clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    with torch.no_grad():
        model.logit_scale.fill_(2.7)  # CLIP's initial value for every model
    images, labels = torch.randn(2, 3, *clip.image_size), torch.tensor([1, 3])
    out = clip(images, labels)
    ours = gradients(model, out.loss)
    loss, theirs = reference_gradients(clip, images, tokens, labels)
    # Gradients that are rounding only are not compared; a key bias, for example, changes nothing.
    largest = max(gradient.norm() for gradient in theirs.values())
    errors = [
        ((ours[weight] - theirs[weight]).norm() / theirs[weight].norm().clamp_min(1e-4 * largest)).item()
        for weight in ours.keys() & theirs.keys()
    ]
    return Row(
        name,
        disabled=", ".join(reduction for reduction, state in clip.reductions.items() if not state.enabled),
        loss_error=abs(out.loss.item() - loss.item()) / loss.item(),
        gradient_error=max(errors),
    )


def tables_of(rows: Sequence[Row]) -> str:
    """The tables of docs/models.md, and versions below them."""
    handled: dict[str, list[Row]] = {}
    for row in rows:
        if not row.refused:
            handled.setdefault(row.disabled or "none", []).append(row)
    lines = []
    for disabled, of in sorted(handled.items(), key=lambda item: -len(item[1])):
        errors = max(row.loss_error for row in of), max(row.gradient_error for row in of)
        lines.append([disabled, "; ".join(row.name for row in of), *(f"{error:.0e}" for error in errors)])
    refused = [[row.name, row.refused] for row in rows if row.refused]
    tables = [table(["disabled reductions", "models", "largest error of the loss", "of a gradient"], lines)]
    tables += [table(["refused", "reason"], refused)] if refused else []
    configs = [not row.refused for row in rows if row.name not in OTHERS]
    versions = f"open_clip {open_clip.__version__}, timm {timm.__version__}, transformers {transformers.__version__}"
    of = f"{sum(configs)} of {len(configs)} configs of open_clip are handled; {versions}; torch {torch.__version__}"
    return "\n\n".join([*tables, f"<sub>{of}; `python -m bench.models`</sub>"])


if __name__ == "__main__":
    main()
