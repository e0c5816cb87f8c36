"""Layouts of prompts: packed rows, rows behind the last suffix, and shapes that depend on no data."""

from __future__ import annotations

import pytest
import torch

import skipkernels as sk
from skipkernels.towers.families.open_clip import OpenClipTextTower
from tests.models import tiny_batch, tiny_clip, tiny_tokens


def test_prompts_with_rows_behind_equal_packed(monkeypatch):
    """On a GPU the number of rows suffices for any K classes: counting those of these K would need a host sync."""
    model, tokens = tiny_clip(), tiny_tokens(9)
    tower = OpenClipTextTower(model)
    prompts, ids = tower.read_prompts(tokens), torch.tensor([1, 4, 8])
    rows = prompts.select(torch.arange(9), exact_rows=True).pack(tower.embed(tokens, prompts))

    def upper(class_ids):
        selected = prompts.select(class_ids)
        return tower.upper(rows[selected.row_numbers], selected)

    expected, exact = upper(ids), prompts.select(ids)
    monkeypatch.setattr("skipkernels.towers.text.counts_are_known", lambda device: False)
    selected = prompts.select(ids)
    longest = prompts.suffix_lengths.sort(descending=True).values[:3]
    assert selected.row_count == prompts.prefix_length + int(longest.sum()) > exact.row_count
    torch.testing.assert_close(upper(ids), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(upper(torch.arange(9)), torch.cat([upper(i) for i in torch.arange(9).split(1)]))
    part = selected.pack(tower.embed(tokens[ids], prompts))
    assert torch.equal(part[: exact.row_count], exact.pack(tower.embed(tokens[ids], prompts)))
    torch.testing.assert_close(tower.upper(part, selected), expected, rtol=1e-12, atol=1e-12)
    clip = sk.SkipCLIP(model, tokens, skip_layers=1)
    repeated = clip.encode_classes(torch.full((20,), 4))
    torch.testing.assert_close(repeated, clip.encode_classes(torch.tensor([4])).expand(20, -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("skip", [0, 1])
def test_step_with_rows_behind_has_same_gradients(monkeypatch, skip):
    """Rows behind the last suffix repeat others; they have no gradient, also where the embedding trains (skip = 0)."""
    images, labels = tiny_batch(3, 9)
    found = []
    for reads in (True, False):
        monkeypatch.setattr("skipkernels.towers.text.counts_are_known", lambda device, reads=reads: reads)
        clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(9), skip_layers=skip, keep_ratio=0.4)
        clip(images, labels).loss.backward()
        found.append({name: p.grad for name, p in clip.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-10, atol=1e-13)


def test_layout_of_prompts_has_static_shapes():
    """On the meta device, a shape that depends on data is an error."""
    prompts_of_task = OpenClipTextTower(tiny_clip()).read_prompts(tiny_tokens(9))
    prompts_of_task.apply(lambda x: x.to("meta"))
    selected = prompts_of_task.select(torch.tensor([1, 4, 8], device="meta"))
    rows = prompts_of_task.most_rows[3]
    assert selected.row_numbers.shape == (rows,) and selected.offsets.shape == (4,)
    assert selected.pack(torch.zeros(3, 12, 8, device="meta")).shape == (rows, 8)
