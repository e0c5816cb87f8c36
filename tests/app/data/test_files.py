"""Listing folders, checking their images, and reading text files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from PIL import Image

from skipkernels.app.data import Source
from skipkernels.app.data.check import facts, findings
from skipkernels.app.data.files import expanded, find_images, path_inside, read_json, read_text
from skipkernels.app.data.images import Images
from tests.app.data.pictures import draw_image, raises_input_error


def test_home_is_expanded_and_an_unknown_user_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [expanded(path) for path in ("~/a", "~no-user/a", "b/~")] == [
        tmp_path / "a",
        Path("~no-user/a"),
        Path("b/~"),
    ]


def test_find_images_in_subfolders_counts_other_files(tmp_path):
    for name in ("b.png", "a.JPG", "deep/er/c.webp", ".hidden.png", ".git/d.png", "__MACOSX/e.png", "ö/f.png"):
        draw_image(tmp_path / "cat" / name)
    draw_image(tmp_path / "elsewhere" / "g.png")
    (tmp_path / "cat" / "link").symlink_to("../elsewhere")
    (tmp_path / "cat" / "deep" / "loop").symlink_to("..")
    (tmp_path / "cat" / "root").symlink_to("..")
    (tmp_path / "cat" / "link again").symlink_to("../elsewhere")
    for name in ("notes.txt", "more.TXT", "README", "anim.mov"):
        (tmp_path / "cat" / name).write_text("x")
    images, others = find_images(tmp_path, {"elsewhere": 0, "cat": 1})
    names = ("a.JPG", "b.png", "deep/er/c.webp", "link/g.png", "ö/f.png")
    assert images == [("elsewhere/g.png", 0), *((f"cat/{name}", 1) for name in names)]
    assert others == {".txt": 2, "no extension": 1, ".mov": 1}
    assert find_images(tmp_path / "cat", {"": 0})[0] == [(name, 0) for name in names]


def test_find_images_lists_unreadable_images(tmp_path):
    """Broken links are named with all other unreadable images, when images are read."""
    draw_image(tmp_path / "cat" / "a.png")
    (tmp_path / "cat" / "b.png").symlink_to("nowhere")
    (tmp_path / "cat" / "c.png").symlink_to("c.png")
    paths = [f"cat/{name}.png" for name in "abc"]
    assert find_images(tmp_path, {"cat": 0})[0] == [(path, 0) for path in paths]
    images = Images.of_files(tmp_path, paths, [0] * 3)
    good, broken, loop = (fact.reason for fact in facts(Source("a", ("cat",), ("{}",), splits={"train": images})))
    assert good is None and broken.endswith("b.png: no such file. Was it removed, or is it a broken link?")
    assert f"c.png: can't be read ({os.strerror(errno.ELOOP)})" in loop


def test_findings_compare_the_sizes_of_images():
    """The pixels of all three are equal in memory."""
    images = Images([(Image.new("L", size), 0) for size in ((2, 3), (3, 2), (2, 3))])
    found = findings(facts(Source("a", ("cat",), ("{}",), splits={"train": images})))
    assert [(one.kind, one.name, one.detail) for one in found] == [("duplicate", "2", "0 (train, cat)")]


def test_path_inside_is_relative_or_none():
    paths = {"../a.png": None, "a/../../b.png": None, "/etc/passwd": None, "/photos-2/a.png": None, "..": None}
    paths |= {"..a/b..c/.../d.png": "..a/b..c/.../d.png", "/photos/a.png": "a.png"}
    assert {path: path_inside("/elsewhere/../photos", path) for path in paths} == paths


def test_read_text_is_utf_8(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffnaïve".encode())
    assert read_text(file) == "naïve", "without the byte-order mark"
    file.write_bytes("naïve".encode("latin-1"))
    with raises_input_error(file, "not a text in UTF-8 (byte 2)"):
        read_text(file)
    file.unlink()
    with raises_input_error(file, "can't be read", os.strerror(errno.ENOENT)):
        read_text(file)


@pytest.mark.parametrize(
    ("text", "why"),
    [("{", ": Invalid JSON: EOF"), ("[" * 100_000, "recursion"), ('{"a": 1}', "['a']: Input should be")],
    ids=["truncated", "nested", "type"],
)
def test_read_json_refuses(tmp_path, text, why):
    file = tmp_path / "a.json"
    file.write_text(text)
    with raises_input_error(file, why, "Correct the file"):
        read_json(file, dict[str, str])
