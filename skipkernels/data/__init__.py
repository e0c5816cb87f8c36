"""Datasets and protocols: from the name of a dataset to the images and classes of a task."""

from .base import InputError, LabelledDataset, SizedDataset
from .few_shot import few_shot, load_few_shot, save_few_shot, shortfall
from .images import Images, LabelledImages, PickedImages
from .registry import open_source, register_source
from .source import Protocol, Source, Split, from_datasets
from .tasks import Task, TestSet, load_task, split_base_new, summarise

__all__ = [
    "Images",
    "InputError",
    "LabelledDataset",
    "LabelledImages",
    "PickedImages",
    "Protocol",
    "SizedDataset",
    "Source",
    "Split",
    "Task",
    "TestSet",
    "few_shot",
    "from_datasets",
    "load_few_shot",
    "load_task",
    "open_source",
    "register_source",
    "save_few_shot",
    "shortfall",
    "split_base_new",
    "summarise",
]
