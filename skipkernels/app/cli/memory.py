"""`skipkernels memory`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from skipkernels._progress import progress
from skipkernels.app.console import Terminal
from skipkernels.app.option_groups import SkipOptions
from skipkernels.options import Memory, Precision

from .options import Trust, settings

if TYPE_CHECKING:
    from skipkernels.app.train.memory import MemoryModel, Saved

SIZES = (8, 12, 16, 24, 40, 80)  # GB of GPUs
_MOST = {"classes": 1_000_000, "batch_size": 65_536}
_HELD = {
    "weights": "weights of the model",
    "momentum": "momentum of the weights that train",
    "text_features": "texts of all classes, below the cut",
    "image_features": "features of images in memory",
}
_PARTS = {
    "saved_images": "saved for backward, images",
    "saved_texts": "saved for backward, texts",
    "gradients": "gradients, at its end",
}


@dataclasses.dataclass(frozen=True)
class MemoryCommand:
    """Predict the GPU memory of training, from the configuration of a model: no weights are downloaded, nothing trains.

    Sizes are counted by running a step without values. GB are 2^30 bytes; 1 GB is assumed for CUDA and its libraries.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help_behavior_hint="(required)")]
    """Model, as for tune --model."""
    classes: int = 1000
    """Classes of the task."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["--batch"])] = 4
    """Images per step."""
    images_in_memory: int = 0
    """Training, validation and test images together, if their features are kept in memory: tune without --cache."""
    name_tokens: int = 4
    """Tokens of a class name. Names of ImageNet have 1 to 11; a word has one to three."""
    method: Literal["skip", "full"] = "skip"
    """skip: Skip Tuning. full: full fine-tuning in plain PyTorch."""
    precision: Precision = "auto"
    """Arithmetic, as for tune; auto is bf16."""
    memory: Memory = "auto"
    """Tensors that a block saves for backward, as for tune; auto shows fast and min."""
    fit: str | None = None
    """Memory of a GPU, such as 8GB: also print the largest number of classes and the largest batch that fit."""
    trust: Trust = False
    json: bool = False
    """Print JSON, with sizes in bytes, instead of a table."""
    skip: SkipOptions = SkipOptions()

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Predict, and print a table. Returns 0."""
        from skipkernels.app.data import InputError
        from skipkernels.app.train.memory import RESERVED, MemoryModel
        from skipkernels.selection import RankSampler

        limits = {"classes": (1, 10**7), "batch_size": (1, 10**6), "images_in_memory": (0, 10**10)}
        for name, (least, most) in (limits | {"name_tokens": (1, 1000)}).items():
            if not least <= getattr(self, name) <= most:
                raise InputError(f"memory: {name} must be from {least} to {most:,}; got {getattr(self, name):,}.", name)
        budget = None if self.fit is None else _bytes(self.fit) - RESERVED
        modes: tuple[Saved, ...] = ("fast", "min") if self.memory == "auto" else (self.memory,)
        modes = ("fast",) if self.method == "full" else modes
        try:
            options = settings(self.skip)
            tower = {name: options.pop(name) for name in ("skip_layers", "train_text")}
            sampler = RankSampler(**options)
            with progress("sizes", len(modes) * (1 if budget is None else 3)) as advance:
                model = MemoryModel(
                    self.model, method=self.method, sampler=sampler, precision=self.precision,
                    name_tokens=self.name_tokens, trust=self.trust, **tower,
                )  # fmt: skip
                found = {mode: self._of_mode(model, mode, budget, advance) for mode in modes}
        except InputError:
            raise
        except (ValueError, RuntimeError) as error:  # of SkipCLIP
            raise InputError(str(error)) from error
        case = {name: getattr(self, name) for name in ("model", "method", "classes", "batch_size", "name_tokens")}
        case |= {"kept_classes": model.kept(self.classes, self.batch_size), "bytes_per_image": model.feature_bytes()}
        if self.json:
            out.print_json(data=case | {"precision": self.precision, "reserved": RESERVED, "memory": found})
            return 0
        out.print(self._table(case["kept_classes"], found))
        if self.method == "skip" and not self.images_in_memory:
            size = f"{case['bytes_per_image'] / 2**20:.2f} MiB"
            err.print(
                f"Features of an image take {size}: in memory with --images-in-memory, on disk with tune --cache."
            )
        return 0

    def _of_mode(
        self, model: MemoryModel, mode: Saved, budget: int | None, advance: Callable[[float], None]
    ) -> dict[str, Any]:
        """Sizes in bytes, the sizes of GPUs that suffice, and what fits in a budget."""
        from skipkernels.app.train.memory import RESERVED, largest

        sizes = dataclasses.asdict(model.predict(self.batch_size, self.classes, mode, images=self.images_in_memory))
        advance(1)
        found: dict[str, Any] = sizes | {"fits_gb": [gb for gb in SIZES if sizes["total"] + RESERVED <= gb << 30]}
        for name, most in _MOST.items() if budget is not None else ():

            def total(count: int, name: str = name) -> int:
                case = {"batch_size": self.batch_size, "classes": self.classes} | {name: count}
                return model.predict(**case, memory=mode, images=self.images_in_memory).total

            assert budget is not None
            found[f"largest_{name}"] = largest(total, budget, getattr(self, name), most)
            advance(1)
        return found

    def _table(self, kept: int, found: Mapping[Saved, dict[str, Any]]) -> Any:
        from rich.table import Table

        classes = f"{self.classes:,} classes" + ("" if kept == self.classes else f", {kept:,} of them in a step")
        table = Table("MiB", title=f"{self.model}, {self.method}: {classes}; batches of {self.batch_size}")
        for mode in found:
            table.add_column(f"--memory {mode}" if self.method == "skip" else "plain PyTorch", justify="right")

        def add(label: str, values: list[str], *, ends: bool = False) -> None:
            table.add_row(label, *values, end_section=ends)

        def sizes(name: str) -> list[str]:
            return [f"{each[name] / 2**20:,.0f}" for each in found.values()]

        for name, label in _HELD.items():
            if name != "image_features" or self.images_in_memory:
                add(label, sizes(name))
        add("a step, at its peak", sizes("step"))
        for name, label in _PARTS.items():
            add(f"  {label}", sizes(name))
        add("evaluation, 64 images at a time", sizes("evaluation"), ends=True)
        add("in total", sizes("total"), ends=True)
        least = [next(iter(each["fits_gb"]), None) for each in found.values()]
        add("fits a GPU of", ["more than 80 GB" if gb is None else f"{gb} GB" for gb in least])
        for name, label in (
            ("classes", f"classes, batches of {self.batch_size}"),
            ("batch_size", f"images per batch, {self.classes:,} classes"),
        ):
            if self.fit is not None:
                most = [each[f"largest_{name}"] for each in found.values()]
                add(f"most in {self.fit}: {label}", [f"{n:,}" + (" or more" if n == _MOST[name] else "") for n in most])
        return table


def _bytes(size: str) -> int:
    """Return the bytes of a size such as "8GB" or "8"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:GB|GiB)?", size, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        from skipkernels.app.data import InputError

        raise InputError(f"memory: fit must be a number of GB, such as 8GB; got {size!r}.", "fit")
    return int(float(found[1]) * 2**30)
