"""Files by which a run folder is used without its training data: classifier.json and open_clip_config.json.

With open_clip_config.json beside model.safetensors, `open_clip.create_model("local-dir:RUN")` loads a run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...folders import replace_text
from ..config import TuneConfig
from ..data import InputError, Task
from ..untrusted import read_object
from .environment import versions
from .plain_config import OPEN_CLIP, save_tokenizer
from .state_checks import check_types

CLASSIFIER = "classifier.json"
FORMAT = 1
NOT_CALIBRATED = "not calibrated: no images were held out, or training did not end"
_MAX_BYTES = 1 << 28  # size of classifier.json: a million classes with a few prompts each
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")  # the part that open_clip reads with a model config

_FIELDS: dict[str, Any] = {
    "format": "whole number",
    "model": "text",
    "pretrained": ("text", "null"),
    "method": "text",
    "settings": "plain mapping",
    "data": "text",
    "protocol": "text",
    "classes": "plain list",
    "templates": ("plain list", "null"),
    "prompts": ("plain list", "null"),
    "weights": "text",
    "holds": "text",
    "logit_scale": "number",
    "temperature": ("number", "null"),
    "calibration_images": "whole number",
    "weights_xxh3": ("text", "null"),
    "preprocessing": "plain mapping",
    "versions": "plain mapping",
}


@dataclass(frozen=True)
class Description:
    """Contents of classifier.json.

    Attributes:
        model, pretrained: Name of the model and of its weights before tuning.
        method, settings: Method, and the settings that its constructor needs.
        data, protocol: Dataset and protocol of the run.
        classes: Names of the trained classes, by label.
        templates: Prompt templates; None if the prompts are not made of templates.
        prompts: Prompts by template and class; None if `templates` make them.
        weights: Name of the weights file.
        holds: Its contents: "model", "method" or "changes"; see `weights`.
        weights_xxh3: Digest of the weights file, by which it is found; None in files of earlier versions.
        logit_scale: exp(logit_scale) of the model.
        temperature: Divisor of the logits, fitted on held-out images at the end of training; None if there were none,
            or training did not end.
        calibration_images: Number of these images.
        preprocessing: Settings of the image transform.
        versions: Versions of the packages that wrote the run.
    """

    model: str
    pretrained: str | None
    method: str
    settings: dict[str, Any]
    data: str
    protocol: str
    classes: list[str]
    templates: list[str] | None
    prompts: list[list[str]] | None
    weights: str
    holds: str
    logit_scale: float
    temperature: float | None = None
    calibration_images: int = 0
    weights_xxh3: str | None = None
    preprocessing: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Description:
        """Read the classifier.json of a folder.

        Raises:
            InputError: If it is missing or damaged, or of a later version.
        """
        path = folder / CLASSIFIER
        if not path.is_file():
            raise InputError(
                f"{path}: no such file. A run has it after its first epoch; a run of an earlier version does not. Give "
                "the folder of a run, or tune again."
            )
        try:
            values = {"weights_xxh3": None} | read_object(path, _MAX_BYTES)
            check_types(values, _FIELDS)
            if values.pop("format") != FORMAT:
                raise ValueError("written by a later version; upgrade skipkernels")
            names = {field.name for field in dataclasses.fields(cls)}
            read = cls(**{name: value for name, value in values.items() if name in names})
            read._check()
        except OSError as error:
            raise InputError(f"{path}: can't be read ({error.strerror}).") from error
        except ValueError as error:
            raise InputError(f"{path}: damaged: {error}. Restore it from a copy, or tune again.") from error
        return read

    def _check(self) -> None:
        def texts(values: Any) -> bool:
            return isinstance(values, list) and bool(values) and all(type(value) is str for value in values)

        if not texts(self.classes):
            raise ValueError("classes must be names")
        if self.templates is None and self.prompts is None:
            raise ValueError("templates and prompts are missing")
        if self.templates is not None and not texts(self.templates):
            raise ValueError("templates must be texts")
        if self.prompts is not None:
            fitting = (texts(part) and len(part) == len(self.classes) for part in self.prompts)
            if not (self.prompts and all(fitting)):
                raise ValueError("prompts must be one text for each class")
        if Path(self.weights).name != self.weights:
            raise ValueError("weights must be the name of a file in the folder")
        if not self.settings.keys() <= {"skip_layers"}:  # other arguments of a method include paths
            raise ValueError(f"settings may have skip_layers only; got {', '.join(self.settings)}")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError("temperature must be above 0")

    def write(self, folder: Path) -> None:
        """Write the classifier.json of a folder."""
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        replace_text(folder / CLASSIFIER, json.dumps(values, indent=2) + "\n")


def describe(config: TuneConfig, model: Any, task: Task, *, weights: str, holds: str) -> Description:
    """Describe a run, of which the first test has the trained classes."""
    test = task.tests[0]
    templates = find_templates(test.classes, test.prompts)
    return Description(
        model=config.model,
        pretrained=config.pretrained,
        method=config.method,
        settings={"skip_layers": config.skip_layers} if config.method == "skip" else {},
        data=task.name,
        protocol=task.protocol,
        classes=list(test.classes),
        templates=templates,
        prompts=None if templates is not None else [list(prompts) for prompts in test.prompts],
        weights=weights,
        holds=holds,
        logit_scale=round(model.logit_scale.detach().float().exp().item(), 6),
        preprocessing=preprocessing(model),
        versions=versions(),
    )


def find_templates(classes: Sequence[str], prompts: Sequence[Sequence[str]]) -> list[str] | None:
    """Find the templates that make the prompts of all classes; None if there are none.

    >>> find_templates(["cat", "a"], [["a cat.", "a a."], ["cat", "a"]])
    ['a {}.', '{}']
    >>> find_templates(["cat", "dog"], [["a cat.", "the dog."]]) is None
    True
    """
    found = []
    for of_classes in prompts:
        first, name = of_classes[0], classes[0]
        starts = [start for start in range(len(first)) if first.startswith(name, start)]
        candidates = (f"{first[:start]}{{}}{first[start + len(name) :]}" for start in starts)
        fitting = (
            template
            for template in candidates
            if all(template.replace("{}", other) == p for other, p in zip(classes, of_classes, strict=True))
        )
        template = next(fitting, None)
        if template is None or template.count("{}") != 1:
            return None
        found.append(template)
    return found


def preprocessing(model: Any) -> dict[str, Any]:
    """Return the settings of the image transform of a model, in open_clip's terms; empty if it does not say."""
    return dict(getattr(getattr(model, "visual", model), "preprocess_cfg", {}))


def write_open_clip_config(folder: Path, model: Any, tokenizer: Any) -> bool:
    """Write open_clip_config.json of a model of `load_model`, and its tokenizer if that is one of Hugging Face.

    Returns:
        False if the model is not one of open_clip; nothing is written then.
    """
    model_cfg = getattr(model, "model_cfg", None)
    if model_cfg is None:
        return False
    cleaned = preprocessing(model)
    config = {"model_cfg": model_cfg, "preprocess_cfg": {key: cleaned[key] for key in _PREPROCESSING if key in cleaned}}
    if model_cfg["text_cfg"].get("hf_tokenizer_name"):  # open_clip reads it from the folder
        save_tokenizer(tokenizer, folder)
    replace_text(folder / OPEN_CLIP, json.dumps(config, indent=2) + "\n")
    return True
