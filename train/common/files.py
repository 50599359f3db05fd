"""Atomic file writing (temporary name, sync, rename), checksums, and reading files this program has written."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
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
    """Return ``path`` with a leading ``~`` expanded.

    Raises:
        ConfigError: if the user after the tilde does not exist; it names the setting, ``name``.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise ConfigError(f"{name} is {path}, whose user does not exist.") from None


def make_folder(path: Path, name: str) -> None:
    """Make a folder, unless it is there.

    Raises:
        ConfigError: if it can't be made; it names the setting, ``name``.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (
            "is a file; give a folder" if isinstance(error, FileExistsError) else f"can't be used: {first_line(error)}"
        )
        raise ConfigError(f"{name} is {path}, which {reason}.") from None


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, atomically; see :func:`write_text`."""
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: write a temporary file, sync it and rename it.

    Readers never see a partial file, even after a power failure.
    """
    tmp = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # process ids are not unique across hosts
    try:
        with tmp.open("w", encoding="utf-8", errors="backslashreplace") as file:  # the name of a file need not be text
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        tmp.replace(path)
    except OSError:
        tmp.unlink(missing_ok=True)
        raise
    sync(path.parent)


def remove_temporaries(folder: Path) -> None:
    """Remove what a :func:`write_text` that was killed has left. Call it where nobody else writes into the folder."""
    for path in folder.glob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{32}", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> tuple[int, str]:
    """Return a file's size in bytes and its SHA-256 as hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**22):
            digest.update(part)
        return file.tell(), digest.hexdigest()


def load_file(kind: type[Kind], path: Path) -> Kind:
    """Read a file that this program has written.

    Raises:
        ConfigError: if the file can't be read or does not fit its schema.
    """
    try:
        return read_schema(kind, path)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; restore it.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read: {first_line(error)}; restore it, or remove it.") from None


def load_yaml(text: str, typed: bool = True) -> Any:
    """Parse YAML into plain data, or if not ``typed`` into texts, lists and mappings of texts.

    Raises:
        ValueError: in one line, if it is not YAML or a mapping has a key twice, of which YAML would take the last.
    """
    import yaml

    base: Any = yaml.SafeLoader if typed else yaml.BaseLoader

    class Loader(base):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise ValueError(f"it has {twice} twice")
            made: dict[Any, Any] = super().construct_mapping(node, deep)
            return made

    try:
        return yaml.load(text, Loader)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def environment_facts() -> dict[str, Any]:
    """Return the command line, package versions and machine, to be stored with a result."""

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
    """Return the valid JSON objects of a file with one object per line; an empty list if there is no such file."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return [line for text in lines if (line := _object(text))]


def _object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # the last line of an interrupted run
        return {}
    return content if isinstance(content, dict) else {}
