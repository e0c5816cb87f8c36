"""Documentation: Python blocks run, commands parse, and the named files, tests and links exist.

- `python` blocks of a page run in order, in one namespace and an empty folder. A `text` block directly after one is its
  output. A block that begins with `# pip install "NAME…"` is skipped without that package.
- A `cpp` or `python` block with a path quotes lines of that file, in order.
- Commands in plain, `console`, `sh` and indented blocks and in backticks are parsed by their program, which does not
  run. In backticks a leading "…" is the module of the previous command.
- Files, tests and options in backticks, links and their anchors exist.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib
import importlib.util
import io
import itertools
import re
import runpy
import shlex
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from PIL import Image

import skipkernels
from skipkernels.app.cli import main as cli
from skipkernels.app.cli.options import tune_config
from skipkernels.app.heads import logistic
from skipkernels.app.report import plots
from skipkernels.ops import OPERATORS, registration

ROOT = Path(__file__).parents[1]
NAMES = ("README.md", "CONTRIBUTING.md", "tests/README.md")

# Placeholders in commands, and a value for each.
PLACEHOLDERS = {"NAME": "mlp_activation"}
# Programs with arguments that are not checked.
OTHER_PROGRAMS = ("cd", "curl", "docker", "git", "pip", "torchrun")


class Block(NamedTuple):
    """A fenced block: its info string, its text, and the line number of the text."""

    kind: str
    text: str
    line: int


class Page(NamedTuple):
    path: Path
    text: str

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path, path.read_text(encoding="utf-8"))

    @property
    def blocks(self) -> list[Block]:
        lines, found, start = self.text.splitlines(keepends=True), [], None
        for number, line in enumerate(lines):
            if not line.lstrip().startswith("```"):
                continue
            if start is None:
                start = number
            else:
                text = "".join(lines[start + 1 : number])
                found.append(Block(lines[start].strip().removeprefix("```"), text, start + 2))
                start = None
        assert start is None, f"{self.path.name}, line {start}: a block is not closed"
        return found

    @property
    def prose(self) -> str:
        """The page with empty lines in place of its blocks."""
        lines = self.text.splitlines()
        for block in self.blocks:
            for number in range(block.line - 2, block.line + block.text.count("\n")):
                lines[number] = ""
        return "\n".join(lines)

    @property
    def spans(self) -> list[str]:
        """Texts in backticks, one line each."""
        return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", self.prose)]


def pages() -> list[Path]:
    return [*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(params=pages(), ids=lambda path: str(path.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Page:
    return Page.read(request.param)


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
    monkeypatch.setattr(plots, "plot_svg", lambda name, *_, **__: f"<svg>{name}</svg>")
    monkeypatch.setattr(logistic, "ITERATIONS", 20)  # before the minimum: no page shows its digits
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (80 * number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    yield {"__name__": "page"} | given_variables()
    library._destroy()


def run_python(page: Page, names: dict[str, Any]) -> None:
    for block, behind in itertools.pairwise([*page.blocks, Block("", "", 0)]):
        needed = re.match(r'# pip install "(\w+)', block.text)
        if block.kind != "python" or (needed and importlib.util.find_spec(needed[1]) is None):
            continue
        printed = io.StringIO()
        code = compile("\n" * (block.line - 1) + block.text, page.path, "exec", dont_inherit=True)
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        last = block.line + block.text.count("\n")  # the closing fence
        between = page.text.splitlines()[last : max(last, behind.line - 2)]
        if behind.kind == "text" and not "".join(between).strip():
            where = f"{page.path.name}, line {behind.line}: the block before it prints"
            assert printed.getvalue().split("\n") == behind.text.split("\n"), f"{where}\n{printed.getvalue()}"


def test_python_blocks_run(page, reader):
    run_python(page, reader)


def check_quotations(page: Page) -> None:
    for block in page.blocks:
        language, _, path = block.kind.partition(" ")
        if not path:
            continue
        rest = iter((ROOT / path).read_text(encoding="utf-8").splitlines())
        for line in filter(None, map(str.strip, block.text.splitlines())):
            if line != "…":
                assert any(line == other.strip() for other in rest), f"{page.path.name}: {path} has no line {line!r}"


# ---- commands ----------------------------------------------------------------------------------------------------


class Command(NamedTuple):
    """Words of a command line; `mention` is True in running text, where arguments may be omitted."""

    words: tuple[str, ...]
    mention: bool

    def __str__(self) -> str:
        return " ".join(self.words)


def commands(page: Page) -> list[Command]:
    lines = [(line, False) for block in page.blocks for line in _command_lines(block)]
    lines += [(line, False) for line in re.findall(r"^ {4,}(\S.*)$", page.prose, re.MULTILINE)]
    module = ""  # of the previous command
    for span in page.spans:
        if found := re.match(r"python -m [\w.]+", span):
            module = found.group()
        lines.append((span.replace("…", module, 1) if span.startswith("… ") else span, True))
    return [
        Command(tuple(words), mention)
        for line, mention in lines
        for part in line.split(" && ")
        if (words := _words(part))
    ]


def _command_lines(block: Block) -> list[str]:
    """Command lines of a block: lines that start with "$", if any, else all lines."""
    if block.kind not in ("", "console", "sh"):
        return []
    text = block.text.replace("\\\n", " ")  # a command on several lines
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    lines = [line for line in lines if line.startswith("$ ")] or lines
    programs = [_program(part) for line in lines for part in line.split(" && ")]
    if block.kind == "" and not CHECKS.keys() & set(programs):
        return []  # not commands, for example a file tree
    unknown = set(programs) - {*CHECKS, *OTHER_PROGRAMS}
    assert not unknown, f"line {block.line}: unknown program {', '.join(unknown)}"
    return lines


def _program(line: str) -> str:
    return _without_environment(line).partition(" ")[0]


def _without_environment(line: str) -> str:
    return re.sub(r"^(\$ )?([A-Z_]+=\S+ )*", "", line.strip())


def _words(line: str) -> list[str]:
    """Words of a command of a known program; none for other lines."""
    line = _without_environment(line)
    if _program(line) not in CHECKS:
        return []
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line, comments=True) if word != "…"]
    if ">" in words:
        words = words[: words.index(">")]
    if words[0] == "compute-sanitizer":
        return words[words.index("python") :] if "python" in words else []
    return words


def check_skipkernels(arguments: tuple[str, ...], mention: bool) -> None:
    try:
        run(cli.main, list(arguments))
    except AssertionError as error:
        if not (mention and re.search("Missing (from|subcommand|value)", str(error))):
            raise


def check_python(arguments: tuple[str, ...], mention: bool) -> None:
    if arguments[:2] == ("-m", "pytest"):
        return check_pytest(arguments[2:], mention)
    if arguments[0] == "-m":
        found = importlib.util.find_spec(arguments[1])
        assert found is not None, f"no module {arguments[1]}"
        name = arguments[1] if found.submodule_search_locations is None else f"{arguments[1]}.__main__"
        main, rest = importlib.import_module(name).main, arguments[2:]
    else:
        main, rest = runpy.run_path(str(ROOT / arguments[0]))["main"], arguments[1:]
    if mention and not rest:
        rest = ("--help",)

    def parse(parser: argparse.ArgumentParser, *_: Any) -> typing.NoReturn:
        unknown = parser.parse_known_args(rest)[1]
        assert not unknown, f"{' '.join(unknown)}: no such option"
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        run(main)


def check_pytest(arguments: tuple[str, ...], mention: bool) -> None:
    for path in (word for word in arguments if re.match(r"\w+/", word)):
        assert (ROOT / path).exists(), f"there is no {path}"


def check_make(arguments: tuple[str, ...], mention: bool) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in arguments:
        name, is_variable, _ = word.partition("=")
        there = rf"^{re.escape(name)} *\??:?=" if is_variable else rf"^{re.escape(name)}:"
        assert re.search(there, makefile, re.MULTILINE), f"make {word}: the Makefile has no {name}"


CHECKS: dict[str, Callable[[tuple[str, ...], bool], None]] = {
    "skipkernels": check_skipkernels,
    "python": check_python,
    "pytest": check_pytest,
    "make": check_make,
    "compute-sanitizer": check_python,
}


def run(main: Callable[..., int | None], *arguments: Any) -> None:
    """Run a main function; its output is the message if it fails."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main(*arguments) or 0
    except SystemExit as ended:
        code = ended.code or 0
    assert code == 0, said.getvalue()


@pytest.fixture
def nothing_runs(monkeypatch) -> None:
    """Parse commands without running them; check the settings of tune."""

    def resolve(command: cli.TuneCommand, *_: Any) -> int:
        tune_config(command).resolved()
        return 0

    for command in cli.COMMANDS.values():
        monkeypatch.setattr(command, "execute", lambda *_: 0)
    monkeypatch.setattr(cli.TuneCommand, "execute", resolve)
    monkeypatch.setattr(cli, "command_with_file", lambda *_: cli.TuneCommand())  # the file of --config


def check_commands(page: Page) -> None:
    wrong = []
    for command in dict.fromkeys(commands(page)):
        try:
            CHECKS[command.words[0]](command.words[1:], command.mention)
        except (AssertionError, argparse.ArgumentError) as error:
            wrong.append(f"{page.path.name}: {command}: {error}")
    assert not wrong, "\n".join(wrong)


@functools.cache
def options() -> set[str]:
    """Options of all programs: fields of the commands' dataclasses, and options of argparse."""
    found: set[str] = set()
    for file in (ROOT / "skipkernels" / "app").rglob("*.py"):
        fields = [name.replace("_", "-") for name in re.findall(r"^    (\w+): ", file.read_text(), re.MULTILINE)]
        found |= {f"--{no}{name}" for name in fields for no in ("", "no-")}
    for file in itertools.chain.from_iterable(
        ROOT.rglob(f"{folder}/**/*.py") for folder in ("bench", "recipes", "examples", "integrations")
    ):
        found |= set(re.findall(r'"(--[a-z-]+)"', file.read_text()))
    return found


def check_options(page: Page) -> None:
    known = options()
    for span in page.spans:
        if span.startswith("--"):
            unknown = [word for word in span.split() if word.startswith("--") and word not in known]
            assert not unknown, f"{page.path.name}: {unknown[0]}: no program has this option"


# ---- files, tests and links ----------------------------------------------------------------------------------------


def check_named(page: Page) -> None:
    """Check paths with a folder, and names of tests."""
    file = ""  # of the previous test
    for span in page.spans:
        path, _, test = span.partition("::")
        if test:
            file = file if path == "…" else path
            names = re.findall(r"^ *def (\w+)", "\n".join(p.read_text() for p in _files(page, file)), re.MULTILINE)
            wanted = test.partition("[")[0]
            found = any(n.startswith(wanted[:-1]) if wanted.endswith("…") else n == wanted for n in names)
            assert found, f"{page.path.name}: there is no {file}::{test}"
        elif re.fullmatch(r"[\w.-]+(/[\w.-]+)+\.(py|h|cpp|md|csv|svg|json|toml)", path):
            assert _files(page, path), f"{page.path.name}: there is no {path}"


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


def check_links(page: Page) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", page.prose)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.path.parent / path
        assert file.exists(), f"{page.path.name}: broken link to {target}"
        if anchor:
            assert anchor in anchors(Page.read(file) if path else page), f"{page.path.name}: {target}: no heading"


@pytest.mark.parametrize(
    "check", [check_quotations, check_commands, check_options, check_named, check_links], ids=lambda f: f.__name__
)
def test_pages(check, nothing_runs):
    for path in pages():
        check(Page.read(path))


# ---- the site ----------------------------------------------------------------------------------------------------


def test_public_names_are_on_the_site():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    public = {name for name in skipkernels.__all__ if name not in ("__version__", "ops", "pairs")}
    assert public <= set(re.findall(r"^::: skipkernels\.(\w+)$", text, re.MULTILINE))
