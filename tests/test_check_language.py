"""tools/check_language.py finds phrases across lines, openings of docstrings, and names."""

from __future__ import annotations

from tools.check_language import in_cpp, in_markdown, in_python


def test_in_python_finds_docstrings_comments_strings_and_names():
    source = (
        "def test_who_is_it():\n"
        '    """Of a run.\n\n    steps: That many.\n    It goes\n    on.\n    """\n'
        "    # code that is\n    # told\n"
        '    raise ValueError(f"{1}: nobody")\n'
    )
    expected = [(1, "who"), (2, "a docstring begins with Of"), (4, "steps: That"), (5, "goes on"), (8, "is told")]
    found = sorted(set(in_python(source)))
    assert found[:5] == expected and [text for _, text in found[5:]] == ["nobody"]
    assert not list(in_python('"""Gather rows."""\nwhole, x = 1, "the host"\n'))


def test_in_cpp_finds_comments_and_strings():
    source = 'int who;\n// lies\n// in\n/* a * whose\n */ f("mend it"); /* at\n * hand */'
    assert sorted(in_cpp(source)) == [(2, "lies in"), (4, "whose"), (5, "at hand"), (5, "mend")]


def test_in_markdown_skips_code():
    assert list(in_markdown("It goes on.\n```python\nwho = 1\n```\nBy itself.\n")) == [(1, "goes on"), (5, "by itself")]
