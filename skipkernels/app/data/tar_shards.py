"""Shards in the format of webdataset: `wds:SHARDS`, uncompressed tar files on this machine.

SHARDS is a path with braces, such as `shards/{000..012}.tar` or `{train,test}-{00..03}.tar`, or a folder of shards. A
sample is the files with the same name up to the first dot: an image (jpg, jpeg, png, webp, …) and its class in `.cls`,
`.json` or `.txt`, the first of them that there is. A `.json` has the class in the field `class_name`, `class`, `label`
or `caption`, among others. Numbers are named by the file `classes.txt` beside the shards, with a name in each line.

Splits. A shard is of a split if its file name begins with train, val or test, or if it is in a folder of that name.
Without any, the images of each class are split by a hash of their names.

Each shard is read once, in order, to index its members and read the labels; images are read where they are needed.
Nothing is unpacked, so member names cannot lead anywhere. The loader of the package `datasets` is not used: it copies
all shards to its cache (16.0 MB for a shard of 16.7 MB), returns None for a .png after samples with .jpg, accepts a
shard that was cut between two members, and stops at any other file that it can't decode.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ...store import digest_json, open_regular
from .base import InputError, open_error
from .files import absolute_path, format_names, has_image_extension, read_text
from .images import DatasetImages, decode_image
from .source import Split, SplitSource, normalize_class_names
from .splits import CAPTIONS, LABEL_NAMES, SPLIT_NAMES, is_number, labels_by_name, listed_source
from .templates import Templates

_MAX_LABEL_BYTES = 1 << 20
_LABEL_FILES = ("cls", "json", "txt")
_SPLIT_PREFIX = re.compile(rf"({'|'.join(sorted(SPLIT_NAMES, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)


class Member(NamedTuple):
    """Image in a shard: path of the shard, and name, first byte and size of the member."""

    shard: Path
    name: str
    offset: int
    size: int


class TarDataset:
    """Images in shards; item i is (image, label).

    Attributes:
        labels: Label of each image.
        fingerprint: Digest of the names, sizes and modification times of the shards, for a feature cache.
    """

    def __init__(self, members: list[Member], labels: list[int]):
        self._members, self.labels = members, labels
        status = [(shard.name, shard.stat()) for shard in dict.fromkeys(member.shard for member in members)]
        self.fingerprint = digest_json([[name, stat.st_size, stat.st_mtime_ns] for name, stat in status])

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        member = self._members[index]
        with open_regular(member.shard) as file:
            file.seek(member.offset)
            content = io.BytesIO(file.read(member.size))
        return decode_image(content, f"{member.shard}: {member.name}"), self.labels[index]


def open_shards(pattern: str, templates: Templates = None) -> SplitSource:
    """Open shards; see the docstring of this module.

    Args:
        pattern: SHARDS.
        templates: See `open_source`. The default for captions is "{}".

    Raises:
        InputError: If a shard or a sample can't be used.
    """
    name = f"wds:{pattern}"
    shards = _shards(name, pattern)
    samples = [sample for shard in shards for sample in _samples(shard)]
    if not samples:
        raise open_error(f"{name}: the shards hold no images. Name other shards.")
    members = [member for member, _, _ in samples]
    found = [label for _, _, label in samples]
    names = [f"{member.shard.parent.name}/{member.shard.name}/{member.name}" for member in members]
    repeated = [each for each, count in Counter(names).items() if count > 1]
    if repeated:
        raise open_error(f"{name}: two images have the name {format_names(repeated)}. Rename one.")
    splits = [split for member in members if (split := _split_of(member.shard)) is not None]
    if splits and len(splits) < len(members):
        other = next(member.shard.name for member in members if _split_of(member.shard) is None)
        raise open_error(
            f"{name}: some shards are named after a split, and {other} is not. Begin its name with train, val or test, "
            "or name only the other splits."
        )
    file = shards[0].parent / "classes.txt"
    if all(map(is_number, found)) and file.is_file():
        labels = list(map(int, found))
        classes = _read_classes(name, file, max(labels))
    else:
        labels, classes = labels_by_name(name, "class", found, f"name them in {file}")
    if templates is None and all(kind in CAPTIONS for _, kind, _ in samples):
        templates = "{}"
    return listed_source(
        name,
        DatasetImages(TarDataset(members, labels), labels, names),
        classes,
        splits or None,
        templates,
        how="no shards of test images" if splits else "no shards named after a split",
        remedy="make shards train-….tar and test-….tar",
    )


def _shards(name: str, pattern: str) -> list[Path]:
    """Return the paths of the shards, which must exist."""
    if not pattern:
        raise open_error("wds: needs shards, such as wds:shards/{000..012}.tar, or a folder of them.")
    folder = absolute_path(pattern)
    if folder.is_dir():
        shards = sorted(folder.glob("*.tar")) or sorted(folder.glob("*/*.tar"))
        if not shards:
            raise open_error(f"{name}: no .tar files in {folder}. Name another folder.")
        return shards
    shards = []
    for shard in map(absolute_path, _expanded(pattern)):
        if not shard.is_file():
            raise open_error(f"{name}: no file {shard} on this machine. Correct the range, or download the shard.")
        shards.append(shard)
    return shards


def _expanded(pattern: str) -> Iterator[str]:
    """Expand braces as a shell does: {a,b} and {000..012}.

    >>> list(_expanded("{train,test}-{08..10}.tar"))[:4]
    ['train-08.tar', 'train-09.tar', 'train-10.tar', 'test-08.tar']
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        yield pattern
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    choices: Iterable[str] = found[1].split(",")
    if numbers:
        choices = (str(number).zfill(len(numbers[1])) for number in range(int(numbers[1]), int(numbers[2]) + 1))
    for choice in choices:
        yield from _expanded(pattern[: found.start()] + choice + pattern[found.end() :])


def _split_of(shard: Path) -> Split | None:
    """Return the split in the name of a shard or of its folder.

    >>> _split_of(Path("a/train-001.tar")), _split_of(Path("val/0.tar")), _split_of(Path("a/trains.tar"))
    ('train', 'val', None)
    """
    found = _SPLIT_PREFIX.match(shard.name)
    return SPLIT_NAMES.get(found[1].lower() if found else shard.parent.name.lower())


def _samples(shard: Path) -> Iterator[tuple[Member, str, str]]:
    """Yield the image, the kind of its label, and the label of each sample of a shard."""
    images: dict[str, Member] = {}
    labels: dict[str, dict[str, bytes]] = defaultdict(dict)
    try:
        with open_regular(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for entry in archive:
                folder, _, last = entry.name.rpartition("/")
                stem, _, extension = last.partition(".")
                key, extension = f"{folder}/{stem}", extension.lower()
                if not entry.isreg() or entry.issparse() or not stem:
                    continue
                content = archive.extractfile(entry)
                if extension in _LABEL_FILES and content is not None:
                    labels[key][extension] = content.read(_MAX_LABEL_BYTES)
                elif has_image_extension(f".{extension}"):
                    if key in images:
                        raise InputError(f"{shard}: {key.lstrip('/')} has two images. Keep one.")
                    images[key] = Member(shard, entry.name, entry.offset_data, entry.size)
            file.seek(archive.offset)  # tarfile takes a cut or damaged header for the end, which is a block of zeros
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("unexpected end of data")
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{shard}: can't be read as an uncompressed tar file ({reason}). Unpack it if it is compressed, or get it "
            "again."
        ) from error
    for key, member in images.items():
        if key not in labels:
            raise InputError(f"{shard}: {member.name} has no .cls, .json or .txt. Add its class, or remove it.")
        yield member, *_label(f"{shard}: {key.lstrip('/')}", labels[key])


def _label(where: str, files: dict[str, bytes]) -> tuple[str, str]:
    """Return the kind and the text of the label of a sample."""
    kind = extension = next(each for each in _LABEL_FILES if each in files)
    try:
        value: Any = files[extension].decode("utf-8-sig")
        if extension == "json":
            fields = json.loads(value)
            named = {key.lower(): field for key, field in fields.items()} if isinstance(fields, dict) else {}
            kind = next((each for each in LABEL_NAMES if each in named), "")
            if not kind:
                raise ValueError(f"no field {', '.join(LABEL_NAMES)}")
            value = named[kind]
            if isinstance(value, bool) or not isinstance(value, (int, str)):
                raise ValueError(f"{kind} must be text or a whole number")
        text = str(value).strip()
        if not text or "\n" in text:
            raise ValueError(f"must be one line of text; got {text!a:.80}")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: its .{extension} is not usable as a label ({error}). Correct it.") from error
    return kind, text


def _read_classes(name: str, file: Path, largest: int) -> tuple[str, ...]:
    """Read the names of numbered classes. An empty line before the last name is refused: it would shift the others."""
    lines = read_text(file).rstrip().splitlines()
    if largest >= len(lines):
        raise InputError(f"{file}: has {len(lines)} names, and a sample has the class {largest}. Add the others.")
    numbers = list(range(len(lines)))
    return normalize_class_names(f"open_source: {name}", "data", "line", numbers, lines, "remove classes.txt")
