"""Triton's interpreter with `tl.device_assert`, and in less time."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
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
        yield
