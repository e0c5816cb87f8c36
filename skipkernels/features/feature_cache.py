"""FeatureCache: the features of a dataset's images at the LSkip cut, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..store import DTYPES, Store, StoreError, absolute_folder
from . import fingerprint
from .builder import SHARD_BYTES, Encoder, Source, check_first, identity_of, of_dataset, write_store
from .dataset_key import Files
from .extract import Encode
from .in_memory import collect
from .loader import FeatureLoader, Rows
from .refresh import Refresher, make_room
from .samplers import BatchSampler, SamplerKind

if TYPE_CHECKING:
    from ..clip import SkipCLIP

Refresh = Literal["never", "epoch"]
Progress = Callable[[int], None] | bool


class FeatureCache(Dataset):
    """The features of some images at the cut, and their classes, on the disk or in memory.

    Made by `build`, `open` or `in_memory`. It is a map-style dataset of (features, label); training reads it through
    `loader`.

    Attributes:
        labels: int64 [n], the class of every image.
        views: Views of every image; epoch e has view e mod views.
        store: What it reads, if that is on the disk and stays the same.

    Source: Wu et al., "Skip Tuning", CVPR 2025, arXiv 2412.11509, section 4, which extracts features anew each epoch.

    Example:
        >>> import logging, tempfile; logging.disable()  # open_clip warns of random weights
        >>> import open_clip, skipkernels as sk
        >>> from skipkernels.experiments import glyph_tiny
        >>> glyph_tiny.register()
        >>> tokens = open_clip.get_tokenizer("glyph-tiny")(["the digit 0.", "the digit 1."])
        >>> clip = sk.SkipCLIP(open_clip.create_model("glyph-tiny"), tokens, skip_layers=0.5)
        >>> images = [(torch.rand(3, 32, 32), n % 2) for n in range(6)]
        >>> cache = sk.FeatureCache.build(tempfile.mkdtemp(), clip, images, dtype="bf16", progress=False)
        >>> for features, labels in cache.loader(batch_size=3, sampler="class_pure"):
        ...     print(features.dtype, list(features.shape), labels.unique().numel(), clip(features, labels).loss.ndim)
        torch.float32 [3, 65, 128] 1 0
        torch.float32 [3, 65, 128] 1 0
    """

    def __init__(
        self, rows: Rows, labels: Tensor, *, views: int = 1, refresher: Refresher | None = None, first_epoch: int = 0
    ):
        self._rows, self.labels, self.views = rows, labels, views
        self._refresher, self._epoch = refresher, first_epoch

    # ---- making one --------------------------------------------------------------------------------------------

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
        files: Files = "times",
        identity: str | None = None,
        resume: bool = False,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
        progress: Progress = True,
    ) -> FeatureCache:
        """Run all images through what is below the cut, and keep what comes out in a folder.

        It may be killed at any time: run again with `resume`, it makes what is missing or damaged, and ends with the
        same bits.

        Args:
            path: The folder, which is made.
            clip: Whose features. What is above its cut does not matter.
            dataset: Map-style of (image, label), or an iterable of those with a length. Images are tensors
                [3, height, width] as the model takes them, labels whole numbers.
            dtype: How features are kept: "fp32", "fp16", "bf16", or "int8" with a scale for each token, which is lossy
                (docs/cache.md has the errors).
            views: Views of every image, for a dataset whose transform draws at random. Epochs go round them. All have
                to have the same labels, so an iterable has to keep its order.
            refresh: "epoch" extracts features anew for every epoch, in the background of the epoch before, as the
                published method does; it keeps two epochs on the disk.
            batch_size: Images encoded at once.
            workers: Processes that load images.
            seed: Of random transforms: each view of each image has a seed of its own, made from it.
            files: What counts of files that the dataset names, besides their names and sizes: "times" when they were
                changed, "contents" what they hold.
            identity: A name for the dataset and its transform, in place of what can be found out about them.
            resume: Go on with a store that is there, if it is this one; mend it where it is damaged.
            overwrite: Replace a store that is there, after the first batch of the new one was computed.
            shard_bytes: Of a file, about. So much is lost at most when a build is killed; memory holds two of them.
            progress: False for no progress bar, or who is told how many images are done.

        Returns:
            The cache.

        Raises:
            StoreError: If that can't be done: another store is there (says in what it differs), another process is
                at work, the disk is full, an image or its features can't be used. What is there stays.
            ValueError: If an argument is out of range.
        """
        folder = absolute_folder(Path(path))
        if dtype not in DTYPES:
            raise ValueError(f"FeatureCache.build: dtype must be one of {', '.join(DTYPES)}; got {dtype!r}.")
        if refresh not in get_args(Refresh):
            raise ValueError(f'FeatureCache.build: refresh must be "never" or "epoch"; got {refresh!r}.')
        least = {"views": 1, "batch_size": 1, "shard_bytes": 1, "seed": 0, "workers": 0}
        for name, value in zip(least, (views, batch_size, shard_bytes, seed, workers), strict=True):
            if not isinstance(value, int):
                raise ValueError(f"FeatureCache.build: {name} must be a whole number; got {value!r}.")
            if value < least[name]:
                raise ValueError(f"FeatureCache.build: {name} must be at least {least[name]}; got {value}.")
        if resume and overwrite:
            raise ValueError(
                "FeatureCache.build: resume goes on with a store and overwrite replaces it; give one of them."
            )
        if refresh == "epoch" and views != 1:
            raise ValueError(
                f'FeatureCache.build: views must be 1 with refresh="epoch", which has a new view each; got {views}.'
            )
        if clip.skip_layers[0] == 0:
            raise ValueError(
                "FeatureCache.build: with skip_layers=0 the image embedding trains, so features can't be kept. Skip a "
                "block, or train from images."
            )
        if not hasattr(dataset, "__len__") or len(dataset) == 0:
            what = "is empty" if hasattr(dataset, "__len__") else "has no length"
            raise ValueError(f"FeatureCache.build: the dataset {what}; it must have at least one image.")
        source = Source(
            clip=clip,
            dataset=dataset,
            dtype=dtype,
            views=views,
            first_view=0,
            batch_size=batch_size,
            workers=workers,
            seed=seed,
            identity=identity_of(dataset, files, identity),
            samples=[] if identity is not None else fingerprint.samples(dataset, seed, workers),
            shard_bytes=shard_bytes,
        )
        encode = Encoder(clip)
        if overwrite:
            check_first(folder, source, encode)
        if refresh == "epoch":
            refresher = Refresher(folder, source, encode, progress, overwrite=overwrite)
            epoch = refresher.first
            try:
                store = refresher.store(epoch)
            except BaseException:
                refresher.close()
                raise
            return cls(store, store.labels(), refresher=refresher, first_epoch=epoch)
        make_room(folder, overwrite=overwrite)
        write_store(folder, source, encode, resume=resume, overwrite=overwrite, progress=progress)
        return cls.open(folder)

    @classmethod
    def open(
        cls,
        path: str | Path,
        clip: SkipCLIP | None = None,
        dataset: Any = None,
        *,
        files: Files = "times",
        identity: str | None = None,
        verify: bool = False,
    ) -> FeatureCache:
        """Open a store that was built.

        Args:
            path: Its folder.
            clip: The model that will train on it: it is refused if its features at the cut are others.
            dataset: What it should have been built from: refused if what can be told of it differs, or an image of the
                few that are loaded. docs/cache.md says what that finds.
            files: As it was given to `build`.
            identity: As it was given to `build`: the name is then all of the dataset that is compared.
            verify: Read all of it, and compare checksums. Otherwise sizes and headers are looked at.

        Raises:
            StoreError: If there is no store, or it is incomplete, damaged, or of something else; says which file, or
                what differs.
        """
        folder = absolute_folder(Path(path))
        store = Store(folder, verify=verify)
        layout = store.layout
        found = [layout.fingerprint.get(name) for name in ("number of images", "number of views", "seed")]
        items, views, seed = (value if isinstance(value, int) else 0 for value in found)
        if items * views != layout.rows or not layout.labelled:
            raise StoreError(f"{folder}: a store of something else than the features of images.")
        if clip is not None:
            wanted = fingerprint.of_model(clip) | {"autocast": Encoder(clip).precision}
            fingerprint.check(layout, wanted, folder)
            fingerprint.check_probe(layout, clip, folder)
        if dataset is not None:
            fingerprint.check(layout, {"number of images": len(dataset)}, folder)
            fingerprint.check(layout, of_dataset(identity_of(dataset, files, identity)), folder)
            if identity is None:
                fingerprint.check_samples(layout, fingerprint.samples(dataset, seed), folder)
        return cls(store, store.labels()[:items], views=views)

    @classmethod
    def in_memory(
        cls,
        dataset: Any,
        encode: Encode = lambda images: images,
        *,
        batch_size: int = 64,
        workers: int = 0,
        progress: Progress = False,
    ) -> FeatureCache:
        """Keep what `encode` gives of all images in memory, where it is; by default the images themselves.

        Args:
            dataset: As for `build`.
            encode: [n, 3, height, width] → [n, …], such as `SkipCLIP.encode_lower`.
            batch_size: Images encoded at once.
            workers: Processes that load images.
            progress: Who is told how many images are done, if it is a function.

        Raises:
            MemoryError: If it would take more than half of the memory that is free.
        """
        told = progress if callable(progress) else (lambda images: None)
        return cls(*collect(dataset, encode, batch_size=batch_size, workers=workers, on_batch=told))

    # ---- using it ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Images."""
        return len(self.labels)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        """Features of an image, in its first view, and its class."""
        if not -len(self) <= item < len(self):
            raise IndexError(f"FeatureCache: image {item} is outside 0…{len(self) - 1}.")
        item %= len(self)
        return self._rows.gather(torch.tensor([item]))[0], int(self.labels[item])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the features of an image."""
        return self._rows.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the features as they come out: that in which they were computed."""
        return self._rows.dtype

    @property
    def store(self) -> Store | None:
        """What is on the disk."""
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
        """An iterable over batches (features [B, …], labels [B]), an epoch each time; every image comes once.

        Args:
            batch_size: Images of a batch.
            sampler: "class_pure", "random" or "sequential", or lists of image numbers, such as a
                `torch.utils.data.BatchSampler`. See `BatchSampler`.
            generator: Source of the order; seeded with 0 if not given.
            rank: Which of `world_size` processes asks: it gets its part of every batch of all of them. Lists of image
                numbers are not divided.
            world_size: Processes that train together.
            dtype: Of the features; by default that in which they were computed.
            device: Where batches go; by default they stay where they are. To a GPU they are copied from pinned memory,
                on a stream of its own.
            prefetch: Batches read ahead of the one that was asked for; by default two from the disk, none from memory.

        Returns:
            FeatureLoader: its `state_dict` belongs into a checkpoint.

        Raises:
            ValueError: If an argument is out of range.
            TypeError: If `dtype` is no torch.dtype.
        """
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"FeatureCache.loader: dtype must be a torch.dtype, such as torch.bfloat16; got {dtype!r}.")
        if not isinstance(sampler, str) and (rank, world_size) != (0, 1):
            raise ValueError(
                f"FeatureCache.loader: lists of image numbers are not divided; got rank={rank} and "
                f"world_size={world_size}. Give each process lists of its own, or name a sampler."
            )
        if isinstance(sampler, str):
            sampler = BatchSampler(self.labels, batch_size, sampler, generator, rank=rank, world_size=world_size)
        if prefetch is None:
            prefetch = 0 if self.store is None else 2
        where = None if device is None else torch.device(device)
        if where is not None and where.type == "cuda" and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())  # of this thread, not of that which reads ahead
        return FeatureLoader(self, sampler, dtype=dtype, device=where, prefetch=prefetch)

    def rows_of_epoch(self, epoch: int) -> tuple[Rows, int]:
        """Where the features of an epoch are, and the number of its first row."""
        if self._refresher is not None:
            self._refresher.check_open()
            if epoch != self._epoch:
                self._rows, self._epoch = self._refresher.store(epoch), epoch
        return self._rows, epoch % self.views * len(self)

    def verify(self, on_bytes: Callable[[int], None] = lambda count: None) -> list[str]:
        """Read all of the store and compare checksums; says what is damaged, file by file."""
        return [] if self.store is None else self.store.verify(on_bytes)

    def close(self) -> None:
        """End an extraction that goes on in the background. What it has made stays; no loader begins another epoch."""
        if self._refresher is not None:
            self._refresher.close()

    def __getstate__(self) -> dict[str, Any]:
        """For another process, such as one of a DataLoader.

        Raises:
            TypeError: If its features are drawn anew for each epoch, which one process does.
        """
        if self._refresher is not None:
            raise TypeError(
                'FeatureCache: with refresh="epoch" it stays in its process; iterate over its loader() here.'
            )
        return self.__dict__

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
