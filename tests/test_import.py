"""What importing the package does and doesn't, and which way the imports flow."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import skipkernels

PACKAGE = Path(skipkernels.__file__).parent

# DESIGN §8: a module may import from its own layer and from those before it.
LAYERS = [
    ("_extension", "_namespace", "checks", "console", "memory", "reference", "testing"),
    ("ops",),
    ("functional",),
    ("store",),
    ("boundary", "classifier", "optimizer", "selection", "towers"),
    ("clip",),
    ("features",),
    ("data",),
    ("tuner",),
    ("experiments",),
    ("integrations", "cli", "__main__"),
]
LAYER_OF = {name: i for i, layer in enumerate(LAYERS) for name in layer}
LIGHT = ("triton", "open_clip", "torchvision", "matplotlib", "xformers", "transformers", "skipkernels.ops")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_is_light():
    out = run(
        "import torch, sys, time, json\n"
        "start = time.perf_counter(); import skipkernels; seconds = time.perf_counter() - start\n"
        "print(json.dumps([seconds, torch.cuda.is_initialized(), sorted(sys.modules)]))"
    )
    seconds, cuda, modules = json.loads(out)
    assert seconds < 0.3
    assert not cuda
    assert not [name for name in LIGHT if name in modules]


@pytest.mark.parametrize(
    "imports", ["import torch, skipkernels", "import skipkernels.ops, torch"], ids=["after torch", "skipkernels.ops"]
)
def test_operators_are_registered(imports):
    """Both for whoever asks the namespace, and for whoever asked it before one of the package's own functions did."""
    code = (
        "namespace = torch.ops.skipkernels; print(namespace.class_sampled_ce.default._schema.name)\n"
        "x = torch.ones(2, 3); torch.library.opcheck(torch.ops.skipkernels.mlp_activation, (x, None, 0))\n"
        "print(torch.equal(namespace.mlp_activation(x, None, 0), skipkernels.functional.mlp_activation(x)))\n"
        "print(type(torch.ops.skipkernels) is type(torch.ops.aten), hasattr(namespace, 'nothing'))"
    )
    assert run(f"{imports}\n{code}").split() == ["skipkernels::class_sampled_ce", "True", "True", "False"]


def test_functional_touches_no_gpu_and_needs_no_triton():
    code = (
        "import sys, torch, skipkernels as sk\n"
        "print(sk.functional.class_scores(torch.ones(1, 2), torch.eye(2), torch.tensor([0])).tolist(), "
        "torch.cuda.is_initialized(), sk.backends()['class_scores']['cuda'].reason)"
    )
    assert run(code).startswith("[inf, 0.707")
    assert "False" in run(code)
    without = "import sys; sys.modules['triton'] = None\n" + code
    assert "Triton is not installed" in run(without) or "no Triton kernel" in run(without)


def test_public_names():
    assert set(skipkernels.__all__) <= set(dir(skipkernels))
    for name in skipkernels.__all__:
        assert getattr(skipkernels, name) is not None
    with pytest.raises(AttributeError, match="module 'skipkernels' has no attribute 'nothing'"):
        _ = skipkernels.nothing


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def layer_of(module: str) -> int:
    """The layer of `skipkernels.a.b.c`, which is that of `a`."""
    return LAYER_OF[module.split(".")[1]]


def imports(path: Path) -> list[str]:
    """Every module of the package that a file imports, at its head or anywhere else, except for types only."""
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
            names.extend([f"{module}.{a.name}" for a in node.names] if module == "skipkernels" else [module])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return [name for name in names if name.startswith("skipkernels.")]


def test_imports_are_read_right(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "skipkernels")
    file = tmp_path / "skipkernels" / "towers" / "one.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import skipkernels.cli, os\nfrom skipkernels import clip\nfrom ..data.task import x\nfrom . import two\n"
        "from .. import functional\nif TYPE_CHECKING:\n    from skipkernels import cache\n"
        "def f():\n    from .three import y\n"
    )
    assert [name.removeprefix("skipkernels.") for name in imports(file)] == [
        "cli",
        "clip",
        "data.task",
        "towers",
        "functional",
        "towers.three",
    ]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_flow_one_way(path):
    own = layer_of(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
    for name in imports(path):
        if name.split(".")[1] in LAYER_OF:
            assert layer_of(name) <= own, f"{path.name} imports {name}, which is built on it"
        else:
            assert name in {f"skipkernels.{public}" for public in skipkernels.__all__}


def test_no_junk_drawer():
    assert not [path for path in modules() if path.stem in {"utils", "util", "helpers", "common", "misc"}]
