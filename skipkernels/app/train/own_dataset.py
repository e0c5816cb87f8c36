"""The user's own map-style dataset as the data of a run."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...digests import digest_json
from ...features.identity import dataset_identity
from ..config import TuneConfig
from ..data import InputError, SizedDataset, Source, from_datasets
from ..data.splits import listed_source

KIND = "dataset"


def own_data(
    config: TuneConfig,
    dataset: SizedDataset,
    *,
    test: SizedDataset | None = None,
    validation: SizedDataset | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    identity: Any = None,
) -> tuple[TuneConfig, Callable[[], Source]]:
    """Return the configuration for a dataset, and the function that opens it; arguments as for `tune`."""
    if config.data != TuneConfig.data and config.data.partition(":")[0] != KIND:
        raise InputError(f"tune: data is {config.data!r}, and dataset is given too; leave one of them out.", "data")
    parts = {"dataset": dataset, "test": test, "validation": validation}
    given = {argument: part for argument, part in parts.items() if part is not None}
    for argument, part in given.items():
        if not (hasattr(part, "__len__") and hasattr(part, "__getitem__")) or isinstance(part, Mapping):
            raise InputError(
                f"tune: {argument} must be a map-style dataset, with len(dataset) and dataset[i] → (image, label); got "
                f"{type(part).__name__}.",
                argument,
            )
    own_name = f"{KIND}:" + re.sub(r"[^\w.+-]", "-", name or type(dataset).__name__)
    digest = digest_json([[argument, dataset_identity(part, identity)] for argument, part in given.items()])

    @functools.cache
    def open_data() -> Source:
        named = from_datasets(
            own_name, train=dataset, val=validation, test=test, classes=classes, templates=config.template
        )
        if test is not None or (config.test == "none" and validation is not None):
            return named
        if validation is None:
            images: Any = named.images("train")
            how, remedy = "no test dataset", "give test=…"
            return listed_source(own_name, images, named.classes, None, config.template, how=how, remedy=remedy)
        note = f"{own_name}: no test dataset, so the validation images are the test images."
        source = from_datasets(own_name, train=dataset, test=validation, classes=classes, templates=config.template)
        return dataclasses.replace(source, notes=(note,))

    return dataclasses.replace(config, data=own_name, dataset_identity=digest), open_data


def check_no_parts(function: str, *parts: object) -> None:
    """Refuse test images, validation images and class names without a dataset."""
    if any(part is not None for part in parts):
        raise InputError(
            f"{function}: test and validation images, and class names as classes, need the training images as dataset. "
            "For a number of classes pass max_classes.",
            "dataset",
        )
