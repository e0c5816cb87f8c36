"""From a dataset to a store of features at the cut."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.filesize import decimal
from rich.progress import MofNCompleteColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from .. import console
from ..store import COMPUTED, DTYPES, Layout, StoreError, Writer
from ..store.shards import map_shard, quantise
from . import fingerprint
from .dataset_key import Files, Identity, Unidentifiable, identify
from .extract import Batch, batch_numbers, batches_of, loading_failed

if TYPE_CHECKING:
    from ..clip import SkipCLIP

_NAME_OF = {dtype: name for name, dtype in COMPUTED.items()}

SHARD_BYTES = 128 << 20
"""Of a shard, about: what a build that is killed makes again at most, and what it holds in memory twice."""


class Encoder:
    """Images to features at the cut, on the CPU: what SkipCLIP computes, from any thread.

    It runs on a copy of the modules below the cut that shares their weights and stays in evaluation mode, under the
    autocast that was on when it was made.
    """

    def __init__(self, clip: SkipCLIP):
        self.device = clip.prototypes.device
        self.image_size = clip.image_size
        self._lower = clip.lower_copy()
        on = torch.is_autocast_enabled(self.device.type)
        self._autocast = torch.get_autocast_dtype(self.device.type) if on else None

    @property
    def precision(self) -> str:
        """Of autocast."""
        return "none" if self._autocast is None else _NAME_OF[self._autocast]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """[n, 3, height, width] → [n, …]."""
        if images.shape[1:] != (3, *self.image_size):
            raise StoreError(
                f"FeatureCache.build: images must be [3, {self.image_size[0]}, {self.image_size[1]}], as the model "
                f"takes them; got {list(images.shape[1:])}. Give the dataset the model's own preprocessing."
            )
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
            return self._lower(images.to(self.device, non_blocking=True)).cpu()


@dataclass(frozen=True)
class Source:
    """What a store is made from, and how.

    Attributes:
        clip: The model.
        dataset: Of (image, label).
        dtype: How features are kept.
        views: How many of each image.
        first_view: Number of the first.
        batch_size: Images encoded at once.
        workers: Processes that load images.
        seed: Of random transforms.
        identity: Of the dataset.
        samples: Of the dataset, of `fingerprint.samples`.
        shard_bytes: Of a shard, about.
        labels: Of the images, where they are known: a view that gives others is refused.
    """

    clip: SkipCLIP
    dataset: Any
    dtype: str
    views: int
    first_view: int
    batch_size: int
    workers: int
    seed: int
    identity: Identity
    samples: list[dict[str, Any]]
    shard_bytes: int
    labels: Tensor | None = None

    def load(self, batches: list[range]) -> contextlib.closing[Generator[Batch, None, None]]:
        """Rows of these numbers; leaving the context ends the processes that load them."""
        how = {"seed": self.seed, "first_view": self.first_view, "workers": self.workers}
        return contextlib.closing(batches_of(self.dataset, batches, **how))

    def layout(self, encode: Encoder) -> Layout:
        """Of the store."""
        image = torch.zeros(1, 3, *self.clip.image_size)
        features = encode(image)[0]
        items = len(self.dataset)
        layout = Layout(
            rows=items * self.views,
            shape=tuple(features.shape),
            dtype=self.dtype,
            computed=_NAME_OF[features.dtype],
            shard_rows=1,
            labelled=True,
            fingerprint=fingerprint.of_model(self.clip)
            | {"number of images": items}  # which says more than a digest
            | of_dataset(self.identity)
            | {"number of views": self.views, "first view": self.first_view}
            | {"seed": self.seed, "batch size": self.batch_size, "autocast": encode.precision},
            notes={"probe": fingerprint.probe(self.clip), "samples": self.samples},
        )
        # A shard is whole batches, so that those of a build that is taken up again are the same.
        batches = max(self.shard_bytes // layout.row_bytes // self.batch_size, 1)
        return replace(layout, shard_rows=batches * self.batch_size)


def of_dataset(identity: Identity) -> dict[str, str | int]:
    """What of the dataset features depend on."""
    return {"images": identity.dataset, "image files": identity.files, "image transform": identity.transform}


def identity_of(dataset: Any, files: Files, name: str | None) -> Identity:
    """The identity of a dataset, or the name that it was given.

    Raises:
        StoreError: If it has none.
    """
    if name is not None:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise StoreError(f"FeatureCache: identity must be text in UTF-8; got {name!a}. Give another.") from None
        return Identity(f"named {name}", "", "")
    try:
        return identify(dataset, files)
    except (Unidentifiable, OSError) as error:
        raise StoreError(
            f"FeatureCache: this dataset can't be told from another: {error}. Pass identity=, a name that "
            "you change when its images or its transform change."
        ) from error


def check_first(folder: Path, source: Source, encode: Encoder) -> None:
    """Compute the first batch for nothing but to see that it can be, before what is there goes.

    Raises:
        StoreError: If an item of it, or its features, can't be used.
    """
    layout = source.layout(encode)
    layout.check_manifest(folder)
    rows = layout.rows_of(0)[: source.batch_size]
    with source.load([rows]) as loaded:
        _shard(layout, rows, loaded, encode, _Labels(source), lambda images: None)


def write_store(
    folder: Path,
    source: Source,
    encode: Encoder,
    *,
    resume: bool,
    overwrite: bool,
    progress: Callable[[int], None] | bool,
    on_loading: Callable[[], None] = lambda: None,
) -> None:
    """Make a store, or what is missing of it.

    Args:
        folder: Where.
        source: What of.
        encode: Images to features.
        resume: Keep what an earlier build left.
        overwrite: Begin anew.
        progress: Called with a number of images that are done, if it is a function; True shows a bar.
        on_loading: Called when the processes that load images have begun.

    Raises:
        StoreError: If that can't be done; what is there stays.
    """
    with _deaths_told(), _Shown(folder, source, progress) as shown:
        layout = source.layout(encode)
        with (
            Writer(folder, layout, resume=resume, overwrite=overwrite, on_bytes=shown.checked) as writer,
            ThreadPoolExecutor(1) as disk,
        ):
            layout, missing = writer.manifest.layout, writer.missing
            fingerprint.check_samples(layout, source.samples, folder)
            shown.begin(layout, missing)
            labels = _Labels(source)
            for number, there in enumerate(writer.manifest.shards):
                if there is not None:
                    labels.add(layout.rows_of(number), map_shard(folder, layout, number, there).labels)
            numbers = batch_numbers([layout.rows_of(number) for number in missing], source.batch_size)
            writing: Future[None] | None = None  # one shard goes to the disk while the next is computed
            with source.load(numbers) as loaded:
                on_loading()
                for number in missing:
                    tensors = _shard(layout, layout.rows_of(number), loaded, encode, labels, shown.done)
                    if writing is not None:
                        writing.result()
                    writing = disk.submit(writer.write, number, tensors)
                if writing is not None:
                    writing.result()


@contextlib.contextmanager
def _deaths_told() -> Iterator[None]:
    """When a process that loads images has died, PyTorch raises that wherever the program is then."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise loading_failed(error) from error


class _Labels:
    """Labels of the images, which have to be the same in all views: training has one for each image."""

    def __init__(self, source: Source):
        self._first_view = source.first_view
        self._known: list[int | None] = [None] * len(source.dataset)
        if source.labels is not None:
            self._known[:] = source.labels.tolist()

    def add(self, rows: Sequence[int], labels: Tensor | None) -> None:
        """Labels of some rows.

        Raises:
            StoreError: If one is another than in the view that was made first.
        """
        assert labels is not None
        for row, label in zip(rows, labels.tolist(), strict=True):
            view, item = divmod(row, len(self._known))
            known = self._known[item]
            if known is not None and known != label:
                raise StoreError(
                    f"FeatureCache.build: view {self._first_view + view} gives other labels than the one that was made "
                    f"first (item {item}: {label}, not {known}): the dataset's order or labels change from one "
                    "iteration to the next. Give a map-style dataset whose labels stay, or keep one view."
                )
            self._known[item] = label


def _shard(
    layout: Layout,
    rows: range,
    loaded: Iterator[Batch],
    encode: Encoder,
    labels: _Labels,
    on_batch: Callable[[int], None],
) -> dict[str, Tensor]:
    """The tensors of a shard."""
    tensors = {
        "rows": torch.empty(len(rows), *layout.kept_shape, dtype=DTYPES[layout.dtype]),
        "labels": torch.empty(len(rows), dtype=torch.int64),
    }
    if layout.dtype == "int8":
        tensors["token_scale"] = torch.empty(len(rows), layout.kept_shape[0])
    done = 0
    while done < len(rows):
        batch = next(loaded)
        labels.add(batch.rows, batch.labels)
        features = encode(batch.images).view(len(batch.rows), *layout.kept_shape)
        _check_numbers(features, layout, batch.rows)
        place = slice(done, done + len(batch.rows))
        if layout.dtype == "int8":
            tensors["rows"][place], tensors["token_scale"][place] = quantise(features)
        else:
            tensors["rows"][place] = features
        tensors["labels"][place] = batch.labels
        done += len(batch.rows)
        on_batch(len(batch.rows))
    return tensors


def _check_numbers(features: Tensor, layout: Layout, rows: list[int]) -> None:
    """Refuse features that are not finite, or that fp16 can't hold."""
    largest = features.abs().amax(dim=(1, 2)).float()
    limit = torch.finfo(torch.float16).max if layout.dtype == "fp16" else torch.finfo(torch.float32).max
    fits = largest <= limit  # NaN is not
    if not fits.all():
        wrong = int((~fits).nonzero()[0])
        item = rows[wrong] % int(layout.fingerprint["number of images"])
        remedy = "Use bf16." if layout.dtype == "fp16" and largest[wrong].isfinite() else "Look at it and the weights."
        raise StoreError(
            f"FeatureCache.build: the features of item {item} reach {largest[wrong]:.3g}, which {layout.dtype} can't "
            f"hold. {remedy}"
        )


class _Shown(contextlib.AbstractContextManager):
    """Progress: images, their rate, the time that is left, and what is on the disk; or a call to whoever shows it."""

    def __init__(self, folder: Path, source: Source, progress: Callable[[int], None] | bool):
        columns = (MofNCompleteColumn(), TextColumn("{task.fields[state]}"), TimeRemainingColumn())
        self._call = progress if callable(progress) else None
        self._bar = console.progress(*columns, console=console.stderr(), disable=progress is not True)
        self._images = len(source.dataset) * source.views
        self._task = self._bar.add_task(f"features → {console.escaped(folder)}", total=self._images, state="")
        self._began, self._encoded = time.perf_counter(), 0
        self._layout: Layout | None = None

    def __enter__(self) -> _Shown:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def checked(self, count: int) -> None:
        """So many bytes that are there were looked at."""
        self._encoded += count
        self._bar.update(self._task, state=f"checking, {decimal(self._encoded)}")

    def begin(self, layout: Layout, missing: list[int]) -> None:
        """What is to be made is known."""
        there = layout.rows - sum(len(layout.rows_of(number)) for number in missing)
        self._began, self._encoded, self._layout = time.perf_counter(), 0, layout
        self._bar.reset(self._task, total=layout.rows, completed=there)
        if self._call is not None and there:
            self._call(there)

    def done(self, images: int) -> None:
        """So many more were encoded."""
        self._encoded += images
        if self._call is not None:
            self._call(images)
        assert self._layout is not None
        rate = self._encoded / (time.perf_counter() - self._began)
        completed = self._bar.tasks[0].completed + images
        size = decimal(int(completed) * self._layout.row_bytes)
        self._bar.update(self._task, completed=completed, state=f"{rate:.1f} images/s, {size}")
