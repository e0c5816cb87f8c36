"""FeatureCache: features of a dataset's images at the LSkip cut, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..clip import SkipCLIP, check_clip
from ..memory import free_bytes
from ..options import Refresh, SamplerKind
from ..store import DTYPES, Manifest, Store, StoreError
from . import fingerprint
from .builder import SHARD_BYTES, Builder, Encoder
from .dataset_key import check_samples, dataset_key, sample_images
from .image_batches import load_batches, split_batches
from .loader import FeatureLoader, MemoryRows, Rows
from .samplers import BatchSampler

Progress = Callable[[int], None] | bool


class FeatureCache(Dataset):
    """Features of images at the cut, and their labels, on the disk or in memory.

    Created by `build`, `open` or `in_memory`. A map-style dataset of (features, label); training reads it by `loader`.

    Attributes:
        labels: Label of every image, [n] int64.
        views: Number of views of every image; epoch e reads view e mod views.

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

    def __init__(self, rows: Rows, labels: Tensor, *, views: int = 1):
        self._rows, self.labels, self.views = rows, labels, views
        self._epoch = 0  # of the features, if each epoch has its own
        self._renew: Callable[[int], tuple[Rows, Tensor]] | None = None  # features and labels of an epoch

    # ---- construction ------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        path: str | Path,
        clip: SkipCLIP,
        dataset: Any,
        *,
        dtype: str = "bf16",
        views: int = 1,
        refresh: Refresh = "never",
        batch_size: int = 64,
        workers: int = 0,
        seed: int = 0,
        key: Any = None,
        resume: bool = False,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
        progress: Progress = True,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> FeatureCache:
        """Encode all images up to the cut and store the features in a folder; see docs/cache.md.

        A build may be killed at any time: with `resume`, missing and damaged shards are computed, and the result is
        bitwise that of an uninterrupted build with the same number of threads.

        Args:
            path: Folder of the store; created if needed.
            clip: Model that computes the features; its weights above the cut are not used.
            dataset: Map-style dataset of (image, label): tensors [3, height, width], preprocessed for the model, and
                whole numbers.
            dtype: Storage dtype: "fp32", "fp16", "bf16" (default), or "int8" with a scale for each token (lossy).
            views: Number of views of every image, for a random transform; default 1. Epochs cycle through them.
            refresh: "epoch" computes a new view when an epoch begins, as in the published method, in place of that of
                the epoch before. Default "never".
            batch_size: Images per forward pass; default 64.
            workers: Number of processes that load images; default 0: this process.
            seed: Seed of random transforms; each view of each image has its own seed, derived from it.
            key: Text or JSON value that identifies the images and their transform; change it when they change. Default:
                files, labels, transform and a few images of the dataset.
            resume: Complete and repair the store in the folder, if its inputs are the same.
            overwrite: Replace the store in the folder.
            shard_bytes: Approximate bytes of a shard. A kill loses at most one shard; a build holds one in memory.
            progress: False for no progress bar, or a function called with the number of images of each batch.
            process_group: Processes that all make this call with equal arguments and share the folder and the work; the
                store is bitwise that of one process with as many threads. Default None: this process alone.

        Raises:
            StoreError: If the folder has another store (the message says how it differs), another process builds in it,
                the disk is full, or an image or its features cannot be used. Existing shards stay.
        """
        check_clip("FeatureCache.build", clip)
        folder = Path(path).absolute()  # a later change of the working directory has no effect
        for name, value, known in (("dtype", dtype, list(DTYPES)), ("refresh", refresh, get_args(Refresh))):
            if value not in known:
                raise ValueError(f"FeatureCache.build: {name} must be one of {', '.join(known)}; got {value!r}.")
        least = {"views": 1, "batch_size": 1, "shard_bytes": 1, "seed": 0, "workers": 0}
        for name, number in zip(least, (views, batch_size, shard_bytes, seed, workers), strict=True):
            if not isinstance(number, int) or number < least[name]:
                raise ValueError(
                    f"FeatureCache.build: {name} must be at least {least[name]}, a whole number; got {number!r}."
                )
        if resume and overwrite:
            raise ValueError("FeatureCache.build: resume continues a store, and overwrite replaces it; pass only one.")
        if refresh == "epoch" and (views != 1 or process_group is not None):
            raise ValueError(
                'FeatureCache.build: views must be 1 and process_group None with refresh="epoch", for which one '
                f"process computes a view per epoch; got {views} and {process_group}."
            )
        if clip.skip_layers[0] == 0:
            raise ValueError(
                "FeatureCache.build: with skip_layers=0 the image embedding trains, so features cannot be cached. Skip "
                "a block, or train from images."
            )
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and len(dataset)):
            raise ValueError(
                "FeatureCache.build: dataset must be map-style, with `__len__` and `__getitem__`, and have at least "
                f"one image; got {type(dataset).__name__}. Pass list(dataset) if it fits into memory."
            )
        is_first = process_group is None or torch.distributed.get_rank(process_group) == 0
        builder = Builder(
            clip=clip,
            dataset=dataset,
            dtype=dtype,
            views=views,
            refresh=refresh,
            batch_size=batch_size,
            workers=workers,
            seed=seed,
            dataset_key=dataset_key(dataset, key),
            samples=sample_images(dataset, seed, workers) if key is None and is_first else [],
            shard_bytes=shard_bytes,
            progress=progress,
            group=process_group,
        )
        if refresh == "never":
            builder.write(folder, resume=resume, overwrite=overwrite)
            return cls.open(folder)
        # The folder has the features of the epoch of the last build, which may have been killed.
        epoch = 0 if overwrite else _first_view(folder)
        builder.write(folder, epoch, resume=not overwrite, overwrite=overwrite)
        builder.progress = False  # from the second epoch on: training shows its own progress
        cache = cls.open(folder)

        def renew(epoch: int) -> tuple[Rows, Tensor]:
            builder.write(folder, epoch, overwrite=True)
            store = Store(folder)
            return store, store.labels()

        cache._epoch, cache._renew = epoch, renew
        return cache

    @classmethod
    def open(
        cls,
        path: str | Path,
        clip: SkipCLIP | None = None,
        dataset: Any = None,
        *,
        key: Any = None,
        verify: bool = False,
    ) -> FeatureCache:
        """Open a complete store.

        Args:
            path: Folder of the store.
            clip: Model that will train on the features; an error if its features at the cut differ.
            dataset: Dataset of the images; an error if it differs from that of the build, as far as docs/cache.md says.
            key: Key that was passed to `build`.
            verify: Read every byte and compare checksums; by default only sizes and headers are checked.

        Raises:
            StoreError: If there is no store, or it is incomplete, damaged, or of another model or dataset.
        """
        folder = Path(path).absolute()
        store = Store(folder, verify=verify)
        layout = store.layout
        items, views, seed = (layout.fingerprint.get(name) for name in ("number of images", "number of views", "seed"))
        if not (isinstance(items, int) and isinstance(views, int) and isinstance(seed, int) and layout.labelled):
            raise StoreError(f"{folder}: this store does not hold features of images.")
        if items < 1 or items * views != layout.rows:
            raise StoreError(f"{folder}: its rows do not match its images and views. Build it again.")
        if clip is not None:
            expected = fingerprint.of_model(clip) | {"autocast": Encoder(clip).precision}
            fingerprint.check(layout, expected, folder)
            fingerprint.check_probe(layout, clip, folder)
        if dataset is not None:
            fingerprint.check(layout, {"number of images": len(dataset)} | dataset_key(dataset, key), folder)
            if key is None:
                check_samples(layout, sample_images(dataset, seed), folder)
        return cls(store, _labels_of_items(store.labels(), views, folder), views=views)

    @classmethod
    def in_memory(
        cls,
        dataset: Any,
        encode: Callable[[Tensor], Tensor] = lambda images: images,
        *,
        batch_size: int = 64,
        workers: int = 0,
        views: int = 1,
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
            views: As for `build`; all views are in memory.
            refresh: As for `build`: "epoch" computes a new view of each image when an epoch begins.
            seed: Seed of random transforms: each view of each image has its own, so that resumed runs see the same.
            progress: Function called with the number of images of each batch, in the first epoch.

        Raises:
            MemoryError: If the outputs would take more than half of the free memory.
        """
        items = len(dataset)
        if items == 0:
            raise ValueError("FeatureCache.in_memory: the dataset has no images.")
        if refresh == "epoch" and views != 1:
            raise ValueError(f'FeatureCache.in_memory: views must be 1 with refresh="epoch"; got {views}.')
        count, labels = items * views, torch.empty(items * views, dtype=torch.int64)
        rows: Tensor | None = None

        def renew(epoch: int, advance: Progress = False) -> tuple[Rows, Tensor]:
            nonlocal rows
            batches = split_batches([range(count)], batch_size)
            for batch in load_batches(dataset, batches, seed=seed, first_view=epoch, workers=workers):
                with torch.no_grad():
                    output = encode(batch.images)
                if rows is None:
                    needed, free = output[0].nbytes * count, free_bytes(output.device)
                    if needed > free / 2:
                        raise MemoryError(
                            f"FeatureCache.in_memory: {count} items of {list(output.shape[1:])} {output.dtype} take "
                            f"{needed / 2**30:.1f} GiB, more than half of the {free / 2**30:.1f} GiB of free memory. "
                            "Use FeatureCache.build (tune: `cache`), fewer shots, views or classes, or a smaller model."
                        )
                    rows = output.new_empty(count, *output.shape[1:])
                place = slice(batch.rows[0], batch.rows[-1] + 1)
                rows[place], labels[place] = output, batch.labels
                if callable(advance):
                    advance(len(batch.rows))
            assert rows is not None
            return MemoryRows(rows), labels

        found, _ = renew(0, progress)
        cache = cls(found, _labels_of_items(labels, views, "FeatureCache.in_memory").clone(), views=views)
        cache._renew = renew if refresh == "epoch" else None
        return cache

    # ---- use ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        """Return the features of an image, in its first view, and its label."""
        if not -len(self) <= item < len(self):
            raise IndexError(f"FeatureCache: image {item} is outside 0…{len(self) - 1}.")
        item %= len(self)
        return self._rows.gather(torch.tensor([item]))[0], int(self.labels[item])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the features of an image."""
        return self._rows.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the features as computed and returned."""
        return self._rows.dtype

    @property
    def store(self) -> Store | None:
        """Store on the disk; None if the features are in memory."""
        return self._rows if isinstance(self._rows, Store) else None

    def loader(
        self,
        batch_size: int = 4,
        sampler: SamplerKind | Iterable[list[int]] = "class_pure",
        *,
        generator: torch.Generator | None = None,
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        prefetch: int | None = None,
    ) -> FeatureLoader:
        """Return an iterable over batches (features [B, …], labels [B]); one iteration is an epoch.

        Args:
            batch_size: Images per batch.
            sampler: "class_pure", "random" or "sequential", or lists of image numbers, such as a
                `torch.utils.data.BatchSampler`. See `BatchSampler`.
            generator: Generator of the order; default: a new one with seed 0.
            rank: Index of this process in `world_size`; a process gets its part of every global batch. Lists of image
                numbers are not divided.
            world_size: Number of processes that train together.
            dtype: Dtype of the features; default: the dtype in which they were computed.
            device: Device of the batches; default: that of the features. Batches are copied to a GPU from pinned memory
                on a separate stream.
            prefetch: Number of batches read ahead; default: two from the disk, none from memory.

        Returns:
            FeatureLoader: Save its `state_dict` in checkpoints.
        """
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"FeatureCache.loader: dtype must be a torch.dtype, such as torch.bfloat16; got {dtype!r}.")
        if isinstance(sampler, str):
            sampler = BatchSampler(self.labels, batch_size, sampler, generator, rank=rank, world_size=world_size)
        elif (rank, world_size) != (0, 1):
            raise ValueError(
                f"FeatureCache.loader: lists of image numbers are not divided; got rank={rank} and "
                f"world_size={world_size}. Give each process its own lists, or name a sampler."
            )
        if prefetch is None:
            prefetch = 0 if self.store is None else 2
        target = None if device is None else torch.device(device)
        if target is not None and target.type == "cuda" and target.index is None:
            target = torch.device("cuda", torch.cuda.current_device())  # the reading thread may have another
        return FeatureLoader(self.rows_of_epoch, self.labels, sampler, dtype=dtype, device=target, prefetch=prefetch)

    def rows_of_epoch(self, epoch: int) -> tuple[Rows, int]:
        """Return the features of an epoch, and the number of its first row."""
        if self._renew is not None and epoch != self._epoch:
            self._epoch = -1  # none until all features are new
            rows, labels = self._renew(epoch)
            if not labels.equal(self.labels):
                where = rows.folder if isinstance(rows, Store) else "FeatureCache.in_memory"
                raise StoreError(
                    f"{where}: epoch {epoch} has other labels than the first: the dataset's labels change from one "
                    "epoch to the next. Give a dataset with fixed labels."
                )
            self._rows, self._epoch = rows, epoch
        return self._rows, epoch % self.views * len(self)

    def verify(self, on_bytes: Callable[[int], None] = lambda count: None) -> list[str]:
        """Read every byte of the store and compare checksums; return a message for each damaged file."""
        return [] if self.store is None else self.store.verify(on_bytes)


def _labels_of_items(labels: Tensor, views: int, where: object) -> Tensor:
    """Labels [items] from those of all rows [views · items]; a StoreError if a view has others than the first."""
    labels = labels.view(views, -1)
    if (wrong := (labels != labels[0]).nonzero()).numel():
        view, item = wrong[0].tolist()
        raise StoreError(
            f"{where}: view {view} has other labels than the first (item {item}: {labels[view, item]}, not "
            f"{labels[0, item]}): the dataset's order or labels change from one iteration to the next. Build it again "
            "from a map-style dataset with fixed labels, or with one view."
        )
    return labels[0]


def _first_view(folder: Path) -> int:
    """First view of the store in a folder; 0 without one."""
    try:
        return int(Manifest.read(folder).layout.fingerprint.get("first view", 0))
    except (StoreError, ValueError):
        return 0
