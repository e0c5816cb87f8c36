"""Builds the C++ kernels where torch is there to build against; the rest of the project's description is in
pyproject.toml. Without torch the result is a pure package that builds the same sources on first use."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # a build front end does not put the project's own folder there

from skipkernels import _extension  # noqa: E402

NAME = f"_C_{_extension.sources_digest()}"


class BuildPyWithSources(build_py):
    """Puts csrc/ into the package, so that an installed copy can build it, and removes libraries of other sources."""

    def run(self) -> None:
        super().run()
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / "skipkernels"
        for library in package.glob("_C*.so"):
            if not library.name.startswith(f"{NAME}."):
                library.unlink()
        if self.editable_mode:
            return  # the checkout's csrc/ is found beside the package
        target = package / "csrc"
        target.mkdir(parents=True, exist_ok=True)
        for name in (*_extension.SOURCES, *_extension.HEADERS):
            shutil.copy2(ROOT / "csrc" / name, target / name)


def native() -> dict:
    try:
        _extension.check_compiler()
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except (ImportError, _extension.BuildError) as error:
        print(f"skipkernels: {error}. The package has no C++ kernels yet; they will be built on first use.")
        return {}
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))  # torch's default is two more than there are cores
    extension = CppExtension(
        f"skipkernels.{NAME}",
        sources=[f"csrc/{name}" for name in _extension.SOURCES],
        depends=[f"csrc/{name}" for name in _extension.HEADERS],
        extra_compile_args=[*_extension.COMPILE_FLAGS, *_extension.DEFINES],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=True)},
        # The binary uses torch's stable ABI and no Python at all: one wheel for all versions of both.
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


options = native()
options.setdefault("cmdclass", {})["build_py"] = BuildPyWithSources
setup(**options)
