"""README.md of a run: a model card, with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...formatting import escaped
from ..config import TuneConfig
from ..methods.registry import MODELS
from .command_line import command_line
from .description import NOT_CALIBRATED, Description
from .notes import demonstration_note, weak_result

CARD = "README.md"
_SHOWN = 20  # classes named in the card


def model_card(
    config: TuneConfig,
    described: Description,
    metrics: Mapping[str, Any],
    *,
    use: str = "open-clip",
    head_code: str = "",
) -> str:
    """Return the text of a model card, from the description of the tuned model and the contents of metrics.json.

    `use` is what can load the folder: "open-clip" (and skipkernels), "skipkernels", "hugging-face" or "onnx".
    `head_code` applies head.safetensors, for another library, if the model does not have all that classifies.
    """
    base = _base(config)
    matter = ["---", f"library_name: {_LIBRARIES[use]}"]
    matter += ["pipeline_tag: zero-shot-image-classification", "tags:", "- clip", "- skipkernels"]
    alpha = metrics.get("alpha")
    blended = "" if alpha is None else f", blended with its zero-shot weights at {alpha:g}"
    code = _with_head(use, head_code) if head_code else _use(use, described)
    head = "" if config.head in (None, "none") else f", with the head `{config.head}`,"
    probe = config.head == "probe" or config.method == "linear-probe"
    demonstration = demonstration_note(config.model)
    lines = [*matter, "---", "", f"# {config.model} tuned on {described.data}{blended}", ""]
    lines += [
        f"{base}, tuned on {len(described.classes):,} classes of `{described.data}` by `{config.method}`{head} with "
        f"[skipkernels](https://github.com/skipkernels/skipkernels) {described.versions['skipkernels']}.",
        *([] if demonstration is None else ["", f"**Demonstration:** {demonstration}"]),
        "",
        "## Accuracy",
        "",
        *_accuracy(config, metrics),
        "",
        "## Use",
        "",
        "```python",
        code.replace("import open_clip\n", f"import open_clip\n{_TOWER}") if config.model in MODELS else code,
    ]
    lines += ["```", "", "## Data and model", ""]
    again = command_line("tune", config, processes=metrics.get("processes", 1), left_out=("out", "device"))
    again += "" if alpha is None else f"\nskipkernels blend RUN --alpha {alpha:g}"
    lines += [
        *_data_and_model(config, described, metrics, "`classes.json`" if head_code else _CLASSES_IN[use]),
        "",
        "## Limits",
        "",
        "- Every image is assigned to one of the classes, also an image of something else.",
        f"- {_probabilities(described, use)}",
        "- Accuracy on other images, such as other cameras or places, may be lower than above; classes that were not "
        f"trained are {'not recognised' if probe else 'recognised by their names, less well than trained ones'}.",
        *(["- " + _CONTENTS[described.holds]] if described.holds in _CONTENTS else []),
        "",
        "## Reproduce",
        "",
        *(["```sh", again, "```", ""] if metrics.get("command") else []),
        "Versions: " + ", ".join(f"{name} {version}" for name, version in described.versions.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def _base(config: TuneConfig) -> str:
    return f"`{config.model}`" + (f", weights `{config.pretrained}`" if config.pretrained else "")


def _data_and_model(
    config: TuneConfig, described: Description, metrics: Mapping[str, Any], classes_in: str
) -> list[str]:
    images, shots = metrics.get("images", {}).get("train"), ""
    trained = "all images" if images is None else images
    if isinstance(config.shots, int) and images is not None:
        whole = images == config.shots * len(described.classes)
        shots = f", {config.shots} per class" if whole else f", fewer than {config.shots} of some classes"
    classes = escaped(", ".join(described.classes[:_SHOWN]))
    more = len(described.classes) - _SHOWN
    return [
        f"- Training images: {trained} of `{described.data}`{shots}, protocol `{config.protocol}`, seed {config.seed}.",
        f"- Classes: {classes}{f' and {more:,} more, all in {classes_in}' if more > 0 else ''}.",
        f"- Prompts: {', '.join(f'`{template}`' for template in described.templates)}.",
        f"- Base model: {_base(config)}. The tuned weights are a work derived from its weights; see the licence of "
        + ("those (LICENSES-pictograms of skipkernels)." if config.model in MODELS else "those."),
    ]


_LIBRARIES = {"open-clip": "open_clip", "skipkernels": "skipkernels", "hugging-face": "transformers", "onnx": "onnx"}
_CLASSIFIER = """import skipkernels as sk

classifier = sk.Classifier.load("FOLDER")  # this folder
classifier.predict(["photo.jpg"]).labels"""
_OPEN_CLIP = """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")"""
_TOWER = "import skipkernels.app.demo.vit_pictogram  # registers the image tower in timm\n"
_TRANSFORMERS = """from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained("FOLDER"), CLIPProcessor.from_pretrained("FOLDER")
# classes.json has the names of the classes, their prompt templates, and the temperature by which logits are divided."""
_ONNX = """import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
metadata = session.get_modelmeta().custom_metadata_map
classes, preprocessing = json.loads(metadata["classes"]), json.loads(metadata["preprocessing"])
height, width = preprocessing["size"]
resample = Image.Resampling[preprocessing["interpolation"].upper()]
picture = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
{resize}
images = np.asarray(picture, np.float32)[None] / 255
images = ((images - preprocessing["mean"]) / preprocessing["std"]).transpose(0, 3, 1, 2).astype(np.float32)
logits, embedding = session.run(None, {{"pixel_values": images}})  # [B, 3, H, W] -> [B, C], [B, D]
probabilities = np.exp(logits - logits.max(1, keepdims=True))
probabilities /= probabilities.sum(1, keepdims=True)  # in the order of classes"""
_RESIZE = {
    "squash": "picture = picture.resize((width, height), resample)",
    "longest": 'picture = ImageOps.pad(picture, (width, height), resample, color=(preprocessing["fill_color"],) * 3)',
    "shortest": """scale = max(width / picture.width, height / picture.height)  # the image covers the crop
picture = picture.resize((int(picture.width * scale + 1e-6), int(picture.height * scale + 1e-6)), resample)
left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
picture = picture.crop((left, top, left + width, top + height))""",
}
_CLASSES_IN = {"open-clip": "`classifier.json`", "skipkernels": "`classifier.json`"}
_CLASSES_IN |= {"hugging-face": "`classes.json`", "onnx": "the metadata of `model.onnx`"}
_USE = {"open-clip": f"{_CLASSIFIER}\n\n{_OPEN_CLIP}", "skipkernels": _CLASSIFIER}
_USE |= {"hugging-face": _TRANSFORMERS}

_HEAD = """import json
from pathlib import Path

{imports}
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

{load}
head, described = load_file("FOLDER/head.safetensors"), json.loads(Path("FOLDER/classes.json").read_text())
picture = Image.open("photo.jpg").convert("RGB")
image = {encode}
{apply}
probabilities = (logits / (described["temperature"] or 1)).softmax(dim=-1)  # in the order of described["classes"]"""
_ENCODE = {
    "open-clip": "model.eval().encode_image(preprocess(picture).unsqueeze(0))",
    "hugging-face": 'model.visual_projection(model.vision_model(**processor(images=picture, return_tensors="pt"))[1])',
}


def _use(use: str, described: Description) -> str:
    """Code that loads a folder, and for ONNX prepares and classifies an image."""
    resize = _RESIZE[described.preprocessing.get("resize_mode") or "shortest"]
    return _ONNX.format(resize=resize) if use == "onnx" else _USE[use]


def _with_head(use: str, head_code: str) -> str:
    """Code that classifies an image by the model and the head in a folder."""
    imports, load = (_OPEN_CLIP if use == "open-clip" else _TRANSFORMERS).split("\n\n")
    return _HEAD.format(imports=imports, load=load.split("\n")[0], encode=_ENCODE[use], apply=head_code)


_CONTENTS = {
    "method": "The folder holds the weights that the method adds. The model is the base model, which is loaded by its "
    "name.",
}


def _probabilities(described: Description, use: str) -> str:
    if described.temperature is None:
        return f"Probabilities are {NOT_CALIBRATED}."
    images = f"on {described.calibration_images} held-out images"
    if use == "onnx":
        return f"Probabilities are calibrated {images}: the logits are divided by the temperature already."
    return f"Probabilities are calibrated by a temperature of {described.temperature:.3g} {images}."


def _accuracy(config: TuneConfig, metrics: Mapping[str, Any]) -> list[str]:
    """Table of the accuracies, in per cent."""
    tuned = metrics["tuned"] or {}
    rows = ["| test | classes | zero-shot | tuned |", "|---|---:|---:|---:|"]
    for name, before in metrics["zero_shot"].items():
        after = tuned.get(name)
        cells = ("–" if value is None else f"{value:.2f} %" for value in (before, after))
        rows.append(f"| {name} | {metrics['classes'].get(name, '')} | {' | '.join(cells)} |")
    if config.test == "none":
        held = metrics.get("validation") or {}
        chosen = "candidate" if metrics.get("candidates") else "epoch"
        images = f"{held['images']} validation images, which choose the {chosen}" if held else "there is none"
        cells = (f"{held[when]:.2f} %" if held.get(when) is not None else "–" for when in ("zero_shot", "tuned"))
        count = next(iter(metrics["classes"].values()))
        rows = [*rows[:2], f"| no test; {images} | {count} | {' | '.join(cells)} |"]
    weak = weak_result(config, metrics)
    return rows + ([] if weak is None else ["", f"**Warning:** {weak}"])
