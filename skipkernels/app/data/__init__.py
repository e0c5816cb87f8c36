"""Datasets and protocols: the images and classes of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy_names
from .base import InputError

if TYPE_CHECKING:
    from .choice import TaskOptions
    from .in_python import from_datasets
    from .registry import open_source
    from .shots import few_shot
    from .source import Source
    from .tasks import Task, TestSet, load_task

_NAMES = {
    "choice": ("TaskOptions",),
    "in_python": ("from_datasets",),
    "registry": ("open_source",),
    "shots": ("few_shot",),
    "source": ("Source",),
    "tasks": ("Task", "TestSet", "load_task"),
}
__all__ = [
    "InputError",
    "Source",
    "Task",
    "TaskOptions",
    "TestSet",
    "few_shot",
    "from_datasets",
    "load_task",
    "open_source",
]
__getattr__ = lazy_names(__name__, _NAMES)
