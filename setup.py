"""Builds csrc into distill/kernels/libdistill.so. Everything else about the package is in pyproject.toml.

torch loads the library, Python does not import it: it needs torch's headers (stable ABI), none of Python's.
Without a C++ compiler or torch the installation still succeeds and says so; the reference then serves.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

LIBRARY = "distill.kernels.libdistill"
SOURCES = sorted(glob("csrc/*.cpp"))
FLAGS = [
    "-O3 -std=c++17 -fPIC -shared -fvisibility=hidden -Wall -Wextra",
    "-fno-math-errno -fno-trapping-math -ffp-contract=off",  # where products are fused, the sources say so
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the stable ABI of torch 2.10
]


class BuildLibrary(build_ext):
    """Calls the compiler itself: setuptools' own way wants Python's headers and puts its tag in the name."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        reason = build(Path(self.get_ext_fullpath(ext.name)))
        if reason:
            # pip shows this only with -v; `python -m distill.kernels` says the same at any time.
            print(
                f"distill: C++ operators not built ({reason}); the PyTorch reference serves", file=sys.stderr
            )

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


def build(target: Path) -> str:
    """Compiles to `target`, whole or not at all. Returns why it could not, or an empty string."""
    named = os.environ.get("CXX")
    compiler = next(filter(None, map(shutil.which, [named] if named else ["c++", "g++", "clang++"])), None)
    if compiler is None:
        return f"no C++ compiler {named or 'c++, g++ or clang++'} on the PATH"
    try:
        import torch
    except ImportError:
        return "torch is not installed in the environment that builds; use --no-build-isolation"
    root = Path(torch.__file__).parent
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial.so")
    command = [compiler, *" ".join(FLAGS).split(), f"-I{root / 'include'}", *SOURCES, "-o", str(partial)]
    command += [f"-L{root / 'lib'}", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"{compiler} failed:\n{done.stderr}"
    os.replace(partial, target)
    return ""


# Optional: an editable installation does not stop at a library that is not there.
extension = Extension(LIBRARY, SOURCES, depends=glob("csrc/*.h"), optional=True)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildLibrary})
