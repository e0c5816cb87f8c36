"""Rows of numbers in a folder: written so that a crash loses little, checked before they are believed, read from a map.

The format is in docs/cache.md. Nothing here knows what the rows are.
"""

from .atomic import partial_of, replace_file, replace_text
from .digest import digest_json, digest_tensors, digests
from .manifest import COMPUTED, DTYPES, MANIFEST, DifferentStore, Layout, Manifest, StoreError
from .reader import Store
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
    "is_store",
    "leftovers",
    "partial_of",
    "prune",
    "replace_file",
    "replace_text",
    "write_tensors",
]
