"""Datasets and protocols: the images and classes of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy_names

if TYPE_CHECKING:
    from .base import InputError, SizedDataset
    from .images import DatasetImages, Images, LabelledImages
    from .registry import open_source
    from .shots import few_shot
    from .source import Source, Split, from_datasets
    from .tasks import Task, TaskOptions, TestSet, load_task, summarise

__all__ = [
    "DatasetImages",
    "Images",
    "InputError",
    "LabelledImages",
    "SizedDataset",
    "Source",
    "Split",
    "Task",
    "TaskOptions",
    "TestSet",
    "few_shot",
    "from_datasets",
    "load_task",
    "open_source",
    "summarise",
]

__getattr__ = lazy_names(
    __name__,
    {
        "base": ("InputError", "SizedDataset"),
        "images": ("DatasetImages", "Images", "LabelledImages"),
        "registry": ("open_source",),
        "shots": ("few_shot"),
        "source": ("Source", "Split", "from_datasets"),
        "tasks": ("Task", "TaskOptions", "TestSet", "load_task", "summarise"),
    },
)
