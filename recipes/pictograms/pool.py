"""Images to pre-train on and to measure on, chosen from the table (`table.py`) and kept in one file, pool.npz.

Held out of pre-training are the families of the tasks, drawings equal to one of theirs, and every icon with one of the
175 words that `names.held_out_words` draws.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import names, sets
from .table import BLANK, Icon, read_rows

NARROW_FAMILIES, NARROW_IMAGES, WIDE_IMAGES = 4, 40, 8  # families that draw a narrow name; images of a name at most
TEST_SETS = ("noto", "twemoji", "openmoji", "fluent-emoji-flat")


class Pool(NamedTuple):
    """Images with their names.

    Attributes:
        alpha: uint8 [M, S, S], the monochrome images, which come first.
        color: uint8 [N, S, S, 4], the others, RGBA with premultiplied alpha.
        label: int [M + N], index of an image's name in `names`.
        style: [M + N], word for an image's style, or "".
        names: [C], the narrow names first.
        narrow: Number of narrow names.
        test_images: uint8 [T, S, S, 4], drawings of the test sets.
        test_set: [T], set of each.
        test_name: [T], name of each.
        test_task: [T], task of each.
        test_group: [T], "narrow" or "wide" for names in the pool, "unknown" for names with a held-out word; or "".
    """

    alpha: np.ndarray
    color: np.ndarray
    label: np.ndarray
    style: np.ndarray
    names: np.ndarray
    narrow: int
    test_images: np.ndarray
    test_set: np.ndarray
    test_name: np.ndarray
    test_task: np.ndarray
    test_group: np.ndarray


def concrete_names(rows: Iterable[Icon]) -> dict[str, str]:
    """Task by name, of the names in all four test sets and in one of the categories of tasks."""
    by_set: dict[str, dict[str, str]] = {prefix: {} for prefix in TEST_SETS}
    for row in rows:
        if row.set in by_set:
            by_set[row.set][row.name] = row.category
    shared = set.intersection(*(set(found) for found in by_set.values()))
    task = {category: task for task, category in sets.TASKS.items()}
    return {name: task[c] for name, c in by_set["noto"].items() if name in shared and c in task}


def training_rows(rows: list[Icon], digests: np.ndarray, held_out: Collection[str]) -> list[int]:
    """Indices of the icons that may be trained on, each drawing of a name once."""
    seen = {(digest, "") for row, digest in zip(rows, digests.tolist(), strict=True) if row.family in sets.HELD_OUT}
    found = []
    for index, (row, digest) in enumerate(zip(rows, digests.tolist(), strict=True)):
        usable = row.family not in sets.HELD_OUT and row.set not in sets.TEST_ONLY and names.is_word_name(row.name)
        if not usable or digest <= BLANK or seen & {(digest, ""), (digest, row.name)}:
            continue
        if not names.has_word(row.name, held_out):
            seen.add((digest, row.name))
            found.append(index)
    return found


def choose(rows: list[Icon], usable: Iterable[int]) -> tuple[list[str], int, list[int]]:
    """Return the names, how many of them are narrow, and the indices of the chosen images.

    The images of a name are taken from its families in turn.
    """
    by_name: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index in usable:
        by_name[rows[index].name][rows[index].family].append(index)
    rng = random.Random(0)
    chosen = []
    for families in by_name.values():
        most = NARROW_IMAGES if len(families) >= NARROW_FAMILIES else WIDE_IMAGES
        ranked = [
            (rank, rng.random(), index)
            for members in families.values()
            for rank, index in enumerate(rng.sample(members, len(members)))
        ]
        chosen += [index for _, _, index in sorted(ranked)[:most]]
    is_wide = {name: len(families) < NARROW_FAMILIES for name, families in by_name.items()}
    ordered = sorted(by_name, key=lambda name: (is_wide[name], name))
    return ordered, len(ordered) - sum(is_wide.values()), chosen


def build(folder: Path, hold_out_words: bool = True) -> Pool:
    """Choose the images of the table in a folder."""
    rows, digests = read_rows(folder), np.load(folder / "digests.npy")
    images = np.load(folder / "images.npy", mmap_mode="r")
    concrete = concrete_names(rows)
    words = names.held_out_words(concrete)
    ordered, narrow, chosen = choose(rows, training_rows(rows, digests, words if hold_out_words else ()))
    chosen.sort(key=lambda index: (rows[index].mono == "0", index))
    monochrome = sum(rows[index].mono == "1" for index in chosen)
    place = {name: i for i, name in enumerate(ordered)}
    test = [i for i, row in enumerate(rows) if row.set in TEST_SETS and row.name in concrete]
    in_pool = {name: "narrow" if i < narrow else "wide" for name, i in place.items()}
    return Pool(
        alpha=images[chosen[:monochrome], :, :, 3],
        color=images[chosen[monochrome:]],
        label=np.array([place[rows[i].name] for i in chosen]),
        style=np.array([rows[i].style for i in chosen]),
        names=np.array(ordered),
        narrow=narrow,
        test_images=images[test],
        test_set=np.array([rows[i].set for i in test]),
        test_name=np.array([rows[i].name for i in test]),
        test_task=np.array([concrete[rows[i].name] for i in test]),
        test_group=np.array(
            ["unknown" if names.has_word(rows[i].name, words) else in_pool.get(rows[i].name, "") for i in test]
        ),
    )


def load(path: Path) -> Pool:
    """Read a pool file."""
    with np.load(path) as arrays:
        return Pool(**{**arrays, "narrow": int(arrays["narrow"])})


def save(path: Path, pool: Pool) -> None:
    """Write a pool file."""
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, **pool._asdict())
    partial.replace(path)
