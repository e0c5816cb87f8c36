"""Triton's interpreter with `tl.device_assert`, and in less time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def interpreter() -> Iterator[None]:
    """Patch the interpreter.

    It ignores the option of the launch for assertions. It would patch `triton.language` at each call of a device
    function, which takes a third of the time: a launch patches it once for each module of its functions.
    """
    module = importlib.import_module("triton.runtime.interpreter")
    patch, launch, builder = module._patch_lang, module.GridExecutor.__call__, module.interpreter_builder
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        globals_of = id(function.__globals__)
        if globals_of not in patched:
            patched.add(globals_of)
            return patch(function)
        return None  # only the launch uses the result, and its call is the first

    def launch_and_forget(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=False)
        monkeypatch.setattr(builder, "options", options)
        monkeypatch.setattr(module, "_patch_lang", patch_once)
        monkeypatch.setattr(module.GridExecutor, "__call__", launch_and_forget)
        for owner, name, function in replacements():
            monkeypatch.setattr(owner, name, function)
        yield


@functools.cache
def replacements() -> list[tuple[Any, str, Callable[..., Any]]]:
    """Functions that would take half of the time: they compute types, shapes and dtypes that are known."""
    names = "language.core", "language.semantic", "runtime.interpreter"
    core, semantic, interpreter = (importlib.import_module(f"triton.{name}") for name in names)
    found = [
        (interpreter, "_get_np_dtype", once_per_name),
        (core.block_type, "__init__", block_type_once),
        (core.tensor, "__init__", tensor_of_known_shape),
        (semantic.TritonSemantic, "broadcast_impl_value", broadcast_others),
    ]
    return [(owner, name, replace(getattr(owner, name))) for owner, name, replace in found]


def once_per_name(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Keep the result of a function of a Triton type; the name of a type says all about it."""
    known: dict[str, Any] = {}

    def kept(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = function(dtype)
        return known[dtype.name]

    return kept


def block_type_once(initialise: Callable[..., None]) -> Callable[..., None]:
    """Keep the attributes of a block type."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def kept(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *[getattr(size, "value", size) for size in shape]
        if key not in known:
            initialise(self, element_ty, shape)
            known[key] = dict(vars(self))
        vars(self).update(known[key])

    return kept


def tensor_of_known_shape(initialise: Callable[..., None]) -> Callable[..., None]:
    """Keep what follows from the type of a tensor."""
    known: dict[str, tuple[Any, ...]] = {}

    def kept(self: Any, handle: Any, type: Any) -> None:
        if type.name not in known:
            initialise(self, handle, type)
            known[type.name] = self.shape, self.numel, self.dtype
        self.handle, self.type = handle, type
        self.shape, self.numel, self.dtype = known[type.name]

    return kept


def broadcast_others(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """Return blocks of one shape as they are."""

    def of_shapes(self: Any, lhs: Any, rhs: Any) -> Any:
        blocks = lhs.type.is_block() and rhs.type.is_block()
        if blocks and lhs.type.shape.values == rhs.type.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return of_shapes
