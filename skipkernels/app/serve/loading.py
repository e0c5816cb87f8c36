"""Loading of the model of a run folder from classifier.json and the weights, without the training data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ...options import Precision
from ..data import InputError, Task
from ..data.base import check_choice
from ..data.class_names import class_names
from ..data.images import Images
from ..data.tasks import TestSet
from ..data.templates import resolve_templates
from ..devices import resolved_precision, usable_device
from ..methods import METHODS, Method
from ..methods.frozen import FrozenModel
from ..train.description import Description, preprocessing
from ..train.reading import read_model
from ..train.weights import load_run_method, load_run_model

TEST = "classes"
"""Name of the test that has the classes to predict, for `Method.logits`."""
_NO_IMAGES = Images([])


class TunedRun(NamedTuple):
    """Model of a run."""

    described: Description  # Contents of classifier.json; for other classes or prompts it is not calibrated
    classes: list[str]  # Names of the classes to predict
    model: Any  # CLIP
    method: Method  # Method with its weights; its test `TEST` has the classes
    transform: Callable[[Any], torch.Tensor]  # Transform of an image
    tokenizer: Any
    precision: Precision  # not "auto"


def load_run(
    folder: Path,
    *,
    classes: Sequence[str] | None = None,
    templates: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    precision: Precision = "auto",
    trust: bool = False,
) -> TunedRun:
    """Load the model of a run; see `Classifier.load` for the arguments and errors."""
    described, file = read_model(folder)
    check_choice(precision, Precision, "precision", "Classifier.load")
    chosen = torch.device(usable_device(str(device or "auto"), "Classifier.load"))
    resolved = resolved_precision(precision, str(chosen))
    model, transform, tokenizer = load_run_model(folder, described, file, chosen, trust=trust)
    given = tuple(described.templates) if templates is None else resolve_templates(None, templates)
    test = TestSet(TEST, _classes(described, classes), given, _NO_IMAGES)
    method = _method(described, model, tokenizer, test)
    load_run_method(method, described, file)
    method.train(False)
    if set(test.classes) != set(described.classes) or list(test.templates) != described.templates:
        described = replace(described, temperature=None, none_logit=None)
    return TunedRun(
        described=described,
        classes=test.classes,
        model=model,
        method=method,
        transform=transform,
        tokenizer=tokenizer,
        precision=resolved,
    )


def load_plain(folder: Path, *, trust: bool = False) -> TunedRun:
    """Load a run in fp32 on the CPU, with all that a CLIP has a place for in its model: LoRA is merged.

    See `Classifier.load` for `trust`. `Method.head` has the rest.
    """
    run = load_run(folder, device="cpu", precision="fp32", trust=trust)
    run.method.merge()
    run.model.float().eval().requires_grad_(False)
    described = replace(run.described, preprocessing=preprocessing(run.model))  # of the model, not of the file
    return run._replace(described=described)


def _classes(described: Description, classes: Sequence[str] | None) -> list[str]:
    """Names of the classes to predict, normalized as in training."""
    if classes is None:
        return described.classes
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise InputError(f"must be a list of names; got {classes!r}.", "classes", "Classifier.load")
    if len(classes) < 2:  # of one class every image is certain
        raise InputError(f"must be at least two names; got {classes}.", "classes", "Classifier.load")
    return list(class_names("the given classes", classes, "name it once", "classes"))


def _method(described: Description, model: nn.Module, tokenizer: Any, test: TestSet) -> Method:
    """Construct the method of a run; its weights are not loaded."""
    if described.method not in METHODS:
        known = f"{', '.join(METHODS)}; got {described.method!r}"
        raise InputError(f"must have one of the methods {known}. Upgrade skipkernels.", "run", "Classifier.load")
    kind = METHODS[described.method]
    tests = [test]
    settings: dict[str, Any] = {str(name): value for name, value in described.settings.items()}
    if issubclass(kind, FrozenModel):  # the shapes of its weights may depend on the trained classes
        tests.insert(0, replace(test, name="trained", classes=described.classes))
    task = Task(described.data, "few-shot", _NO_IMAGES, tuple(tests))  # classifies among all classes
    return kind(model, tokenizer, task, **settings)
