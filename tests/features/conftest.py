"""Fixture of the tests that read a cache: a complete one, which none of them changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.features.caches import build


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache of `images()` of the small model."""
    path = tmp_path_factory.mktemp("cache") / "store"
    build(path)
    return path
