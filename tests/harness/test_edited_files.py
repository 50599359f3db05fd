"""Files of a comparison that somebody has edited or damaged: the report leaves a run out, or says why it can't be.

``test_a_report`` goes through seeded edits without drawing figures, which take nine tenths of the time.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from train.analysis.lr_selection import best_lr
from train.analysis.report_page import markdown
from train.analysis.results import caveats, load_results, summarize
from train.common.errors import ConfigError
from train.common.files import write_json

CASES, BATCH = 400, 100
WEIRD: list[Any] = [None, True, False, 0, -1, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "x", "1e-3"]
WEIRD += ["\0", "../..", "/etc", "ü\ud800", "<script>", [], [1], [[]], {}, {"a": 1}]
KEYS = ("step", "loss", "validation_loss", "lr", "name", "arm", "seconds", "parameters", "x y", "\ud800")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of two arms and two seeds, with all that a report reads."""
    out = tmp_path_factory.mktemp("comparison")
    runs = []
    for arm in ("0.95", "0.9,0.999"):
        for seed in (0, 1):
            run = {"name": f"beta-{arm}_seed-{seed}".replace(",", "-"), "arm": arm, "lr": 1e-3, "seed": seed}
            folder = out / str(run["name"])
            folder.mkdir()
            identity = {"model": {"model": "tiny"}, "optimizer": {"lr": 1e-3, "betas": arm}, "seed": seed}
            write_json(folder / "run.json", {"identity": identity, "tokens": "abc"})
            result = {"status": "finished", "step": 12, "validation_loss": 4.5 + seed / 100, "parameters": 450_000}
            write_json(folder / "result.json", {**result, "seconds": 3.0, "device": "cpu", "validation_blocks": 8})
            steps = [{"step": n, "loss": 5 - n / 20, "lr": 1e-3, "step_seconds": 0.1} for n in range(1, 13)]
            lines = [*steps, {"step": 12, "validation_loss": 4.5}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            runs.append({**run, "arguments": ["--seed", str(seed)]})
    plan = {"runs": runs, "steps": 12, "ranks": 2, "launcher": "deepspeed", "packages": {"torch": "2.13.0"}}
    write_json(out / "manifest.json", {**plan, "command": ["train.compare"]})
    return out


def places(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    yield place
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(value, (*place, key))


def edited(draw: random.Random, document: Any) -> Any:
    """The document with one value changed, removed, added or doubled."""
    document = copy.deepcopy(document)
    place = draw.choice(list(places(document)))
    if not place:
        return draw.choice(WEIRD)
    node = document
    for key in place[:-1]:
        node = node[key]
    how = draw.choice(["change", "change", "change", "remove", "add", "double"])
    if how == "change":
        node[place[-1]] = draw.choice(WEIRD)
    elif how == "remove":
        del node[place[-1]]
    elif isinstance(node, list):
        node.append(copy.deepcopy(node[place[-1]]) if how == "double" else draw.choice(WEIRD))
    else:
        node[draw.choice(KEYS)] = draw.choice(WEIRD)
    return document


def damage(draw: random.Random, file: Path) -> None:
    """Change bytes of a file, or put something else in its place."""
    content = bytearray(file.read_bytes())
    how = draw.choice(["cut", "flip", "insert", "empty", "remove", "folder", "loop"])
    place = draw.randrange(len(content))
    file.unlink()
    if how == "cut":
        file.write_bytes(content[:place])
    elif how == "flip":
        content[place] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    elif how == "insert":
        content[place:place] = draw.randbytes(5)
        file.write_bytes(content)
    elif how == "empty":
        file.touch()
    elif how == "folder":
        file.mkdir()
    elif how == "loop":
        file.symlink_to(file)


def spoil(draw: random.Random, out: Path) -> str:
    """Edit or damage one file of a comparison; which one."""
    file = draw.choice([*sorted(each for each in out.rglob("*") if each.is_file()), *[out / "manifest.json"] * 4])
    if draw.random() < 0.3:
        damage(draw, file)
    elif file.name == "metrics.jsonl":
        lines = file.read_text().splitlines()
        number = draw.randrange(len(lines))
        lines[number] = json.dumps(edited(draw, json.loads(lines[number])))
        file.write_text("\n".join(lines) + "\n")
    else:
        file.write_text(json.dumps(edited(draw, json.loads(file.read_text()))))
    return str(file.relative_to(out))


@pytest.mark.parametrize("first", range(0, CASES, BATCH))
def test_a_report(comparison: Path, tmp_path: Path, first: int) -> None:
    refused = 0
    for seed in range(first, first + BATCH):
        out = tmp_path / str(seed)
        shutil.copytree(comparison, out)
        file = spoil(random.Random(seed), out)
        try:
            _, table, _ = load_results(out)
            assert markdown(summarize(best_lr(table), table["arm"].iloc[0]), caveats(table))
        except ConfigError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000, (seed, file, error)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {file}: {error!r}") from error
        with suppress(OSError):
            shutil.rmtree(out)
    assert 0 < refused < BATCH
