"""Entry point of the command line, before it imports torch."""

from __future__ import annotations

import os

import pytest

from skipkernels import __main__ as entry

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "1000"}], ids=str)
def test_passive_wait_keeps_user_settings(monkeypatch, own):
    monkeypatch.setattr(entry.os, "environ", dict(own))
    entry._set_passive_wait()
    found = {name: os.environ[name] for name in WAITING if name in os.environ}
    assert found == (own or {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"})


def test_passive_wait_before_import_of_torch(monkeypatch):
    order = []
    monkeypatch.setattr(entry.sys, "argv", ["skipkernels"])
    monkeypatch.setattr(entry, "_set_passive_wait", lambda: order.append("waiting"))
    monkeypatch.setattr("skipkernels.app.cli.main.main", lambda: order.append("main") or 0)
    assert entry.main() == 0 and order == ["waiting", "main"]
