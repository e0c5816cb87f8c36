"""tools/check_generators.py finds `with` around `yield`, except in context managers; `make check` runs it."""

from __future__ import annotations

import pytest

from tools.check_generators import suspended_contexts

BODY = "    with progress() as bar:\n        for x in items:\n            {}\n"


@pytest.mark.parametrize("statement", ["yield x", "yield from x", "bar.add((yield))"])
def test_suspended_contexts_finds_generators(statement):
    source = "def chunks(items):\n" + BODY.format(statement)
    assert suspended_contexts(source) == [(2, "chunks")]
    assert suspended_contexts(f"@contextlib.contextmanager\n{source}") == []
    assert suspended_contexts(source.replace("progress()", "path.open()")) == []
