"""`tools/build_kernels.py`: builds load beside the package, without it, and in Hugging Face's `kernels`."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from skipkernels import _build
from skipkernels.ops import registration
from tools import build_kernels


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    return build_kernels.write_build(tmp_path_factory.mktemp("kernels") / "build" / "torch-cpu", "cpu")


@contextlib.contextmanager
def hidden_package() -> Iterator[None]:
    """Make `import skipkernels` fail."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "skipkernels"]:
            patch.setitem(sys.modules, name, None)
        yield


def load(folder: Path) -> ModuleType:
    """Import a build under the id in its metadata, as `kernels` does, without the package."""
    name = json.loads((folder / "metadata.json").read_text())["id"]
    if name not in sys.modules:
        spec: Any = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        with hidden_package():
            spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def test_imports_torch_and_the_standard_library_alone(build):
    imported = set()
    for path in build.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "triton"}


def test_loads_without_the_package(build):
    kernel = load(build)
    with hidden_package():
        assert kernel.functional.mlp_activation(torch.ones(1)).item() == pytest.approx(0.845796, abs=1e-6)


def test_operators_have_their_own_namespace(build):
    kernel = load(build)
    namespace = sys.modules[f"{kernel.__name__}._ops"].NAMESPACE
    assert namespace != "skipkernels"
    for name in registration.definitions:
        ours, copied = (getattr(getattr(torch.ops, ns), name).default for ns in ("skipkernels", namespace))
        assert str(copied._schema) == str(ours._schema).replace("skipkernels::", f"{namespace}::")


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("QuickGELU", lambda x: x * torch.sigmoid(1.702 * x)),
        ("GELU", nn.functional.gelu),
        ("GELUTanh", lambda x: nn.functional.gelu(x, approximate="tanh")),
    ],
    ids=["QuickGELU", "GELU", "GELUTanh"],
)
def test_activations_train(build, layer, expected):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    module = getattr(load(build).layers, layer)()
    for function in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        (found,) = torch.autograd.grad(function(x).square().sum(), x)
        (wanted,) = torch.autograd.grad(expected(x).square().sum(), x)
        torch.testing.assert_close(function(x), expected(x))
        torch.testing.assert_close(found, wanted)


def test_layer_norm_trains(build):
    """`kernelize` puts this forward in place of that of `nn.LayerNorm`."""
    x = torch.randn(3, 5, dtype=torch.float64)
    norm = nn.LayerNorm(5, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    forward = load(build).layers.LayerNorm.forward
    parameters = list(norm.parameters())
    found = torch.autograd.grad(forward(norm, x).square().sum(), parameters)
    wanted = torch.autograd.grad(norm(x).square().sum(), parameters)
    for each, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(each, other)
    plain = nn.LayerNorm(5, bias=False, dtype=torch.float64)
    assert forward(plain, x).equal(plain(x))


def test_namespace_of_the_cpp_library():
    """A macro renames it; compiling it all takes a minute."""
    flags = ["-Dskipkernels=other", "-isystem", str(Path(torch.__file__).parent / "include")]
    source = str(_build.source_dir() / "rotary_embedding.cpp")
    command = [*_build._compiler(), *flags, "-E", source]
    code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert '"other","CPU"' in re.sub(r"^#.*|\s", "", code, flags=re.MULTILINE)


def test_hugging_face_kernels(tmp_path):
    """`kernels` finds the build for the installed torch, and replaces the activation of a model that trains."""
    kernels = pytest.importorskip("kernels", reason="pip install 'skipkernels[test-integrations]'")
    for backend in ("cpu", "cuda"):  # `kernels` takes the build of the backend that torch was compiled for
        build_kernels.write_build(tmp_path / "build" / f"torch-{backend}", backend)
    kernel = kernels.get_local_kernel(tmp_path)
    assert kernel.layers.QuickGELU.has_backward

    @kernels.use_kernel_forward_from_hub("SkipQuickGELU")
    class Activation(nn.Module):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

    repository = kernels.LocalLayerRepository(repo_path=tmp_path, layer_name="QuickGELU")
    mapping = {"SkipQuickGELU": {"cpu": repository}}
    with kernels.use_kernel_mapping(mapping):
        model = kernels.kernelize(nn.Sequential(Activation()), mode=kernels.Mode.TRAINING, device="cpu")
    x = torch.randn(3, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    (expected,) = torch.autograd.grad((x * torch.sigmoid(1.702 * x)).sum(), x)
    torch.testing.assert_close(gradient, expected)
