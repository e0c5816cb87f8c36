"""Rows of numbers in a folder: written so that a crash loses little, checked before they are believed, read from a map.

The format is in docs/cache.md. Nothing here knows what the rows are.
"""

from .atomic import partial_of, replace_file, replace_text
from .digest import digest_json, digest_tensors, digests
from .manifest import (
    COMPUTED,
    DTYPES,
    MANIFEST,
    DifferentStore,
    Layout,
    Manifest,
    StoreError,
    file_errors,
    usable_folder,
)
from .reader import Store
from .regular import open_regular, parse_object, read_object, read_regular
from .shards import rounded
from .tensor_file import write_tensors
from .writer import Writer, erase, is_store, leftovers, prune

__all__ = [
    "COMPUTED",
    "DTYPES",
    "MANIFEST",
    "DifferentStore",
    "Layout",
    "Manifest",
    "Store",
    "StoreError",
    "Writer",
    "digest_json",
    "digest_tensors",
    "digests",
    "erase",
    "file_errors",
    "is_store",
    "leftovers",
    "open_regular",
    "parse_object",
    "partial_of",
    "prune",
    "read_object",
    "read_regular",
    "replace_file",
    "replace_text",
    "rounded",
    "usable_folder",
    "write_tensors",
]
