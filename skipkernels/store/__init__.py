"""Storage of rows of numbers in a folder: crash-safe writing, checksums, and memory-mapped reading.

docs/cache.md specifies the format.
"""

from .atomic import partial_of, replace_file, replace_text
from .digest import digest_bytes, digest_json, digest_tensors, digests
from .manifest import (
    COMPUTED,
    DTYPES,
    MANIFEST,
    DifferentStore,
    Layout,
    Manifest,
    Shard,
    StoreError,
    absolute_folder,
    file_errors,
)
from .reader import Store
from .safe_read import open_regular, parse_object, read_object, read_regular
from .shards import rounded
from .tensor_file import write_tensors
from .writer import ShardWriter, Writer, erase, is_store, leftovers, prune

__all__ = [
    "COMPUTED",
    "DTYPES",
    "MANIFEST",
    "DifferentStore",
    "Layout",
    "Manifest",
    "Shard",
    "ShardWriter",
    "Store",
    "StoreError",
    "Writer",
    "absolute_folder",
    "digest_bytes",
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
    "write_tensors",
]
