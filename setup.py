"""Builds the C++ kernels if torch and a C++ compiler are present; all other metadata is in pyproject.toml.

Without them, or if the build fails, the result is a pure package; `skipkernels build` builds the same sources later.
"""

import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # a build front end does not put the project's own folder there

from skipkernels import _build  # noqa: E402

SOURCE = "https://github.com/skipkernels/skipkernels"
NAME = f"_C_{_build.sources_digest()}"


class BuildPyWithSources(build_py):
    """Copies csrc/ into the package, so that an installed copy can build it, and removes libraries of other sources."""

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
        for source in (ROOT / "csrc").iterdir():
            shutil.copy2(source, target / source.name)


class BuildKernels(build_ext):
    """Builds the library. A failure is a warning, and the package is pure."""

    def build_extension(self, ext: Extension) -> None:
        try:
            _build.build(Path(self.get_ext_fullpath(ext.name)))
        except (ImportError, OSError, _build.BuildError) as error:  # no torch, or no compiler
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel is not None:
                wheel.root_is_pure = True
            # Optional: setuptools makes it a warning.
            raise CompileError(f"{error}. No C++ kernels are built; `skipkernels build` builds them later.") from error


def readme() -> str:
    """README.md with absolute links, for a package index."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\1{SOURCE}/raw/main/", text)
    return re.sub(r"(?<!!)(\[[^\]]*\]\()(?!https?:|#)", rf"\1{SOURCE}/blob/main/", text)


sources = sorted(f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*.cpp"))
setup(
    ext_modules=[Extension(f"skipkernels.{NAME}", sources, py_limited_api=True, optional=True)],
    # The binary uses torch's stable ABI and no Python at all: one wheel for all versions of both.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    long_description=readme(),
    long_description_content_type="text/markdown",
    cmdclass={"build_py": BuildPyWithSources, "build_ext": BuildKernels},
)
