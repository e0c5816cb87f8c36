"""`skipkernels check`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from skipkernels._progress import progress
from skipkernels.app.console import Terminal
from skipkernels.formatting import csv_line, escaped

from .errors import with_flags

if TYPE_CHECKING:
    from skipkernels.app.data import Source
    from skipkernels.app.data.check import Fact, Finding

_FEW = 16  # training images of a class, the default of tune --shots
_SHOWN = 20  # findings of a kind on the terminal; --out has all


@dataclasses.dataclass(frozen=True)
class CheckCommand:
    """Read all images of a dataset and report unreadable files, sizes, classes with few images, and duplicates. The
    exit code is 1 if a file could not be read, or tune refuses the dataset.
    """

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA", help_behavior_hint="(required)")]
    """Dataset, named as for tune, such as imagefolder:photos."""
    root: Path | None = None
    """Folder that contains the datasets of coop:, or the images of csv:."""
    out: Path | None = None
    """File of all findings, .csv. By default the first of each kind are printed."""

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Check the dataset, and print the results. Returns the exit code."""
        from skipkernels.app.data.check import Finding, facts, findings, nonempty_splits
        from skipkernels.app.serve.output import check_file
        from skipkernels.folders import replace_text

        if self.out is not None:
            check_file(self.out, "check")
        source = self._open()
        total = sum(len(source.images(split)) for split in nonempty_splits(source))
        with progress("images", total) as advance:
            images = facts(source, lambda: advance(1))
        for note in source.notes:
            err.print(f"note: {note}", soft_wrap=True)
        out.print(_table(images, str(source.name)))
        trained = Counter(one.label for one in images if one.split == "train" and one.reason is None)
        for line in _about_classes(source, images, trained):
            out.print(line, soft_wrap=True)
        problems = findings(images)
        self._print_findings(problems, out)
        if self.out is not None:
            replace_text(self.out, "".join(csv_line(map(escaped, row)) for row in [Finding._fields, *problems]))
        refused = self._refused(source, trained)
        if refused is not None:
            out.print(f"tune refuses this dataset: {refused}", soft_wrap=True)
        return 1 if refused is not None or any(one.kind == "unreadable" for one in problems) else 0

    def _open(self) -> Source:
        from skipkernels.app.data import InputError, open_source

        try:
            return open_source(self.data, self.root)
        except InputError as error:  # DATA has no flag
            raise InputError(error.reason, None if error.argument == "data" else error.argument) from error

    def _print_findings(self, problems: list[Finding], out: Terminal) -> None:
        """Print the first findings of each kind."""
        if not problems:
            out.print("no unreadable images, no duplicates")
        for kind, count in Counter(one.kind for one in problems).items():
            out.print(f"{kind}: {count:,}", style="bold")
            for one in [one for one in problems if one.kind == kind][:_SHOWN]:
                text = one.detail if kind == "unreadable" else f"{one.name} ({one.split}, {one.label}) = {one.detail}"
                out.print(f"  {text}", soft_wrap=True)
            if count > _SHOWN:
                out.print(f"  and {count - _SHOWN:,} more" + ("" if self.out else ": --out FILE has all"))

    def _refused(self, source: Source, trained: Counter[str]) -> str | None:
        """Return why `tune` refuses the dataset with its default protocol; None if it does not."""
        from skipkernels.app.data import InputError, TaskOptions, load_task
        from skipkernels.app.data.files import format_names
        from skipkernels.app.data.registry import default_protocol, is_own

        protocol = default_protocol(self.data)
        options = TaskOptions(protocol=protocol, shots=_FEW, validation="auto" if is_own(self.data) else "none")
        try:
            task = load_task(source, options)
        except InputError as error:
            return with_flags(error)
        if without := [name for name in task.tests[0].classes if not trained[name]]:
            return f"no training image of {format_names(without)} can be read, also not with --unreadable skip."
        return None


def _about_classes(source: Source, images: list[Fact], trained: Counter[str]) -> Iterator[str]:
    """Yield a line on classes with few training images, and one on classes of different size.

    `trained` has the number of readable training images of each class.
    """
    from skipkernels.app.data.files import format_names
    from skipkernels.app.data.shots import class_sizes_note
    from skipkernels.app.report.formats import plural

    few = [f"{name} {trained[name]}" for name in source.classes if trained[name] < _FEW] if trained else []
    if few:
        classes = plural(len(source.classes), "class", "classes")
        yield f"fewer than {_FEW} training images: {len(few)} of {classes}: {format_names(few)}"
    labels: dict[str, Sequence[int]] = {split: of_split.labels for split, of_split in source.splits.items()}
    if (sizes := class_sizes_note(labels, source.classes)) is not None:
        yield sizes


def _table(images: list[Fact], title: str) -> Any:
    """Table of the splits."""
    from rich.table import Table

    table = Table("split", title=title)
    for column in ("images", "unreadable", "classes", "per class", "smallest", "median", "largest"):
        table.add_column(column, justify="right")
    for split in dict.fromkeys(one.split for one in images):
        part = [one for one in images if one.split == split]
        read = sorted((one.size for one in part if one.reason is None), key=lambda size: size[0] * size[1])
        counts = Counter(one.label for one in part)
        sizes = [f"{w}×{h}" for w, h in (read[0], read[len(read) // 2], read[-1])] if read else ["–"] * 3
        numbers = (len(part), len(part) - len(read), len(counts))
        table.add_row(split, *(f"{n:,}" for n in numbers), f"{min(counts.values())}–{max(counts.values())}", *sizes)
    return table
