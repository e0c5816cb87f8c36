"""packed_layout against its definition."""

from __future__ import annotations

import itertools

import pytest
import torch

from skipkernels.ops.packed_layout import packed_layout
from tests.layouts import laid_out
from tests.ops.backends import GPU, INTERPRETED, Backend

# There are no C++ kernels.
pytestmark = pytest.mark.parametrize("backend", ["reference", INTERPRETED, GPU], indirect=True)

LENGTHS = torch.tensor([3, 1, 200, 2, 7, 1, 129])


def layout(class_ids: list[int], prefix_length: int, spare: int) -> tuple[list[int], list[int], list[int]]:
    """Row numbers, offsets and last rows: those of the prefix, of each class, and spare ones from the first row on."""
    starts = (prefix_length + LENGTHS.cumsum(0) - LENGTHS).tolist()
    suffixes = [range(starts[class_id], starts[class_id] + int(LENGTHS[class_id])) for class_id in class_ids]
    row_numbers = [*range(prefix_length), *itertools.chain(*suffixes), *range(spare)]
    offsets = [0, *itertools.accumulate(map(len, suffixes))]
    return row_numbers, offsets, [prefix_length + offset - 1 for offset in offsets[1:]]


@pytest.mark.parametrize("class_ids", [[2], [0, 1, 3, 6], [6, 2, 4], list(range(7)), [1, 1, 5]], ids=str)
@pytest.mark.parametrize(("P", "spare"), [(0, 0), (2, 0), (5, 1), (140, 300)])
def test_packed_layout(backend: Backend, class_ids, P, spare):
    """A program writes several hundred spare rows. The lengths are not contiguous."""
    expected = layout(class_ids, P, spare)
    ids, starts, lengths = (
        x.to(backend.device) for x in (torch.tensor(class_ids), P + LENGTHS.cumsum(0) - LENGTHS, LENGTHS)
    )
    found = packed_layout(ids, starts, laid_out(lengths, "every other row"), P, len(expected[0]))
    assert tuple(x.tolist() for x in found) == expected


def test_more_classes_than_are_packed(backend: Backend, monkeypatch):
    class_ids, lengths = (x.to(backend.device) for x in (torch.tensor([0, 2, 5]), LENGTHS))
    arguments = class_ids, lengths.cumsum(0), lengths, 4, 300
    packed = packed_layout(*arguments)
    monkeypatch.setattr("skipkernels.ops.packed_layout.MOST_PACKED", 2)
    assert all(map(torch.equal, packed, packed_layout(*arguments)))


@pytest.mark.parametrize("class_id", [-1, 7])
def test_ids_out_of_range_are_an_error(backend: Backend, class_id):
    if backend.name not in ("reference", "interpreter"):
        pytest.skip("an assertion stops the device")
    with pytest.raises(Exception, match=r"out of range|class_ids must be rows of lengths"):
        packed_layout(torch.tensor([2, class_id]), LENGTHS, LENGTHS, 0, 300)


def test_no_row_behind_the_last(backend: Backend, monkeypatch):
    """A caller may ask for fewer rows than the classes have, if it bounds them by those of different classes."""
    buffer = torch.full((40,), -1, device=backend.device)  # of which the result is the beginning
    fake = "skipkernels.ops.packed_layout._fake"
    monkeypatch.setattr(fake, lambda ids, *_: (buffer[:9], ids.new_empty(3), ids.new_empty(2)))
    ids, lengths = (x.to(backend.device) for x in (torch.tensor([4, 4]), LENGTHS))
    rows, _, _ = packed_layout(ids, lengths.cumsum(0) - lengths, lengths, 0, 9)
    assert rows.tolist() == [*range(206, 213), 206, 207] and (buffer[9:] == -1).all()


def test_opcheck(backend: Backend):
    ids, lengths = (x.to(backend.device) for x in (torch.tensor([0, 2, 4]), LENGTHS))
    backend.opcheck(packed_layout, (ids, lengths, lengths, 2, 300))
