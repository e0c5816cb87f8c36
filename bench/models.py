"""Check SkipCLIP on every supported model and write docs/models.md.

    PYTHONPATH=open_clip/src python -m bench.models --json development.json
    python -m bench.models --merge development.json
    python -m bench.models --no-save --model ViT-B-32 coca_base

Builds every config of `open_clip.list_models()`, and OpenAI's and Hugging Face's own models, with random weights and
few blocks and otherwise unchanged, skips the first block, and compares the loss of a batch over all classes and the
gradient of every weight above the cut with those of the model's own forward. Models without an image and a text tower
are refused by their class, and not built. The first command writes the rows of open_clip's development version, from a
checkout of the commit that CI installs (`.ci/open_clip_development.txt`), for the page that the second one writes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
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
from torch import nn

import skipkernels as sk
from skipkernels.towers.base import UnsupportedModel
from skipkernels.towers.block import unfused
from tests.models import openai_models, uncompared

from .rows import command, machine_columns

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
DEVELOPMENT = ROOT / ".ci" / "open_clip_development.txt"
BLOCKS = 3
LOSS, GRADIENT = 1e-5, 2e-3  # largest errors, of fp32 as in the tests of the towers
NAME_LENGTHS = (1, 2, 3, 1)  # tokens of each class's name
# Key of a config → class of its models, which have no image and text tower.
WITHOUT_PAIR = {
    "audio_cfg": "clap_model.CLAP",
    "genlip_cfg": "naflex_genlip_model.NaFlexGenLip",
    "genlap_cfg": "naflex_genlap_model.NaFlexGenLap",
}
VOCABULARY = 3000  # one of 50,000 to 256,000 tokens would dominate the time

# Published settings of these text encoders, with fewer layers and a smaller vocabulary.
_ROBERTA = {"num_hidden_layers": BLOCKS, "vocab_size": VOCABULARY, "max_position_embeddings": 514, "pad_token_id": 1}
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
_MT5 = {"num_layers": BLOCKS, "vocab_size": VOCABULARY, "d_kv": 64}
_NLLB = {"d_model": 1024, "encoder_layers": BLOCKS, "decoder_layers": 1, "vocab_size": VOCABULARY}
_NLLB |= {"encoder_layerdrop": 0}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
ENCODERS: dict[str, Callable[[], Any]] = {
    "roberta-base": lambda: transformers.RobertaConfig(**_ROBERTA, type_vocab_size=1),
    "xlm-roberta-base": lambda: transformers.XLMRobertaConfig(**_ROBERTA, type_vocab_size=1),
    "xlm-roberta-large": lambda: transformers.XLMRobertaConfig(**_ROBERTA, **_LARGE, type_vocab_size=1),
    "google/mt5-base": lambda: transformers.MT5Config(**_MT5, d_model=768, d_ff=2048, num_heads=12),
    "google/mt5-xl": lambda: transformers.MT5Config(**_MT5, d_model=2048, d_ff=5120, num_heads=32),
    "facebook/nllb-200-distilled-600M": lambda: transformers.M2M100Config(**_NLLB, encoder_ffn_dim=4096),
    "facebook/nllb-200-distilled-1.3B": lambda: transformers.M2M100Config(**_NLLB, encoder_ffn_dim=8192),
    "Alibaba-NLP/gte-modernbert-base": lambda: transformers.ModernBertConfig(
        num_hidden_layers=BLOCKS, vocab_size=VOCABULARY, pad_token_id=1, **dict.fromkeys(_TOKEN_IDS, 0)
    ),
}


class Row(NamedTuple):
    """The result for a model."""

    name: str
    refused: str = ""
    off: str = ""
    loss_error: float = 0.0
    gradient_error: float = 0.0
    versions: Sequence[str] = ()  # of open_clip


def main() -> None:
    parser = command(__doc__)
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME", help="by default all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append rows, of configs that it does not have yet")
    parser.add_argument(
        "--merge",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="rows of --json, as of another version",
    )
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # open_clip warns about random weights
    configs = open_clip.list_models()
    if unknown := set(args.model) - {*configs, *OTHERS}:
        parser.error(f"--model must be a config of open_clip or one of {', '.join(OTHERS)}; got {min(unknown)}.")
    known = {row.name for row in read_rows(args.json)} if args.json else set()
    names = [name for name in args.model or [*configs, *([] if args.json else OTHERS)] if name not in known]
    rows = []
    gc.freeze()  # modules are not searched after each model
    for name in track(names, description=f"models of open_clip {open_clip.__version__}"):
        rows.append(row_of(name))
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    rows += [row for file in args.merge for row in read_rows(file)]
    page = markdown(merged(rows), list(dict.fromkeys(version for row in rows for version in row.versions)))
    print(page)
    wrong = [row.name for row in rows if row.loss_error > LOSS or row.gradient_error > GRADIENT]
    if wrong:
        parser.exit(1, f"larger errors than {LOSS} of the loss or {GRADIENT} of a gradient: {', '.join(wrong)}\n")
    if not (args.no_save or args.json):
        PAGE.write_text(page)


def row_of(name: str) -> Row:
    """Build a reduced model and compare it."""
    torch.manual_seed(0)
    try:
        model, tokens = OTHERS[name]() if name in OTHERS else of_open_clip(name)
        row = compare(name, model.eval(), tokens)
    except UnsupportedModel as error:
        row = Row(name, str(error).removeprefix("SkipCLIP: "))
    finally:
        gc.collect()
    return row._replace(versions=() if name in OTHERS else (open_clip.__version__,))


def read_rows(path: Path) -> list[Row]:
    """Rows that `--json` wrote; none if there is no file."""
    return [Row(*json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def merged(rows: list[Row]) -> list[Row]:
    """Rows in the order of their names; those of two versions as one if they differ in the errors alone."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        same = found.get(row[:3], row)
        errors = max(same.loss_error, row.loss_error), max(same.gradient_error, row.gradient_error)
        found[row[:3]] = Row(*row[:3], *errors, list(dict.fromkeys([*same.versions, *row.versions])))
    names = sorted({row.name for row in rows} - OTHERS.keys(), key=str.casefold)
    order = {name: number for number, name in enumerate([*names, *OTHERS])}
    return sorted(found.values(), key=lambda row: order[row.name])


def of_open_clip(name: str) -> tuple[Any, torch.Tensor]:
    """A model with few blocks from an open_clip config, and its prompts."""
    config = get_model_config(name)
    for key, path in WITHOUT_PAIR.items():
        if key in config:
            module, _, kind = path.partition(".")
            empty = getattr(importlib.import_module(f"open_clip.{module}"), kind)
            nn.Module.__init__(model := empty.__new__(empty))
            return model, prompts({})
    vision, text = config["vision_cfg"], config["text_cfg"]
    for part in (vision, text):
        layers = part.get("layers", 12)
        part["layers"] = [1] * len(layers) if isinstance(layers, list) else min(layers, BLOCKS)
    text["vocab_size"] = VOCABULARY
    if text.get("text_arch") == "modern":  # its special tokens are the last ones
        text |= {name: VOCABULARY - 1 - number for number, name in enumerate(("eos_id", "bos_id", "pad_id"))}
    custom = config.pop("custom_text", False) or {"timm_model_name", "hf_model_name", "text_arch"} & {*vision, *text}
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
            return create(name, **{**rest, "depth": BLOCKS})
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
    "transformers MetaClip2Model, ViT-B/32": lambda: of_hugging_face(transformers.MetaClip2Config()),
    "transformers SiglipModel, ViT-B/16": lambda: of_hugging_face(transformers.SiglipConfig()),
    "transformers Siglip2Model, ViT-B/16, 256 patches": lambda: of_hugging_face(transformers.Siglip2Config()),
    "transformers AltCLIPModel": lambda: of_hugging_face(transformers.AltCLIPConfig()),
    "transformers ChineseCLIPModel": lambda: of_hugging_face(transformers.ChineseCLIPConfig()),
    "transformers CLIPSegModel": lambda: of_hugging_face(transformers.CLIPSegConfig()),
}


def compare(name: str, model: Any, tokens: torch.Tensor) -> Row:
    """Loss and gradients over all classes, against the model's own forward."""
    with uncompared():
        clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    with torch.no_grad():
        model.logit_scale.fill_(2.7)  # CLIP's initial value for every model
    images, labels = torch.randn(2, 3, *clip.image_size), torch.tensor([1, 3])
    out = clip(images, labels)
    out.loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with unfused(model.modules()):
        outputs = clip.images.tower.reference_forward(images), clip.texts.tower.reference_forward(tokens)
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
    has_end = text.get("pool_type") == "eos" or text.get("text_arch") == "modern"
    end = text.get("eos_id", 2) if has_end else vocabulary - 1
    padding = text["pad_id"] if text.get("text_arch") == "modern" else 0
    tokens = torch.full((len(NAME_LENGTHS), text.get("context_length", 77)), padding)
    for i, length in enumerate(NAME_LENGTHS):
        name = range(100 * (i + 1), 100 * (i + 1) + length)
        prompt = [vocabulary - 2, 320, 1125, 539, *name, end]
        tokens[i, : len(prompt)] = torch.tensor(prompt)
    return tokens


def encoder_prompts(padding: int) -> torch.Tensor:
    """Prompts [C, L] for a text encoder of transformers."""
    tokens = prompts({"vocab_size": VOCABULARY})
    return torch.where(tokens == 0, padding, tokens)


def markdown(rows: list[Row], versions: list[str]) -> str:
    """The text of docs/models.md, for these versions of open_clip."""
    machine = machine_columns(torch.device("cpu"))
    counts = []
    for version in versions:
        of_version = [row for row in rows if version in row.versions]
        counts.append(f"{sum(not row.refused for row in of_version)} of the {len(of_version)} configs of {version}")
    names = f"open_clip {versions[0]}"
    if len(versions) > 1:
        commit = re.search(r"@([0-9a-f]{40})", DEVELOPMENT.read_text())
        assert commit is not None
        names += f" and its development version {versions[1]}, commit {commit[1]}"
    lines = [
        "# Models",
        "",
        f"Written by `python -m bench.models` ({names}; timm {timm.__version__}, transformers "
        f"{transformers.__version__}, PyTorch {machine['torch']}). Of open_clip, SkipCLIP handles "
        f"{' and '.join(counts)}, and refuses the others at construction, with the reason. Models have random weights, "
        f"three transformer blocks per tower or one or two per stage of other towers, and {VOCABULARY:,} tokens; all "
        "else is as configured. fp32, evaluation mode, one block skipped, all classes kept. Errors are relative to the "
        "model's own forward, of two versions of open_clip the larger ones; the gradient error is the largest of any "
        "weight, relative to the norm of its gradient or to a ten-thousandth of the largest norm. In fp64, on small "
        "models of every family, errors are below 1e-9 (`tests/towers`), except "
        "of models that compute a part in fp32.",
        "",
        "- Images have one size. A NaFlexVit interpolates its positions to the size of the config; a `Siglip2Model` "
        "gets square images of as many patches as it has positions, or of another size that its patches divide.",
        "- Models with code of their own (`trust_remote_code`), such as jina-clip and nomic-embed-vision, are not "
        "handled.",
        "",
        "| model | open_clip | disabled reductions | error of the loss | error of a gradient |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {', '.join(row.versions) or '–'} | {row.off or 'none'} | {row.loss_error:.0e} | "
        f"{row.gradient_error:.0e} |"
        for row in rows
        if not row.refused
    ]
    refused = [f"| {row.name} | {', '.join(row.versions) or '–'} | {row.refused} |" for row in rows if row.refused]
    if refused:
        lines += ["", "| refused | open_clip | reason |", "|---|---|---|", *refused]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
