"""Accuracies of a method and of heads on its embeddings: on base classes, on new ones, and among both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from skipkernels import FeatureCache
from skipkernels.app import heads
from skipkernels.app.data.tasks import summarise
from skipkernels.app.methods import Method
from skipkernels.app.results.class_metrics import accuracy
from skipkernels.app.train.setup import BATCH, RunSetup

# The accuracies of a run. "joint": on the test images of base and new classes, among all of them.
ACCURACIES = ("base", "new", "harmonic", "joint")


@torch.no_grad()
def accuracies(
    setup: RunSetup, method: Method, tests: Mapping[str, FeatureCache], head: heads.Head | None = None
) -> dict[str, float | None]:
    """Compute `ACCURACIES`, in per cent; None where the method has no logits for new classes."""
    base, new = setup.task.tests
    method.train(False)
    whole = head and head.with_new_classes(method.class_embeddings(new.name))
    names = base.name, new.name
    (of_base, base_labels), (of_new, new_labels) = (_logits(method, names, tests[name], whole) for name in names)
    classes = len(base.classes)
    if of_base.shape[1] == classes:
        return dict.fromkeys(ACCURACIES) | {"base": accuracy(base_labels, of_base.argmax(dim=1))}
    split = {
        "base": accuracy(base_labels, of_base[:, :classes].argmax(dim=1)),
        "new": accuracy(new_labels, of_new[:, classes:].argmax(dim=1)),
    }
    joint = accuracy(torch.cat([base_labels, new_labels + classes]), torch.cat([of_base, of_new]).argmax(dim=1))
    return dict(summarise(setup.task.protocol, split)) | {"joint": joint}


def _logits(
    method: Method, names: Sequence[str], features: FeatureCache, head: heads.Head | None
) -> tuple[Tensor, Tensor]:
    """Logits of images over the classes of all tests in `names` that the method has logits for, and their labels."""
    logits, labels = [], []
    for inputs, of in features.loader(BATCH, "sequential"):
        image = method.embed(inputs)
        found = [head.logits(image)] if head is not None else [method.logits_of(name, image) for name in names]
        logits.append(torch.cat([each for each in found if each is not None], dim=1))
        labels.append(of)
    if not all(each.isfinite().all() for each in logits):
        raise FloatingPointError(f"{method.name}: logits are not finite")
    return torch.cat(logits), torch.cat(labels)


def rounded(accuracies: dict[str, Any]) -> dict[str, Any]:
    """Accuracies for a row; a linear probe has none on new classes."""
    return {name: None if value is None else round(value, 2) for name, value in accuracies.items()}
