"""FeatureCache: features of a dataset's images at the LSkip cut, computed once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import _progress
from ..checks import check_choice, check_dtype, check_shape
from ..options import CacheDtype, Refresh, SamplerKind
from .extraction import Encoder, Images
from .folder_table import DTYPE_NAMES, CacheError, FolderTable, Layout, probe_of
from .identity import dataset_identity
from .loader import FeatureLoader
from .samplers import BatchSampler
from .table import FeatureTable, SelectedRows
from .writer import TableWriter

if TYPE_CHECKING:
    from ..clip import SkipCLIP

Progress = Callable[[int], None] | bool  # called with the number of images of each batch; True shows a bar


class FeatureCache(Dataset):
    """Features of images at the cut, and their labels, on the disk or in memory.

    Created by `build`, `open` or `in_memory`. A map-style dataset of (features, label); training reads it by `loader`.

    Attributes:
        labels: Label of every image, [n] int64.

    Source: Wu et al., "Skip Tuning", CVPR 2025, arXiv 2412.11509, section 4, which extracts features anew each epoch.

    Example:
        >>> import tempfile, skipkernels as sk
        >>> from skipkernels.app.demo import pictogram_tiny
        >>> model, _, tokenizer = pictogram_tiny.load()
        >>> clip = sk.SkipCLIP(model, tokenizer(["the digit 0.", "the digit 1."]), skip_layers=0.5)
        >>> images = [(torch.rand(3, 32, 32), n % 2) for n in range(6)]
        >>> cache = sk.FeatureCache.build(tempfile.mkdtemp(), clip, images, dtype="bf16", progress=False)
        >>> for features, labels in cache.loader(batch_size=3, sampler="class_pure"):
        ...     print(features.dtype, list(features.shape), labels.unique().numel(), clip(features, labels).loss.ndim)
        torch.float32 [3, 17, 128] 1 0
        torch.float32 [3, 17, 128] 1 0
    """

    def __init__(
        self,
        table: FeatureTable,
        labels: Tensor,
        *,
        compute: Callable[[int], tuple[FeatureTable, Tensor]] | None = None,
    ):
        self.labels = labels
        self._table: FeatureTable | None = table  # None after an error in the computation of an epoch
        self._epoch = 0
        self._compute = compute  # returns the table and labels of an epoch, if each has its own

    # ---- construction ------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        path: str | Path,
        clip: SkipCLIP,
        dataset: Any,
        *,
        dtype: CacheDtype = "bf16",
        batch_size: int = 64,
        workers: int = 0,
        seed: int = 0,
        identity: Any = None,
        resume: bool = False,
        progress: Progress = True,
    ) -> FeatureCache:
        """Encode all images up to the cut and write the features to a folder; see docs/cache.md.

        A build may be killed at any time: with `resume`, missing and damaged rows are computed, and the result is
        bitwise that of an uninterrupted build.

        Args:
            path: Folder of the cache; created if needed.
            clip: Model that computes the features; its weights above the cut are not used.
            dataset: Map-style dataset of (image, label): tensors [3, height, width], preprocessed for the model, and
                whole numbers.
            dtype: Dtype in the folder: "fp32", "fp16", "bf16" (default), or "int8" with a scale for each token (lossy).
            batch_size: Images per forward pass; default 64.
            workers: Number of processes that load images; default 0: this process.
            seed: Seed of random transforms; each image has its own seed, derived from it.
            identity: Text or JSON value that identifies the images and their transform; change it when they change.
                Default: files, tensors, labels and transform of the dataset.
            resume: Complete and repair the cache in the folder, if its identity is the same.
            progress: False for no progress bar, or a function called with the number of images of each batch.

        Raises:
            CacheError: If the folder has another cache (the message says how it differs), another process builds in it,
                the disk is full, or an image or its features cannot be used. Finished rows stay.
        """
        folder = Path(path).absolute()  # a later change of the working directory has no effect
        check_choice("FeatureCache.build", "dtype", dtype, CacheDtype)
        encode = Encoder("FeatureCache.build", clip)
        images = Images("FeatureCache.build", dataset, batch_size, workers, seed)
        options: dict[str, str | int] = {"seed": seed, "batch size": batch_size}
        of_dataset, probe = dataset_identity(dataset, identity), encode.probe()
        layout = Layout(
            rows=len(images),
            shape=tuple(probe.shape),
            dtype=dtype,
            computed_dtype=DTYPE_NAMES[probe.dtype],
            labelled=True,
            identity=encode.identity() | of_dataset | options,
            probe=probe_of(probe),
        )
        with (
            TableWriter(folder, layout, resume=resume) as writer,
            _advancing(f"features → {folder}", len(images), progress) as advance,
        ):
            images.extract(encode, writer.write, advance, missing=writer.missing)
        table = FolderTable.open(folder)
        return cls(table, table.labels())

    @classmethod
    def open(
        cls,
        path: str | Path,
        clip: SkipCLIP | None = None,
        dataset: Any = None,
        *,
        identity: Any = None,
        verify: bool = False,
    ) -> FeatureCache:
        """Open a complete cache.

        Args:
            path: Folder of the cache.
            clip: Model that will train on the features; an error if its cut, or its features there, differ. Without it
                the features are not compared with a model.
            dataset: Dataset of the images; an error if it differs from that of the build, as far as docs/cache.md says.
            identity: The `identity` that was passed to `build`.
            verify: Compare every row with its checksums now; by default features are compared when they are read.

        Raises:
            CacheError: If there is no cache, or it is incomplete, damaged, or of another model or dataset.
        """
        folder = Path(path).absolute()
        table = FolderTable.open(folder, verify=verify)
        layout = table.layout
        if not layout.labelled:
            raise CacheError(f"{folder}: does not hold features of images.")
        expected, probe = dict(layout.identity), layout.probe
        if clip is not None:
            encode = Encoder("FeatureCache.open", clip)
            expected |= encode.identity()
            probe = probe_of(encode.probe())
        if dataset is not None:
            expected |= dataset_identity(dataset, identity)
        layout.check_equal(replace(layout, identity=expected, probe=probe), folder)
        return cls(table, table.labels())

    @classmethod
    def in_memory(
        cls,
        dataset: Any,
        encode: Callable[[Tensor], Tensor] = lambda images: images,
        *,
        batch_size: int = 64,
        workers: int = 0,
        refresh: Refresh = "never",
        seed: int = 0,
        progress: Progress = False,
    ) -> FeatureCache:
        """Keep the outputs of `encode` for all images in memory, on their device; by default the images themselves.

        Args:
            dataset: As for `build`.
            encode: Function [n, 3, height, width] → [n, …], such as `SkipCLIP.encode_lower`.
            batch_size: Images per call of `encode`.
            workers: Number of processes that load images.
            refresh: "epoch" computes the outputs again when an epoch begins, with new draws of a random transform, as
                in the published method; those of the epoch before are released first. Default "never".
            seed: As for `build`; with `refresh` each image has its own seed in each epoch.
            progress: As for `build`, in the first epoch; default False.

        Raises:
            MemoryError: If the outputs would take more than half of the free memory.
        """
        check_choice("FeatureCache.in_memory", "refresh", refresh, Refresh)
        images = Images("FeatureCache.in_memory", dataset, batch_size, workers, seed)
        with _advancing("features", len(images), progress) as advance:
            table, labels = images.compute(encode, 0, advance)
        return cls(table, labels, compute=functools.partial(images.compute, encode) if refresh == "epoch" else None)

    # ---- use ---------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        place = self.table.folder or "in memory"
        return f"FeatureCache({len(self)} images, {list(self.shape)} {self.dtype}, {place})"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        """Return the features of an image, and its label."""
        if not -len(self) <= item < len(self):
            raise IndexError(f"FeatureCache: image {item} is outside 0…{len(self) - 1}.")
        item %= len(self)
        return self.table.rows(torch.tensor([item], device="cpu"))[0], int(self.labels[item])

    @property
    def table(self) -> FeatureTable:
        """The features; those of the current epoch, if each has its own."""
        return self.load_epoch(self._epoch)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the features of an image."""
        return self.table.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the features as computed and returned."""
        return self.table.dtype

    def subset(self, images: Tensor) -> FeatureCache:
        """Return the features of some images, by number, int64 [m], without a copy; those of the current epoch."""
        name = "FeatureCache.subset"
        check_dtype(name, "images", images, [torch.int64], "Use mask.nonzero().squeeze(1) for a mask.")
        check_shape(name, "images", images, m=None)
        low, high = (int(x) for x in torch.aminmax(images))
        if low < 0 or high >= len(self):
            raise IndexError(f"{name}: images are numbered from 0 to {len(self) - 1}; got {low} to {high}.")
        return FeatureCache(SelectedRows(self.table, images), self.labels[images.cpu()])

    def loader(
        self,
        batch_size: int = 4,
        sampler: SamplerKind | Iterable[list[int]] = "class_pure",
        *,
        generator: torch.Generator | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str | None = None,
        prefetch: int | None = None,
    ) -> FeatureLoader:
        """Return an iterable over batches (features [B, …], labels [B]); one iteration is an epoch.

        Args:
            batch_size: Images per batch.
            sampler: "class_pure", "random", "balanced" or "sequential", see `BatchSampler`; or lists of image numbers,
                such as a `torch.utils.data.BatchSampler`.
            generator: Generator of the order; default: a new one with seed 0.
            rank: Index of this process in `world_size`; a process gets its part of every global batch. Lists of image
                numbers are not divided.
            world_size: Number of processes that train together.
            device: Device of the batches; default: that of the features. Batches are copied to a GPU from pinned memory
                on a separate stream.
            prefetch: Number of batches read ahead; default: two from the disk, none from memory.

        Returns:
            FeatureLoader: Save its `state_dict` in checkpoints.
        """
        if isinstance(sampler, str):
            sampler = BatchSampler(self.labels, batch_size, sampler, generator, rank=rank, world_size=world_size)
        elif (rank, world_size) != (0, 1):
            raise ValueError(
                f"FeatureCache.loader: lists of image numbers are not divided; got rank={rank} and "
                f"world_size={world_size}. Give each process its own lists, or name a sampler."
            )
        if prefetch is None:
            prefetch = 0 if self.table.folder is None else 2
        target = None if device is None else torch.device(device)
        if target is not None and target.type == "cuda" and target.index is None:
            target = torch.device("cuda", torch.cuda.current_device())  # the reading thread may have another
        return FeatureLoader(self.load_epoch, self.labels, sampler, device=target, prefetch=prefetch)

    def load_epoch(self, epoch: int) -> FeatureTable:
        """Return the features of an epoch; computed if each has its own, and it is not the current one."""
        if self._compute is not None and (self._table is None or epoch != self._epoch):
            self._table, self._epoch = None, epoch  # released before the next one is computed
            table, labels = self._compute(epoch)
            if not labels.equal(self.labels):
                raise CacheError(
                    f"FeatureCache.in_memory: epoch {epoch} has other labels than the first: the dataset's labels "
                    "change from one epoch to the next. Give a dataset with fixed labels."
                )
            self._table = table
        assert self._table is not None
        return self._table


@contextlib.contextmanager
def _advancing(title: str, total: int, progress: Progress) -> Iterator[Callable[[int], object]]:
    """Yield the function to call with the number of images of each batch."""
    with _progress.progress(title, total, shown=progress is True) as bar:
        yield progress if callable(progress) else bar
