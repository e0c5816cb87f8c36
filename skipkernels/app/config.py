"""Configuration of a run: one schema for Python, the command line, YAML files and run folders."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from pydantic import ConfigDict, ValidationError, field_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError, to_jsonable_python

from ..formatting import first_line
from .data.base import InputError
from .data.files import expanded, file_name
from .data.registry import default_protocol, is_own
from .devices import resolved_precision, usable_device
from .methods.registry import AUTO, METHODS
from .settings import Settings
from .untrusted import check_source

if TYPE_CHECKING:
    from .data import Source, TaskOptions
    from .methods import Method

_SHOTS = 16

CONFIG = "config.yaml"
"""Name of the file of a run with its configuration."""
_SOURCES = ("model", "pretrained", "data")
RATES = ("text_lr", "image_lr")
"""Settings that are learning rates."""

# Types are not converted: `epochs: true` and `seed: "3"` are errors.
_SCHEMA = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, config=_SCHEMA)
class TuneConfig(Settings):
    """Configuration of a run. Its fields are those of `Settings`.

    Example:
        >>> TuneConfig(data="imagefolder:photos", epochs=3, out="runs/photos").out
        PosixPath('runs/photos')
    """

    dataset_identity: str | None = None
    """Digest of a dataset that was passed to `tune`, which sets it."""

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        """Check the method here, before a command has imported torch."""
        if value not in (AUTO, *METHODS):
            raise PydanticCustomError("method", "one of {names}", {"names": ", ".join([AUTO, *METHODS])})
        return value

    @field_validator("out", "cache", "resume")
    @classmethod
    def _expanded(cls, path: Path | None) -> Path | None:
        return None if path is None else expanded(path)

    # ---- defaults ----------------------------------------------------------------------------------------------------

    def resolved(self, open_data: Callable[[], Source] | None = None) -> TuneConfig:
        """Return the configuration with all defaults filled in, some of which depend on the number of classes.

        Raises an InputError if two values exclude each other.
        """
        device = usable_device(self.device, "TuneConfig")
        config = dataclasses.replace(
            self,
            method=self._resolved_method,
            device=device,
            precision=resolved_precision(self.precision, device),
            validation="none" if self.validation == "auto" and not self.own_data else self.validation,
            protocol=self.protocol or default_protocol(self.data),
            shots=("all" if self._pictograms else _SHOTS) if self.shots is None else self.shots,
            head=self.head or ("auto" if self._resolved_method == AUTO else "none"),
            out=self.folder,
        )
        recipe = config._recipe(open_data or self.open_data)
        config = dataclasses.replace(
            config, **{name: value for name, value in recipe.items() if getattr(config, name) is None}
        )
        config._check()
        return config

    @property
    def _resolved_method(self) -> str:
        """The method; "skip" for "auto" with other settings or data than those of its choice."""
        can_choose = self.preset == "default" and (self.own_data or self._pictograms)
        return "skip" if self.method == AUTO and not can_choose else self.method

    @property
    def folder(self) -> Path:
        """Folder of the results. Default: that of the run to resume, or one in runs/, named after data and method."""
        return self.out or self.resume or Path("runs", file_name(f"{self.data}-{self._resolved_method}"))

    def _recipe(self, open_data: Callable[[], Source]) -> dict[str, Any]:
        """Training settings of the method for the data and the protocol."""
        from .methods import TrainingData

        def trained_classes() -> int:
            classes = min(len(open_data().classes), self.max_classes or sys.maxsize)
            return math.ceil(classes / 2) if self.protocol == "base-to-new" else classes

        reference = self.preset == "reference"
        data = TrainingData(
            name=self.data,
            protocol=self.protocol or "few-shot",
            shots=self.shots if isinstance(self.shots, int) else _SHOTS,
            classes=trained_classes if self.epochs is None else lambda: 1,  # epochs that are given need no data
            reference=reference,
        )
        recipe = dataclasses.asdict(self.method_class().recipe("" if reference else self.model, data))
        return recipe if self.class_weight is None else recipe | {"sampler": "random"}

    @property
    def rate_factors(self) -> dict[str, float]:
        """Factors of the learning rates of a resolved configuration over those of the recipe, by name."""
        recipe = self._recipe(self.open_data)
        return {name: float(f"{getattr(self, name) / recipe[name]:.4g}") for name in RATES if recipe[name]}

    # ---- what follows from the settings ------------------------------------------------------------------------------

    def method_class(self) -> type[Method]:
        """Return the class of the method."""
        return METHODS["skip" if self.method == AUTO else self.method]

    @property
    def has_steps(self) -> bool:
        """True if the method trains in steps, not by `fit`."""
        return self.method_class().recipe(self.model).epochs != 0

    @property
    def chooses(self) -> bool:
        """True if a run begins with a choice between candidates."""
        return self.method == AUTO or self.head == "auto"

    @property
    def balances(self) -> bool:
        """True if epochs, candidates, rates and blends are compared by their balanced accuracy."""
        return self.class_weight is not None or self.prior == "balanced"

    @property
    def own_data(self) -> bool:
        """True if the dataset is the user's own, not a published or packaged one."""
        return is_own(self.data)

    @property
    def _pictograms(self) -> bool:
        return self.data.partition(":")[0] == "pictograms"

    def open_data(self) -> Source:
        """Open the dataset."""
        from .data import open_source

        return open_source(self.data, self.root, self.template)

    def task_options(self) -> TaskOptions:
        """Return the choice of images and classes of a resolved configuration."""
        from .data import TaskOptions

        names = ("protocol", "shots", "max_classes", "seed", "validation", "test", "root")
        trains = self.chooses or self.train_on_validation
        settings = {name: getattr(self, name) for name in names}
        return TaskOptions(templates=self.template, train_on_validation=trains, **settings)

    # ---- settings that exclude each other ----------------------------------------------------------------------------

    def _check(self) -> None:
        for name in self._unused():
            _refuse(name, f"{getattr(self, name)} has no effect with `method={self.method}`; leave it out.")
        assert self.epochs is not None
        if self.epochs < (0 if self.head != "none" or self.train_on_validation else 1) and self.has_steps:
            _refuse("epochs", f"must be at least 1, or 0 with a head; got {self.epochs}.")
        if self.refresh == "epoch" and self.epochs == 0:
            _refuse("refresh", "epoch has no effect without epochs; leave it out.")
        if self.refresh == "epoch" and self.chooses:
            _refuse("refresh", "epoch needs a chosen method and head; add `method=skip`, or leave it out.")
        if self.epochs == 0 and self.blend != 1:
            _refuse("blend", f"{self.blend:g} has no effect without epochs; leave it out.")
        if self.head == "none" and self.prior != "images":
            _refuse("prior", f"{self.prior} is that of a head; add `head=anchored`, or leave it out.")
        self.task_options().check()
        if self.cache is not None and self.skip_layers == 0:
            _refuse("cache", "must be left out with `skip_layers=0`: features are kept at the cut, and there is none.")
        if self.resume is not None and (self.overwrite or self.out != self.resume):
            _refuse("resume", "continues the run in its folder; leave out `out` and `overwrite`.")
        if isinstance(self.class_weight, (int, float)) and not 0 < self.class_weight <= 1:
            _refuse("class_weight", f"must be balanced, or above 0 and at most 1; got {self.class_weight}.")
        if self.class_weight is not None and self.sampler == "class_pure":
            _refuse("class_weight", "must be left out for batches of one class; or use `sampler=random`.")
        if self.class_weight is not None and self.sampler == "balanced":
            _refuse("class_weight", "must be left out with `sampler=balanced`, or it would balance twice.")

    def _unused(self) -> list[str]:
        """Names of settings that the method does not use, and that have another value than without them."""
        method = self.method_class()
        recipe = dataclasses.asdict(method.recipe(self.model))
        unused = {name for other in METHODS.values() for name in other.settings} - {*method.settings}
        unused |= {name for name in RATES if recipe[name] is None} if self.has_steps else recipe.keys()
        if not method.takes_head:
            unused |= {"head", "prior"}
        if not method.trains_model:
            unused.add("blend")
        without = recipe | {"head": "none"}
        return [
            field.name
            for field in dataclasses.fields(TuneConfig)
            if field.name in unused and getattr(self, field.name) not in (field.default, without.get(field.name))
        ]

    def with_method(self, method: str) -> TuneConfig:
        """Return the configuration for another method, with the default for settings that it does not use."""
        config = dataclasses.replace(self, method=method)
        return dataclasses.replace(config, **{name: getattr(TuneConfig, name) for name in config._unused()})

    # ---- files -------------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Settings that change the results, as plain values; a run can only be resumed with equal ones."""
        results = {field.name for field in dataclasses.fields(TuneConfig) if field.metadata.get("results", True)}
        values = {name: value for name, value in self._plain().items() if name in results}
        return values | {"cache_dtype": None if self.cache is None else self.cache_dtype}

    def _plain(self) -> dict[str, Any]:
        """Settings that a file may have, as values of JSON."""
        values = dataclasses.asdict(self)
        del values["trust"], values["resume"]
        return to_jsonable_python(values)

    def to_yaml(self) -> str:
        """Return the configuration as YAML, for `from_yaml`."""
        return yaml.safe_dump(self._plain(), sort_keys=False)

    @classmethod
    def from_yaml(cls, path: Path, *, trust: bool = False, given: Collection[str] = ()) -> TuneConfig:
        """Read a configuration from YAML or JSON, such as the config.yaml of a run.

        Args:
            path: The file.
            trust: Accept all sources that the file names, because the user trusts it or because nothing is loaded.
            given: Settings that the caller replaces; their sources are accepted.
        """
        try:
            values = yaml.safe_load(path.read_bytes())
        except OSError as error:
            raise InputError(f"{path}: can't be read ({error.strerror}).") from None
        except (ValueError, yaml.YAMLError) as error:
            raise InputError(f"{path}: not readable as YAML ({first_line(error)}).") from None
        if not isinstance(values, dict):
            raise InputError(f"{path}: expected a mapping of settings; got {type(values).__name__}.")
        if "trust" in values:
            raise InputError(f"{path}: trust is not taken from a file; remove it.")
        try:
            config = cls(**{str(name): value for name, value in values.items()})
        except ValidationError as error:
            wrong = setting_error(error)
            raise InputError(f"{path}: {wrong.about(wrong.argument)}") from None
        for name in (name for name in _SOURCES if name in values and name not in given):
            check_source(path, name, getattr(config, name) or "", trust)
        return config


def _refuse(argument: str, reason: str) -> NoReturn:
    raise InputError(reason, argument, "TuneConfig")


def setting_error(error: ValidationError) -> InputError:
    """Return the error of the first invalid setting, in one line."""
    errors = error.errors(include_url=False)
    setting = str(errors[0]["loc"][0])
    if errors[0]["type"] == "unexpected_keyword_argument":
        close = difflib.get_close_matches(setting, [field.name for field in dataclasses.fields(TuneConfig)], 1)
        hint = f"; did you mean {close[0]}?" if close else "."
        return InputError(f"unknown setting {setting!r}{hint}", function="TuneConfig")
    # a message for each type of a union
    expected = [re.sub("^Input (should be|is not) ", "", one["msg"]) for one in errors if one["loc"][0] == setting]
    got = repr(errors[0]["input"])
    return InputError(f"must be {' or '.join(dict.fromkeys(expected))}; got {got}.", setting, "TuneConfig")
