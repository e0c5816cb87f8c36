"""Cost of importing the package, its public names, and what is missing: packages, and files of a wheel."""

from __future__ import annotations

import ast
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
for name in ("tune", "Classifier"):
    try: getattr(sk, name)
    except ModuleNotFoundError as error: print(error)
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
    for name, line in zip(("tune", "Classifier"), core[-3:-1], strict=True):
        assert re.fullmatch(rf"skipkernels\.{name} needs \w+: pip install 'skipkernels\[cli\]'", line)


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
