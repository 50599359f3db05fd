"""Files that are never seen half-written: written under a temporary name, synced and renamed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import uuid
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from train.common.errors import ConfigError, first_line
from train.common.schemas import Kind, read_schema

PACKAGES = ("balanced-adam", "torch", "deepspeed", "transformers", "accelerate", "datasets", "numpy")
REPOSITORY = Path(__file__).resolve().parents[2]


def expanded(path: Path, name: str) -> Path:
    """With a home folder in place of a tilde; raises :class:`ConfigError`, naming the setting."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ConfigError(f"{name} is {path}, whose user does not exist.") from None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as :func:`write_text` does."""
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file aside, sync it and rename it, so that nobody ever sees a part, also after a power cut."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # workers on several hosts may have one process number
    try:
        with aside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**22):
            digest.update(part)
        return file.tell(), digest.hexdigest()


def load_file(kind: type[Kind], path: Path) -> Kind:
    """The content of a file that this program has written.

    Raises:
        ConfigError: if somebody or something has damaged it.
    """
    try:
        return read_schema(kind, path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read: {first_line(error)}; restore it, or remove it.") from None


def environment_facts() -> dict[str, Any]:
    """Command, versions and machine, for the reader of a result."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "command": [sys.executable, *sys.argv],
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
        "machine": f"{platform.node()}: {platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole objects of a file with one a line; none if there is no such file."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return [line for text in lines if (line := _object(text))]


def _object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # the last line of a run that was cut
        return {}
    return content if isinstance(content, dict) else {}
