"""Building of a feature store from a dataset."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _progress
from ..store import COMPUTED, DTYPES, Layout, Shard, ShardWriter, StoreError, Writer
from ..store.shards import map_shard, path_of, quantise
from . import fingerprint
from .build_group import Builders, PeerError, Report
from .dataset_key import check_samples
from .image_batches import Batch, load_batches, split_batches, worker_error

if TYPE_CHECKING:
    from ..clip import SkipCLIP

_NAME_OF = {dtype: name for name, dtype in COMPUTED.items()}

SHARD_BYTES = 128 << 20
"""Approximate bytes of a shard. A kill loses at most one shard; a build holds two in memory."""


class Encoder:
    """Function from images to features at the cut on the CPU, callable from any thread.

    Runs a copy of the modules below the cut that shares their weights, with the autocast enabled at construction.
    """

    def __init__(self, clip: SkipCLIP):
        self.device = clip.prototypes.device
        self.image_size = clip.image_size
        self._lower = clip.lower_copy()
        enabled = torch.is_autocast_enabled(self.device.type)
        self._autocast = torch.get_autocast_dtype(self.device.type) if enabled else None

    @property
    def precision(self) -> str:
        """Dtype of autocast, or "none"."""
        return "none" if self._autocast is None else _NAME_OF[self._autocast]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Encode images [n, 3, height, width] to features [n, …]."""
        if images.shape[1:] != (3, *self.image_size):
            raise StoreError(
                f"FeatureCache.build: images must be [3, {self.image_size[0]}, {self.image_size[1]}], the model's "
                f"input size; got {list(images.shape[1:])}. Give the dataset the model's own preprocessing."
            )
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
            return self._lower(images.to(self.device, non_blocking=True)).cpu()


@dataclass(frozen=True)
class BuildConfig:
    """Inputs and options of a store."""

    clip: SkipCLIP
    dataset: Any  # Dataset of (image, label)
    dtype: str  # Storage dtype of features
    views: int
    first_view: int
    batch_size: int  # Images per forward pass
    workers: int  # Number of processes that load images
    seed: int  # Seed of random transforms
    dataset_key: dict[str, str]  # Fingerprint of the dataset, from `dataset_key`
    samples: list[dict[str, Any]]  # Summaries of a few items, from `sample_images`
    shard_bytes: int  # Approximate bytes of a shard
    labels: Tensor | None = None  # Labels [n] of the images, if known; a view with other labels is an error

    def load(self, batches: list[range]) -> contextlib.closing[Generator[Batch, None, None]]:
        """Load batches of rows; on exit the context stops the worker processes."""
        options = {"seed": self.seed, "first_view": self.first_view, "workers": self.workers}
        return contextlib.closing(load_batches(self.dataset, batches, **options))

    def layout(self, encode: Encoder) -> Layout:
        """Layout of the store."""
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
            | {"number of images": items}  # before the digests: this difference is reported first
            | self.dataset_key
            | {"number of views": self.views, "first view": self.first_view}
            | {"seed": self.seed, "batch size": self.batch_size, "autocast": encode.precision},
            notes={"probe": fingerprint.probe(self.clip), "samples": self.samples},
        )
        # A shard has whole batches, so that a resumed build computes the same batches.
        batches = max(self.shard_bytes // layout.row_bytes // self.batch_size, 1)
        return replace(layout, shard_rows=batches * self.batch_size)


def check_first(folder: Path, config: BuildConfig, encode: Encoder) -> None:
    """Compute and discard the first batch, so that an error is raised before an existing store is replaced."""
    layout = config.layout(encode)
    layout.check_manifest(folder)
    rows = layout.rows_of(0)[: config.batch_size]
    with config.load([rows]) as loaded:
        _shard(layout, rows, loaded, encode, _LabelCheck(config), lambda images: None)


def write_store(
    folder: Path,
    config: BuildConfig,
    encode: Encoder,
    *,
    resume: bool,
    overwrite: bool,
    progress: Callable[[int], None] | bool,
    on_loading: Callable[[], None] = lambda: None,
    builders: Builders | None = None,
) -> None:
    """Build a store, or with `resume` its missing shards.

    `progress` is called with the number of images after each batch, True shows a bar; `on_loading` is called when
    worker processes have started.
    """
    builders = builders or Builders()
    title, shown = f"features → {folder}", progress is True and builders.first
    bar = _progress.progress(title, len(config.dataset) * config.views, shown=shown)
    with _worker_errors(), bar as advance_bar:
        advance = progress if callable(progress) and builders.first else advance_bar
        layout = config.layout(encode)
        if not builders.first:
            layout, missing = builders.begin(layout, [])
            _Build(ShardWriter(folder, layout), config, encode, builders, advance).write(missing, on_loading)
            return
        with Writer(folder, layout, resume=resume, overwrite=overwrite) as writer:
            layout, missing = writer.manifest.layout, writer.missing
            check_samples(layout, config.samples, folder)
            builders.begin(layout, missing)
            existing_images = layout.rows - sum(len(layout.rows_of(number)) for number in missing)
            if existing_images:
                advance(existing_images)
            build = _Build(writer, config, encode, builders, advance)
            for number, existing in enumerate(writer.manifest.shards):
                if existing is not None:
                    build.check_labels(number, existing)
            build.write(missing, on_loading)


class _Build:
    """Encoding and writing of the shards of this process; the first process also lists the shards of the others."""

    def __init__(
        self,
        writer: Writer,
        config: BuildConfig,
        encode: Encoder,
        builders: Builders,
        advance: Callable[[int], None],
    ):
        self._writer, self._config, self._encode = writer, config, encode
        self._layout = writer.manifest.layout
        self._builders, self._advance, self._labels = builders, advance, _LabelCheck(config)

    def check_labels(self, number: int, shard: Shard) -> None:
        """Check the labels of a shard that was written."""
        labels = map_shard(self._writer.folder, self._layout, number, shard).labels
        self._labels.add(self._layout.rows_of(number), labels)

    def write(self, missing: list[int], on_loading: Callable[[], None]) -> None:
        """Write the share of this process of the missing shards, and wait for the other processes."""
        own = self._builders.share(missing)
        batches = split_batches([self._layout.rows_of(number) for number in own], self._config.batch_size)
        writing: Future[tuple[int, Shard]] | None = None  # one shard is written while the next is computed
        with ThreadPoolExecutor(1) as disk:
            try:
                with self._config.load(batches) as loaded:
                    on_loading()
                    for number in own:
                        rows = self._layout.rows_of(number)
                        tensors = _shard(self._layout, rows, loaded, self._encode, self._labels, self._batch)
                        if writing is not None:
                            self._builders.written(*writing.result())
                        writing = disk.submit(self._write, number, tensors)
                    if writing is not None:
                        self._builders.written(*writing.result())
                done = False
                while not done:
                    reports, done = self._builders.report_done()
                    self._receive(reports)
            except BaseException:
                with contextlib.suppress(StoreError, PeerError):  # the first error is raised
                    if writing is not None:
                        self._builders.written(*writing.result())
                with contextlib.suppress(StoreError, PeerError):
                    self._receive(self._builders.report_failed())
                raise
        self._builders.end()

    def _write(self, number: int, tensors: dict[str, Tensor]) -> tuple[int, Shard]:
        return number, self._writer.write(number, tensors)

    def _batch(self, images: int) -> None:
        self._receive(self._builders.report(images))

    def _receive(self, reports: list[Report]) -> None:
        """Show the images of all processes, list the shards that others have written, and raise their errors."""
        images = sum(report.images for report in reports)
        if images:
            self._advance(images)
        if self._builders.first:
            added = dict(report.written for report in reports if report.written is not None)
            for number, shard in added.items():
                if not path_of(self._writer.folder, number).exists():
                    raise StoreError(
                        f"{path_of(self._writer.folder, number)}: another process has written it, and this one can't "
                        "see it. Choose a folder that all processes share."
                    )
                self.check_labels(number, shard)
            if added:
                self._writer.add(added)
        self._builders.check(reports)


@contextlib.contextmanager
def _worker_errors() -> Iterator[None]:
    """Convert the error that PyTorch raises, at any point, after a worker process has died."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise worker_error(error) from error


class _LabelCheck:
    """Check that all views of an image have the same label."""

    def __init__(self, config: BuildConfig):
        self._first_view = config.first_view
        self._known: list[int | None] = [None] * len(config.dataset)
        if config.labels is not None:
            self._known[:] = config.labels.tolist()

    def add(self, rows: Sequence[int], labels: Tensor | None) -> None:
        """Record the labels of rows; raise a StoreError if one differs from another view of the item."""
        assert labels is not None
        for row, label in zip(rows, labels.tolist(), strict=True):
            view, item = divmod(row, len(self._known))
            known = self._known[item]
            if known is not None and known != label:
                raise StoreError(
                    f"FeatureCache.build: view {self._first_view + view} has other labels than the first (item {item}: "
                    f"{label}, not {known}): the dataset's order or labels change from one iteration to the next. Give "
                    "a map-style dataset with fixed labels, or keep one view."
                )
            self._known[item] = label


def _shard(
    layout: Layout,
    rows: range,
    loaded: Iterator[Batch],
    encode: Encoder,
    labels: _LabelCheck,
    on_batch: Callable[[int], None],
) -> dict[str, Tensor]:
    tensors = {
        "rows": torch.empty(len(rows), *layout.stored_shape, dtype=DTYPES[layout.dtype]),
        "labels": torch.empty(len(rows), dtype=torch.int64),
    }
    if layout.dtype == "int8":
        tensors["token_scale"] = torch.empty(len(rows), layout.stored_shape[0])
    done = 0
    while done < len(rows):
        batch = next(loaded)
        labels.add(batch.rows, batch.labels)
        features = encode(batch.images).view(len(batch.rows), *layout.stored_shape)
        _check_range(features, layout, batch.rows)
        place = slice(done, done + len(batch.rows))
        if layout.dtype == "int8":
            tensors["rows"][place], tensors["token_scale"][place] = quantise(features)
        else:
            tensors["rows"][place] = features
        tensors["labels"][place] = batch.labels
        done += len(batch.rows)
        on_batch(len(batch.rows))
    return tensors


def _check_range(features: Tensor, layout: Layout, rows: list[int]) -> None:
    """Raise a StoreError if features are not finite, or out of the range of fp16 storage."""
    largest = features.abs().amax(dim=(1, 2)).float()
    limit = torch.finfo(torch.float16).max if layout.dtype == "fp16" else torch.finfo(torch.float32).max
    in_range = largest <= limit  # False for NaN
    if not in_range.all():
        wrong = int((~in_range).nonzero()[0])
        item = rows[wrong] % int(layout.fingerprint["number of images"])
        fp16_overflow = layout.dtype == "fp16" and largest[wrong].isfinite()
        remedy = 'Use dtype="bf16".' if fp16_overflow else "Check the image and the weights."
        raise StoreError(
            f"FeatureCache.build: the features of item {item} reach {largest[wrong]:.3g}, out of the range of "
            f"{layout.dtype}. {remedy}"
        )
