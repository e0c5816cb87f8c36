"""What is in folders and text files."""

from __future__ import annotations

import os

import pytest
from pictures import draw, folders, refused
from torchvision.datasets.folder import IMG_EXTENSIONS

from skipkernels.data.files import (
    IMAGE_ENDINGS,
    check_files,
    check_inside,
    images_below,
    is_image_name,
    read_json,
    read_text,
    subfolders,
)


def test_images_are_those_of_torchvision():
    assert set(IMAGE_ENDINGS) == set(IMG_EXTENSIONS)
    assert is_image_name("A.JPEG") and not is_image_name("a.gif") and not is_image_name("jpg")


def test_images_are_found_at_any_depth_and_other_files_counted(tmp_path):
    for name in (
        "b.png",
        "a.JPG",
        "deep/er/c.webp",
        "deep.png",
        ".hidden.png",
        ".git/d.png",
        "__MACOSX/e.png",
        "ö/f.png",
    ):
        draw(tmp_path / "cat" / name)
    for name in ("notes.txt", "more.TXT", "README", "anim.gif"):
        (tmp_path / "cat" / name).write_text("x")
    images, others = images_below(tmp_path, "cat")
    assert images == ["cat/a.JPG", "cat/b.png", "cat/deep.png", "cat/deep/er/c.webp", "cat/ö/f.png"]
    assert others == {".txt": 2, "no ending": 1, ".gif": 1}


def test_links_are_followed_but_not_in_circles(tmp_path):
    draw(tmp_path / "elsewhere" / "b.png")
    draw(tmp_path / "data" / "cat" / "a.png")
    cat = tmp_path / "data" / "cat"
    (cat / "more").symlink_to(tmp_path / "elsewhere")
    (cat / "file.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    (cat / "here").symlink_to(".")
    (cat / "up").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere" / "back").symlink_to(cat)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    wanted = ["cat/a.png", "cat/file.png", "cat/more/b.png"]
    assert images_below(tmp_path / "data", "cat")[0] == wanted
    assert images_below(tmp_path / "link", "cat")[0] == wanted


def test_images_below_visits_linked_folders_once(tmp_path):
    """Sixteen folders with links to each other: there are 16! paths without a circle."""
    for number in range(16):
        draw(tmp_path / "cat" / f"{number:02d}" / "a.png")
        for other in range(16):
            (tmp_path / "cat" / f"{number:02d}" / f"to{other:02d}").symlink_to(f"../{other:02d}")
    assert images_below(tmp_path, "cat")[0] == [f"cat/{number:02d}/a.png" for number in range(16)]


def test_images_below_prefers_paths_without_links(tmp_path):
    draw(tmp_path / "cat" / "deep" / "real" / "a.png")
    draw(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "cat" / "alias").symlink_to("deep/real")
    (tmp_path / "cat" / "deep" / "x").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "cat" / "y").symlink_to(tmp_path / "elsewhere")
    assert images_below(tmp_path, "cat")[0] == ["cat/deep/real/a.png", "cat/y/b.png"]


def test_images_below_refuses_what_is_no_file(tmp_path):
    draw(tmp_path / "cat" / "a.png")
    os.mkfifo(tmp_path / "cat" / "pipe")
    assert images_below(tmp_path, "cat") == (["cat/a.png"], {"no ending": 1})
    os.mkfifo(tmp_path / "cat" / "b.png")
    with refused(tmp_path / "cat" / "b.png", "not a regular file", "Remove it"):
        images_below(tmp_path, "cat")


@pytest.mark.parametrize("goal", ["nowhere", "itself.png"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, goal):
    draw(tmp_path / "cat" / "a.png")
    (tmp_path / "cat" / "itself.png").symlink_to(goal)
    with refused(tmp_path / "cat" / "itself.png", "a link to", "Remove it"):
        images_below(tmp_path, "cat")


def test_subfolders(tmp_path):
    folders(tmp_path, {"b": 1, "a": 1, ".hidden": 1, "__MACOSX": 1})
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    assert subfolders(tmp_path) == ["a", "b", "link"]
    with refused(tmp_path / "none", "can't be listed"):
        subfolders(tmp_path / "none")


def test_files_are_missed(tmp_path):
    folders(tmp_path, {"cat": 2})
    check_files(tmp_path, ["cat/00.png", "cat/01.png"], "list")
    with refused("list: 3 of 4 files are missing, such as 'cat/02.png'", tmp_path):
        check_files(tmp_path, ["cat/00.png", "cat/02.png", "dog/00.png", "nul\0/x"], "list")


@pytest.mark.parametrize("path", ["../a.png", "a/../../b.png", "/etc/passwd", "C:\\a.png", "a\\..\\..\\b.png"])
def test_paths_stay_inside(path):
    with refused("entry 3", "leads out of the folder"):
        check_inside(path, "entry 3")


@pytest.mark.parametrize("path", ["a.png", "a/b..png", "..a/b.png", "a/.../b.png", "C/a.png"])
def test_paths_that_are_inside(path):
    check_inside(path, "entry 3")


def test_texts(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffnaïve".encode())
    assert read_text(file) == "naïve"
    file.write_bytes("naïve".encode("latin-1"))
    with refused(file, "not a text in UTF-8 (byte 2)"):
        read_text(file)
    with refused(tmp_path / "b.txt", "can't be read", os.strerror(2)):
        read_text(tmp_path / "b.txt")
    with refused(tmp_path, "can't be read"):
        read_text(tmp_path)


@pytest.mark.parametrize("link", ["/dev/zero", None], ids=["device", "fifo"])
def test_read_text_refuses_what_is_no_file(tmp_path, link):
    path = tmp_path / "a.json"
    path.symlink_to(link) if link else os.mkfifo(path)
    with refused(path, "not a regular file"):
        read_json(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [("{", "line 1"), ('{"a": 1, "a": 2}', "'a' is there twice"), ("[" * 100_000, "recursion"), ("", "")],
)
def test_json_that_can_not_be_used(tmp_path, text, why):
    (tmp_path / "a.json").write_text(text)
    with refused(tmp_path / "a.json", "not usable as JSON", why):
        read_json(tmp_path / "a.json")
