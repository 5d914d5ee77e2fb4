"""Builds the package. All metadata is in pyproject.toml.

csrc/ is built with CMake into ``vllm/kernels/lib/libhav.so`` when CMake and a C++ compiler are there;
otherwise, or with ``VLLM_BUILD_NATIVE=0``, the package is pure Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
NATIVE = "vllm.kernels.lib.libhav"


def can_build_native() -> bool:
    """Whether CMake and a compiler that it would find are there."""
    if os.environ.get("VLLM_BUILD_NATIVE", "1") == "0":
        return False
    compilers = [os.environ.get("CXX", "c++"), "g++", "clang++"]
    return bool(shutil.which("cmake")) and any(shutil.which(each) for each in compilers)


class CMakeBuild(build_ext):
    """Runs CMake in place of setuptools' compiler calls."""

    def get_ext_filename(self, fullname: str) -> str:
        # The library does not know Python, so its name does not either.
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        build = str(ROOT / "build" / "native")
        prefix = Path(self.get_ext_fullpath(ext.name)).resolve().parents[3]
        num_jobs = str(os.cpu_count() or 1)
        try:
            subprocess.run(["cmake", "-S", str(ROOT), "-B", build], check=True)
            subprocess.run(["cmake", "--build", build, "--parallel", num_jobs], check=True)
            subprocess.run(["cmake", "--install", build, "--prefix", str(prefix)], check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"csrc/ does not build: {error}") from error

    def copy_extensions_to_source(self) -> None:
        # Of an editable install. The folder holds nothing else, so a checkout does not have it.
        (ROOT / "vllm" / "kernels" / "lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()


class PlatformWheel(bdist_wheel):
    """One wheel per platform, for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


if can_build_native():
    # Optional: where the build fails, setuptools warns and installs pure Python.
    setup(
        ext_modules=[Extension(NATIVE, sources=[], optional=True)],
        cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    )
else:
    print("no CMake or no C++ compiler: installing pure Python", file=sys.stderr)
    setup()
