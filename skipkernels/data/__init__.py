"""Datasets and protocols: from the name of a dataset to the images and classes of a task."""

from .task import BaseToNew, ClassSplit, InputError, SizedDataset, load_base_to_new

__all__ = ["BaseToNew", "ClassSplit", "InputError", "SizedDataset", "load_base_to_new"]
