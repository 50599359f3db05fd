"""A checkpoint, whoever made it, is data: no command runs what its files say."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import session
from tests.corpus import write_corpus
from tests.harness.runs import change, finish, out_of
from tests.ranks import Program, environment, start
from train.common.files import REPOSITORY
from train.common.schemas import guard

READERS = {"load_checkpoint", "get_fp32_state_dict_from_zero_checkpoint", "ds_to_universal.main", "torch.load"}
"""Calls that read a checkpoint's files, DeepSpeed's as they are used here."""
MODULES = {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}


def unguarded(source: str) -> Iterator[str]:
    """Calls in a module that read a checkpoint outside of ``only_known_classes``, and modules that unpickle."""

    def guards(node: ast.AST) -> bool:
        heads = [item.context_expr for item in node.items] if isinstance(node, ast.With) else []
        heads += node.decorator_list if isinstance(node, ast.FunctionDef) else []
        return any("only_known_classes()" in ast.unparse(head) for head in heads)

    def visit(node: ast.AST, guarded: bool) -> Iterator[str]:
        guarded = guarded or guards(node)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if not guarded and any(name == reader or name.endswith(f".{reader}") for reader in READERS):
                yield f"{node.lineno}: {name}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            yield from (f"{node.lineno}: import {name}" for name in sorted(names & MODULES))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, guarded)

    yield from visit(ast.parse(source), False)


def test_whatever_reads_a_checkpoint_does_it_guarded() -> None:
    found = {str(file): list(unguarded(file.read_text())) for file in sorted((REPOSITORY / "train").rglob("*.py"))}
    assert len(found) > 50
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(file)",
        "import pickle",
        "from pickle import loads",
        "engine.load_checkpoint(place)",
        "with open(file): ds_to_universal.main(arguments)",
    ],
)
def test_the_search_for_unguarded_readers_can_fail(line: str) -> None:
    assert list(unguarded(f"def read():\n    {line}\n"))


class Evil:
    """What a checkpoint must not be able to do: run a command when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def poison(checkpoint: Path, name: str, mark: Path) -> None:
    """Put a command into one file, and make the sums right again."""
    file = checkpoint / name
    torch.save({**torch.load(file, weights_only=False), "evil": Evil(mark)}, file, pickle_module=pickle)
    manifest = checkpoint / "complete.json"
    about = json.loads(manifest.read_text())
    about["files"][name] = [file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()]
    manifest.write_text(json.dumps(guard(about)))


OPTIONS = (
    "--steps 30 --warmup 1 --batch 4 --sequence-length 32 --validation-fraction 0.2 "
    "--save-every 6 --keep 9 --validate-every 0"
)


@session.shared
def trained(stage: int) -> list[str]:
    """The options of a run that was cut after its first checkpoint."""
    place = session.folder() / f"guarded-{stage}"
    place.mkdir()
    options = [*OPTIONS.split(), "--data", str(write_corpus(place / "corpus")), "--data-cache", str(place / "cache")]
    options += ["--ds-config", str(REPOSITORY / "ds_configs" / f"zero{stage}.json"), "--out", str(place / "run")]
    code, said = finish(options, None)
    assert code == 0, said
    (place / "run" / "result.json").unlink()
    for path in (place / "run" / "checkpoints").glob("step-*"):
        if path.name != "step-0000006":
            shutil.rmtree(path)
    return options


def resume(options: list[str], out: Path) -> tuple[int, str]:
    """train.pretrain goes on."""
    return finish(options, None)


def respond(options: list[str], out: Path) -> tuple[int, str]:
    """train.response begins from the run's checkpoint."""
    place = options.index("--ds-config")
    kept = [*options[:place], *options[place + 2 : options.index("--out")]]
    line = f"--betas 0.9 --at 18 --window 12 --elements 64 --checkpoint {out_of(options)} --out {out} --"
    return finish([*line.split(), *kept], None, "train.response")


def convert(options: list[str], out: Path) -> tuple[int, str]:
    """As train.checkpoint does for another number of ranks."""
    arguments = [str(out_of(options) / "checkpoints" / "step-0000006"), str(out)]
    program = Program(
        "train.checkpoint.universal", arguments, environment(DS_ACCELERATOR="cpu"), out.with_suffix(".log"), None
    )
    started = start(program)
    return started.wait(), started.said()


def export(options: list[str], out: Path) -> tuple[int, str]:
    """train.export reads the weights."""
    return finish([str(out_of(options)), str(out)], None, "train.export")


FILES = {
    0: ["mp_rank_00_model_states.pt"],
    1: ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"],
    3: ["zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"],
}
CASES = [
    (stage, name, command)
    for stage, names in FILES.items()
    for name in names
    for command in (resume, respond, convert, export)
    if (stage, command) != (0, convert)
]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("stage", "name", "command"), CASES, ids=[f"stage{s}-{n[-15:-3]}-{c.__name__}" for s, n, c in CASES]
)
def test_no_command_runs_what_a_checkpoint_says(
    stage: int, name: str, command: Callable[[list[str], Path], tuple[int, str]], tmp_path: Path
) -> None:
    options = change(trained(stage), out=tmp_path / "run")
    shutil.copytree(out_of(trained(stage)), tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-0000006"
    assert {path.name for path in checkpoint.glob("*.pt")} == set(FILES[stage]), "a file that is not tried"
    poison(checkpoint, name, tmp_path / "evil-was-here")
    code, said = command(options, tmp_path / "out")
    assert not (tmp_path / "evil-was-here").exists()
    assert code != 0 and re.search("can't be loaded|weights_only", said), said
