"""Small open_clip models with random weights, and OpenAI's `clip.model`, for tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import open_clip
import pytest
import torch

verify = importlib.import_module("skipkernels.clip.verify")  # the package has the function of this name


VISION = {"image_size": 16, "patch_size": 8, "width": 24, "layers": 3, "head_width": 8}
TEXT = {"context_length": 77, "vocab_size": 60, "width": 16, "heads": 2, "layers": 3}


def tiny_clip(
    dtype: torch.dtype = torch.float64,
    *,
    quick_gelu: bool = False,
    seed: int = 0,
    vision: dict | None = None,
    text: dict | None = None,
    family: type = open_clip.CLIP,
) -> torch.nn.Module:
    """Open_clip model with three blocks per tower and random parameters, biases and norms too."""
    torch.manual_seed(seed)
    model = family(12, {**VISION, **(vision or {})}, {**TEXT, **(text or {})}, quick_gelu=quick_gelu)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype)


def half_precision_clip(dtype: torch.dtype) -> torch.nn.Module:
    """The model of `tiny_clip` as `open_clip.create_model` makes it in half precision: norms and positions in fp32."""
    model = open_clip.CLIP(12, VISION, TEXT, cast_dtype=dtype)
    model.load_state_dict(tiny_clip(torch.float32).state_dict())
    open_clip.model.convert_weights_to_lp(model, dtype)
    return model


def tiny_coca(correct: bool = False, **vision) -> torch.nn.Module:
    """Open_clip `CoCa` of the same size, in fp64; `correct` selects the mask that does not exclude the class token."""
    pooler = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 5, "output_tokens": True}
    text = {**TEXT, "embed_cls": True, "output_tokens": True, "context_length": 76}
    decoder = {"context_length": 76, "width": 16, "heads": 2, "layers": 1, "vocab_size": 60}
    torch.manual_seed(0)
    width = VISION["width"] if vision else 12  # poolers named in a config take the width of the tower
    model = open_clip.CoCa(width, decoder, text, {**VISION, **pooler, **vision})
    model.text.correct_cls_mask = correct  # no config has it
    return random_weights(model)


def openai_clip(size: int = 16, layers: int | tuple[int, ...] = 3, width: int = 64) -> torch.nn.Module:
    """OpenAI's model in fp32, the dtype that its norms compute in; several numbers of layers are those of a ResNet."""
    torch.manual_seed(0)
    patch = 8 if isinstance(layers, int) else None
    return random_weights(openai_models().CLIP(12, size, layers, width, patch, 77, 60, 16, 2, 3)).float()


def openai_models() -> ModuleType:
    """The module `clip.model`, loaded from its file: its package needs a module that setuptools no longer has."""
    if "clip.model" not in sys.modules:
        package = importlib.util.find_spec("clip")
        assert package is not None and package.submodule_search_locations, "pip install clip-anytorch"
        file = Path(package.submodule_search_locations[0]) / "model.py"
        spec = importlib.util.spec_from_file_location("clip.model", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["clip.model"] = module
    return sys.modules["clip.model"]


def random_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Perturb every parameter, biases and norms too, in fp64."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("logit"):
                parameter.fill_(2.5)
            else:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.double()


def tiny_tokens(classes: int, *, context: int = 77, seed: int = 0) -> torch.Tensor:
    """Prompts [classes, context]: two shared tokens, a name of one to five tokens, and the largest id."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(classes, context, dtype=torch.int64)
    for row in tokens:
        length = int(torch.randint(1, 6, (), generator=generator))
        row[:2] = torch.tensor([57, 5])
        row[2 : 2 + length] = torch.randint(6, 50, (length,), generator=generator)
        row[2 + length] = 59
    return tokens


def tiny_batch(batch: int, classes: int, dtype: torch.dtype = torch.float64, *, seed: int = 1):
    """Images [batch, 3, 16, 16] and labels [batch]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(classes, (batch,), generator=generator)


@contextmanager
def uncompared() -> Iterator[None]:
    """Make SkipCLIPs without the comparison with their model, which has tests of its own and takes half of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "_check", lambda *arguments: None)
        yield
