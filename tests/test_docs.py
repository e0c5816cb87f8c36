"""Documentation: Python blocks run, quoted lines are those of the files, and what is named or linked exists.

- `python` blocks of a page run in order, in one namespace and an empty folder. A `text` block directly after one is its
  output. A block that begins with `# pip install "NAME…"` is skipped without that package.
- A `cpp` or `python` block with a path quotes lines of that file, in order.
- Files and tests in backticks, links and their anchors exist.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image

import skipkernels
from skipkernels.app.heads import logistic
from skipkernels.ops import OPERATORS, registration
from tests.pages import ROOT, Block, Page, each_page

# ---- Python ------------------------------------------------------------------------------------------------------


def narrow_model(name: str) -> torch.nn.Module:
    """Create a narrow model with the architecture and depth of an open_clip config and random weights."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    config["embed_dim"] = 16
    config["vision_cfg"] |= {"width": 32, "head_width": 16, "image_size": 32, "patch_size": 16}
    config["text_cfg"] |= {"width": 32, "heads": 2}
    return open_clip.CLIP(**config)


def without_downloads(create: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of open_clip: return a narrow model instead of downloading weights."""

    def instead(name: str, pretrained: str | None = None, **options: Any) -> Any:
        if pretrained not in open_clip.list_pretrained_tags_by_model(name):
            return create(name, pretrained, **options)
        transform = open_clip.image_transform(32, is_train=False)
        made = narrow_model(name), transform, transform
        return made if create.__name__ == "create_model_and_transforms" else made[0]

    return instead


def given_variables() -> dict[str, Any]:
    """Variables that the pages use without defining them: class names, images, labels and a dataset of these."""
    labels = torch.arange(8) % 4
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {
        "class_names": ["cat", "dog", "fish", "bird"],
        "images": images,
        "labels": labels,
        "dataset": [(image, int(label)) for image, label in zip(images, labels, strict=True)],
    }


@pytest.fixture
def reader(tmp_path, monkeypatch) -> Iterator[dict[str, Any]]:
    """Namespace of a page in an empty folder. Operators that the page defines are removed afterwards."""
    skipkernels.backends()  # registers the operators of the package
    library = torch.library.Library(registration.NAMESPACE, "FRAGMENT")
    monkeypatch.setattr(registration, "_library", library)
    monkeypatch.setattr(registration, "definitions", dict(registration.definitions))
    for create in (open_clip.create_model, open_clip.create_model_and_transforms):
        monkeypatch.setattr(open_clip, create.__name__, without_downloads(create))
    monkeypatch.setattr(logistic, "ITERATIONS", 20)  # before the minimum: no page shows its digits
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (80 * number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    yield {"__name__": "page"} | given_variables()
    library._destroy()


@each_page
def test_python_blocks_run(page, reader):
    for block, behind in itertools.pairwise([*page.blocks, Block("", "", 0)]):
        needed = re.match(r'# pip install "(\w+)', block.text)
        if block.kind != "python" or (needed and importlib.util.find_spec(needed[1]) is None):
            continue
        printed = io.StringIO()
        code = compile("\n" * (block.line - 1) + block.text, page.path, "exec", dont_inherit=True)
        with contextlib.redirect_stdout(printed):
            exec(code, reader)
        last = block.line + block.text.count("\n")  # the closing fence
        between = page.text.splitlines()[last : max(last, behind.line - 2)]
        if behind.kind == "text" and not "".join(between).strip():
            message = f"the block before line {behind.line} prints\n{printed.getvalue()}"
            assert printed.getvalue().split("\n") == behind.text.split("\n"), message


# ---- quotations, files, tests and links ------------------------------------------------------------------------------


@each_page
def test_quoted_lines_are_in_their_files(page):
    for block in page.blocks:
        language, _, path = block.kind.partition(" ")
        if not path:
            continue
        rest = iter((ROOT / path).read_text(encoding="utf-8").splitlines())
        for line in filter(None, map(str.strip, block.text.splitlines())):
            if line != "…":
                assert any(line == other.strip() for other in rest), f"{path} has no line {line!r}"


@each_page
def test_named_files_and_tests_exist(page):
    """Files are named by paths with a folder."""
    file = ""  # of the previous test
    for span in page.spans:
        path, _, test = span.partition("::")
        if test:
            file = file if path == "…" else path
            names = re.findall(r"^ *def (\w+)", "\n".join(p.read_text() for p in _files(page, file)), re.MULTILINE)
            wanted = test.partition("[")[0]
            found = any(n.startswith(wanted[:-1]) if wanted.endswith("…") else n == wanted for n in names)
            assert found, f"there is no {file}::{test}"
        elif re.fullmatch(r"[\w.-]+(/[\w.-]+)+\.(py|h|cpp|md|csv|svg|json|toml)", path):
            assert _files(page, path), f"there is no {path}"


def _files(page: Page, path: str) -> list[Path]:
    """Find a path from the root, the page, the package or the tests; NAME is any operator."""
    tails = [path.replace("NAME", name.rstrip("_")) for name in OPERATORS] if "NAME" in path else [path]
    folders = (ROOT, page.path.parent, ROOT / "skipkernels", ROOT / "tests", ROOT / "tests" / "ops")
    return [folder / tail for folder in folders for tail in tails if (folder / tail).is_file()]


def anchors(page: Page) -> set[str]:
    """Anchors that GitHub generates from headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", page.prose, re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        again = (f"{slug}-{n}" for n in itertools.count(1))
        found.add(next(s for s in itertools.chain([slug], again) if s not in found))
    return found


@each_page
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", page.prose)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.path.parent / path
        assert file.exists(), f"broken link to {target}"
        if anchor:
            assert anchor in anchors(Page.read(file) if path else page), f"{target}: no heading"


# ---- the site ----------------------------------------------------------------------------------------------------


def test_public_names_are_on_the_site():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    public = {name for name in skipkernels.__all__ if name not in ("__version__", "ops", "pairs")}
    assert public <= set(re.findall(r"^::: skipkernels\.(\w+)$", text, re.MULTILINE))
