"""Accuracies of a method and of heads on its embeddings: on base classes, on new ones, and among both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

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

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        """Logits over the base and the new classes, or over the base classes alone."""
        image = method.embed(inputs)
        if whole is not None:
            return whole.logits(image)
        found = (method.logits_of(test.name, image) for test in (base, new))
        return torch.cat([each for each in found if each is not None], dim=1)

    def of_test(features: FeatureCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and labels of the images of a test."""
        found, labels = zip(*((logits(x), of) for x, of in features.loader(BATCH, "sequential")), strict=True)
        return torch.cat(found), torch.cat(labels)

    def checked(found: torch.Tensor, labels: torch.Tensor) -> float:
        if not found.isfinite().all():
            raise FloatingPointError(f"{method.name}: logits are not finite")
        return accuracy(labels, found.argmax(dim=1))

    classes = len(base.classes)
    (of_base, base_labels), (of_new, new_labels) = (of_test(tests[test.name]) for test in (base, new))
    if of_base.shape[1] == classes:
        return dict.fromkeys(ACCURACIES) | {"base": checked(of_base, base_labels)}
    split = {"base": checked(of_base[:, :classes], base_labels), "new": checked(of_new[:, classes:], new_labels)}
    joint = checked(torch.cat([of_base, of_new]), torch.cat([base_labels, new_labels + classes]))
    return dict(summarise(setup.task.protocol, split)) | {"joint": joint}


def rounded(accuracies: dict[str, Any]) -> dict[str, Any]:
    """Accuracies for a row; a linear probe has none on new classes."""
    return {name: None if value is None else round(value, 2) for name, value in accuracies.items()}
