"""`skipkernels cache`: build, info and verify."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from skipkernels._progress import progress
from skipkernels.app.console import Terminal
from skipkernels.app.option_groups import (
    CacheOptions,
    ComputeOptions,
    DataOptions,
    ModelOptions,
    ProtocolOptions,
    RunOptions,
    SkipOptions,
)
from skipkernels.options import CacheDtype, Precision

from .errors import on_interrupt
from .options import tune_config


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """An interrupted build continues with --resume."""

    skip_layers: int | float = SkipOptions.skip_layers
    """Blocks that each tower skips: a number, or a fraction of its blocks such as 0.5. Features are the output of the
    last skipped block."""
    dtype: CacheDtype = CacheOptions.cache_dtype
    """Type of the stored features. int8 is lossy."""
    views: int = CacheOptions.views
    """Random crops per training image. 1: no random crop."""
    precision: Precision = ComputeOptions.precision
    """Precision of the model, as for tune."""
    resume: bool = False
    """Complete an earlier build in the folder, and compute damaged parts again."""
    overwrite: bool = False
    """Replace an earlier build in the folder."""


@dataclasses.dataclass(frozen=True)
class CacheBuild:
    """Compute the features of the images and prompts of a task, for tune --cache."""

    path: tyro.conf.Positional[Path]
    """Folder of the cache."""
    build: BuildOptions = BuildOptions()
    data: DataOptions = DataOptions()
    protocol: ProtocolOptions = ProtocolOptions()
    model: ModelOptions = ModelOptions()
    run: RunOptions = RunOptions()

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Build the stores, and print them. Returns 0."""
        from skipkernels.app.train.run_folder import check_apart
        from skipkernels.app.train.setup import build_run

        with on_interrupt("complete shards are kept; resume with cache build --resume"):
            # resume and overwrite of a run; those of the stores are passed to `build_run`
            changes = {"cache": self.path, "cache_dtype": self.build.dtype, "resume": False, "overwrite": False}
            config = tune_config(self, **changes).resolved()
            check_apart("cache", self.path, config)
            setup = build_run(config, resume=self.build.resume, overwrite=self.build.overwrite)
            setup.test_features(progress=True)  # stores the features, as do the next two
            setup.validation_features(progress=True)
            setup.train_features(progress=True)
        return CacheInfo(self.path).execute(out, err)


@dataclasses.dataclass(frozen=True)
class CacheInfo:
    """Print the contents of the stores in a folder, and the model and data that they depend on."""

    path: tyro.conf.Positional[Path]
    """Folder of a store, or a folder that contains stores."""
    json: bool = False
    """Print JSON instead of a table."""

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Print the stores. Returns 0."""
        stores = {str(folder): _description(folder) for folder in _stores(self.path, err)}
        if self.json:
            out.print_json(data=stores)
            return 0
        short = (Column(name, no_wrap=True) for name in ("rows", "shape", "dtype", "on disk"))
        table = Table(Column("store", overflow="fold"), *short, Column("state", overflow="fold"))
        for name, store in stores.items():
            if "error" in store:
                table.add_row(name, "", "", "", "", store["error"])
                continue
            shape = " × ".join(map(str, store["shape"]))
            state = "complete" if store["complete"] else f"{store['shards_written']} of {store['shards']} shards"
            table.add_row(name, f"{store['rows']:,}", shape, store["dtype"], decimal(store["bytes"]), state)
        out.print(table)
        (store, *others) = stores.values()
        if not others and "error" not in store:
            depends = Table("depends on", "")
            for name, value in store["fingerprint"].items():
                depends.add_row(name, str(value))
            out.print(depends)
        return 0


@dataclasses.dataclass(frozen=True)
class CacheVerify:
    """Read every store in a folder and compare the checksums. The exit code is 1 if a store is damaged."""

    path: tyro.conf.Positional[Path]
    """Folder of a store, or a folder that contains stores."""

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Verify the stores, and print damaged parts. Returns 0, or 1 if one is damaged."""
        from skipkernels.store import Store, StoreError

        folders, problems = _stores(self.path, err), list[str]()
        for folder in folders:
            try:
                store = Store(folder)
                with progress(f"{folder}, MB", store.bytes // 10**6) as advance:
                    problems += store.verify(lambda count: advance(count / 10**6))  # noqa: B023
            except StoreError as error:
                problems.append(str(error))
        for problem in problems:
            out.print(Text("damaged", "red"), problem, soft_wrap=True)
        intact = "complete and undamaged. Stores that a build has not started are not counted"
        state = f"{len(problems)} damaged parts" if problems else intact
        out.print(f"stores: {len(folders)}; {state}.", soft_wrap=True)
        return 1 if problems else 0


@dataclasses.dataclass(frozen=True)
class CacheCommand:
    """Build and inspect feature caches: build, info, verify."""

    action: (
        Annotated[CacheBuild, tyro.conf.subcommand("build")]
        | Annotated[CacheInfo, tyro.conf.subcommand("info")]
        | Annotated[CacheVerify, tyro.conf.subcommand("verify")]
    )

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Run the action."""
        return self.action.execute(out, err)


def _stores(path: Path, err: Terminal) -> list[Path]:
    """List the folders of stores in a path and its subfolders; report manifests that are not of a store."""
    from skipkernels.app.data import InputError
    from skipkernels.store import MANIFEST, is_store

    stores = []
    for manifest in sorted(path.rglob(MANIFEST)):
        if is_store(manifest.parent):
            stores.append(manifest.parent)
        else:
            err.print(f"skipped {manifest}: not the manifest of a store", soft_wrap=True)
    if not stores:
        raise InputError(f"{path} contains no store (no {MANIFEST}); create one with skipkernels cache build.")
    return stores


def _description(folder: Path) -> dict[str, Any]:
    """Describe a store in JSON types."""
    from skipkernels.store import Manifest, StoreError

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
        "shards_written": len(written),
        "complete": not manifest.missing,
        "fingerprint": layout.fingerprint,
    }
