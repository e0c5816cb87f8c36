"""Files by which a run folder is used without its training data: classifier.json and open_clip_config.json.

With open_clip_config.json beside model.safetensors, `open_clip.create_model("local-dir:RUN")` loads a run.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, InstanceOf

from ...folders import replace_text
from ..data import InputError
from ..results.files import CLASSIFIER, MODEL
from ..untrusted import OPEN_CLIP, read_object, validated

if TYPE_CHECKING:
    from .setup import RunSetup

FORMAT = 1
CALIBRATED = "calibrated on held-out images"
NOT_CALIBRATED = "not calibrated: no temperature was fitted on held-out images"
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")  # the part that open_clip reads with a model config
Text = InstanceOf[str]  # pydantic's own str refuses names of folders that are not UTF-8


def _name_of_file(name: str) -> str:
    if Path(name).name != name:
        raise ValueError("must be the name of a file in the folder")
    return name


@dataclass(frozen=True)
class Description:
    """Contents of classifier.json."""

    model: Text
    pretrained: Text | None
    """Name of the model and of its weights before tuning."""
    method: Text
    settings: dict[Literal["skip_layers", "vectors"], int | float]
    """Method, and the settings of its constructor that a file may give: others include paths."""
    data: Text
    classes: Annotated[list[Text], Field(min_length=1)]
    """Names of the trained classes, by label."""
    templates: Annotated[list[Text], Field(min_length=1)]
    """Prompt templates."""
    weights: Annotated[Text, AfterValidator(_name_of_file)]
    """Name of the weights file."""
    whole_model: bool
    """True if the weights file is a whole model, which open_clip can load; else it is the state of the method, for use
    with the pretrained model."""
    classifier: Text = ""
    """Name of what classifies: method, blend and head; empty in a checkpoint, which has neither of the last two."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """Divisor of the logits, fitted on held-out images at the end of training; None if they are not calibrated."""
    none_logit: float | None = None
    """Logit of "none of these" after the temperature; see `calibration.class_probabilities`."""
    calibration_images: int = 0
    weights_xxh3: Text = ""
    """Digest of the weights file, known when that is written."""
    head_xxh3: Text | None = None
    """Digest of head.safetensors, which classifies the embeddings; None: the texts of the classes do."""
    preprocessing: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Description:
        """Read the classifier.json of a folder."""
        path = folder / CLASSIFIER
        if not path.is_file():
            raise InputError(
                f"{path}: no such file. A run has it after its first epoch. Give the folder of a run, wait for the "
                "first epoch of a run in progress, or continue a run that was stopped with `resume=RUN`."
            )
        try:
            values = read_object(path)
            if (written := values.pop("format", None)) != FORMAT:
                raise ValueError(f"format must be {FORMAT}; got {written!r}")
            return validated(cls, values)
        except OSError as error:
            raise InputError(f"{path}: can't be read ({error.strerror}).") from error
        except ValueError as error:
            raise InputError(f"{path}: damaged: {error}. Restore it from a copy, or tune again.") from error

    def write(self, folder: Path) -> None:
        """Write the classifier.json of a folder."""
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        replace_text(folder / CLASSIFIER, json.dumps(values, indent=2) + "\n")


def describe(setup: RunSetup) -> Description:
    """Describe a run, of which the first test has the trained classes."""
    config, task, test = setup.config, setup.task, setup.task.tests[0]
    return Description(
        model=config.model,
        pretrained=config.pretrained,
        method=config.method,
        settings=_settings(setup),
        data=task.name,
        classes=list(test.classes),
        templates=list(test.templates),
        weights=MODEL,
        whole_model=config.method_class().trains_model,
        preprocessing=preprocessing(setup.model),
    )


def _settings(setup: RunSetup) -> dict[Literal["skip_layers", "vectors"], int | float]:
    """Return the settings of the method by which its weights are read."""
    if setup.config.method == "coop":
        return {"vectors": len(setup.method.state_dict()["context"])}  # fewer than given, if names are long
    return {"skip_layers": setup.config.skip_layers} if setup.config.method == "skip" else {}


def preprocessing(model: Any) -> dict[str, Any]:
    """Return the settings of the image transform of a model, in open_clip's terms; empty if it does not say."""
    return dict(getattr(getattr(model, "visual", model), "preprocess_cfg", {}))


def write_open_clip_config(folder: Path, model: Any, tokenizer: Any) -> bool:
    """Write open_clip_config.json of a model, with a tokenizer of Hugging Face; False for other models."""
    model_cfg = getattr(model, "model_cfg", None)
    if model_cfg is None:
        return False
    cleaned = preprocessing(model)
    config = {"model_cfg": model_cfg, "preprocess_cfg": {key: cleaned[key] for key in _PREPROCESSING if key in cleaned}}
    if model_cfg["text_cfg"].get("hf_tokenizer_name"):  # open_clip reads it from the folder
        tokenizer.save_pretrained(folder)
    replace_text(folder / OPEN_CLIP, json.dumps(config, indent=2) + "\n")
    return True
