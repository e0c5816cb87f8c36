"""`skipkernels cache`: build, info, verify and prune."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

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
    """Folder to create."""
    build: BuildOptions = BuildOptions()
    data: DataOptions = DataOptions()
    protocol: ProtocolOptions = ProtocolOptions()
    model: ModelOptions = ModelOptions()
    run: RunOptions = RunOptions()

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Build the stores. Returns 0."""
        from . import cache_actions

        config = tune_config(self, cache=self.path, cache_dtype=self.build.dtype, resume=False, overwrite=False)
        with on_interrupt("complete shards are kept; resume with cache build --resume"):
            cache_actions.build(config, self.path, out, err, resume=self.build.resume, overwrite=self.build.overwrite)
        return 0


@dataclasses.dataclass(frozen=True)
class CacheInfo:
    """Print the contents of the stores in a folder, and the model and data that they depend on."""

    path: tyro.conf.Positional[Path]
    """Folder of a store, or a folder that contains stores."""
    json: bool = False
    """Print JSON instead of a table."""

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Print the stores. Returns 0."""
        from . import cache_actions

        cache_actions.info(cache_actions.stores_in(self.path, err), self.json, out)
        return 0


@dataclasses.dataclass(frozen=True)
class CacheVerify:
    """Read every store in a folder and compare the checksums. The exit code is 1 if a store is damaged."""

    path: tyro.conf.Positional[Path]
    """Folder of a store, or a folder that contains stores."""

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Verify the stores. Returns 0, or 1 if one is damaged."""
        from . import cache_actions

        return cache_actions.verify(cache_actions.stores_in(self.path, err), out, err)


@dataclasses.dataclass(frozen=True)
class CachePrune:
    """Delete files of interrupted builds that no store uses."""

    path: tyro.conf.Positional[Path]
    """Folder of a store, or a folder that contains stores."""
    dry_run: bool = False
    """Print the files without deleting them."""

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Delete the files. Returns 0."""
        from . import cache_actions

        folders = cache_actions.stores_in(self.path, err)
        cache_actions.remove_unused(folders, out, dry_run=self.dry_run)
        return 0


@dataclasses.dataclass(frozen=True)
class CacheCommand:
    """Build and inspect feature caches: build, info, verify, prune."""

    action: (
        Annotated[CacheBuild, tyro.conf.subcommand("build")]
        | Annotated[CacheInfo, tyro.conf.subcommand("info")]
        | Annotated[CacheVerify, tyro.conf.subcommand("verify")]
        | Annotated[CachePrune, tyro.conf.subcommand("prune")]
    )

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Run the action."""
        return self.action.execute(out, err)
