"""tools/check_generators.py finds `with` around `yield`, except in context managers."""

from __future__ import annotations

import pytest

from tools.check_generators import main, suspended_contexts

BODY = "    with progress() as bar:\n        for x in items:\n            {}\n"


@pytest.mark.parametrize("statement", ["yield x", "yield from x", "bar.add((yield))"])
def test_suspended_contexts_finds_generators(statement):
    source = "def chunks(items):\n" + BODY.format(statement)
    assert suspended_contexts(source) == [(2, "chunks")]
    assert suspended_contexts(f"@contextlib.contextmanager\n{source}") == []
    assert suspended_contexts(source.replace("progress()", "path.open()")) == []


def test_suspended_contexts_ignores_other_functions():
    inner = "def outer(items):\n    with lock:\n        def rows():\n            yield 1\n        return rows\n"
    assert suspended_contexts(inner) == []
    assert suspended_contexts("def all_of(items):\n" + BODY.format("x()") + "    yield 1\n") == []


def test_package_has_no_suspended_contexts(capsys):
    assert main() == 0, capsys.readouterr().out
