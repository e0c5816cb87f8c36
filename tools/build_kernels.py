"""Assemble the operators into a kernel of Hugging Face's `kernels`.

    python tools/build_kernels.py FOLDER          FOLDER/build/torch-cpu, torch-cuda and torch-rocm
    python tools/build_kernels.py FOLDER --cpp    also this machine's C++ kernels, for every torch since 2.10

    kernels.get_local_kernel(Path("FOLDER"))      loads the build for the device of the installed torch

A build is a copy of the operators' modules, which import the standard library and torch alone (Triton if it is there),
and of the files in tools/kernels. Its operators have a namespace of their own, named after a digest of its files, so
that it can be loaded beside the package and beside other builds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "skipkernels"
TEMPLATES = Path(__file__).with_name("kernels")
MODULES = ("checks.py", "functional.py", "reference.py")
BACKENDS = ("cpu", "cuda", "rocm")
VERSION = 1  # of the interface, counted by `kernels`

OPS = '''"""Namespace of the operators of this build."""

import torch

NAMESPACE = "{namespace}"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(name: str) -> str:
    """Return the qualified name of an operator."""
    return f"{{NAMESPACE}}::{{name}}"
'''


def sources() -> dict[str, str]:
    """Files of a build by name, but for the namespace."""
    files = {name: (PACKAGE / name).read_text() for name in MODULES}
    for path in sorted((PACKAGE / "ops").glob("*.py")):
        files[f"ops/{path.name}"] = path.read_text()
    files |= {path.name: path.read_text() for path in sorted(TEMPLATES.glob("*.py"))}
    name = "ops/registration.py"
    own = '\nNAMESPACE = "skipkernels"\n'
    assert files[name].count(own) == 1
    files[name] = files[name].replace(own, "\nfrom .._ops import NAMESPACE  # noqa: E402\n")
    return files


def metadata(namespace: str, backend: str) -> dict:
    """Contents of metadata.json."""
    return {
        "name": "skipkernels",
        "id": namespace,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }


def write_build(folder: Path, backend: str, library: bool = False) -> Path:
    """Write one build; return its folder."""
    files = sources()
    digest = hashlib.sha256(backend.encode())
    for name, text in files.items():
        digest.update(f"{name}\0{text}\0".encode())
    if library:
        for path in sorted((ROOT / "csrc").iterdir()):
            digest.update(path.read_bytes())
    namespace = f"_skipkernels_{backend}_{digest.hexdigest()[:12]}"
    files["_ops.py"] = OPS.format(namespace=namespace)
    files["metadata.json"] = json.dumps(metadata(namespace, backend), indent=2) + "\n"
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if library:
        _compile(folder / "_C.so", namespace)
    return folder


def _compile(library: Path, namespace: str) -> None:
    """Compile the C++ kernels. The macro renames their C++ namespace and that of their operators."""
    code = f"from pathlib import Path; from skipkernels import _build; _build.build(Path({str(library)!r}))"
    flags = os.environ.get("CXXFLAGS", "") + f" -Dskipkernels={namespace}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"CXXFLAGS": flags})


def main() -> None:
    """Write the builds and print their folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cpp", action="store_true", help="compile the C++ kernels")
    arguments = parser.parse_args()
    build = arguments.folder / "build"
    for backend in BACKENDS:
        print(write_build(build / f"torch-{backend}", backend))
    if arguments.cpp:
        system = f"cpu-{platform.machine()}-{platform.system().lower()}"
        print(write_build(build / f"torch-stable-abi210-{system}", "cpu", library=True))


if __name__ == "__main__":
    main()
