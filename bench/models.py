"""Which of open_clip's models SkipCLIP handles, and how exactly: docs/models.md.

    python -m bench.models
    python -m bench.models --model ViT-B-32 coca_base

Builds every config of `open_clip.list_models()` with random weights and at most three blocks a tower, everything else
as it is, cuts it below the second block, and compares the loss of a batch over all classes and the gradient of every
weight above the cut with those of the model's own forward. Configs that name a timm image tower or a Hugging Face text
tower are refused by their type and are not built.
"""

from __future__ import annotations

import argparse
import gc
import logging
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.factory import get_model_config
from rich.progress import track

import skipkernels as sk
from skipkernels.towers import UnsupportedModel

from . import measure

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BLOCKS = 3
NAME_LENGTHS = (1, 2, 3, 1)  # tokens of each class's name


class Row(NamedTuple):
    """What became of a config."""

    name: str
    refused: str = ""
    off: str = ""
    loss_error: float = 0.0
    gradient_error: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=open_clip.list_models(), help="configs; all by default")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # open_clip warns of random weights
    rows = [row_of(name) for name in track(args.model, description="models")]
    page = markdown(rows)
    print(page)
    if not args.no_save:
        PAGE.write_text(page)


def row_of(name: str) -> Row:
    """Build a config, reduced, and compare."""
    config = get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision:
        return Row(name, f"the image tower is timm's {vision['timm_model_name']}")
    if "hf_model_name" in text:
        return Row(name, f"the text tower is Hugging Face's {text['hf_model_name']}")
    for part in (vision, text):
        if isinstance(part.get("layers", 12), int):
            part["layers"] = min(part.get("layers", 12), BLOCKS)
    try:
        return compare(name, config)
    except UnsupportedModel as error:
        return Row(name, str(error).removeprefix("SkipCLIP: "))
    finally:
        gc.collect()


def compare(name: str, config: dict[str, Any]) -> Row:
    """Loss and gradients over all classes, against the model's own forward."""
    torch.manual_seed(0)
    custom = config.pop("custom_text", False)
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model = kind(**config)
    tokens = prompts(config["text_cfg"])
    clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    images, labels = torch.randn(2, 3, *clip._image.image_size), torch.tensor([1, 3])
    out = clip(images, labels)
    out.loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    image, text = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
    loss = torch.nn.functional.cross_entropy(model.logit_scale.exp() * image @ text.T, labels)
    loss.backward()
    # A gradient is compared where it is more than rounding: a key's bias, for one, changes nothing.
    largest = max(p.grad.norm() for p in model.parameters() if p.grad is not None)
    errors = [
        ((gradient - theirs).norm() / theirs.norm().clamp_min(1e-4 * largest)).item()
        for name, gradient in ours.items()
        if (theirs := model.get_parameter(name).grad) is not None
    ]
    off = [reduction for reduction, reason in clip.reductions.items() if reason is not None]
    return Row(name, "", ", ".join(off), abs(out.loss.item() - loss.item()) / loss.item(), max(errors))


def prompts(text: dict[str, Any]) -> torch.Tensor:
    """Prompts [C, L] of one template, as a tokenizer would give them; some need packages and downloads."""
    vocabulary = text.get("vocab_size", 49408)
    end = text.get("eos_id", 2) if text.get("pool_type") == "eos" else vocabulary - 1
    tokens = torch.zeros(len(NAME_LENGTHS), text.get("context_length", 77), dtype=torch.int64)
    for i, length in enumerate(NAME_LENGTHS):
        name = range(100 * (i + 1), 100 * (i + 1) + length)
        prompt = [vocabulary - 2, 320, 1125, 539, *name, end]
        tokens[i, : len(prompt)] = torch.tensor(prompt)
    return tokens


def markdown(rows: list[Row]) -> str:
    """The page."""
    handled = [row for row in rows if not row.refused]
    machine = measure.machine(torch.device("cpu"))
    lines = [
        "# Models",
        "",
        f"Written by `python -m bench.models` (open_clip {open_clip.__version__}, PyTorch {machine['torch']}): "
        f"{len(handled)} of {len(rows)} configs are handled, the others are refused when SkipCLIP is made, with the "
        "reason. Random weights, at most three blocks a tower, everything else as the config has it; fp32, the cut "
        "below the second block, all classes kept. Errors are relative, against the model's own forward; of gradients "
        "the largest of any weight.",
        "",
        "| handled | reductions that are off | error of the loss | of a gradient |",
        "|---|---|---|---|",
        *(f"| {row.name} | {row.off or 'none'} | {row.loss_error:.0e} | {row.gradient_error:.0e} |" for row in handled),
        "",
        "| refused | because |",
        "|---|---|",
        *(f"| {row.name} | {row.refused} |" for row in rows if row.refused),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
