"""CSkip: selection of the classes of a step.

    law → ranks [K] of the descending scores → classes at these ranks (`ops.class_scores.classes_at_ranks`)

Ranks are drawn on the CPU and copied to the device of the scores without a host sync.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor

from ..ops.class_scores import classes_at_ranks
from ..options import Tail
from .probabilities import RankLaw, base_keep

_law = functools.lru_cache(maxsize=8)(RankLaw)  # for their tensors


class ClassSelection(NamedTuple):
    """Kept classes of a step.

    Attributes:
        class_ids: [K] int64, ascending.
        targets: [B] int64, positions of the labels in `class_ids`: class_ids[targets] = labels. Of labels [B, C] their
            columns [B, K].
    """

    class_ids: Tensor
    targets: Tensor


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
            number: each rank has its probability q. In a CUDA graph it draws round(Σq), see `draw`. "fixed" draws
            each rank of the tail once, independently, and keeps the result for the run, as published.
        generator: Random generator; by default a new one with seed 0. One on a GPU costs a host sync in each draw.
        max_tail: Upper bound on Σq, the expected number of classes drawn from the tail; q is scaled down if Σq exceeds
            it (`bounded`). "resample" then draws at most `max_tail` classes, "fixed" `max_tail` on average. With None,
            the default, the tail grows with C as published, to 6 % of a million classes. A bound changes the method.

    Attributes:
        shared: Classes [K] of the first step within `same_classes`, or empty before it; None outside.
    """

    keep_ratio: float = 0.5
    max_keep: int = 50
    decay: float = 0.3
    tail: Tail = "resample"
    generator: torch.Generator | None = None
    max_tail: int | None = None

    def __post_init__(self) -> None:
        # Largest `max_labels` of the steps so far: a smaller last batch then keeps as many classes as the others.
        self._most_labels = 1
        self._fixed: Tensor | None = None  # uniform numbers of the last ranks, for `tail="fixed"`
        self.shared: list[Tensor] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "generator":
            value = torch.Generator().manual_seed(0) if value is None else value
        _check_option(name, value)
        super().__setattr__(name, value)

    # ---- number of classes -------------------------------------------------------------------------------------

    def law(self, num_classes: int, max_labels: int) -> RankLaw:
        """Return the law of the kept ranks of the next step; draws nothing.

        `max_labels` bounds the number of different labels: for one label per image, the batch size. m is raised so that
        every label is kept. A step with fewer than an earlier one, as for the last batch of an epoch, keeps as many.
        """
        m = base_keep(num_classes, self.keep_ratio, self.max_keep)
        keep = max(m, min(num_classes, max(self._most_labels, max_labels)))
        return _law(num_classes, keep, self.decay, self.max_tail)

    def expected_keep(self, num_classes: int, max_labels: int = 1) -> int:
        """Return m + round(Σq): K in a CUDA graph, elsewhere the rounded mean of K.

        >>> [RankSampler().expected_keep(C) for C in (1000, 500, 199, 98, 51, 24, 19, 5)]
        [107, 77, 59, 52, 28, 13, 11, 4]
        >>> RankSampler().expected_keep(1_000_000), RankSampler(max_tail=1000).expected_keep(1_000_000)
        (60047, 1050)
        """
        law = self.law(num_classes, max_labels)
        return law.keep + round(law.q.sum().item())

    # ---- classes of a step -------------------------------------------------------------------------------------

    def select(self, scores: Tensor, labels: Tensor, max_labels: int | None = None) -> ClassSelection:
        """Select the classes of a step: those at the drawn ranks of descending scores.

        Args:
            scores: [C]; +∞ for the classes of the labels, as of `functional.class_scores`. NaN ranks last.
            labels: [B] int64, classes of the images; or [B, C], not 0 where an image has a class.
            max_labels: Bound of the number of different labels: B for [B]; of [B, C] they are counted by default, on a
                GPU by a host sync.
        """
        if self.shared:
            return _select_again(self.shared[0], scores, labels)
        if max_labels is None:
            max_labels = len(labels)
            if labels.ndim == 2:
                max_labels = max(max_labels, int((scores == math.inf).sum()))
        ranks = self.draw(len(scores), max_labels)  # [K]
        ranks = pinned(ranks, scores.device).to(scores.device, non_blocking=True)
        if labels.ndim == 1:
            class_ids, targets = classes_at_ranks(scores, ranks, labels)  # [K], [B]
        else:
            class_ids, _ = classes_at_ranks(scores, ranks, None)  # [K]
            targets = labels.index_select(1, class_ids)  # [B, K]
        if self.shared is not None:
            self.shared.append(class_ids)
        return ClassSelection(class_ids, targets)

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
        if self.shared is not None:
            raise RuntimeError("RankSampler: same_classes() cannot be nested. Leave the outer context first.")
        self.shared = []
        try:
            yield
        finally:
            self.shared = None

    # ---- ranks -------------------------------------------------------------------------------------------------

    def draw(self, num_classes: int, max_labels: int, *, one_size: bool = False) -> Tensor:
        """Draw the kept ranks [K] of a step, int64, ascending, on the CPU.

        With `one_size` K is the same in every step, as a CUDA graph needs it: "resample" draws round(Σq) ranks of the
        tail, each with its entry of `inclusion_probabilities` as probability.
        """
        law = self.law(num_classes, max_labels)
        if torch._C._current_graph_task_id() != -1 and law.keep < num_classes:
            raise RuntimeError(
                "RankSampler: the step was called again within a backward pass, as activation checkpointing does; it "
                'would draw other classes than the first time. Use memory="min" instead.'
            )
        self._most_labels = max(self._most_labels, max_labels)
        if self.tail == "fixed" and len(law.q):
            if self._fixed is None or len(self._fixed) < len(law.q):
                self._fixed = self._uniform(len(law.q))
            # A larger batch keeps more of the first ranks, and the tail loses these.
            tail = (self._fixed[-len(law.q) :] < law.q).nonzero().squeeze(1)  # [n], places in the tail
        elif (intervals := law.intervals_of_one_size if one_size else law.intervals).total:
            tail = intervals.draw(self._uniform().item())  # [n]
        else:
            tail = torch.empty(0, dtype=torch.int64)
        return torch.cat([torch.arange(law.keep), law.keep + tail])  # [K]

    def _uniform(self, *shape: int) -> Tensor:
        device = self._random.device
        return torch.rand(shape, generator=self._random, dtype=torch.float64, device=device).cpu()

    @property
    def _random(self) -> torch.Generator:
        return cast(torch.Generator, self.generator)  # `__setattr__` replaces None

    # ---- state -------------------------------------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """Return the arguments by name, except the generator."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "generator"}

    def fingerprint(self) -> bytes:
        """Return what the classes of the next step depend on besides the scores, as bytes."""
        shared = None if self.shared is None else [x.tolist() for x in self.shared]
        state = self._random.get_state().numpy().tobytes()  # `_fixed` was drawn by this generator
        return repr((self.options(), self._most_labels, shared)).encode() + state

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of the draws, for `load_state_dict`, as CPU tensors."""
        state = {"generator": self._random.get_state(), "largest_batch": torch.tensor(self._most_labels)}
        return state if self._fixed is None else state | {"fixed": self._fixed}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from the result of `state_dict`.

        Raises:
            ValueError: If it is not the state of a generator on this device.
        """
        try:
            self._random.set_state(state["generator"])
            self._most_labels, self._fixed = int(state["largest_batch"]), state.get("fixed")
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"RankSampler: the state is not that of a generator on {self._random.device}: {error}."
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        # A generator cannot be pickled; its device and state can. The state is pickled as bytes, because a spawned
        # process would open the shared memory of a tensor after this process has freed it.
        generator = self._random.device, self._random.get_state().numpy().tobytes()
        return vars(self) | {"generator": generator, "shared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        device, data = state["generator"]
        generator = torch.Generator(device)
        generator.set_state(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        vars(self).update(state | {"generator": generator})


def _select_again(class_ids: Tensor, scores: Tensor, labels: Tensor) -> ClassSelection:
    """Select the classes [K] of an earlier step, among which all labels must be."""
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


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


# Conditions of the options of RankSampler, each with its text
_CONDITIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "keep_ratio": (
        lambda x: _is_real(x) and (0 < x <= 1 or (x > 1 and float(x).is_integer())),
        "above 0 (a share up to 1, or a whole number of classes)",
    ),
    "max_keep": (lambda x: _is_whole(x) and x >= 1, "at least 1, a whole number"),
    "decay": (lambda x: _is_real(x) and x > 0 and math.isfinite(x), "above 0 and finite"),
    "tail": (lambda x: x in get_args(Tail), f"one of {', '.join(get_args(Tail))}"),
    "max_tail": (lambda x: x is None or (_is_whole(x) and x >= 0), "at least 0, or None"),
    "generator": (lambda x: isinstance(x, torch.Generator), "a torch.Generator"),
}


def _check_option(name: str, value: Any) -> None:
    """Raise an error if the value of an option of RankSampler is out of its range."""
    if name in _CONDITIONS:
        is_valid, expected = _CONDITIONS[name]
        if not is_valid(value):
            kind = TypeError if name == "generator" else ValueError
            raise kind(f"RankSampler: {name} must be {expected}; got {value!r}.")


def pinned(ranks: Tensor, device: torch.device) -> Tensor:
    """Move ranks to memory from which a copy to the device does not wait."""
    return ranks.pin_memory() if device.type == "cuda" else ranks


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
    return RankSampler(**options).select(scores.scatter(0, labels, math.inf), labels)
