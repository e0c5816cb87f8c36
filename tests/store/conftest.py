"""Skip flushes to the disk: they matter only when the power fails, and take most of the time of tests."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
