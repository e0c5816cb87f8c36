"""Check SkipCLIP on every supported model and write docs/models.md.

    python -m bench.models
    python -m bench.models --model ViT-B-32 coca_base

Builds every config of `open_clip.list_models()`, and OpenAI's and Hugging Face's own models, with random weights and
few blocks and otherwise unchanged, skips the first block, and compares the loss of a batch over all classes and the
gradient of every weight above the cut with those of the model's own forward.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import open_clip
import timm
import torch
import torch.nn.functional as F
import transformers
from open_clip.factory import get_model_config
from rich.progress import track

import skipkernels as sk
from skipkernels.towers import UnsupportedModel
from skipkernels.towers.block import unfused
from tests.models import openai_models

from . import measure

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BLOCKS = 3
NAME_LENGTHS = (1, 2, 3, 1)  # tokens of each class's name
VOCABULARY = 3000  # of text encoders; their vocabulary of 250,000 would dominate the time

# Published settings of these text encoders, with fewer layers and a smaller vocabulary.
_ROBERTA = {"num_hidden_layers": BLOCKS, "vocab_size": VOCABULARY, "max_position_embeddings": 514, "pad_token_id": 1}
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
_MT5 = {"num_layers": BLOCKS, "vocab_size": VOCABULARY, "d_kv": 64}
_NLLB = {"d_model": 1024, "encoder_layers": BLOCKS, "decoder_layers": 1, "vocab_size": VOCABULARY}
_NLLB |= {"encoder_layerdrop": 0}
ENCODERS: dict[str, Callable[[], Any]] = {
    "roberta-base": lambda: transformers.RobertaConfig(**_ROBERTA, type_vocab_size=1),
    "xlm-roberta-base": lambda: transformers.XLMRobertaConfig(**_ROBERTA, type_vocab_size=1),
    "xlm-roberta-large": lambda: transformers.XLMRobertaConfig(**_ROBERTA, **_LARGE, type_vocab_size=1),
    "google/mt5-base": lambda: transformers.MT5Config(**_MT5, d_model=768, d_ff=2048, num_heads=12),
    "google/mt5-xl": lambda: transformers.MT5Config(**_MT5, d_model=2048, d_ff=5120, num_heads=32),
    "facebook/nllb-200-distilled-600M": lambda: transformers.M2M100Config(**_NLLB, encoder_ffn_dim=4096),
    "facebook/nllb-200-distilled-1.3B": lambda: transformers.M2M100Config(**_NLLB, encoder_ffn_dim=8192),
}


class Row(NamedTuple):
    """The result for a model."""

    name: str
    refused: str = ""
    off: str = ""
    loss_error: float = 0.0
    gradient_error: float = 0.0


def main() -> None:
    parser = measure.command(__doc__)
    names = [*open_clip.list_models(), *OTHERS]
    parser.add_argument("--model", nargs="+", default=names, choices=names, metavar="NAME", help="by default all")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # open_clip warns about random weights
    rows = [row_of(name) for name in track(args.model, description="models")]
    page = markdown(rows)
    print(page)
    if not args.no_save:
        PAGE.write_text(page)


def row_of(name: str) -> Row:
    """Build a reduced model and compare it."""
    torch.manual_seed(0)
    try:
        model, tokens = OTHERS[name]() if name in OTHERS else of_open_clip(name)
        return compare(name, model.eval(), tokens)
    except UnsupportedModel as error:
        return Row(name, str(error).removeprefix("SkipCLIP: "))
    finally:
        gc.collect()


def of_open_clip(name: str) -> tuple[Any, torch.Tensor]:
    """A model with few blocks from an open_clip config, and its prompts."""
    config = get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    for part in (vision, text):
        layers = part.get("layers", 12)
        part["layers"] = [1] * len(layers) if isinstance(layers, list) else min(layers, BLOCKS)
    custom = config.pop("custom_text", False) or "timm_model_name" in vision or "hf_model_name" in text
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    tokens = prompts(text)
    with few_blocks_of_timm(), tempfile.TemporaryDirectory() as folder:
        if "hf_model_name" in text:
            encoder = ENCODERS[text["hf_model_name"]]()
            encoder.save_pretrained(folder)  # a folder in place of a name: nothing is downloaded
            text |= {"hf_model_name": folder, "hf_model_pretrained": False}
            tokens = encoder_prompts(encoder.pad_token_id)
        return kind(**config), tokens


@contextlib.contextmanager
def few_blocks_of_timm() -> Iterator[None]:
    """Make timm create models with few blocks; open_clip passes only their names."""
    create = timm.create_model

    def create_small(name: str, **rest: Any) -> Any:
        with torch.device("meta"):
            whole = create(name)
        stages = getattr(whole, "stages", getattr(whole, "layers", None))
        if stages is None:
            return create(name, **rest, depth=BLOCKS)
        each = (1,) * (len(stages) - 1) + (2,)
        return create(name, **rest, **{"layers" if type(whole).__name__ == "FastVit" else "depths": each})

    with mock.patch.object(timm, "create_model", create_small):
        yield


def of_openai(vision_layers: Any, width: int, patch: int | None, heads: int) -> tuple[Any, torch.Tensor]:
    """A model of OpenAI's class."""
    model = openai_models().CLIP(512, 224, vision_layers, width, patch, 77, 49408, 512, heads, BLOCKS)
    return model, prompts({})


def of_hugging_face(config: Any, **changes: Any) -> tuple[Any, torch.Tensor]:
    """A model of Hugging Face's class with its default config, that of the base model."""
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = BLOCKS
    text = config.text_config
    tokens = prompts({"vocab_size": text.vocab_size, "context_length": text.max_position_embeddings})
    return transformers.AutoModel.from_config(config, **changes), tokens


OTHERS: dict[str, Callable[[], tuple[Any, torch.Tensor]]] = {
    "OpenAI clip, ViT-B/32": lambda: of_openai(BLOCKS, 768, 32, 8),
    "OpenAI clip, RN50": lambda: of_openai((1, 1, 1, 1), 64, None, 8),
    "transformers CLIPModel, ViT-B/32": lambda: of_hugging_face(transformers.CLIPConfig()),
    "transformers CLIPModel, eager attention": lambda: of_hugging_face(
        transformers.CLIPConfig(), attn_implementation="eager"
    ),
    "transformers SiglipModel, ViT-B/16": lambda: of_hugging_face(transformers.SiglipConfig()),
}


def compare(name: str, model: Any, tokens: torch.Tensor) -> Row:
    """Loss and gradients over all classes, against the model's own forward."""
    with torch.no_grad():
        model.logit_scale.fill_(2.7)  # CLIP's initial value for every model
    clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    images, labels = torch.randn(2, 3, *clip._image.image_size), torch.tensor([1, 3])
    out = clip(images, labels)
    out.loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with unfused(model.modules()):
        outputs = clip._image.reference_forward(images), clip._text.reference_forward(tokens)
        image, text = (F.normalize(x, dim=-1) for x in outputs)
        loss = F.cross_entropy(model.logit_scale.exp() * image @ text.T, labels)
        loss.backward()
    # Gradients that are rounding only are not compared; a key bias, for example, changes nothing.
    largest = max(p.grad.norm() for p in model.parameters() if p.grad is not None)
    errors = [
        ((gradient - theirs).norm() / theirs.norm().clamp_min(1e-4 * largest)).item()
        for name, gradient in ours.items()
        if (theirs := model.get_parameter(name).grad) is not None
    ]
    off = [name for name, reduction in clip.reductions.items() if not reduction.enabled]
    return Row(name, "", ", ".join(off), abs(out.loss.item() - loss.item()) / loss.item(), max(errors))


def prompts(text: dict[str, Any]) -> torch.Tensor:
    """Prompts [C, L] of one template, made without a tokenizer; some tokenizers need packages and downloads."""
    vocabulary = text.get("vocab_size", 49408)
    end = text.get("eos_id", 2) if text.get("pool_type") == "eos" else vocabulary - 1
    tokens = torch.zeros(len(NAME_LENGTHS), text.get("context_length", 77), dtype=torch.int64)
    for i, length in enumerate(NAME_LENGTHS):
        name = range(100 * (i + 1), 100 * (i + 1) + length)
        prompt = [vocabulary - 2, 320, 1125, 539, *name, end]
        tokens[i, : len(prompt)] = torch.tensor(prompt)
    return tokens


def encoder_prompts(padding: int) -> torch.Tensor:
    """Prompts [C, L] for a text encoder of transformers."""
    tokens = prompts({"vocab_size": VOCABULARY})
    return torch.where(tokens == 0, padding, tokens)


def markdown(rows: list[Row]) -> str:
    """The text of docs/models.md."""
    handled, of_configs = [row for row in rows if not row.refused], [row for row in rows if row.name not in OTHERS]
    machine = measure.machine(torch.device("cpu"))
    lines = [
        "# Models",
        "",
        f"Written by `python -m bench.models` (open_clip {open_clip.__version__}, timm {timm.__version__}, "
        f"transformers {transformers.__version__}, PyTorch {machine['torch']}). SkipCLIP handles "
        f"{sum(not row.refused for row in of_configs)} of the {len(of_configs)} configs of open_clip and refuses the "
        "others at construction, with the reason. Models have random weights, three transformer blocks per tower or "
        f"one or two per stage of other towers, and {VOCABULARY:,} tokens in text encoders of transformers; all else "
        "is as configured. fp32, evaluation mode, one block skipped, all classes kept. Errors are relative to the "
        "model's own forward; the gradient error is the largest of any weight, relative to the norm of its gradient "
        "or to a ten-thousandth of the largest norm. In fp64, on small models of every family, errors are below 1e-9 "
        "(`tests/towers`).",
        "",
        "| model | disabled reductions | error of the loss | error of a gradient |",
        "|---|---|---|---|",
        *(f"| {row.name} | {row.off or 'none'} | {row.loss_error:.0e} | {row.gradient_error:.0e} |" for row in handled),
        "",
    ]
    refused = [f"| {row.name} | {row.refused} |" for row in rows if row.refused]
    if refused:
        lines += ["| refused | reason |", "|---|---|", *refused, ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
