"""Cost of importing the package, and the direction of imports between its modules."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import skipkernels

PACKAGE = Path(skipkernels.__file__).parent
CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"


def places() -> dict[str, int]:
    """Places of the parts of the package in the layout of CONTRIBUTING.md: a part may import those above it."""
    layout = re.search(r"^skipkernels/.*?^bench/", CONTRIBUTING.read_text("utf-8"), re.MULTILINE | re.DOTALL)[0]
    found, prefix = {"__main__": len(layout)}, ""
    for place, line in enumerate(layout.splitlines()):
        if line.startswith("skipkernels/app/"):
            prefix = "app."
        elif re.match("  [a-z_]", line):
            names = line.split("   ")[0].replace(".py", "")
            found |= {prefix + name: place for name in re.findall(r"\w+", names)}
    return found


LIGHT = ("triton", "open_clip", "torchvision", "matplotlib", "xformers", "transformers", "skipkernels.ops")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_loads_no_torch():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = run("import skipkernels, sys; print('torch' in sys.modules)")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    assert out == "False\n"


def test_public_names():
    assert set(skipkernels.__all__) <= set(dir(skipkernels))
    for name in skipkernels.__all__:
        assert getattr(skipkernels, name) is not None
    with pytest.raises(AttributeError, match="module 'skipkernels' has no attribute 'nothing'"):
        _ = skipkernels.nothing


@pytest.mark.parametrize("package", ["app.data", "app.train"])
def test_lazy_names_are_no_modules(package):
    """A submodule with the name of a public function would hide it once it is imported."""
    for path in PACKAGE.joinpath(*package.split(".")).glob("*.py"):
        importlib.import_module(f"skipkernels.{package}.{path.stem}")
    found = importlib.import_module(f"skipkernels.{package}")
    assert not [name for name in found.__all__ if inspect.ismodule(getattr(found, name))]


def modules() -> list[Path]:
    roots = PACKAGE / "__init__.py", PACKAGE / "app" / "__init__.py"
    return sorted(path for path in PACKAGE.rglob("*.py") if path not in roots)


def part_of(module: str) -> str:
    """Part of the house that `skipkernels.a.b.c` is in: `a`, in the application `app.b`."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2] if parts[0] == "app" else parts[:1])


def imports(path: Path) -> list[str]:
    """Modules of the package that a file imports, in functions too, except for types only."""
    folder = path.relative_to(PACKAGE.parent).parent.parts
    names: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join((*start, *filter(None, [node.module])))
            names.extend(module_of(f"{module}.{alias.name}", module) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return [name for name in names if name.startswith("skipkernels.")]


def module_of(name: str, parent: str) -> str:
    """A name imported from a module: itself if it is a module or a name of the root package, else the module."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    return name if path.is_dir() or path.with_suffix(".py").exists() or parent == "skipkernels" else parent


def test_imports_flow_downwards():
    upward, place_of = set(), places()
    for path in modules():
        file = path.relative_to(PACKAGE)
        for name in imports(path):
            if name.split(".")[1] in skipkernels.__all__ and part_of(name) not in place_of:
                continue
            if place_of[part_of(name)] > place_of[part_of(".".join(("skipkernels", *file.with_suffix("").parts)))]:
                upward.add((file.as_posix(), name))
    assert not upward


def test_imports_form_no_circle():
    graph = {}
    for path in modules():
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if path.stem == "__init__" else parts)
        graph[name] = set(imports(path)) - {name}
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError that names the modules


# One process for both tests, since it imports torch. Packages of the command line are blocked after the first import.
CORE = """
import json, sys, time, torch
start = time.process_time(); import skipkernels as sk; seconds = time.process_time() - start
print(json.dumps([seconds, torch.cuda.is_initialized(), sorted(sys.modules)]))

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED = {"rich", "tyro", "pydantic", "triton", "torchmetrics", "ninja"}
sys.meta_path.insert(0, Blocked())
import skipkernels.clip
print(*[name for name in sys.modules if name.startswith("skipkernels")])
import skipkernels.ops
x = torch.ones(2, 3)
print(torch.equal(torch.ops.skipkernels.mlp_activation(x, None, 0), sk.functional.mlp_activation(x)))
print(sk.functional.class_scores(torch.ones(1, 2), torch.eye(2), torch.tensor([0])).tolist())
print(torch.cuda.is_initialized(), sk.backends()["class_scores"]["cuda"].reason)

import open_clip
model = open_clip.CLIP(32, open_clip.CLIPVisionCfg(layers=3, width=64, head_width=32, patch_size=8, image_size=16),
                       open_clip.CLIPTextCfg(context_length=8, vocab_size=99, width=64, heads=2, layers=3))
tokens = torch.randint(1, 98, (7, 8)); tokens[:, 7] = 98
clip = sk.SkipCLIP(model, tokens, skip_layers=1)
images, labels = torch.randn(6, 3, 16, 16), torch.arange(6) % 7
cache = sk.FeatureCache.build("features", clip, torch.utils.data.TensorDataset(images, labels), progress=True)
features, labels = next(iter(cache.loader(batch_size=3)))
optimizer = torch.optim.SGD(clip.parameter_groups(text_lr=1e-3, image_lr=1e-3), momentum=0.9)
loss = clip(features, labels).loss
loss.backward(); optimizer.step()
print(loss.isfinite().item(), sorted(BLOCKED & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def core(tmp_path_factory) -> list[str]:
    """Lines that CORE prints."""
    folder = tmp_path_factory.mktemp("core")
    result = subprocess.run([sys.executable, "-c", CORE], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_import_after_torch_is_light(core):
    seconds, cuda, modules = json.loads(core[0])
    assert seconds < 0.3
    assert not cuda
    assert not [name for name in LIGHT if name in modules]
    # Several processes, caches, CUDA graphs, families and the builder of SkipCLIP are imported where they are used.
    assert len(core[1].split()) <= 50


def test_core_without_the_packages_of_the_command_line(core):
    equal, scores, reason = core[2:5]
    assert equal == "True" and scores.startswith("[inf, 0.707") and reason.startswith("False ")
    assert "Triton is not installed" in reason or "no Triton kernel" in reason
    assert core[-1] == "True []"


@pytest.mark.parametrize("package", ["pydantic", "rich", "tyro", "yaml", "jinja2"])
def test_command_line_names_the_package_that_it_lacks(package):
    code = f"import sys; sys.modules[{package!r}] = None\nfrom skipkernels.__main__ import main\nsys.exit(main())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == f"skipkernels: the command line needs {package}: pip install 'skipkernels[cli]'\n"


def test_wheel_has_every_file_of_the_package():
    """Files other than modules are in a wheel only if pyproject.toml lists them."""
    listed = re.search(r"^skipkernels = (\[.*\])$", (PACKAGE.parent / "pyproject.toml").read_text(), re.MULTILINE)
    assert listed is not None
    given = {path for pattern in ast.literal_eval(listed[1]) for path in PACKAGE.glob(pattern)}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".so")}
    assert files == given
