"""The four protocols of CLIP fine-tuning: their training images and test sets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from ...formatting import escaped
from ...options import Protocol, Shots, Test, Validation
from .base import InputError, check_choice
from .files import format_names
from .images import Images, joined
from .registry import open_source
from .shots import class_sizes_note, few_shot, few_shot_note, hold_out
from .source import Source, Split
from .templates import Templates, prompts

VALIDATION = "validation"
"""Name of the validation images beside the names of the tests."""
VALIDATION_SHARE = 0.2
"""Share of the images of each class that are held out for validation by default."""


@dataclass(frozen=True)
class TestSet:
    """Test images of some classes.

    Attributes:
        name: "base", "new", "source" or "all".
        classes: Names by label.
        templates: Prompt templates. Training uses the first.
        images: Items are (image, label).
    """

    __test__ = False  # not a pytest class

    name: str
    classes: list[str]
    templates: tuple[str, ...]
    images: Images

    @property
    def prompts(self) -> tuple[list[str], ...]:
        """Prompts of all classes, in a list for each template."""
        return prompts(self.templates, self.classes)


@dataclass(frozen=True)
class Task:
    """Training images and test sets of a protocol.

    Attributes:
        name: Name of the dataset, as `open_source` takes it.
        protocol: The protocol.
        train: Items are (image, label), with the labels of `tests[0]`.
        tests: Test sets; the first has the classes of the training images. It has no images if all train.
        validation: Images with the classes of `tests[0]` that neither train nor test, to choose the best epoch; or
            None.
        notes: Remarks for the user on how the data were read, and on what trains and validates.
        held_out: Number of images at the end of `train` that were chosen for validation, of `train_on_validation`.
    """

    name: str
    protocol: Protocol
    train: Images
    tests: tuple[TestSet, ...]
    validation: TestSet | None = None
    notes: tuple[str, ...] = ()
    held_out: int = 0


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options of `load_task`: settings of `TuneConfig`, with other defaults, and two more.

    Attributes:
        max_classes: See `TuneConfig`. They are evenly spaced.
        train_on_validation: Append the validation images to the training images, as the last `held_out` ones.
        templates: The setting `template`.
        train: False: without training and validation images, to test a model on other data.
    """

    protocol: Protocol
    shots: Shots
    max_classes: int | None = None
    seed: int = 0
    validation: Validation = "none"
    train_on_validation: bool = False
    test: Test = "split"
    root: str | Path | None = None
    templates: Templates = None
    train: bool = True

    def check(self) -> None:
        """Raise an InputError if a value can't be used."""
        check_choice(self.protocol, Protocol, "protocol", "load_task")
        check_choice(self.test, Test, "test", "load_task")
        if isinstance(self.validation, str):
            check_choice(self.validation, get_args(Validation)[0], "validation", "load_task")
        elif not (isinstance(self.validation, float) and 0 < self.validation < 1):
            raise InputError(
                f"must be a share between 0 and 1, or a text; got {self.validation!r}.", "validation", "load_task"
            )
        for name, value, every, least in (("shots", self.shots, "all", 1), ("max_classes", self.max_classes, None, 2)):
            if value != every and not (type(value) is int and value >= least):
                raise InputError(f"must be a whole number, at least {least}; got {value!r}.", name, "load_task")
        if self.test == "none" and self.protocol != "few-shot":
            raise InputError(
                f"none needs `protocol=few-shot`; {self.protocol} is a comparison of tests.", "test", "load_task"
            )


def summarise(protocol: Protocol, accuracies: Mapping[str, float]) -> dict[str, float]:
    """Add the summary of a protocol to the accuracies of its test sets.

    For base-to-new it is "harmonic", the harmonic mean of base and new; the others have none.

    >>> summarise("base-to-new", {"base": 60.0, "new": 30.0})
    {'base': 60.0, 'new': 30.0, 'harmonic': 40.0}
    >>> summarise("base-to-new", {"base": 0.0, "new": 0.0})["harmonic"], summarise("few-shot", {"all": 50.0})
    (0.0, {'all': 50.0})
    """
    found = dict(accuracies)
    if protocol == "base-to-new":
        base, new = found["base"], found["new"]
        found["harmonic"] = 2 * base * new / (base + new) if base + new else 0.0
    return found


def load_task(
    data: str | Source,
    options: TaskOptions,
    *,
    transform: Callable | None = None,
    train_transform: Callable | None = None,
) -> Task:
    """Make the task of a protocol.

    - base-to-new: trains on the first half of the classes, and tests on "base" and "new" classes.
    - few-shot: trains on all classes, and tests on "all".
    - cross-dataset and domain-generalization: trains on all classes, and tests on "source", the dataset itself. A model
      is tested on other datasets by `evaluate_run`.

    Args:
        data: The dataset, as `open_source` takes it, or a source, such as one of `from_datasets`.
        options: Protocol, and choice of images and classes.
        transform: Applied to every image; default: none.
        train_transform: Applied to training images; default: `transform`.

    Raises:
        InputError: If there is no such dataset, or it can't be used with the protocol.

    Example:
        >>> options = TaskOptions(protocol="base-to-new", shots=4, max_classes=20, seed=1)
        >>> task = load_task("pictograms:food", options)
        >>> [(test.name, len(test.classes)) for test in task.tests], len(task.train), task.tests[1].prompts[0][0]
        ([('base', 10), ('new', 10)], 20, 'an icon of a hamburger')
    """
    options.check()
    source = data if isinstance(data, Source) else open_source(data, options.root, options.templates)
    notes: list[str] = []
    count, limit = len(source.classes), options.max_classes
    if count < 2:
        raise InputError(f"{source.name} has fewer than two classes. Add some.", "data", "load_task")
    if limit is not None and limit < count:
        source = source.subset_classes([position * count // limit for position in range(limit)])
        notes.append(f"{limit} of {count} classes, evenly spaced.")
    parts = _parts(source, options.protocol)
    tests = tuple(_test_set(name, part, transform, options.test) for name, part in parts.items())
    task = Task(source.name, options.protocol, Images([]), tests)
    if options.train:
        trained = next(iter(parts.values()))
        task = _with_training_images(task, trained, options, notes, transform, train_transform or transform)
    for test in tests:
        if len(test.classes) == 1:
            notes.append(f"{test.name} has only the class {test.classes[0]}, so all of its images count as correct.")
    shown = (*source.notes, *(f"{source.name}: {note}" for note in notes))
    return replace(task, notes=tuple(dict.fromkeys(map(escaped, shown))))


def _parts(source: Source, protocol: Protocol) -> dict[str, Source]:
    """Return the tests on the dataset itself by name; the first trains. By CoOp's rule the first half is base."""
    if protocol != "base-to-new":
        return {"all" if protocol == "few-shot" else "source": source}
    classes = range(len(source.classes))
    middle = math.ceil(len(classes) / 2)
    return {"base": source.subset_classes(classes[:middle]), "new": source.subset_classes(classes[middle:])}


def _test_set(name: str, source: Source, transform: Callable | None, test: Test) -> TestSet:
    images = Images([]) if test == "none" else source.images("test", transform)
    if test != "none" and not len(images):
        raise InputError(f"{source.name} has no test images of {format_names(source.classes)}. Add some.", "data")
    return TestSet(name, list(source.classes), source.templates, images)


def _with_training_images(
    task: Task,
    source: Source,
    options: TaskOptions,
    notes: list[str],
    transform: Callable | None,
    train_transform: Callable | None,
) -> Task:
    """Return a task with the training images of a source, and with validation images or those appended; add notes."""
    train, held_out = _train_and_held_out(source, options, notes)
    train, held_out = train.with_transform(train_transform), held_out.with_transform(transform)
    validation, appended = None, 0
    if len(held_out) and options.train_on_validation:
        train, appended = joined([train, held_out]), len(held_out)
    elif len(held_out):
        validation = TestSet(VALIDATION, list(source.classes), source.templates, held_out)
    kinds = {"training": train, "test": task.tests[0].images}
    sizes = class_sizes_note({kind: [source.classes[label] for label in part.labels] for kind, part in kinds.items()})
    if sizes is not None:
        notes.append(f"{sizes} Read the balanced accuracy; --class-weight balanced lets each class count the same.")
    return replace(task, train=train, validation=validation, held_out=appended)


def _train_and_held_out(source: Source, options: TaskOptions, notes: list[str]) -> tuple[Images, Images]:
    """Choose the training images, and the images that are held out for validation; add notes on the choice."""
    validation = options.validation
    on_split = validation == "split" or (validation == "auto" and source.has_split("val"))
    used: dict[Split, bool] = {"val": on_split, "test": options.test == "split"}
    unused = [split for split in used if source.has_split(split) and not used[split]]
    if unused and (source.hashed or options.test == "none"):
        counts = " and ".join(f"{len(source.images(split))} {split}" for split in unused)
        notes.append(f"the {counts} images train too, as they are not used otherwise.")
        source = source.train_on(unused)

    images = source.images("train")
    sizes = Counter(images.labels)
    without = [name for label, name in enumerate(source.classes) if not sizes[label]]
    if without:
        raise InputError(f"{source.name} has no training images of {format_names(without)}. Add some.", "data")
    if options.shots != "all":
        notes += filter(None, [few_shot_note(images.labels, source.classes, options.shots)])

    shots = max(sizes.values()) if options.shots == "all" else options.shots
    if validation == "none" or on_split:
        train = images.subset(few_shot(images.labels, images.names, shots, options.seed))
        held_out = source.images("val") if on_split else Images([])
        where = "of its val split."
        if on_split and not len(held_out):
            raise InputError(f"{source.name} has no val images. Use `validation=auto`, or add some.", "validation")
    else:
        share = VALIDATION_SHARE if isinstance(validation, str) else validation
        train, held_out = map(images.subset, hold_out(images.labels, images.names, shots, options.seed, share))
        where = "of its train split, which don't train."
        if not len(held_out):
            notes.append("no validation: no class has a second training image.")
    if len(held_out) and not options.train_on_validation:
        notes.append(f"validation on {len(held_out)} images {where}")
    return train, held_out
