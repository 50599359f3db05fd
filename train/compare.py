"""Many runs, one after the other, and the report at the end: ``python -m train.compare --help``.

The plan (train.plan) is a manifest file. Start it again after a Ctrl-C or a crash: finished runs are skipped, a cut one goes on
from its newest checkpoint. Start it several times, on one machine or on many that share the folder: each takes runs that no
other one is at.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from train import folder, report
from train.plan import Comparison, manifest, read_manifest, settings_of
from train.progress import Progress
from train.ranks import free_port
from train.schemas import PlanFile
from train.settings import REPOSITORY, SettingsError, parse, require

POLL_SECONDS = 0.5
# What a surrounding launcher may have set, and the launchers started here set anew.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def command(plan: dict[str, Any], run: dict[str, Any], out: Path) -> list[str]:
    """The command line that starts one run."""
    program = ["train.pretrain", "--out", str(out / run["name"]), *run["arguments"]]
    ranks, port = str(plan["ranks"]), str(free_port())
    launch = [sys.executable, "-m"]
    if plan["launcher"] == "deepspeed":
        launch += ["deepspeed.launcher.runner", "--num_gpus", ranks, "--master_port", port, "--module"]
    elif plan["launcher"] == "torchrun":
        launch += ["torch.distributed.run", "--nproc-per-node", ranks, "--master-port", port, "-m"]
    elif plan["launcher"] == "accelerate":
        config = str(REPOSITORY / "ds_configs" / "accelerate.yaml")
        launch += ["accelerate.commands.launch", "--config_file", config, "--num_processes", ranks]
        launch += ["--main_process_port", port, "--module"]
    return launch + program


@contextmanager
def _started(line: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run in a session of its own; it ends with the block, whatever happens, with all its ranks."""
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    with log.open("ab") as file:
        process = subprocess.Popen(
            line,
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # a Ctrl-C reaches this process alone, which then ends the ranks in order
        )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[Any], patience: float = 10.0) -> None:
    """End a launcher and all its ranks, wherever they have put themselves; gently first. Does nothing if it has ended."""
    if process.poll() is not None:
        return
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    tree[0].terminate()
    for left in psutil.wait_procs(tree, patience)[1]:
        with suppress(psutil.NoSuchProcess):
            left.kill()
    process.wait()


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What this worker may spend."""

    runs: float = math.inf
    seconds: float = math.inf


def execute(plan: dict[str, Any], out: Path, budget: Budget | None = None, discard: bool = False) -> None:
    """Run what isn't finished and no other worker is at, one run after the other, until all runs have ended or the budget is spent.

    Raises:
        SettingsError: if a run fails (one that diverges doesn't: that is a result), with its own sentence.
    """
    budget = budget or Budget()
    runs, steps = plan["runs"], plan["steps"]
    for run in runs:  # none of them may be another run of that name, made before the plan was edited
        folder.check(settings_of(run, out))

    def left() -> list[dict[str, Any]]:
        return [run for run in runs if folder.result(out / run["name"]) is None]

    took: list[float] = []  # seconds of whole runs of this worker

    def typical() -> float:
        """Seconds of a run: the median of this worker's, or of all that have ended, whose start isn't counted."""
        ended = [folder.result(out / run["name"]) for run in runs if not took]
        return statistics.median(took or [result["seconds"] for result in ended if result] or [0.0])

    done = len(runs) - len(left())
    if done:
        print(f"{done} of {len(runs)} runs are finished already.", flush=True)
    begun, begun_here, told = time.monotonic(), 0, False
    with Progress(len(runs) * steps, done * steps, "compare", enabled=True) as progress:
        while pending := left():
            for run in pending:
                seconds, count = typical(), len(left())
                if seconds and count and not told:
                    print(
                        f"A run takes {seconds:.0f} s; {count} are left: {count * seconds / 3600:.1f} h on one worker.",
                        flush=True,
                    )
                    told = True
                spent = time.monotonic() - begun
                if begun_here >= budget.runs or spent + seconds > budget.seconds:
                    print(
                        f"The budget is spent: {begun_here} runs in {spent / 3600:.2f} h; {count} are left.", flush=True
                    )
                    return
                with folder.sole_worker(out / run["name"]) as mine:
                    if mine and folder.result(out / run["name"]) is None:
                        begun_here += 1
                        fresh = not folder.read_metrics(out / run["name"])
                        _execute(plan, run, out, progress, (len(runs) - count) * steps)
                        took += [time.monotonic() - begun - spent] if fresh else []
                        if discard:
                            shutil.rmtree(out / run["name"] / "checkpoints", ignore_errors=True)
            time.sleep(POLL_SECONDS)  # what is left now, another worker is at
        progress.show(len(runs) * steps)


def _execute(plan: dict[str, Any], run: dict[str, Any], out: Path, progress: Progress, done: int) -> None:
    """One run, ``done`` steps being behind it."""
    log = out / run["name"] / "log.txt"
    with _started(command(plan, run, out), log) as process:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            lines = folder.read_metrics(out / run["name"])
            progress.show(done + (lines[-1]["step"] if lines else 0), run["name"])
    if folder.result(out / run["name"]) is None:
        said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
        raise SettingsError(f"run {run['name']} failed: {said[-1][7:] if said else f'see {log}'}")


def compare(comparison: Comparison) -> None:
    """Plan, run, report.

    Raises:
        SettingsError: on a bad plan, another plan in the same folder, or a failed run.
    """
    require(
        comparison.launcher != "slurm" or comparison.plan_only,
        "launcher is 'slurm', whose runs are jobs; submit slurm/compare.sbatch with the same options.",
    )
    plan = read_manifest(comparison.manifest) if comparison.manifest else json.loads(json.dumps(manifest(comparison)))
    require(
        not comparison.plan_only or not (comparison.max_runs or comparison.max_hours or comparison.discard_checkpoints),
        "max_runs, max_hours and discard_checkpoints are for runs that are started here; a plan alone has no use for them.",
    )
    for name in ("max_runs", "max_hours"):
        value = getattr(comparison, name)
        require(value is None or value > 0, f"{name} is {value}; it must be above 0.")
    file = comparison.out / "manifest.json"
    if file.exists():
        before = folder.read(PlanFile, file).model_dump(exclude_unset=True)
        begun = any((comparison.out / run["name"] / "run.json").exists() for run in before["runs"])
        require(
            not begun or (before["runs"], before["ranks"]) == (plan["runs"], plan["ranks"]),
            f"out is {comparison.out}, which holds another comparison ({len(before['runs'])} runs); give another folder.",
        )
    try:
        comparison.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"out is {comparison.out}, which can't be used: {error.strerror}.") from None
    folder.write_json(file, {**plan, **folder.environment()})
    if comparison.plan_only:
        print(file)
        return
    budget = Budget(
        runs=math.inf if comparison.max_runs is None else comparison.max_runs,
        seconds=math.inf if comparison.max_hours is None else comparison.max_hours * 3600,
    )
    execute(plan, comparison.out.resolve(), budget, comparison.discard_checkpoints)
    if any(folder.result(comparison.out / run["name"]) for run in plan["runs"]):
        report.write(comparison.out)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Command line: ``python -m train.compare --help``."""
    signal.signal(signal.SIGTERM, _interrupt)  # what a batch system sends: end the ranks too
    try:
        compare(parse(Comparison, sys.argv[1:] if arguments is None else arguments, "train.compare", __doc__))
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
