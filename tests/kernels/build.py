"""Compiles the kernels' sources for tests: the CPU library with other flags, the CUDA source through the emulator."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import tomllib

import balanced_adam.kernels
from balanced_adam.kernels.cuda import STATE_TYPES
from balanced_adam.kernels.table import Variant
from train.settings import REPOSITORY

SOURCES = Path(balanced_adam.kernels.__file__).parent
HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@cache
def flags() -> list[str]:
    """Those of the installed library (pyproject.toml)."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    (extension,) = project["tool"]["setuptools"]["ext-modules"]
    return list(extension["extra-compile-args"])


@cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="balanced-adam-kernels-"))
    return path


def compiled(name: str, source: Path, extra: Sequence[str] = (), sources: Path = SOURCES) -> Path:
    """``name`` in the folder of this session, built from ``source``; ``extra`` flags come last."""
    target = folder() / name
    target.parent.mkdir(exist_ok=True)
    assert COMPILER is not None
    includes = [f"-I{sources}", f"-I{HERE}"]
    command = [COMPILER, *flags(), "-w", *includes, str(source), "-o", str(target), *extra]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return target


SHARED = ["-shared", "-fPIC", "-fvisibility=default"]


@cache
def cpu_library(*extra: str) -> Path:
    """The CPU kernels with other flags."""
    return compiled(f"cpu{abs(hash(extra))}.so", SOURCES / "cpu.cpp", [*SHARED, *extra])


def definitions(variant: Variant, threads: int = 8) -> list[str]:
    state = STATE_TYPES[variant.state]
    return [
        *(f"-DPARAM={variant.param}", f"-DGRAD={variant.grad}", f"-DCOPY={variant.copy}"),
        *(f"-DSTATE={state}", f"-DTHREADS={threads}"),
    ]


@cache
def emulated(variant: Variant) -> ctypes.CDLL:
    """The CUDA kernels of a variant, on the CPU."""
    name = "emulator-{}{}{}{}{}.so".format(*map(int, variant))
    return ctypes.CDLL(str(compiled(name, HERE / "emulator.cpp", ["-O1", *SHARED, *definitions(variant)])))


def mutated(name: str, file: str, right: str, wrong: str) -> Path:
    """A copy of the sources with one place of one file changed."""
    sources = folder() / f"mutant-{name}"
    sources.mkdir()
    for source in ("rule.h", "cpu.cpp", "cuda.cu"):
        text = (SOURCES / source).read_text()
        if source == file:
            assert text.count(right) == 1, f"{file} no longer has one {right!r}"
            text = text.replace(right, wrong)
        (sources / source).write_text(text)
    return sources
