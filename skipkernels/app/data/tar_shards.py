"""Shards in the format of webdataset: `wds:SHARDS`, uncompressed tar files on this machine.

SHARDS is a path with braces, such as `shards/{000..012}.tar` or `{train,test}-{00..03}.tar`, or a folder of shards. A
sample is the files with the same name up to the first dot: an image (jpg, jpeg, png, webp, …) and its class in `.cls`,
`.json` or `.txt`, the first of them that there is. A `.json` has the class in the field `class_name`, `class`, `label`
or `caption`, among others. Numbers are named by the file `classes.txt` beside the shards, with a name in each line.

Splits. A shard is of a split if its file name begins with train, val or test, or if it is in a folder of that name.
Without any, the images of each class are split by a hash of their names.

Each shard is read once, in order, to index its members and read the labels; images are read where they are needed.
Nothing is unpacked, so member names cannot lead anywhere.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
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
_MAX_SHARDS = 100_000
_LABEL_FILES = ("cls", "json", "txt")
_SPLIT_PREFIX = re.compile(rf"({'|'.join(sorted(SPLIT_NAMES, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)


class Member(NamedTuple):
    """Image in a shard: number of the shard, and name, first byte and size of the member."""

    shard: int
    name: str
    offset: int
    size: int


class TarDataset:
    """Images in shards; item i is (image, label).

    Attributes:
        shards: Paths of the shards.
        members: Place of each image.
        labels: Label of each image.
        fingerprint: Digest of the names, sizes and modification times of the shards, for a feature cache.
    """

    def __init__(self, shards: list[Path], members: list[Member], labels: list[int]):
        self.shards, self.members, self.labels = shards, members, labels
        status = [(shard.name, shard.stat()) for shard in shards]
        self.fingerprint = digest_json([[name, stat.st_size, stat.st_mtime_ns] for name, stat in status])

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        member = self.members[index]
        shard = self.shards[member.shard]
        with open_regular(shard) as file:
            file.seek(member.offset)
            content = io.BytesIO(file.read(member.size))
        return decode_image(content, f"{shard}: {member.name}"), self.labels[index]


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
    members: list[Member] = []
    found: list[str] = []
    splits: list[Split | None] = []
    kinds: dict[str, None] = {}
    for number, shard in enumerate(shards):
        for member, kind, label in _samples(shard, number):
            members.append(member)
            found.append(label)
            splits.append(_split_of(shard))
            kinds[kind] = None
    if not members:
        raise open_error(f"{name}: the shards hold no images. Name other shards.")
    names = [_name_of(shards, member) for member in members]
    if len(set(names)) < len(names):
        repeated = sorted({one for one, other in itertools.pairwise(sorted(names)) if one == other})
        raise open_error(f"{name}: two images have the name {format_names(repeated)}. Rename one.")
    known = [split for split in splits if split is not None]
    if known and len(known) < len(splits):
        other = next(shards[member.shard] for member, split in zip(members, splits, strict=True) if split is None)
        raise open_error(
            f"{name}: some shards are named after a split, and {other.name} is not. Begin its name with train, val or "
            "test, or name only the other splits."
        )
    numbered = all(map(is_number, found))
    file = shards[0].parent / "classes.txt"
    if numbered and file.is_file():
        labels, classes = list(map(int, found)), _read_classes(name, file, max(map(int, found)))
    else:
        labels, classes = labels_by_name(name, "class", found, f"name them in {file}")
    if templates is None and set(kinds) <= set(CAPTIONS):
        templates = "{}"
    images = DatasetImages(TarDataset(shards, members, labels), labels, names)
    return listed_source(
        name,
        images,
        classes,
        known or None,
        templates,
        how="no shards of test images" if known else "no shards named after a split",
        remedy="make shards train-….tar and test-….tar",
    )


def _shards(name: str, pattern: str) -> list[Path]:
    """Return the paths of the shards, which must exist."""
    if "://" in pattern or pattern.startswith("pipe:"):
        raise open_error(f"{name}: shards must be files on this machine. Download them.")
    if not pattern:
        raise open_error("wds: needs shards, such as wds:shards/{000..012}.tar, or a folder of them.")
    folder = absolute_path(pattern)
    if folder.is_dir():
        shards = sorted(folder.glob("*.tar")) or sorted(folder.glob("*/*.tar"))
        if not shards:
            raise open_error(f"{name}: no .tar files in {folder}. Name another folder.")
        return shards
    shards = [absolute_path(path) for path in itertools.islice(_expanded(pattern), _MAX_SHARDS + 1)]
    if len(shards) > _MAX_SHARDS:
        raise open_error(f"{name}: names more than {_MAX_SHARDS} shards. Name fewer.")
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing:
        raise open_error(f"{name}: no file {format_names(missing)}. Correct the range, or get the files again.")
    return list(dict.fromkeys(shards))


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
    if numbers:
        first, last = map(int, numbers.groups())
        width = len(numbers[1]) if numbers[1].startswith("0") else 0
        choices: Any = (f"{number:0{width}d}" for number in range(first, last + 1))
    else:
        choices = found[1].split(",")
    for choice in choices:
        yield from _expanded(pattern[: found.start()] + choice + pattern[found.end() :])


def _split_of(shard: Path) -> Split | None:
    """Return the split in the name of a shard or of its folder.

    >>> _split_of(Path("a/train-001.tar")), _split_of(Path("val/0.tar")), _split_of(Path("a/trains.tar"))
    ('train', 'val', None)
    """
    found = _SPLIT_PREFIX.match(shard.name)
    return SPLIT_NAMES.get(found[1].lower() if found else shard.parent.name.lower())


def _name_of(shards: list[Path], member: Member) -> str:
    shard = shards[member.shard]
    return f"{shard.parent.name}/{shard.name}/{member.name}"


def _samples(shard: Path, number: int) -> Iterator[tuple[Member, str, str]]:
    """Yield the image, the kind of its label, and the label of each sample of a shard."""
    images: dict[str, Member] = {}
    labels: dict[str, dict[str, bytes]] = {}
    size = shard.stat().st_size
    try:
        with open_regular(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for entry in archive:
                folder, _, last = entry.name.rpartition("/")
                stem, _, extension = last.partition(".")
                key, extension = f"{folder}/{stem}", extension.lower()
                if not entry.isreg() or entry.issparse() or not stem:
                    continue
                if entry.offset_data + entry.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                if extension in _LABEL_FILES:
                    if entry.size > _MAX_LABEL_BYTES:
                        raise InputError(f"{shard}: {entry.name} is too large for a label. Remove it.")
                    opened = archive.extractfile(entry)
                    labels.setdefault(key, {})[extension] = b"" if opened is None else opened.read()
                elif has_image_extension(f".{extension}"):
                    if key in images:
                        raise InputError(f"{shard}: {key.lstrip('/')} has two images. Keep one.")
                    images[key] = Member(number, entry.name, entry.offset_data, entry.size)
            if archive.offset >= size:  # tarfile takes the end of the file for that of the archive
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
        text = files[extension].decode("utf-8-sig").strip()
        if extension == "json":
            fields = json.loads(text)
            values = {str(name).lower(): value for name, value in fields.items()} if isinstance(fields, dict) else {}
            kind = next((each for each in LABEL_NAMES if each in values), "")
            if not kind:
                raise ValueError(f"no field {', '.join(LABEL_NAMES)}")
            value = values[kind]
            if isinstance(value, bool) or not isinstance(value, (int, str)):
                raise ValueError(f"{kind} must be text or a whole number")
            text = str(value).strip()
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: its .{extension} is not usable as a label ({error}). Correct it.") from error
    if not text or "\n" in text:
        raise InputError(f"{where}: its label must be one line of text; got {text!a:.80}. Correct it.")
    return kind, text


def _read_classes(name: str, file: Path, largest: int) -> tuple[str, ...]:
    """Read the names of numbered classes. An empty line before the last name is refused: it would shift the others."""
    lines = read_text(file).rstrip().splitlines()
    if largest >= len(lines):
        raise InputError(f"{file}: has {len(lines)} names, and a sample has the class {largest}. Add the others.")
    numbers = list(range(len(lines)))
    return normalize_class_names(f"open_source: {name}", "data", "line", numbers, lines, "remove classes.txt")
