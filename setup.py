"""Builds the C++ extension `bert_fast._C` when there is a compiler; everything else stands in pyproject.toml."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.cpp"))
HEADERS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.h"))
# No -march=native and no -ffast-math: one binary serves every CPU, and every instruction set rounds the same way.
# No debugging information: it is a third of the time that compiling takes.
FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"]


class TorchIsMissing(build_ext):
    """Stands in for torch's builder where torch cannot be imported."""

    def run(self) -> None:
        """Stop with what to do about it."""
        sys.exit(
            "bert_fast: torch is needed to build the C++ extension: install torch first, then bert_fast with "
            "--no-build-isolation (or set BERT_FAST_NO_EXTENSION=1 to do without the extension)"
        )


def reason_for_no_extension() -> str | None:
    """Why the package is installed without its C++ extension, or None when the extension is built."""
    if os.environ.get("BERT_FAST_NO_EXTENSION") == "1":
        return "BERT_FAST_NO_EXTENSION=1"
    compiler = os.environ.get("CXX", "c++")
    return None if shutil.which(compiler.split()[0]) else f"no C++ compiler ({compiler}) was found"


def extension() -> dict[str, Any]:
    """The arguments of setup() that build the extension, none when it is not built."""
    if reason := reason_for_no_extension():
        print(f"bert_fast: warning: {reason}: installing without C++ kernels", file=sys.stderr)
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {"ext_modules": [Extension("bert_fast._C", SOURCES)], "cmdclass": {"build_ext": TorchIsMissing}}
    module = CppExtension("bert_fast._C", SOURCES, depends=HEADERS, extra_compile_args=FLAGS)
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


def version() -> str:
    """`__version__` of the package, read without importing it."""
    match = re.search(r'^__version__ = "(.+)"$', (ROOT / "bert_fast/__init__.py").read_text(encoding="utf-8"), re.M)
    if match is None:
        raise RuntimeError("bert_fast/__init__.py has no __version__")
    return match[1]


setup(
    version=version(),
    # `kernels` is a folder without __init__.py behind a symlink, so that it never shadows the package of that name.
    packages=[*find_packages(include=["bert_fast*"]), "bert_fast.kernels"],
    package_data={"bert_fast": ["py.typed", "*.pyi", "data/*"], "bert_fast.kernels": ["tables/*.json"]},
    **extension(),
)
