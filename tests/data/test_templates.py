"""Templates of the papers, and one's own."""

from __future__ import annotations

import pytest
from pictures import refused

from skipkernels.data.coop import DATASETS
from skipkernels.data.templates import COOP, PAPER, templates_of

PHOTO = "a photo of a {}."


def test_every_dataset_has_both():
    assert PAPER.keys() == COOP.keys() == DATASETS.keys()
    for template in [*PAPER.values(), *COOP.values()]:
        assert templates_of(None, template) == (template,)


def test_where_the_sets_differ():
    differ = {name for name in DATASETS if PAPER[name] != COOP[name]}
    assert differ == {
        *("caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft", "dtd", "ucf101"),
        *("imagenet_sketch", "imagenet_a", "imagenet_r"),
    }
    assert PAPER["ucf101"] == "a photo of a {}, a type of sport."
    assert COOP["ucf101"] == "a photo of a person doing {}."


@pytest.mark.parametrize(
    ("dataset", "templates", "wanted"),
    [
        ("eurosat", None, ("a centered satellite photo of {}.",)),
        ("food101", "paper", ("a photo of the nice {}.",)),
        ("food101", "coop", ("a photo of {}, a type of food.",)),
        ("food101", ["coop"], ("a photo of {}, a type of food.",)),
        (None, "coop", ("the thing {}.",)),
        (None, None, ("the thing {}.",)),
        ("food101", "my {}!", ("my {}!",)),
        ("food101", ("{}", "two {}"), ("{}", "two {}")),
    ],
)
def test_which_are_taken(dataset, templates, wanted):
    assert templates_of(dataset, templates, "the thing {}.") == wanted


@pytest.mark.parametrize("wrong", ["none", "", "{} and {}", "{name}", "{0}", "a {} {", "{{}}", "}{", ["a {}", "b"]])
def test_what_is_no_template(wrong):
    got = wrong[-1] if isinstance(wrong, list) else wrong
    with refused("--template", "paper or coop", PHOTO, repr(got)):
        templates_of("dtd", wrong)


@pytest.mark.parametrize("wrong", [("paper", "x {}"), ("a {}", "coop"), ("paper", "coop")])
def test_a_set_stands_alone(wrong):
    with refused("--template: paper and coop are sets", "can't be combined", f"got {wrong[0]!r}, {wrong[1]!r}."):
        templates_of("dtd", wrong)


def test_none_at_all():
    with refused("--template", "at least one", PHOTO):
        templates_of("dtd", [])
