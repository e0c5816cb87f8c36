"""Prompt templates: those of the papers, and given ones."""

from __future__ import annotations

import pytest

from skipkernels.app.data.coop import DATASETS
from skipkernels.app.data.templates import COOP, PAPER, resolve_templates


def test_template_sets_cover_all_datasets():
    assert PAPER.keys() == COOP.keys() == DATASETS.keys()
    for template in [*PAPER.values(), *COOP.values()]:
        assert resolve_templates(None, template) == (template,)


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
def test_resolve_templates(dataset, templates, wanted):
    assert resolve_templates(dataset, templates, "the thing {}.") == wanted
