"""The entry point of the command line, before it imports torch."""

from __future__ import annotations

import os

import pytest

from skipkernels import __main__ as entry

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "1000"}], ids=str)
def test_threads_wait_passively_unless_the_user_says_how(monkeypatch, own):
    monkeypatch.setattr(entry.os, "environ", dict(own))
    entry._wait_passively()
    found = {name: os.environ[name] for name in WAITING if name in os.environ}
    assert found == (own or {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"})


def test_waiting_is_set_before_torch_is_imported(monkeypatch):
    order = []
    monkeypatch.setattr(entry, "_wait_passively", lambda: order.append("waiting"))
    monkeypatch.setattr("skipkernels.cli.main.main", lambda: order.append("main") or 0)
    assert entry.main() == 0 and order == ["waiting", "main"]
