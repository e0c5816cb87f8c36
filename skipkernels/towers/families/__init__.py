"""Model families, one file each, and a record of each: which types of modules it handles.

A file is imported when a model has one of its types: only models of a package need that package.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import Any, NamedTuple


class Family(NamedTuple):
    """Types of modules that a file of this folder handles, by their full names.

    The value for a tower or a block is the class or function of the file that makes the tower, or the class of the
    fused block.
    """

    file: str
    model: Mapping[str, tuple[str | None, str | None]] = {}  # attributes of image and text half; None: the model itself
    image: Mapping[str, str] = {}  # by the type of the image half
    text: Mapping[str, str] = {}
    block: Mapping[str, str] = {}
    requires: tuple[str, int] | None = None  # package and its lowest major version


class Entry(NamedTuple):
    """A name in the file of a family."""

    family: Family
    name: str

    def why_unavailable(self) -> str | None:
        """Return why the installed packages are too old for this family, or None."""
        if self.family.requires is None:
            return None
        package, lowest = self.family.requires
        version = importlib.metadata.version(package)
        if int(version.split(".")[0]) >= lowest:
            return None
        remedy = "Update it: pip install 'skipkernels[hugging-face]'."
        return f"needs {package} {lowest} or later; got {version}. {remedy}"

    def load(self) -> Any:
        """Import the file, and return what has this name."""
        return getattr(importlib.import_module(f"{__name__}.{self.family.file}"), self.name)


_CLIP = "transformers.models.clip.modeling_clip.CLIP"
_METACLIP_2 = "transformers.models.metaclip_2.modeling_metaclip_2.MetaClip2"
_SIGLIP = "transformers.models.siglip.modeling_siglip.Siglip"
_SIGLIP_2 = "transformers.models.siglip2.modeling_siglip2.Siglip2"
_HUGGING_FACE = (_CLIP, _METACLIP_2, _SIGLIP, _SIGLIP_2)

FAMILIES = (
    Family(
        "open_clip",
        model={
            "open_clip.model.CLIP": ("visual", None),
            "open_clip.model.CustomTextCLIP": ("visual", "text"),
        },
        image={"open_clip.transformer.VisionTransformer": "OpenClipImageTower"},
        text={"open_clip.model.CLIP": "OpenClipTextTower"},
        block={"open_clip.transformer.ResidualAttentionBlock": "OpenClipBlock"},
    ),
    Family(
        "coca",
        model={"open_clip.coca_model.CoCa": ("visual", "text")},
        text={"open_clip.transformer.TextTransformer": "text_transformer_tower"},
    ),
    Family("modern_text", text={"open_clip.transformer.ModernTextTransformer": "ModernTextTower"}),
    Family("hf_text", text={"open_clip.hf_model.HFTextEncoder": "encoder_tower"}, requires=("transformers", 5)),
    Family("timm", image={"open_clip.timm_model.TimmModel": "timm_tower"}),
    Family(
        "timm_blocks",
        block={"timm.models.vision_transformer.Block": "TimmBlock", "timm.models.eva.EvaBlock": "TimmEvaBlock"},
    ),
    Family(
        "convnets",
        image={"open_clip.modified_resnet.ModifiedResNet": "ResNetTower", "clip.model.ModifiedResNet": "ResNetTower"},
    ),
    Family(
        "openai",
        model={"clip.model.CLIP": ("visual", None)},
        image={"clip.model.VisionTransformer": "OpenAIImageTower"},
        text={"clip.model.CLIP": "OpenAITextTower"},
        block={"clip.model.ResidualAttentionBlock": "OpenAIBlock"},
    ),
    Family(
        "hugging_face",
        model={f"{prefix}Model": (None, None) for prefix in _HUGGING_FACE},
        image={f"{prefix}Model": "HuggingFaceImageTower" for prefix in _HUGGING_FACE},
        text={f"{prefix}Model": "HuggingFaceTextTower" for prefix in _HUGGING_FACE},
        block={f"{prefix}EncoderLayer": "HuggingFaceBlock" for prefix in _HUGGING_FACE},
        requires=("transformers", 5),  # arguments of blocks differ between major versions
    ),
)

MODELS = {kind: halves for family in FAMILIES for kind, halves in family.model.items()}
IMAGE_TOWERS = {kind: Entry(family, name) for family in FAMILIES for kind, name in family.image.items()}
TEXT_TOWERS = {kind: Entry(family, name) for family in FAMILIES for kind, name in family.text.items()}
BLOCKS = {kind: Entry(family, name) for family in FAMILIES for kind, name in family.block.items()}


def type_name(kind: type) -> str:
    """Full name of a type."""
    return f"{kind.__module__}.{kind.__qualname__}"
