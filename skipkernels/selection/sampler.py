"""CSkip, class-wise skipping: selection of the classes of a step.

    law → ranks [K] of the descending scores → classes at these ranks (`ops.classes_at_ranks`)

Ranks are drawn on the CPU and copied to the device of the scores without a host sync.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from ..ops.classes_at_ranks import classes_at_ranks
from ..ops.launching import pinned
from ..options import Tail
from .probabilities import Intervals, RankLaw, base_keep

_law = functools.lru_cache(maxsize=8)(RankLaw)  # a pure function, of which most steps need the same tensors


class ClassSelection(NamedTuple):
    """Kept classes of a step.

    Attributes:
        class_ids: [K] int64, ascending.
        targets: [B] int64, positions of the labels in `class_ids`: class_ids[targets] = labels. Of labels [B, C] their
            columns [B, K].
    """

    class_ids: Tensor
    targets: Tensor


class RankSampler:
    """Sampler of the ranks [K] that are kept in a step, by one of two policies.

    Arguments can be changed between steps, for example `sampler.decay = 0.5`, from the next draw on.

    Args:
        keep_ratio: Below 1, the share of the classes that is always kept; above 1, their number. 1 keeps every class,
            whatever `max_keep` is.
        max_keep: Largest number of classes that are always kept; more if a batch has more labels.
        decay: λ. The probability to keep a rank of the tail (the other classes) falls exponentially; the larger λ is,
            the more are kept.
        tail: "resample" draws ⌊Σq⌋ or ⌈Σq⌉ ranks of the tail in each step by systematic sampling, from one uniform
            number: each rank has its probability q. In a CUDA graph it draws round(Σq), see `draw`. "fixed" draws
            each rank of the tail once, independently, and keeps the result for the run, as published; a longer tail,
            such as of more classes, is drawn again.
        generator: Random generator; by default a new one with seed 0. One on a GPU costs a host sync in each draw.
        max_tail: Upper bound on Σq, the expected number of classes drawn from the tail; q is scaled down if Σq exceeds
            it (`bounded`). "resample" then draws at most `max_tail` classes, "fixed" `max_tail` on average. With None,
            the default, the tail grows with C as published, to 6 % of a million classes. A bound changes the method.
    """

    def __init__(
        self,
        keep_ratio: float = 0.5,
        max_keep: int = 50,
        decay: float = 0.3,
        tail: Tail = "resample",
        generator: torch.Generator | None = None,
        max_tail: int | None = None,
    ):
        self.keep_ratio, self.max_keep = keep_ratio, max_keep
        self.decay, self.tail, self.max_tail = decay, tail, max_tail
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self._largest_batch = 1  # so far: a smaller last batch then keeps as many classes as the others
        self._fixed: Tensor | None = None  # uniform numbers of the last ranks, for `tail="fixed"`

    def __setattr__(self, name: str, value: Any) -> None:
        _check_option(name, value)
        if isinstance(value, Real) and not isinstance(value, int):  # a number of NumPy, or a fraction
            value = int(value) if isinstance(value, Integral) else float(value)
        super().__setattr__(name, value)

    # ---- classes of a step -------------------------------------------------------------------------------------

    def select(self, scores: Tensor, labels: Tensor, max_labels: int | None = None) -> ClassSelection:
        """Select the classes of a step: those at the drawn ranks of descending scores.

        Args:
            scores: [C]; +∞ for the classes of the labels, as of `functional.class_scores`. NaN ranks last.
            labels: [B] int64, classes of the images; or [B, C], not 0 where an image has a class.
            max_labels: Bound of the number of different labels of [B, C]. By default they are counted, on a GPU by a
                host sync.

        Source: Wu et al., "Skip Tuning", CVPR 2025, arXiv 2412.11509, section 4.

        Example:
            >>> labels = torch.tensor([99, 7])
            >>> scores = torch.linspace(1, 0, 100).index_fill(0, labels, math.inf)
            >>> selection = RankSampler().select(scores, labels)
            >>> len(selection.class_ids), selection.class_ids[selection.targets].tolist()
            (53, [99, 7])
        """
        if labels.ndim == 1:
            ranks = self.draw(len(scores), len(labels))  # [K]
            return ClassSelection(*classes_at_ranks(scores, _to_device_of(scores, ranks), labels))
        counted = int((scores == math.inf).sum()) if max_labels is None else 0
        ranks = self.draw(len(scores), len(labels) if max_labels is None else max_labels, counted=counted)  # [K]
        class_ids, _ = classes_at_ranks(scores, _to_device_of(scores, ranks), None)  # [K]
        return ClassSelection(class_ids, labels.index_select(1, class_ids))

    # ---- ranks -------------------------------------------------------------------------------------------------

    def draw(self, num_classes: int, max_labels: int, *, counted: int = 0, one_size: bool = False) -> Tensor:
        """Draw the kept ranks [K] of a step, int64, ascending, on the CPU.

        Args:
            num_classes: C.
            max_labels: Bound of the number of different labels by the size of the batch: for one label per image, B. A
                step with fewer than an earlier one, as for the last batch of an epoch, keeps as many classes.
            counted: Number of different labels of this batch, if it can be more; other steps do not keep as many.
            one_size: K is the same in every step, as a CUDA graph needs it: "resample" draws round(Σq) ranks of the
                tail, each with its entry of `inclusion_probabilities` as probability.
        """
        law = self.law(num_classes, max_labels, counted)
        if torch._C._current_graph_task_id() != -1 and law.keep < num_classes:
            raise RuntimeError(
                "RankSampler: the step was called again within a backward pass, as activation checkpointing does; it "
                'would draw other classes than the first time. Use memory="min" instead.'
            )
        self._largest_batch = max(self._largest_batch, max_labels)
        if self.tail == "fixed":
            tail = self._fixed_tail(law.q, num_classes, max_labels)
        else:
            tail = self._resampled_tail(law.intervals_of_one_size if one_size else law.intervals)
        return torch.cat([torch.arange(law.keep, device="cpu"), law.keep + tail])  # [K]

    def _fixed_tail(self, q: Tensor, num_classes: int, max_labels: int) -> Tensor:
        """Places in the tail [n] int64, of numbers that are drawn once, for the longest tail of this batch size."""
        if len(q) == 0:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        if self._fixed is None or len(self._fixed) < len(q):
            self._fixed = self._uniform(num_classes - self.law(num_classes, max_labels).keep)
        # With more labels than `_fixed` was drawn for, more of the first ranks are kept, and the tail loses these.
        return (self._fixed[-len(q) :] < q).nonzero().squeeze(1)

    def _resampled_tail(self, intervals: Intervals) -> Tensor:
        """Places in the tail [n] int64, drawn anew."""
        if intervals.total == 0:  # no number is drawn
            return torch.empty(0, dtype=torch.int64, device="cpu")
        return intervals.draw(self._uniform().item())

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64, device=self.generator.device).cpu()

    # ---- number of classes -------------------------------------------------------------------------------------

    def law(self, num_classes: int, max_labels: int, counted: int = 0) -> RankLaw:
        """Return the law of the kept ranks of the next step; draws nothing.

        m is raised so that every label is kept; see `draw` for `max_labels` and `counted`.
        """
        m = base_keep(num_classes, self.keep_ratio, self.max_keep)
        keep = max(m, min(num_classes, max(self._largest_batch, max_labels, counted)))
        return _law(num_classes, keep, self.decay, self.max_tail)

    def expected_keep(self, num_classes: int, max_labels: int = 1) -> int:
        """Return m + round(Σq), the rounded mean of K; with `tail="resample"` K in a CUDA graph.

        >>> [RankSampler().expected_keep(C) for C in (1000, 500, 199, 98, 51, 24, 19, 5)]
        [107, 77, 59, 52, 28, 13, 11, 4]
        >>> RankSampler().expected_keep(1_000_000), RankSampler(max_tail=1000).expected_keep(1_000_000)
        (60047, 1050)
        """
        law = self.law(num_classes, max_labels)
        return law.keep + round(law.q.sum().item())

    # ---- state -------------------------------------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """Return the arguments by name, except the generator."""
        return {name: getattr(self, name) for name in _CONDITIONS if name != "generator"}

    def identity(self) -> bytes:
        """Return what the classes of the next step depend on besides the scores, as bytes."""
        state = self.generator.get_state().numpy().tobytes()  # `_fixed` was drawn by this generator
        return repr((self.options(), self._largest_batch)).encode() + state

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of the draws, for `load_state_dict`, as CPU tensors."""
        state = {
            "generator": self.generator.get_state(),
            "largest_batch": torch.tensor(self._largest_batch, device="cpu"),
        }
        return state if self._fixed is None else state | {"fixed": self._fixed}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from the result of `state_dict`.

        Raises:
            ValueError: If it is not the state of a generator on this device.
        """
        try:
            tensors = {name: tensor.cpu() for name, tensor in state.items()}
            largest_batch = int(tensors["largest_batch"])
            self.generator.set_state(tensors["generator"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"RankSampler: the state is not that of a generator on {self.generator.device}: {error}."
            ) from error
        self._largest_batch, self._fixed = largest_batch, tensors.get("fixed")

    def __getstate__(self) -> dict[str, Any]:
        # The state of the generator as bytes: its own pickle has a tensor, and a spawned process would open the shared
        # memory of that after this process has freed it (github.com/pytorch/pytorch/issues/146828).
        generator = self.generator.device, self.generator.get_state().numpy().tobytes()
        return vars(self) | {"generator": generator}

    def __setstate__(self, state: dict[str, Any]) -> None:
        device, data = state["generator"]
        generator = torch.Generator(device)
        generator.set_state(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        vars(self).update(state | {"generator": generator})


def _to_device_of(scores: Tensor, ranks: Tensor) -> Tensor:
    return pinned(ranks, scores.device).to(scores.device, non_blocking=True)


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
