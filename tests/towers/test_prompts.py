"""Layouts of prompts: packed rows, rows behind the last suffix, and shapes that depend on no data."""

from __future__ import annotations

import pytest
import torch

import skipkernels as sk
from skipkernels.testing import gradients
from skipkernels.towers.families.open_clip import OpenClipTextTower
from tests.models import tiny_batch, tiny_clip, tiny_tokens
from tests.reference_step import assert_close_by_name


def test_repeated_classes_with_rows_behind(monkeypatch):
    """More than there are classes: as many rows as the longest of all would not suffice."""
    monkeypatch.setattr("skipkernels.towers.prompts.counts_are_known", lambda device: False)
    clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(9), skip_layers=1)
    repeated = clip.encode_classes(torch.full((20,), 4))
    torch.testing.assert_close(repeated, clip.encode_classes(torch.tensor([4])).expand(20, -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("skip", [0, 1])
def test_step_with_rows_behind_has_same_gradients(monkeypatch, skip):
    """Rows behind the last suffix repeat others; they have no gradient, also where the embedding trains (skip = 0)."""
    images, labels = tiny_batch(3, 9)
    found = []
    for reads in (True, False):
        monkeypatch.setattr("skipkernels.towers.prompts.counts_are_known", lambda device, reads=reads: reads)
        clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(9), skip_layers=skip, keep_ratio=0.4)
        found.append(gradients(clip, clip(images, labels).loss))
    assert_close_by_name(found[1], found[0], tolerance=1e-13)


def test_layout_of_prompts_has_static_shapes():
    """On the meta device, a shape that depends on data is an error."""
    prompts_of_task = OpenClipTextTower(tiny_clip()).read_prompts(tiny_tokens(9))
    prompts_of_task.apply(lambda x: x.to("meta"))
    selected = prompts_of_task.select(torch.tensor([1, 4, 8], device="meta"))
    rows = prompts_of_task.most_rows[3]
    assert selected.row_numbers.shape == (rows,) and selected.offsets.shape == (4,)
    assert selected.pack(torch.zeros(3, 12, 8, device="meta")).shape == (rows, 8)
