"""The four protocols of CLIP fine-tuning: what is tuned on, and what is tested on."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from .base import InputError, LabelledDataset, escape_unprintable
from .few_shot import shortfall
from .files import shown
from .registry import open_source
from .source import Protocol, Source
from .templates import Templates

_WITH_TARGETS = ("cross-dataset", "domain-generalization")


@dataclass(frozen=True)
class TestSet:
    """Images to test on, of classes labelled from 0 in this order.

    Attributes:
        name: "base", "new", "source", "all", or the name of a target dataset or domain.
        classes: Their names.
        prompts: For each template, a prompt for each class; the first template is that of training.
        images: Items are (image, label).
    """

    __test__ = False  # pytest takes a class of this name for tests

    name: str
    classes: list[str]
    prompts: tuple[list[str], ...]
    images: LabelledDataset


@dataclass(frozen=True)
class Task:
    """Tune on some images of the classes of the first test set, and test on each of them.

    Attributes:
        name: Of the dataset, as `open_source` takes it.
        protocol: Which of them.
        train: Items are (image, label), labels those of `tests[0]`.
        tests: Test sets; the first has the classes that are tuned on.
        notes: What a user should be told of how the data were read.
    """

    name: str
    protocol: Protocol
    train: LabelledDataset
    tests: tuple[TestSet, ...]
    notes: tuple[str, ...] = ()


def split_base_new(classes: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """CoOp's rule: of the classes in order, the first half is base (the larger one if the number is odd).

    >>> split_base_new(["a", "b", "c"])
    (['a', 'b'], ['c'])
    """
    middle = math.ceil(len(classes) / 2)
    return list(classes[:middle]), list(classes[middle:])


def summarise(protocol: Protocol, accuracies: Mapping[str, float]) -> dict[str, float]:
    """The accuracies of the test sets of a task, in their order, and what the protocol reports of them.

    That is for base-to-new "harmonic", the harmonic mean; for cross-dataset and domain-generalization "targets", the
    mean over all test sets but the first.

    Example:
        >>> summarise("base-to-new", {"base": 60.0, "new": 30.0})
        {'base': 60.0, 'new': 30.0, 'harmonic': 40.0}
        >>> summarise("cross-dataset", {"source": 90.0, "dtd": 40.0, "eurosat": 50.0})
        {'source': 90.0, 'dtd': 40.0, 'eurosat': 50.0, 'targets': 45.0}
    """
    found = dict(accuracies)
    if protocol == "base-to-new":
        base, new = found["base"], found["new"]
        found["harmonic"] = 2 * base * new / (base + new) if base + new else 0.0
    elif protocol in _WITH_TARGETS:
        found["targets"] = statistics.fmean(list(accuracies.values())[1:])
    return found


def load_task(
    data: str | Source,
    *,
    protocol: Protocol,
    shots: int,
    classes: int | None,
    seed: int,
    root: str | Path | None = None,
    templates: Templates = None,
    targets: Sequence[str | Source] | None = None,
    transform: Callable | None = None,
    train_transform: Callable | None = None,
    download: bool = False,
) -> Task:
    """The task that a protocol makes of a dataset.

    - base-to-new: tuned on the first half of the classes (`split_base_new`), tested on "base" and "new" ones.
    - few-shot: tuned on all classes and tested on "all".
    - cross-dataset: tuned on the dataset and tested on it, "source", and on each target dataset. Targets are by default
      for coop:imagenet the ten other datasets of CoOp, and for glyphs the other blocks of 100 characters or more.
    - domain-generalization: the same, where targets have the same classes, or some of them, in other images. They are
      matched by name, and tested on among those that both have. Targets are by default for coop:imagenet its four
      variants. Of glyphs the domains are fonts: tuned on in the first that is held out, tested on in it and each other.

    Args:
        data: The dataset, as `open_source` takes it, or a source such as `from_datasets` makes.
        protocol: Which of them.
        shots: Training images of each class that is tuned on.
        classes: Most classes of each dataset, base and new together: evenly spaced ones are taken. None: all.
        seed: Chooses the training images.
        root: The folder of the datasets, for coop: and torchvision:.
        templates: One's own, of which the first is for training; or "paper" or "coop". By default the paper's.
        targets: Datasets to test on, as `data`, or fonts.
        transform: Applied to every image; without one, images are as the dataset has them.
        train_transform: Applied to training images in its place.
        download: Let torchvision fetch what is not there.

    Raises:
        InputError: If there is no such dataset, or too little of it.

    Example:
        >>> import skipkernels.experiments  # registers glyphs
        >>> task = load_task("glyphs:greek", protocol="base-to-new", shots=4, classes=20, seed=1)
        >>> [(test.name, len(test.classes)) for test in task.tests], len(task.train), task.tests[1].prompts[0][0]
        ([('base', 10), ('new', 10)], 40, 'the character greek small letter zeta.')
    """
    if protocol not in get_args(Protocol):
        raise InputError(f"--protocol must be one of {', '.join(get_args(Protocol))}; got {protocol!r}.")
    if classes is not None and classes < 2:
        raise InputError(f"--classes must be at least 2; got {classes}: one class alone is no task.")
    if targets and protocol not in _WITH_TARGETS:
        raise InputError(f"--targets: {protocol} has none. Leave it out, or choose {' or '.join(_WITH_TARGETS)}.")

    def opened(dataset: str | Source) -> Source:
        if isinstance(dataset, Source):
            return dataset
        return open_source(dataset, root, templates, download=download)

    source = opened(data)
    if len(source.classes) < 2:
        raise InputError(
            f"--data: {source.name} has fewer than two classes, so there is nothing to tell apart. Add some."
        )
    chosen = _evenly_spaced(source, classes)
    domains = chosen.domains if protocol == "domain-generalization" else {}
    if protocol == "base-to-new":
        base, new = split_base_new(range(len(chosen.classes)))
        parts = {"base": chosen.of_classes(base), "new": chosen.of_classes(new)}
    elif protocol == "few-shot":
        parts = {"all": chosen}
    else:
        parts = {"source": next(iter(domains.values()), chosen)}
    tests = [_test_set(name, part, transform) for name, part in parts.items()]
    tuned = next(iter(parts.values()))
    train = tuned.few_shot(shots, seed, train_transform or transform)

    if protocol in _WITH_TARGETS:
        wanted = targets or source.default_targets(protocol)
        with _told_of_targets("" if targets else " Or name those that you have with --targets."):
            if domains:
                others = _target_domains(domains, wanted)
            else:
                found = [opened(target) for target in wanted]
                names = _short_names([target.name for target in found])
                if protocol == "domain-generalization":
                    found = [_domain(target, source, chosen) for target in found]
                others = dict(zip(names, (_evenly_spaced(target, classes) for target in found), strict=True))
            tests += [_test_set(name, part, transform) for name, part in others.items()]
        parts |= others
    notes = [*source.notes, *(note for part in parts.values() for note in part.notes)]
    cut = f"{len(chosen.classes)} of {len(source.classes)} classes, evenly spaced"
    notes += [f"{source.name}: {cut}."] * (chosen is not source)
    few = shortfall(train.labels, tuned.classes, shots)
    notes += [f"{source.name}: {few}"] * (few is not None)
    notes += [
        f"{source.name}: {test.name} has one class alone, {test.classes[0]}, so all of its images count as right, "
        "whatever is tuned."
        for test in tests
        if len(test.classes) == 1
    ]
    return Task(source.name, protocol, train, tuple(tests), tuple(dict.fromkeys(map(escape_unprintable, notes))))


def _evenly_spaced(source: Source, classes: int | None) -> Source:
    """A source with some classes at most."""
    there = len(source.classes)
    if classes is None or classes >= there:
        return source
    return source.of_classes([position * there // classes for position in range(classes)])


def _test_set(name: str, source: Source, transform: Callable | None) -> TestSet:
    images = source.images("test", transform)
    if not len(images):
        raise InputError(f"--data: {source.name} has no test images of {shown(source.classes)}. Add some.")
    return TestSet(name, list(source.classes), source.prompts, images)


# ---- targets ---------------------------------------------------------------------------------------------------------


@contextmanager
def _told_of_targets(remedy: str) -> Iterator[None]:
    """What is wrong with a target is said of it, and not of the dataset that is tuned on."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("--data:", "--targets:", 1) + remedy) from error


def _short_names(specs: Sequence[str]) -> list[str]:
    """Names that tell datasets apart, in tables and as names of files: as much of the end of each as that takes.

    Raises:
        InputError: If two are the same.

    Example:
        >>> _short_names(["coop:dtd", "imagefolder:/data/office"])
        ['dtd', 'office']
        >>> _short_names(["imagefolder:office/amazon/images", "imagefolder:office/dslr/images"])
        ['amazon-images', 'dslr-images']
    """
    words = [[re.sub(r"[^\w.+-]", "-", word) for word in re.split(r"[:/\\]+", spec) if word] for spec in specs]
    for depth in range(1, max(map(len, words)) + 1):
        names = ["-".join(of_one[-depth:]) for of_one in words]
        if len({*names, "source", "targets"}) == len(names) + 2:
            return names
    raise InputError(f"--targets: two of {shown(specs)} are the same. Name each once.")


def _target_domains(domains: Mapping[str, Source], targets: Sequence[str | Source]) -> dict[str, Source]:
    """The domains that `targets` names, without the first, which is trained on."""
    home, *others = domains
    names = list(map(str, targets))
    if len(set(names)) < len(names) or not set(names) <= set(others):
        raise InputError(
            f"--targets: {domains[home].name} trains on its domain {home} and tests on {', '.join(others)}, each once; "
            f"got {' '.join(names)}."
        )
    return {name: domains[name] for name in names}


def _domain(target: Source, source: Source, chosen: Source) -> Source:
    """The classes of a target that are tuned on, in their order and by their names.

    Args:
        target: Images to test on.
        source: Whose classes all of the target's have to be among.
        chosen: The same with the classes that are tuned on.
    """
    for one in (source, target):
        twice = [name for name, key in zip(one.classes, one.keys, strict=True) if one.keys.count(key) > 1]
        if twice:
            raise InputError(f"--data: {one.name} has two classes {twice[0]!r}, which no name can match. Rename one.")
    unknown = [name for name, key in zip(target.classes, target.keys, strict=True) if key not in source.keys]
    if unknown:
        raise InputError(
            f"--data: {target.name} has classes that {source.name} doesn't have: {shown(unknown)}. Leave them out, or "
            "name them as there."
        )
    label_of = {key: label for label, key in enumerate(target.keys)}
    common = [(label_of[key], name) for key, name in zip(chosen.keys, chosen.classes, strict=True) if key in label_of]
    if not common:
        raise InputError(f"--data: {target.name} has none of the classes that are tuned on. Raise --classes.")
    return replace(target.of_classes([label for label, _ in common]), classes=tuple(name for _, name in common))
