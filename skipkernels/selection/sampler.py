"""CSkip: selection of the classes of a step.

The published policy draws each rank of the tail independently, once per run. The default policy draws in each step by
systematic sampling, so that the number of drawn ranks is Σq rounded down or up; the step of a CUDA graph, which needs
one K, draws round(Σq) ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from ..ops.class_scores import classes_at_ranks as _at_ranks
from ..options import Tail
from .probabilities import base_keep, bounded, inclusion_probabilities, tail_probabilities
from .rank_table import Intervals, RankTable


class ClassSelection(NamedTuple):
    """Kept classes of a step.

    Attributes:
        class_ids: [K] int64, ascending.
        targets: [B] int64, positions of the labels in `class_ids`: class_ids[targets] = labels. Of labels [B, C] their
            columns [B, K].
    """

    class_ids: Tensor
    targets: Tensor


def _is(kind: Any, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "keep_ratio": (
        lambda x: _is(Real, x) and (0 < x <= 1 or (x > 1 and float(x).is_integer())),
        "above 0 (a share up to 1, or a whole number of classes)",
    ),
    "max_keep": (lambda x: _is(Integral, x) and x >= 1, "at least 1, a whole number"),
    "decay": (lambda x: _is(Real, x) and x > 0 and math.isfinite(x), "above 0 and finite"),
    "tail": (lambda x: x in get_args(Tail), f"one of {', '.join(get_args(Tail))}"),
    "max_tail": (lambda x: x is None or (_is(Integral, x) and x >= 0), "at least 0, or None"),
}


@dataclass
class RankSampler:
    """Sampler of the ranks [K] that are kept in a step, by one of two policies.

    Arguments can be changed between steps, for example `sampler.decay = 0.5`, from the next draw on.

    Args:
        keep_ratio: Below 1, the share of the classes that is always kept; above 1, their number. 1 keeps every class,
            whatever `max_keep` is.
        max_keep: Largest number of classes that are always kept.
        decay: λ. The probability to keep a rank of the tail (the other classes) falls exponentially; the larger λ is,
            the more are kept.
        tail: "resample" draws ⌊Σq⌋ or ⌈Σq⌉ ranks of the tail in each step by systematic sampling, from one uniform
            number: each rank has its probability q. In a CUDA graph it draws round(Σq), see `reserve`. "fixed" draws
            each rank of the tail once, independently, and keeps the result for the run, as published.
        generator: Random generator; by default a new one with seed 0.
        max_tail: Upper bound on Σq, the expected number of classes drawn from the tail; q is scaled down if Σq exceeds
            it (`bounded`). "resample" then draws at most `max_tail` classes, "fixed" `max_tail` on average. With None,
            the default, the tail grows with C as published, to 6 % of a million classes. A bound changes the method.
    """

    keep_ratio: float = 0.5
    max_keep: int = 50
    decay: float = 0.3
    tail: Tail = "resample"
    generator: torch.Generator | None = None
    max_tail: int | None = None

    def __post_init__(self) -> None:
        self._min_keep = 1
        self._plan: tuple[Any, Tensor] | None = None  # q, and the values that it was computed from
        self._fixed: Tensor | None = None  # the uniform number of each rank of the tail
        # By `constant`: if all draws have the same size.
        self._intervals: dict[bool, tuple[Tensor, torch.device, Intervals]] = {}  # q, device, intervals
        self._tables: dict[bool, RankTable] = {}
        self._shares = False  # within `same_classes`
        self._shared: Tensor | None = None  # [K], the classes of the first step there

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _RANGES and not _RANGES[name][0](value):
            raise ValueError(f"RankSampler: {name} must be {_RANGES[name][1]}; got {value!r}.")
        if name == "generator":
            value = torch.Generator().manual_seed(0) if value is None else value
            if not isinstance(value, torch.Generator):
                raise TypeError(
                    f"RankSampler: generator must be a torch.Generator; got {value!r}. Use "
                    "torch.Generator().manual_seed(0)."
                )
        super().__setattr__(name, value)

    def plan(self, num_classes: int, batch_size: int) -> tuple[int, Tensor]:
        """Return m, raised so that every label of a batch fits, and the probabilities q of the tail.

        m is computed for the largest batch so far, so a smaller last batch of an epoch keeps the same number of
        classes.
        """
        min_keep = max(self._min_keep, batch_size)
        keep = max(base_keep(num_classes, self.keep_ratio, self.max_keep), min(num_classes, min_keep))
        key = num_classes, keep, self.decay, self.max_tail
        if self._plan is None or self._plan[0] != key:
            self._plan = key, bounded(tail_probabilities(num_classes - keep, self.decay), self.max_tail)
        return keep, self._plan[1]

    def expected_keep(self, num_classes: int, batch_size: int = 1) -> int:
        """Return m + round(Σq): K in a CUDA graph, elsewhere the rounded mean of K.

        >>> [RankSampler().expected_keep(C) for C in (1000, 500, 199, 98, 51, 24, 19, 5)]
        [107, 77, 59, 52, 28, 13, 11, 4]
        >>> RankSampler().expected_keep(1_000_000), RankSampler(max_tail=1000).expected_keep(1_000_000)
        (60047, 1050)
        """
        keep, q = self.plan(num_classes, batch_size)
        return keep + round(q.sum().item())

    def select(self, scores: Tensor, labels: Tensor, at_most: int | None = None) -> ClassSelection:
        """Select the classes of a step: those at the drawn ranks of descending scores.

        Args:
            scores: [C]; +∞ for the classes of the labels, as of `functional.class_scores`.
            labels: [B] int64, classes of the images; or [B, C], not 0 where an image has a class.
            at_most: Bound of the number of different labels: B for [B]; of [B, C] they are counted by default, on a GPU
                by a host sync.
        """
        if self._shared is not None:
            return self._select_again(scores, labels)
        count = len(labels) if at_most is None else at_most
        if labels.ndim == 2 and at_most is None:
            count = max(count, int((scores == math.inf).sum()))
        self._refuse_recomputation(len(scores), count)
        ranks = self.draw_on(scores.device, len(scores), count)  # [K]
        if labels.ndim == 1:
            selection = ranked_selection(scores, labels, ranks)
        else:
            class_ids = classes_at_ranks(scores, ranks)  # [K]
            selection = ClassSelection(class_ids, labels.index_select(1, class_ids))
        if self._shares:
            self._shared = selection.class_ids
        return selection

    @property
    def shares_classes(self) -> bool:
        """True within `same_classes`."""
        return self._shares

    @contextmanager
    def same_classes(self) -> Iterator[None]:
        """Select the classes of the first training step for all steps of the context, with one draw.

        The loss of a batch is then a function of the weights, as SAM, the closure of LBFGS and the two forward passes
        of R-Drop need it. Labels of later steps must be among these classes: a ValueError on the CPU, and a device-side
        assertion on a GPU. Graphed steps are refused.

        Example:
            >>> sampler, labels = RankSampler(), torch.tensor([3, 7])
            >>> scores = torch.rand(100).index_fill(0, labels, torch.inf)
            >>> with sampler.same_classes():
            ...     first, second = sampler.select(scores, labels), sampler.select(scores, labels)
            >>> first.class_ids.equal(second.class_ids)
            True
        """
        if self._shares:
            raise RuntimeError("RankSampler: same_classes() cannot be nested. Leave the outer context first.")
        self._shares = True
        try:
            yield
        finally:
            self._shares, self._shared = False, None

    def _select_again(self, scores: Tensor, labels: Tensor) -> ClassSelection:
        """Select the classes of the first step within `same_classes`, which must have all labels."""
        class_ids = self._shared
        assert class_ids is not None
        missing = (scores == math.inf).index_fill(0, class_ids, False)  # [C]
        expected = "within same_classes() labels must be among the classes that its first step kept"
        if missing.device.type != "cpu":
            torch._assert_async(~missing.any(), f"RankSampler: {expected}.")
        elif missing.any():
            raise ValueError(
                f"RankSampler: {expected}, {len(class_ids)} of {len(missing)}; got {missing.count_nonzero()} others, "
                f"such as {int(missing.nonzero()[0])}. Enter same_classes() again for each batch."
            )
        targets = torch.searchsorted(class_ids, labels) if labels.ndim == 1 else labels.index_select(1, class_ids)
        return ClassSelection(class_ids, targets)

    def _refuse_recomputation(self, num_classes: int, labels: int) -> None:
        """Raise a RuntimeError within a backward pass, where a step would draw other classes than the first time."""
        if torch._C._current_graph_task_id() != -1 and self.plan(num_classes, labels)[0] < num_classes:
            raise RuntimeError(
                "SkipCLIP: the step was called again within a backward pass, as activation checkpointing does; it "
                'would draw other classes than the first time. Use memory="min" instead.'
            )

    def draw(self, num_classes: int, batch_size: int) -> Tensor:
        """Draw the kept ranks [K] of a step, int64, ascending, on the device of the generator.

        A generator on a GPU costs a host sync, to read K.
        """
        certain, intervals = self._certain(num_classes, batch_size, constant=False)
        if intervals is None:
            return certain
        start = self._uniform()
        return torch.cat([certain, len(certain) + intervals.draw(start)[: intervals.count(start.item())]])  # [K]

    def draw_on(self, device: torch.device, num_classes: int, batch_size: int) -> Tensor:
        """Draw as `draw` does, for a device: on a GPU from a table of the ranks of many steps."""
        assert self.generator is not None
        if device.type == "cpu" or self.generator.device.type != "cpu":
            return self.draw(num_classes, batch_size)
        return self._reserve(device, num_classes, batch_size, constant=False).current()

    def reserve(self, device: torch.device, num_classes: int, batch_size: int) -> None:
        """Draw the kept ranks of a step from a CPU generator, and copy them to where a CUDA graph reads them (`take`).

        K is the same in every step: "resample" draws round(Σq) ranks of the tail, each with its entry of
        `inclusion_probabilities` as probability. The ranks of many steps, drawn with a copy of the generator, are
        copied to the device together; the generator itself advances by one number in each step, as in `draw`.
        """
        table = self._reserve(device, num_classes, batch_size, constant=True)
        table.row.copy_(table.current())

    def _reserve(self, device: torch.device, num_classes: int, batch_size: int, *, constant: bool) -> RankTable:
        assert self.generator is not None
        certain, intervals = self._certain(num_classes, batch_size, constant)
        table = self._tables.get(constant)
        if table is None or not table.fits(device, certain, intervals):
            table = self._tables[constant] = RankTable(device, certain, intervals)
        if intervals is not None:
            start = self._uniform()
            # Another number than the row was drawn with: the generator was seeded, or continues from a checkpoint.
            if table.starts[table.next : table.next + 1] != [start.item()]:
                table.fill(start, self.generator)
            table.next += 1
        return table

    def take(self) -> Tensor:
        """Return the reserved ranks [K], always at the same address."""
        return self._tables[True].row

    def _uniform(self) -> Tensor:
        assert self.generator is not None
        return torch.rand((), generator=self.generator, dtype=torch.float64, device=self.generator.device)

    def _certain(self, num_classes: int, batch_size: int, constant: bool) -> tuple[Tensor, Intervals | None]:
        """Return the ranks that this step certainly keeps, and the intervals that the others are drawn from, if any.

        If `constant`, all draws have the same size.
        """
        assert self.generator is not None
        keep, q = self.plan(num_classes, batch_size)
        self._min_keep = max(self._min_keep, batch_size)
        device = self.generator.device
        if self.tail == "fixed" and len(q):
            if self._fixed is None or len(self._fixed) != len(q):
                self._fixed = torch.rand(q.shape, generator=self.generator, dtype=q.dtype, device=device)  # [tail]
            kept = (self._fixed.to(device) < q.to(device)).nonzero().squeeze(1)  # [n], places in the tail
            return torch.cat([torch.arange(keep, device=device), keep + kept]), None  # [K]
        of, on, intervals = self._intervals.get(constant, (None, None, None))
        if of is not q or on != device or intervals is None:
            ends = (inclusion_probabilities(q) if constant else q).cumsum(0)  # [tail]
            # Rounded: a sum that is a whole number up to rounding has one size of draws.
            total = round(ends[-1].item(), 0 if constant else 9) if len(q) else 0.0
            intervals = Intervals(torch.arange(keep, device=device), ends.to(device), total)
            self._intervals[constant] = q, device, intervals
        return intervals.certain, intervals if intervals.total else None

    def options(self) -> dict[str, Any]:
        """Return the arguments by name, except the generator."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "generator"}

    def fingerprint(self) -> bytes:
        """Return everything that the next draw depends on as bytes."""
        assert self.generator is not None
        return repr((self.options(), self._min_keep)).encode() + self.generator.get_state().numpy().tobytes()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of the draws, for `load_state_dict`, as CPU tensors."""
        assert self.generator is not None
        state = {"generator": self.generator.get_state(), "min_keep": torch.tensor(self._min_keep)}
        return state if self._fixed is None else state | {"fixed": self._fixed.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from the result of `state_dict`.

        Raises:
            ValueError: If it is not the state of a generator on this device.
        """
        assert self.generator is not None
        try:
            self.generator.set_state(state["generator"])
            self._min_keep, fixed = int(state["min_keep"]), state.get("fixed")
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"RankSampler: the state is not that of a generator on {self.generator.device}: {error}."
            ) from error
        if fixed is not None and fixed.dtype == torch.bool:  # a mask of an earlier version: 0 is below q, 1 is not
            fixed = 1.0 - fixed.double()
        self._fixed = None if fixed is None else fixed.to(self.generator.device)

    def __getstate__(self) -> dict[str, Any]:
        # A generator cannot be pickled; its device and state can. The state is pickled as bytes, because a spawned
        # process would open the shared memory of a tensor after this process has freed it.
        assert self.generator is not None
        generator = self.generator.device, self.generator.get_state().numpy().tobytes()
        return vars(self) | {"generator": generator, "_tables": {}, "_shared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        device, data = state["generator"]
        generator = torch.Generator(device)
        generator.set_state(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        vars(self).update(state | {"generator": generator})


def select_ranks(scores: Tensor, labels: Tensor, ranks: Tensor) -> ClassSelection:
    """Return the classes at the given ranks, ordered by descending score with all labels first.

    Args:
        scores: [C], any floating dtype. NaN ranks last.
        labels: [B] int64, classes of the images.
        ranks: [K] int64, distinct; must contain all ranks below the number of distinct labels.

    Returns:
        ClassSelection: `class_ids` [K] ascending and `targets` [B], int64, with class_ids[targets] = labels.

    Example:
        >>> scores = torch.tensor([0.1, 0.9, 0.3, 0.8])
        >>> select_ranks(scores, torch.tensor([2, 2]), torch.tensor([0, 1]))
        ClassSelection(class_ids=tensor([1, 2]), targets=tensor([1, 1]))
    """
    return ranked_selection(scores.scatter(0, labels, math.inf), labels, ranks)


def ranked_selection(scores: Tensor, labels: Tensor, ranks: Tensor) -> ClassSelection:
    """Return the result of `select_ranks` for scores [C] that are infinite for labels, as those of `class_scores`."""
    return ClassSelection(*_at_ranks(scores, ranks.to(scores.device, non_blocking=True), labels))


def classes_at_ranks(scores: Tensor, ranks: Tensor) -> Tensor:
    """Class ids [K] int64, ascending, at the given ranks [K] of descending scores [C]. NaN ranks last.

    >>> classes_at_ranks(torch.tensor([0.1, 0.9, 0.3, 0.8]), torch.tensor([0, 2]))
    tensor([1, 2])
    """
    return _at_ranks(scores, ranks.to(scores.device, non_blocking=True), None)[0]


def select_classes(scores: Tensor, labels: Tensor, **options: Any) -> ClassSelection:
    """Select the classes of one step: the top m by score, and others with a probability that falls with their rank.

    For several steps use `RankSampler`, which keeps its state between them and describes the options.

    Args:
        scores: [C], any floating dtype; NaN ranks last.
        labels: [B] int64 in [0, C); always kept.
        options: Arguments of `RankSampler`: keep_ratio, max_keep, decay, tail, generator, max_tail.

    Returns:
        ClassSelection: `class_ids` [K] int64 ascending, `targets` [B] int64.

    Source: Wu et al., "Skip Tuning", CVPR 2025, arXiv 2412.11509, section 4.

    Example:
        >>> selection = select_classes(torch.linspace(1, 0, 100), torch.tensor([99, 7]))
        >>> len(selection.class_ids), selection.class_ids[selection.targets].tolist()
        (53, [99, 7])
    """
    if scores.ndim != 1 or scores.numel() == 0:
        raise ValueError(f"select_classes: scores must be [C] with C ≥ 1; got {list(scores.shape)}.")
    if labels.ndim != 1 or labels.numel() == 0 or labels.dtype != torch.int64:
        raise ValueError(
            f"select_classes: labels must be int64 [B] with B ≥ 1; got {labels.dtype} {list(labels.shape)}."
        )
    if labels.device.type == "cpu" and not (0 <= int(labels.min()) and int(labels.max()) < len(scores)):
        raise ValueError(
            f"select_classes: labels must be in [0, C={len(scores)}); got {int(labels.min())} to {int(labels.max())}."
        )
    return select_ranks(scores, labels, RankSampler(**options).draw(scores.numel(), labels.numel()))
