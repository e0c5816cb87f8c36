"""Tasks: the training images and test sets of the four protocols of CLIP fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ...formatting import escaped
from ...options import Protocol, Test
from .base import InputError
from .choice import NOTHING, TaskOptions, choose_images
from .files import format_names
from .images import Images, joined
from .registry import open_source
from .shots import class_sizes_note
from .source import Source
from .templates import prompts

VALIDATION = "validation"
"""Name of the validation images beside the names of the tests."""


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
    source, notes = _limited(source, options.max_classes)
    parts = _parts(source, options.protocol)
    tests = tuple(_test_set(name, part, transform, options.test) for name, part in parts.items())
    chosen = choose_images(next(iter(parts.values())), options) if options.train else NOTHING
    train = chosen.train.with_transform(train_transform or transform)
    held_out = chosen.held_out.with_transform(transform)
    validation, appended = None, 0
    if len(held_out) and options.train_on_validation:
        train, appended = joined([train, held_out]), len(held_out)
    elif len(held_out):
        validation = replace(tests[0], name=VALIDATION, images=held_out)
    notes += [*chosen.notes, *_class_sizes(train, tests[0])]
    shown = (*source.notes, *(f"{source.name}: {note}" for note in notes))
    unique = tuple(dict.fromkeys(map(escaped, shown)))
    return Task(source.name, options.protocol, train, tests, validation, notes=unique, held_out=appended)


def _limited(source: Source, limit: int | None) -> tuple[Source, list[str]]:
    """Return a source with at most `limit` classes, evenly spaced, and a note."""
    count = len(source.classes)
    if count < 2:
        raise InputError(f"{source.name} has fewer than two classes. Add some.", "data", "load_task")
    if limit is None or limit >= count:
        return source, []
    limited = source.subset_classes([position * count // limit for position in range(limit)])
    return limited, [f"{limit} of {count} classes, evenly spaced."]


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


def _class_sizes(train: Images, test: TestSet) -> list[str]:
    """Return a note if the classes of the training or test images differ in size."""
    labels = {"training": train.labels, "test": test.images.labels} if len(train) else {}
    sizes = class_sizes_note(labels, test.classes)
    if sizes is None:
        return []
    remedy = "--prior balanced with a head, or --class-weight balanced without one, lets each class count the same."
    return [f"{sizes} Read the balanced accuracy; {remedy}"]
