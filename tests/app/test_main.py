"""Entry point of the command line, before it imports torch."""

from __future__ import annotations

import os

import pytest

from skipkernels import __main__ as entry

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "1000"}], ids=str)
def test_passive_wait_before_import_of_torch_keeps_user_settings(monkeypatch, own):
    at_import: dict[str, str] = {}
    monkeypatch.setattr(entry.os, "environ", dict(own))
    monkeypatch.setattr(entry.sys, "argv", ["skipkernels"])
    monkeypatch.setattr("skipkernels.app.cli.main.main", lambda: at_import.update(os.environ) or 0)
    assert entry.main() == 0
    found = {name: at_import[name] for name in WAITING if name in at_import}
    assert found == (own or {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"})
