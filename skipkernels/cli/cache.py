"""`skipkernels cache`: build, info, verify and prune."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.filesize import decimal
from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Column, Table

from skipkernels.console import Terminal, escaped, plain, progress
from skipkernels.data import InputError
from skipkernels.options import CacheDtype, Precision, Protocol
from skipkernels.store import MANIFEST, Manifest, Store, StoreError, is_store, leftovers, prune
from skipkernels.tuner import TuneConfig
from skipkernels.tuner.run_folder import check_apart
from skipkernels.tuner.setup import build_run


@dataclasses.dataclass(frozen=True)
class CacheBuildConfig:
    """Compute the features of a task's images and texts at the cut, into a folder that `tune --cache` reads.

    It may be killed at any time; --resume goes on from there.
    """

    path: tyro.conf.Positional[Path]
    """The folder, which is made."""
    data: str = TuneConfig.data
    """As for tune."""
    protocol: Protocol | None = TuneConfig.protocol
    """As for tune."""
    model: str = TuneConfig.model
    """As for tune."""
    pretrained: str | None = TuneConfig.pretrained
    """As for tune."""
    shots: int = TuneConfig.shots
    """Training images of each class that trains."""
    classes: int | None = TuneConfig.classes
    """Most classes, base and new together."""
    skip_layers: int | float = TuneConfig.skip_layers
    """Blocks of each tower that are skipped: a number, or a fraction such as 0.5."""
    dtype: CacheDtype = TuneConfig.cache_dtype
    """How features are kept; int8 is lossy."""
    views: int = TuneConfig.views
    """Random crops of each training image; 1: the image as it is tested."""
    workers: int = TuneConfig.workers
    """Processes that load images."""
    precision: Precision = TuneConfig.precision
    """As for tune."""
    device: str = TuneConfig.device
    """cpu, cuda, cuda:1, …; auto is cuda where there is one."""
    seed: int = TuneConfig.seed
    """Chooses training images."""
    resume: bool = False
    """Go on with what is there, and mend it where it is damaged."""
    overwrite: bool = False
    """Replace what is there."""


@dataclasses.dataclass(frozen=True)
class CacheInfoConfig:
    """Say what stores a folder holds, and what they depend on."""

    path: tyro.conf.Positional[Path]
    """Of a store, or a folder with some in it."""
    json: bool = False
    """Print JSON in place of a table."""


@dataclasses.dataclass(frozen=True)
class CacheVerifyConfig:
    """Read the stores of a folder, all of them, and compare checksums. Exit code 1 if one is damaged."""

    path: tyro.conf.Positional[Path]
    """Of a store, or a folder with some in it."""


@dataclasses.dataclass(frozen=True)
class CachePruneConfig:
    """Delete what is of no use to the stores of a folder: what builds left that were killed."""

    path: tyro.conf.Positional[Path]
    """Of a store, or a folder with some in it."""
    unfinished: bool = False
    """Delete stores that are incomplete, too."""
    dry_run: bool = False
    """Only say what would go."""


CacheCommand = (
    Annotated[CacheBuildConfig, tyro.conf.subcommand("build")]
    | Annotated[CacheInfoConfig, tyro.conf.subcommand("info")]
    | Annotated[CacheVerifyConfig, tyro.conf.subcommand("verify")]
    | Annotated[CachePruneConfig, tyro.conf.subcommand("prune")]
)


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Features at the cut on the disk: build, info, verify, prune."""

    action: CacheCommand


def run(action: CacheCommand, out: Terminal, err: Terminal) -> int:
    """Run a command. Returns 0, or 1 for a store that is damaged.

    Raises:
        InputError, StoreError: For what can't be used.
    """
    if isinstance(action, CacheBuildConfig):
        _build(action, out, err)
        return 0
    folders = _stores(action.path, err)
    if not folders:
        raise InputError(f"{action.path}: no store in it (no {MANIFEST}); make one with skipkernels cache build.")
    if isinstance(action, CacheInfoConfig):
        _info(folders, action.json, out)
        return 0
    if isinstance(action, CachePruneConfig):
        _prune(folders, action, out)
        return 0
    return _verify(folders, out, err)


def _stores(path: Path, err: Terminal) -> list[Path]:
    """Folders of stores in a folder; says what else there is that looks like one."""
    stores = []
    for manifest in sorted(path.rglob(MANIFEST)):
        if is_store(manifest.parent):
            stores.append(manifest.parent)
        else:
            err.print(f"skipped {manifest}: not of a store", soft_wrap=True)
    return stores


def _build(action: CacheBuildConfig, out: Terminal, err: Terminal) -> None:
    same = {field.name for field in dataclasses.fields(TuneConfig)}
    values = {name: value for name, value in vars(action).items() if name in same}
    config = TuneConfig(cache=action.path, cache_dtype=action.dtype, **values).resolved()
    check_apart("cache", action.path, config)
    setup = build_run(config, resume=action.resume, overwrite=action.overwrite)
    setup.test_features(progress=True)
    setup.train_features(progress=True)
    _info(_stores(action.path, err), False, out)


def _info(folders: list[Path], as_json: bool, out: Terminal) -> None:
    described = {str(folder): _described(folder) for folder in folders}
    if as_json:
        out.print_json(data=described)
        return
    short = (Column(name, no_wrap=True) for name in ("rows", "of", "kept in", "on disk"))
    table = Table(Column("store", overflow="fold"), *short, Column("state", overflow="fold"))
    for name, values in described.items():
        if "error" in values:
            table.add_row(name, "", "", "", "", values["error"])
            continue
        shape = " × ".join(map(str, values["shape"]))
        state = "complete" if values["complete"] else f"{values['shards there']} of {values['shards']} shards"
        if values["leftover bytes"]:
            state += f", {decimal(values['leftover bytes'])} of no use"
        table.add_row(name, f"{values['rows']:,}", shape, values["dtype"], decimal(values["bytes"]), state)
    out.print(table)
    if len(folders) == 1 and "error" not in values:
        depends = Table("depends on", "")
        for name, value in values["depends on"].items():
            depends.add_row(name, str(value))
        out.print(depends)


def _described(folder: Path) -> dict[str, Any]:
    """For JSON."""
    try:
        manifest = Manifest.read(folder)
    except StoreError as error:
        return {"error": str(error)}
    layout, there = manifest.layout, [shard for shard in manifest.shards if shard is not None]
    return {
        "rows": layout.rows,
        "shape": list(layout.shape),
        "dtype": layout.dtype,
        "computed": layout.computed,
        "bytes": sum(shard.bytes for shard in there),
        "shards": layout.shards,
        "shards there": len(there),
        "complete": manifest.complete,
        "leftover bytes": sum(path.stat().st_size for path in leftovers(folder, manifest)),
        "depends on": layout.fingerprint,
    }


def _verify(folders: list[Path], out: Terminal, err: Terminal) -> int:
    wrong: list[str] = []
    columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with progress(*columns, console=err) as bars:
        for folder in folders:
            try:
                store = Store(folder)
                bar = bars.add_task(escaped(folder), total=store.bytes)
                wrong += store.verify(partial(bars.advance, bar))
            except StoreError as error:
                wrong.append(str(error))
    for message in wrong:
        out.print(plain("damaged", style="red"), plain(message), soft_wrap=True)
    sound = f"{len(folders)} stores, all complete and sound; one that a build has not begun is not seen"
    out.print(f"{len(folders)} stores, {len(wrong)} damages" if wrong else sound, soft_wrap=True)
    return 1 if wrong else 0


def _prune(folders: list[Path], action: CachePruneConfig, out: Terminal) -> None:
    total = 0
    for folder in folders:
        for path, size in prune(folder, unfinished=action.unfinished, dry_run=action.dry_run):
            out.print(f"{path}  {decimal(size)}", soft_wrap=True)
            total += size
    out.print(f"{decimal(total)} {'would be freed' if action.dry_run else 'freed'}")
