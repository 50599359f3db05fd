"""Files of ours that somebody has edited or damaged, and what reads them: it leaves something out, or says why it
can't."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

import pandas as pd

from tests.fuzz.command_lines import Refused, run_main
from tests.fuzz.edits import edited
from tests.fuzz.outcome import Outcome, attempt
from train import requeue
from train.analysis import beta_grid, beta_rules
from train.analysis.lr_selection import best_lr
from train.analysis.report_page import markdown
from train.analysis.results import TABLE, caveats, load_results, summarize
from train.checkpoint.manifest import MANIFEST, checkpoint_info, complete_checkpoints, files_in, newest_step
from train.common.command_line import parse
from train.common.errors import ConfigError
from train.common.files import checksum, write_json
from train.common.schemas import guard
from train.data import token_files, tokenization
from train.run import run_dir
from train.run.config import Run
from train.run.metrics import Metrics

BETAS = (0.8, 0.9, 0.95)


def make(out: Path, corpus: Path) -> None:
    """Fill a folder with what a comparison, a pilot, a run with a checkpoint and a token folder leave."""
    plan = out / "comparison"
    run_main(
        "compare", ["--out", str(plan), "--arms", *map(str, BETAS), "0.9,0.999", "--seeds", "0", "1", "--plan-only"]
    )
    planned = json.loads((plan / "manifest.json").read_text())["runs"]
    rows = []
    for number, run in enumerate(planned):
        settings = _settings(plan / run["name"], run["arguments"])
        loss = 4.5 + number / 100
        _write_run(settings, loss)
        rows.append({"arm": run["arm"], "lr": run["lr"], "seed": run["seed"], "validation_loss": loss, "steps": 200})
    table = pd.DataFrame(rows).assign(step=200, tokens=200 * 2048, parameters=450_000)
    table.to_csv(plan / TABLE, index=False)
    pilot = {"beta": 0.9, "range": [0.8, 0.95], "steps": 200, "tokens_per_step": 2048, "parameters": 450_000}
    write_json(plan / "pilot.json", pilot)
    _write_run(_settings(out / "run", SINGLE), 4.5)
    (out / "run" / "result.json").unlink()
    for step in (3, 6):
        _write_checkpoint(out / "run" / "checkpoints" / f"step-{step:07d}", step)
    with redirect_stdout(StringIO()):
        requeue.verdict(out / "run")
        requeue.verdict(out / "run")
    run = _settings(out / "run", ["--data", str(corpus), "--data-cache", str(out / "cache"), *SMALL])
    token_files.prepare(run.data, tokenization.load_tokenizer(run.data.tokenizer), "")


SINGLE = ["--steps", "6", "--warmup", "1"]
SMALL = ["--validation-fraction", "0.2", "--sequence-length", "32"]


def _settings(out: Path, arguments: list[str]) -> Run:
    return parse(Run, ["--out", str(out), *arguments], "train.pretrain", None)


def _write_run(run: Run, loss: float) -> None:
    run.out.mkdir(parents=True, exist_ok=True)
    run_dir.describe(run, {"tokens": "tokens-abc", "order": "permutation", "loss": "full"}, {})
    metrics = Metrics(run.out, 0)
    for step in range(1, 13):
        metrics.write(step=step, loss=5 - step / 20, lr=1e-3, step_seconds=0.1, update_rms=0.1)
    metrics.write(step=12, validation_loss=loss)
    result = {"status": "finished", "step": 12, "validation_loss": loss, "parameters": 450_000, "seconds": 3.0}
    write_json(run.out / "result.json", {**result, "device": "cpu", "validation_blocks": 8})


def _write_checkpoint(folder: Path, step: int) -> None:
    folder.mkdir(parents=True)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (folder / name).write_bytes(b"\0" * step)
    layout = {"world": 1, "stage": 1, "dtype": "fp32", "accumulation": None}
    files = {each.name: checksum(each) for each in files_in(folder)}
    about = {"step": step, "parameters": 450_000, "layout": layout, "files": files, "run": {}, "tokens": "tokens-abc"}
    write_json(folder / MANIFEST, guard(about))


def report(out: Path) -> None:
    """As train.report, without its figures, which take nine tenths of the time."""
    _, table, _ = load_results(out / "comparison")
    assert markdown(summarize(best_lr(table), table["arm"].iloc[0]), caveats(table))


def plane(out: Path) -> None:
    """As train.plane, without its figure."""
    table = beta_grid.read(out / "comparison" / TABLE)
    best = best_lr(table)
    if beta_grid.is_grid(best):
        beta_grid.markdown(table, best)


def regret(out: Path) -> None:
    """As train.regret."""
    beta_rules.row(out / "comparison", ("0.9", "refresh:10", "pilot"))


def plan_again(out: Path) -> None:
    """The same comparison once more, in its folder."""
    arguments = ["--arms", *map(str, BETAS), "0.9,0.999", "--seeds", "0", "1", "--plan-only"]
    run_main("compare", ["--out", str(out / "comparison"), *arguments])


def run_plan(out: Path) -> None:
    """The edited plan as one to execute."""
    plan = str(out / "comparison" / "manifest.json")
    run_main("compare", ["--manifest", plan, "--out", str(out / "other"), "--plan-only"])


def resume(out: Path) -> None:
    """What a run looks at before it goes on."""
    run = _settings(out / "run", SINGLE)
    run_dir.check(run)
    if run_dir.result(run.out) is None:
        run_dir.begun(run.out)
        for path in complete_checkpoints(run.out / "checkpoints"):
            assert checkpoint_info(path).step in (3, 6)
        Metrics(run.out, newest_step(run.out / "checkpoints"))


def queue(out: Path) -> None:
    """As train.requeue."""
    assert requeue.main([str(out / "run")]) in (1, 75)


def tokens(out: Path) -> None:
    """A token folder, opened."""
    (folder,) = (each for each in (out / "cache").iterdir() if each.is_dir())
    train, validation = token_files.open_blocks(folder, 32)
    assert len(train) > 0 and len(validation) > 0


READERS: list[tuple[str, Callable[[Path], None]]] = [
    ("comparison", report),
    ("comparison", report),
    ("comparison/report.csv", plane),
    ("comparison/report.csv", regret),
    ("comparison/pilot.json", regret),
    ("comparison/manifest.json", plan_again),
    ("comparison/manifest.json", run_plan),
    ("run", resume),
    ("run/attempts.jsonl", queue),
    ("cache", tokens),
]
"""What is edited, a file or any file of a folder, and what reads it then."""


def damage(draw: random.Random, file: Path) -> None:
    """Change bytes of a file, or put something else in its place."""
    content = bytearray(file.read_bytes())
    how = draw.choice(["cut", "flip", "insert", "empty", "remove", "folder", "loop"])
    place = draw.randrange(max(1, len(content)))
    file.unlink()
    if how == "cut":
        file.write_bytes(content[:place])
    elif how == "flip" and content:
        content[place] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    elif how == "insert":
        content[place:place] = draw.randbytes(5)
        file.write_bytes(content)
    elif how in ("empty", "flip"):
        file.touch()
    elif how == "folder":
        file.mkdir()
    elif how == "loop":
        file.symlink_to(file)


def edit(draw: random.Random, file: Path) -> None:
    """Edit a file of JSON, of JSON lines or of comma-separated values; damage another."""
    if draw.random() < 0.3 or file.suffix not in (".json", ".jsonl", ".csv"):
        damage(draw, file)
    elif file.suffix == ".json":
        content = edited(draw, json.loads(file.read_text()))
        if isinstance(content, dict) and "sum" in content and draw.random() < 0.7:
            content = guard(content)  # an edit that the sum does not give away
        file.write_text(json.dumps(content))
    else:
        lines = file.read_text().splitlines()
        number = draw.randrange(len(lines))
        if file.suffix == ".jsonl":
            lines[number] = json.dumps(edited(draw, json.loads(lines[number])))
        else:
            cells = lines[number].split(",")
            cells[draw.randrange(len(cells))] = draw.choice(
                ["", "x", "nan", "-1", "1e400", "inf", '"', "0.9", "\u0663"]
            )
            lines[number] = ",".join(cells)
        file.write_text("\n".join(lines) + "\n")


def outcome(seed: int, whole: Path, folder: Path) -> Outcome:
    """Of one edit in a copy of ``whole``, which :func:`make` has filled; ``folder`` is empty."""
    draw = random.Random(seed)
    place, read = draw.choice(READERS)
    out = folder / "out"
    shutil.copytree(whole, out)
    files = sorted(each for each in (out / place).rglob("*") if each.is_file() and each.suffix != ".lock")
    if place == "cache":
        files = [each for each in files if each.parent.name.startswith("tokens-")]
    file = draw.choice(files) if files else out / place
    edit(draw, file)
    given = f"{read.__name__} of {file.relative_to(out)}, seed {seed}"
    with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        return attempt(
            given, partial(read, out), (ConfigError, Refused, OSError)
        )  # the ranks' collective_errors names the file of an OSError
