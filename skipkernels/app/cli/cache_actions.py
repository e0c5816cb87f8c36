"""Implementation of `skipkernels cache`. Imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from skipkernels._progress import progress
from skipkernels.app.config import TuneConfig
from skipkernels.app.console import Terminal
from skipkernels.app.data import InputError
from skipkernels.app.train.run_folder import check_apart
from skipkernels.app.train.setup import build_run
from skipkernels.store import MANIFEST, Manifest, Store, StoreError, is_store, leftovers, prune


def stores_in(path: Path, err: Terminal) -> list[Path]:
    """List the folders of stores in a path and its subfolders; report manifests that are not of a store.

    Raises:
        InputError: If there is no store.
    """
    stores = _stores(path, err)
    if not stores:
        raise InputError(f"{path} contains no store (no {MANIFEST}); create one with skipkernels cache build.")
    return stores


def _stores(path: Path, err: Terminal) -> list[Path]:
    stores = []
    for manifest in sorted(path.rglob(MANIFEST)):
        if is_store(manifest.parent):
            stores.append(manifest.parent)
        else:
            err.print(f"skipped {manifest}: not the manifest of a store", soft_wrap=True)
    return stores


def build(config: TuneConfig, path: Path, out: Terminal, err: Terminal, *, resume: bool, overwrite: bool) -> None:
    """Compute the features of a task into a folder, and print its stores.

    Raises:
        InputError, StoreError: If the task, the model or the folder is not usable.
    """
    config = config.resolved()
    check_apart("cache", path, config)
    setup = build_run(config, resume=resume, overwrite=overwrite)
    setup.test_features(progress=True)
    setup.validation_features(progress=True)
    setup.train_features(progress=True)
    info(_stores(path, err), False, out)


def info(folders: list[Path], as_json: bool, out: Terminal) -> None:
    """Print the contents of stores, and the model and data that they depend on."""
    described = {str(folder): _described(folder) for folder in folders}
    if as_json:
        out.print_json(data=described)
        return
    short = (Column(name, no_wrap=True) for name in ("rows", "shape", "dtype", "on disk"))
    table = Table(Column("store", overflow="fold"), *short, Column("state", overflow="fold"))
    for name, values in described.items():
        if "error" in values:
            table.add_row(name, "", "", "", "", values["error"])
            continue
        shape = " × ".join(map(str, values["shape"]))
        state = "complete" if values["complete"] else f"{values['shards there']} of {values['shards']} shards"
        if values["leftover bytes"]:
            state += f", {decimal(values['leftover bytes'])} unused"
        table.add_row(name, f"{values['rows']:,}", shape, values["dtype"], decimal(values["bytes"]), state)
    out.print(table)
    if len(folders) == 1 and "error" not in values:
        depends = Table("depends on", "")
        for name, value in values["depends on"].items():
            depends.add_row(name, str(value))
        out.print(depends)


def _described(folder: Path) -> dict[str, Any]:
    """Describe a store in JSON types."""
    try:
        manifest = Manifest.read(folder)
    except StoreError as error:
        return {"error": str(error)}
    layout, written = manifest.layout, [shard for shard in manifest.shards if shard is not None]
    return {
        "rows": layout.rows,
        "shape": list(layout.shape),
        "dtype": layout.dtype,
        "computed": layout.computed,
        "bytes": sum(shard.bytes for shard in written),
        "shards": layout.shards,
        "shards there": len(written),
        "complete": not manifest.missing,
        "leftover bytes": sum(path.stat().st_size for path in leftovers(folder, manifest)),
        "depends on": layout.fingerprint,
    }


def verify(folders: list[Path], out: Terminal, err: Terminal) -> int:
    """Verify checksums, and print damaged parts. Returns 0, or 1 if a store is damaged."""
    damages: list[str] = []
    for folder in folders:
        try:
            store = Store(folder)
            with progress(f"{folder}, MB", store.bytes // 10**6) as advance:
                damages += store.verify(lambda count: advance(count / 10**6))  # noqa: B023
        except StoreError as error:
            damages.append(str(error))
    for message in damages:
        out.print(Text("damaged", "red"), message, soft_wrap=True)
    intact = f"{len(folders)} stores, all complete and undamaged; stores that a build has not started are not counted"
    out.print(f"{len(folders)} stores, {len(damages)} damaged parts" if damages else intact, soft_wrap=True)
    return 1 if damages else 0


def remove_unused(folders: list[Path], out: Terminal, *, dry_run: bool) -> None:
    """Delete files that no store uses, and print them."""
    total = 0
    for folder in folders:
        for path, size in prune(folder, dry_run=dry_run):
            out.print(f"{path}  {decimal(size)}", soft_wrap=True)
            total += size
    out.print(f"{decimal(total)} {'would be freed' if dry_run else 'freed'}")
