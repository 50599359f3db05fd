"""The rules that the layout follows: which part may import which, and what a command costs before it does anything."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.common.files import REPOSITORY

FLOORS = {
    "common": set[str](),
    "distributed": {"common"},
    "data": {"common"},
    "run": {"common", "distributed", "data"},
    "analysis": {"common", "run"},
    "checkpoint": {"common", "distributed", "data", "run"},
    "probe": {"common", "distributed", "data", "run", "analysis", "checkpoint"},
    "sweep": {"common", "distributed", "data", "run", "analysis"},
}
"""The sub-packages of train/, and what each may import. The commands at the top may import all of them."""
COMMANDS = sorted({file.stem for file in (REPOSITORY / "train").glob("*.py")} - {"__init__", "restarts"})


def imports(file: Path) -> Iterator[str]:
    """The modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def upward(file: Path, floor: str) -> list[str]:
    """What a file on this floor imports from one beside or above it, or from a command."""
    ours = [name for name in imports(file) if name.split(".")[0] == "train" and name != "train"]
    return [name for name in ours if name.split(".")[1] not in FLOORS[floor] | {floor}]


@pytest.mark.parametrize("floor", FLOORS)
def test_no_part_of_train_imports_a_higher_one(floor: str) -> None:
    files = sorted((REPOSITORY / "train" / floor).glob("*.py"))
    assert len(files) > 1
    assert {file.name: names for file in files if (names := upward(file, floor))} == {}


def test_no_other_folder_is_in_train_and_an_upward_import_would_be_found(tmp_path: Path) -> None:
    folders = {file.parent.name for file in (REPOSITORY / "train").glob("*/*.py")}
    assert folders == set(FLOORS) and len(list((REPOSITORY / "train").glob("*.py"))) <= 14
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from train.sweep import plan\n    import train.pretrain\n")
    assert upward(file, "run") == ["train.sweep.plan", "train.pretrain"]


def test_the_optimizer_imports_nothing_of_the_harness_and_reads_no_environment() -> None:
    for file in (REPOSITORY / "balanced_adam").rglob("*.py"):
        assert not [name for name in imports(file) if name.split(".")[0] in ("train", "tests")], file
        if file.parent.name == "balanced_adam":
            assert "environ" not in file.read_text(), file


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_printed_without_importing_torch(command: str) -> None:
    line = [sys.executable, "-X", "importtime", "-m", f"train.{command}", "--help"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0 and "usage: python -m train." in done.stdout
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "tyro" in modules and not modules & {"torch", "deepspeed", "transformers", "pandas", "balanced_adam"}


@pytest.mark.parametrize("file", sorted((REPOSITORY / "ds_configs").glob("*.json")), ids=lambda file: file.name)
def test_every_ds_config_sets_what_deepspeed_has_other_defaults_for_from_version_to_version(file: Path) -> None:
    assert "gradient_clipping" in json.loads(file.read_text())  # its default went from 0 to 1 within 0.19
