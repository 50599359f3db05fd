"""Compiles the kernels' sources for tests: the CPU library with other flags, the CUDA source through the emulator."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

import pytest
import tomllib
from filelock import FileLock

import balanced_adam.kernels
from balanced_adam.kernels.cuda import STATE_TYPES
from balanced_adam.kernels.table import Variant
from tests import session
from train.common.files import REPOSITORY

SOURCES = Path(balanced_adam.kernels.__file__).parent
HERE = Path(__file__).parent
BUILT = REPOSITORY / "build" / "tests"
COMPILER = shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@cache
def flags() -> list[str]:
    """The flags of the installed library (pyproject.toml)."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    (extension,) = project["tool"]["setuptools"]["ext-modules"]
    return list(extension["extra-compile-args"])


@cache
def compiler_version() -> str:
    return subprocess.run([str(COMPILER), "--version"], capture_output=True, text=True, check=True).stdout


def compiled(name: str, source: Path, extra: Sequence[str] = (), sources: Path = SOURCES) -> Path:
    """The library ``name``, built from ``source`` with ``extra`` flags last, or one built from the same text before."""
    texts = [file.read_bytes() for place in (sources, HERE) for file in sorted(place.glob("*.[ch]*"))]
    settings = repr((compiler_version(), source.name, flags(), extra)).encode()
    target = BUILT / f"{sha256(settings + b''.join(texts)).hexdigest()[:16]}-{name}"
    BUILT.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            aside = target.with_name(f".{target.name}")
            includes = [f"-I{sources}", f"-I{HERE}"]
            command = [str(COMPILER), *flags(), "-w", *includes, str(source), "-o", str(aside), *extra]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            aside.rename(target)
    return target


SHARED = ["-shared", "-fPIC", "-fvisibility=default"]


@cache
def cpu_library(*extra: str) -> Path:
    """The CPU kernels with these flags; without any, those that are installed, unless the sources are newer."""
    installed = [] if extra else sorted(SOURCES.glob("_cpu*.so"))
    if installed and installed[0].stat().st_mtime > max(
        file.stat().st_mtime for file in [*SOURCES.glob("*.[ch]*"), REPOSITORY / "pyproject.toml"]
    ):
        return installed[0]
    return compiled("cpu.so", SOURCES / "cpu.cpp", [*SHARED, *extra])


def definitions(variant: Variant, threads: int = 8) -> list[str]:
    state = STATE_TYPES[variant.state]
    return [
        *(f"-DPARAM={variant.param}", f"-DGRAD={variant.grad}", f"-DCOPY={variant.copy}"),
        *(f"-DSTATE={state}", f"-DTHREADS={threads}"),
    ]


@cache
def emulated(variant: Variant) -> ctypes.CDLL:
    """The CUDA kernels of a variant, on the CPU."""
    return ctypes.CDLL(str(compiled("emulator.so", HERE / "emulator.cpp", ["-O1", *SHARED, *definitions(variant)])))


def copied(name: str) -> Path:
    """A copy of the sources for one instruction set; the loops of the others are the same."""
    sources = session.folder() / f"sources-{name}"
    sources.mkdir()
    for file in SOURCES.glob("*.[ch]*"):
        (sources / file.name).write_text(file.read_text().replace("#ifdef __x86_64__", "#if 0"))
    return sources


def mutated(name: str, file: str, right: str, wrong: str) -> Path:
    """Such a copy with one place of one file changed."""
    sources = copied(name)
    text = (sources / file).read_text()
    assert text.count(right) == 1, f"{file} no longer has one {right!r}"
    (sources / file).write_text(text.replace(right, wrong))
    return sources
