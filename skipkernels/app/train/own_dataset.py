"""The user's own map-style dataset as the data of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...digests import digest_json
from ...features.identity import dataset_identity
from ..config import TuneConfig
from ..data import InputError, Source, from_datasets
from ..data.files import file_name
from ..data.map_style import SizedDataset
from ..data.registry import IN_PYTHON, is_in_python
from ..data.splits import listed_source


@dataclass(frozen=True)
class OwnData:
    """Datasets that were passed in Python; fields as the arguments of `tune`."""

    dataset: SizedDataset | None
    test: SizedDataset | None = None
    validation: SizedDataset | None = None
    classes: Sequence[str] | None = None
    identity: Any = None

    def applied(self, config: TuneConfig, function: str) -> tuple[TuneConfig, Callable[[], Source]]:
        """Return the configuration for the dataset, and a function that opens it once; without one, that of `data`."""
        parts = {"dataset": self.dataset, "test": self.test, "validation": self.validation}
        given = {argument: part for argument, part in parts.items() if part is not None}
        self._check(config, given, function)
        if self.dataset is None:
            return config, functools.cache(config.open_data)
        name = f"{IN_PYTHON}:{file_name(type(self.dataset).__name__)}"
        parts_identity = [[argument, dataset_identity(part, self.identity)] for argument, part in given.items()]
        digest = digest_json([parts_identity, None if self.classes is None else list(self.classes)])
        config = replace(config, data=name, dataset_identity=digest)
        return config, functools.cache(lambda: self._opened(config))

    def _check(self, config: TuneConfig, given: Mapping[str, SizedDataset], function: str) -> None:
        if self.dataset is None and (given or self.classes is not None):
            raise InputError(
                "must be given with test, validation or classes. For a number of classes pass max_classes.",
                "dataset",
                function,
            )
        if self.dataset is not None and config.data != TuneConfig.data and not is_in_python(config.data):
            raise InputError(f"must be left out with dataset; got {config.data!r}.", "data", function)
        for argument, part in given.items():
            if not (hasattr(part, "__len__") and hasattr(part, "__getitem__")) or isinstance(part, Mapping):
                raise InputError(
                    "must be a map-style dataset, with len(dataset) and dataset[i] → (image, "
                    f"label); got {type(part).__name__}.",
                    argument,
                    function,
                )

    def _opened(self, config: TuneConfig) -> Source:
        """Open the data with their splits; without test images, those of `validation`, or else a part of all images."""
        name, templates, test, validation = config.data, config.template, self.test, self.validation
        notes: tuple[str, ...] = ()
        if test is None and validation is not None and config.test != "none":
            test, validation = validation, None
            notes = (f"{name}: no test dataset, so the validation images are the test images.",)
        named = from_datasets(
            name, train=self.dataset, val=validation, test=test, classes=self.classes, templates=templates
        )
        if self.identity is not None:  # also for a feature cache
            for part in named.splits.values():
                part.identity = config.dataset_identity
        if test is None and validation is None:
            return listed_source(name, named.images("train"), named.classes, None, templates)
        return replace(named, notes=notes)
