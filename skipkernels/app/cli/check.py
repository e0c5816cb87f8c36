"""`skipkernels check`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from skipkernels._progress import progress
from skipkernels.app.console import Terminal
from skipkernels.formatting import csv_line, escaped

from .errors import with_flags

if TYPE_CHECKING:
    from skipkernels.app.data import Source
    from skipkernels.app.data.check import Fact

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
        """Check the dataset. Returns 0, or 1 if a file could not be read, or tune refuses the dataset."""
        from skipkernels.app.data import InputError, open_source
        from skipkernels.app.data.check import Finding, facts, findings
        from skipkernels.app.data.files import format_names
        from skipkernels.app.data.shots import class_sizes_note
        from skipkernels.app.report.formats import plural
        from skipkernels.folders import replace_text

        if self.out is not None:
            from skipkernels.app.serve.output import check_file

            check_file(self.out, "check")
        try:
            source = open_source(self.data, self.root)
        except InputError as error:  # DATA has no flag
            raise InputError(error.reason, None if error.argument == "data" else error.argument) from error
        total = sum(len(source.images(split)) for split in ("train", "val", "test") if source.has_split(split))
        with progress("images", total) as advance:
            images = facts(source, lambda: advance(1))
        for note in source.notes:
            err.print(f"note: {note}", soft_wrap=True)
        problems = findings(images)
        out.print(_table(images, str(source.name)))
        trained = Counter(one.label for one in images if one.split == "train" and one.reason is None)
        few = [f"{name} {trained[name]}" for name in source.classes if trained[name] < _FEW] if trained else []
        if few:
            of = f"{len(few)} of {plural(len(source.classes), 'class', 'classes')}"
            out.print(f"fewer than {_FEW} training images: {of}: {format_names(few)}", soft_wrap=True)
        labels: dict[str, list[str]] = {}
        for image in images:
            labels.setdefault(image.split, []).append(image.label)
        if (sizes := class_sizes_note(labels)) is not None:
            out.print(sizes, soft_wrap=True)
        kinds = Counter(one.kind for one in problems)
        for kind, count in kinds.items():
            out.print(f"{kind}: {count:,}", style="bold")
            for one in [one for one in problems if one.kind == kind][:_SHOWN]:
                text = one.detail if kind == "unreadable" else f"{one.name} ({one.split}, {one.label}) = {one.detail}"
                out.print(f"  {text}", soft_wrap=True)
            if count > _SHOWN:
                out.print(f"  and {count - _SHOWN:,} more" + ("" if self.out else ": --out FILE has all"))
        if not problems:
            out.print("no unreadable images, no duplicates")
        if self.out is not None:
            table = (csv_line(map(escaped, row)) for row in [Finding._fields, *problems])
            replace_text(self.out, "".join(table))
        refused = self._refused(source, [name for name in source.classes if not trained[name]])
        if refused is not None:
            out.print(f"tune refuses this dataset: {refused}", soft_wrap=True)
        return 1 if kinds["unreadable"] or refused is not None else 0

    def _refused(self, source: Source, without: list[str]) -> str | None:
        """Return why `tune` refuses the dataset, which has no readable training image of some classes."""
        from skipkernels.app.data import InputError, TaskOptions, load_task
        from skipkernels.app.data.files import format_names

        try:
            load_task(source, TaskOptions(protocol="few-shot", shots=_FEW, validation="auto"))
        except InputError as error:
            return with_flags(error)
        if without:
            return f"no training image of {format_names(without)} can be read, also not with --unreadable skip."
        return None


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
