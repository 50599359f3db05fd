"""Source archives of DeepSpeed, which come before the one that is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

from train.common.files import REPOSITORY


def environment(version: str | None) -> dict[str, str]:
    """One in which this version is imported; None is the one that is installed."""
    path = [str(unpacked(version))] if version else []
    # torch 2.4 starts a thread and processes to compile when it is imported, and ranks are forked after that.
    more = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return {**os.environ, **more, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *path])}


def said(version: str, code: str) -> list[list[str]]:
    """The rows that Python code prints with this DeepSpeed: of lines that begin with "row", what stands between tabs.

    Raises:
        RuntimeError: if it failed.
    """
    done = subprocess.run([sys.executable, "-c", code], env=environment(version), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{code} with DeepSpeed {version} failed:\n{done.stdout[-3000:]}{done.stderr[-6000:]}")
    lines = (line.split("\t") for line in done.stdout.splitlines())
    return [cells for kind, *cells in lines if kind == "row"]


def unpacked(version: str) -> Path:
    """The folder of a version's source archive, fetched if need be."""
    folder = REPOSITORY / "build" / "compat"
    found = folder / f"deepspeed-{version}"
    if not found.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Its setup.py needs the torch that is installed here.
        line = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            ":all:",
        ]
        subprocess.run([*line, "-d", str(folder), f"deepspeed=={version}"], check=True)
        with tarfile.open(folder / f"deepspeed-{version}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return found
