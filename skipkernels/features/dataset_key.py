"""What a dataset and its transform are, in words that stay the same from one process to the next.

An object is described by its type and its public attributes, which are what its constructor was given; a file by its
name, size and time, or its contents; a function by its name and source. Nothing is described by where it is in memory.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image

from ..store import digest_json, digest_tensors
from ..store.digest import digest_bytes, digest_file

Files = Literal["times", "contents"]
# Attributes that begin with an underscore are an object's own business, such as what it has loaded so far. In these,
# torchvision's datasets keep which images they have, and Hugging Face's what they are made of.
_KNOWN_PRIVATE = frozenset({"_image_files", "_images", "_samples", "_labels", "_data", "_targets", "_fingerprint"})
_TRANSFORMS = ("transform", "transforms", "target_transform")
_DEEPEST = 12


class Identity(NamedTuple):
    """Digests of a dataset: of what it is, of its files' times (or contents), and of its image transform."""

    dataset: str
    files: str
    transform: str


class Unidentifiable(TypeError):
    """An object whose state cannot be told."""


def identify(dataset: Any, files: Files = "times") -> Identity:
    """The identity of a dataset.

    Args:
        dataset: Anything with attributes; a list of (image, label) is one by its contents.
        files: What of files counts besides name and size: when they were changed, or what they hold.

    Raises:
        Unidentifiable: If some of it cannot be told.
        ValueError: If `files` is something else.

    Example:
        >>> identify([(torch.zeros(3, 2, 2), 1)]) == identify([(torch.zeros(3, 2, 2), 1)])
        True
    """
    if files not in get_args(Files):
        raise ValueError(f'FeatureCache: files must be "times" or "contents"; got {files!r}.')
    seen = _Description()
    description = seen.of(dataset)
    root = os.path.commonpath([path.parent for path in seen.files]) if seen.files else ""
    names = [[str(path.relative_to(root)), path.stat().st_size] for path in seen.files]
    if files == "contents":
        detail: list[Any] = [digest_file(path) for path in seen.files]
    else:
        detail = [path.stat().st_mtime_ns for path in seen.files]
    return Identity(digest_json([description, names]), digest_json(detail), digest_json(seen.transforms))


class _Description:
    """Describes objects, and collects the files and image transforms that it comes upon."""

    def __init__(self):
        self.files: dict[Path, int] = {}
        self.transforms: dict[str, Any] = {}
        self._in_transform = False  # which may have transforms itself, as Compose
        # Of an object that is met again, as ImageFolder has one list twice. The object is kept: as long as it is there,
        # no other one has its id.
        self._known: dict[int, tuple[Any, Any]] = {}

    def of(self, value: Any, where: str = "dataset", depth: int = 0) -> Any:
        """A tree of JSON values."""
        if depth > _DEEPEST:
            raise Unidentifiable(f"{where} goes deeper than {_DEEPEST} levels")
        if isinstance(value, (int, str, float)):
            return self._of(value, where, depth)
        if id(value) not in self._known:
            self._known[id(value)] = value, self._of(value, where, depth)
        return self._known[id(value)][1]

    def _of(self, value: Any, where: str, depth: int) -> Any:
        if value is None or isinstance(value, (bool, int)):
            return value
        if isinstance(value, float):
            return repr(value)
        if isinstance(value, (str, Path)):
            return self._text(value)
        if isinstance(value, bytes):
            return ["bytes", digest_bytes(value)]
        if isinstance(value, (torch.dtype, torch.device, np.dtype)):
            return str(value)
        if isinstance(value, torch.Tensor):
            return ["tensor", digest_tensors([("", value)])]
        if isinstance(value, (np.ndarray, np.generic)):
            return self._array(np.asarray(value), where, depth)
        if isinstance(value, Image.Image):
            return ["image", value.mode, list(value.size), digest_bytes(value.tobytes()), value.getpalette()]
        if isinstance(value, enum.Enum):
            return [_name(type(value)), value.name]
        if isinstance(value, Mapping):
            return [
                "mapping",
                [
                    [self.of(key, where, depth + 1), self.of(item, f"{where}[{key!r}]", depth + 1)]
                    for key, item in value.items()
                ],
            ]
        if isinstance(value, (list, tuple, range)):
            return ["sequence", [self.of(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]]
        if isinstance(value, (set, frozenset)):
            return ["set", sorted(digest_json(self.of(item, where, depth + 1)) for item in value)]
        if isinstance(value, functools.partial):
            return ["partial", *(self.of(part, where, depth + 1) for part in (value.func, value.args, value.keywords))]
        if isinstance(value, type) or callable(value) and not hasattr(value, "__dict__"):
            if not hasattr(value, "__qualname__"):
                raise Unidentifiable(f"{where} is a {_name(type(value))}, which has no attributes to tell it by")
            of_what = getattr(value, "__self__", None)  # {}.get is of a mapping, math.sqrt of a module
            bound = isinstance(value, types.BuiltinMethodType) and not isinstance(of_what, (types.ModuleType, type))
            return ["named", _name(value)] + ([self.of(of_what, where, depth + 1)] if bound else [])
        if isinstance(value, types.MethodType):
            return ["method", value.__name__, self.of(value.__self__, where, depth + 1)]
        if isinstance(value, types.FunctionType):
            return self._function(value, where, depth)
        return self._object(value, where, depth)

    def _text(self, value: str | Path) -> Any:
        text = str(value)
        if isinstance(value, Path) or os.sep in text:
            try:
                path = Path(value).absolute()
                if path.is_file():
                    return ["file", self.files.setdefault(path, len(self.files))]  # names are compared by themselves
                if path.is_dir():
                    return ["folder"]
            except (OSError, ValueError):  # a text that no system takes for a path
                pass
        return text

    def _array(self, array: np.ndarray, where: str, depth: int) -> Any:
        if array.dtype.hasobject or array.dtype.kind in "USMm":
            return self.of(array.tolist(), where, depth + 1)
        return ["array", str(array.dtype), list(array.shape), digest_bytes(np.ascontiguousarray(array).tobytes())]

    def _function(self, function: types.FunctionType, where: str, depth: int) -> Any:
        captured = [cell.cell_contents for cell in function.__closure__ or ()]
        text: Any = _code(function.__code__)  # another Python compiles it otherwise, so the source is preferred
        # Functions made by `exec` all have the file name "<string>", for which Python 3.13 returns the text of `-c`.
        if function.__code__.co_filename != "<string>":
            with contextlib.suppress(OSError, TypeError):
                text = inspect.getsource(function)
        return ["function", _name(function), text] + [
            self.of(part, where, depth + 1) for part in (captured, function.__defaults__, function.__kwdefaults__)
        ]

    def _object(self, value: Any, where: str, depth: int) -> Any:
        if isinstance(value, types.ModuleType):
            return ["named", value.__name__]
        if isinstance(value, torch.nn.Module):
            state = {name: item for name, item in value.__dict__.items() if not name.startswith("_")}
            state.pop("training", None)
            state |= {f"module {n}": m for n, m in value._modules.items()} | dict(value._parameters)
            state |= dict(value._buffers)
        elif hasattr(value, "__dict__"):
            fields = vars(value)
            # A fingerprint tells what the others hold.
            private = {"_fingerprint"} if "_fingerprint" in fields else _KNOWN_PRIVATE
            state = {name: item for name, item in fields.items() if name[:1] != "_" or name in private}
            if not state and (fields or depth == 0):
                why = "whose attributes are all private" if fields else "which has no attributes to tell it by"
                raise Unidentifiable(f"{where} is a {_name(type(value))}, {why}")
        else:
            raise Unidentifiable(f"{where} is a {_name(type(value))}, which has no attributes to tell it by")
        described = {}
        for name, item in state.items():
            if name in _TRANSFORMS and not self._in_transform:
                if item is not None:
                    self._in_transform = True
                    self.transforms[f"{where}.{name}"] = self.of(item, f"{where}.{name}", depth + 1)
                    self._in_transform = False
            else:
                if name == "root" and isinstance(item, str):  # a folder, even if no separator shows that
                    item = Path(item)
                described[name] = self.of(item, f"{where}.{name}", depth + 1)
        return [_name(type(value)), described]


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{value.__qualname__}"


def _code(code: types.CodeType) -> Any:
    return [digest_bytes(code.co_code), list(code.co_names), [_constant(part) for part in code.co_consts]]


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _code(value)
    if isinstance(value, tuple):
        return [_constant(part) for part in value]
    if isinstance(value, frozenset):  # whose order is another one in each process
        return ["set", sorted(map(repr, value))]
    return repr(value)
