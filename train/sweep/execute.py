"""Execute the runs of a comparison one after the other, alongside other workers that do the same."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.analysis.report_page import write_report
from train.common.errors import EXIT_RETRY, ConfigError, RetryError, require
from train.common.files import environment_facts, load_file, make_folder, write_json
from train.common.progress import Progress
from train.common.schemas import PlanFile
from train.run import run_dir
from train.run.metrics import last_step
from train.sweep.launch import launch_command, started
from train.sweep.options import Comparison
from train.sweep.plan import manifest, read_manifest, settings_of

POLL_SECONDS = 0.5
# A rank that was killed, as by the kernel for want of memory: the code of the deepspeed launcher, which exits with the
# rank's -9; and of a shell; and what torchrun and accelerate print, which exit with 1.
KILLED, SAYS_KILLED = (247, 137, -9), "Signal 9 (SIGKILL) received by PID"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The limits of this worker; infinite by default."""

    runs: float = math.inf
    """Number of runs to begin."""
    seconds: float = math.inf
    """Time after which no run should end."""


def execute(plan: dict[str, Any], out: Path, budget: Budget | None = None, discard: bool = False) -> None:
    """Execute the runs that are not finished and that no other worker is working on, until all have ended.

    Args:
        plan: the comparison's plan; see :func:`train.sweep.plan.manifest`.
        out: the comparison's folder.
        budget: stop when it is spent. None sets no limit.
        discard: remove the checkpoints of each run that this worker has finished.

    Raises:
        ConfigError: if a run fails, with its own message. A run that diverges does not fail: that is a result.
    """
    budget = budget or Budget()
    runs, steps = plan["runs"], plan["steps"]
    for run in runs:  # an older run of the same name, made before the plan was edited, is an error
        run_dir.check(settings_of(run, out))

    def left() -> list[dict[str, Any]]:
        return [run for run in runs if run_dir.result(out / run["name"]) is None]

    took: list[float] = []  # seconds of the runs that this worker began and finished

    def typical() -> float:
        """Return the typical seconds of a run: the median of this worker's, or of all ended runs' training time."""
        ended = [run_dir.result(out / run["name"]) for run in runs if not took]
        return statistics.median(took or [result.get("seconds") or 0.0 for result in ended if result] or [0.0])

    done = len(runs) - len(left())
    if done:
        print(f"{done} of {len(runs)} runs are finished already.", flush=True)
    begun, begun_here, announced = time.monotonic(), 0, False
    with Progress(len(runs) * steps, done * steps, "compare", enabled=True) as progress:
        while pending := left():
            for run in pending:
                seconds, count = typical(), len(left())
                if seconds and count and not announced:
                    print(
                        f"A run takes {seconds:.0f} s; {count} are left: {count * seconds / 3600:.1f} h on one worker.",
                        flush=True,
                    )
                    announced = True
                spent = time.monotonic() - begun
                if begun_here >= budget.runs or spent + seconds > budget.seconds:
                    print(
                        f"The budget is spent: {begun_here} runs in {spent / 3600:.2f} h; {count} are left.", flush=True
                    )
                    return
                with run_dir.sole_worker(out / run["name"]) as mine:
                    if mine and run_dir.result(out / run["name"]) is None:
                        begun_here += 1
                        fresh = not last_step(out / run["name"])
                        _execute(plan, run, out, progress, (len(runs) - count) * steps)
                        took += [time.monotonic() - begun - spent] if fresh else []
                        if discard:
                            shutil.rmtree(out / run["name"] / "checkpoints", ignore_errors=True)
            time.sleep(POLL_SECONDS)  # other workers are working on the remaining runs
        progress.show(len(runs) * steps)


def _execute(plan: dict[str, Any], run: dict[str, Any], out: Path, progress: Progress, done: int) -> None:
    """Execute one run, and show its progress on top of the ``done`` steps of earlier runs.

    Raises:
        ConfigError: if the run fails.
        RetryError: if its launcher says that it may be started again.
    """
    log = out / run["name"] / "log.txt"
    written = log.stat().st_size if log.exists() else 0  # by earlier attempts
    before = last_step(out / run["name"])
    with started(launch_command(plan, run, out), log) as process:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            progress.show(done + last_step(out / run["name"]), run["name"])
    if run_dir.result(out / run["name"]) is None:
        lines_now = log.read_bytes()[written:].decode(errors="replace").splitlines()
        errors = [line for line in lines_now if line.startswith("error: ")]
        killed = process.returncode in KILLED or any(SAYS_KILLED in line for line in lines_now)
        # One that is killed before it gets any further, as for want of memory, would be killed again.
        again = killed and last_step(out / run["name"]) > before
        kind = RetryError if again or process.returncode == EXIT_RETRY else ConfigError
        why = errors[-1][7:] if errors else f"{'a rank was killed (SIGKILL), ' * killed}see {log}"
        raise kind(f"run {run['name']} failed: {why}")


def _write_plan(comparison: Comparison, plan: dict[str, Any]) -> Path:
    """Write manifest.json, unless another comparison has begun in the folder, and begin.

    Raises:
        ConfigError: if one has, or the folder can't be used.
    """
    file = comparison.out / "manifest.json"
    make_folder(comparison.out, "out")
    if file.exists():
        before = load_file(PlanFile, file).model_dump(exclude_unset=True)
        begun = any(run_dir.has_begun(comparison.out / run["name"]) for run in before["runs"])
        require(
            not begun or (before["runs"], before.get("ranks")) == (plan["runs"], plan["ranks"]),
            f"out is {comparison.out}, which holds another comparison ({len(before['runs'])} runs); "
            "give another folder.",
        )
    write_json(file, {**plan, **environment_facts()})
    return file


def compare(comparison: Comparison) -> None:
    """Plan the runs, execute them and write the report.

    Raises:
        ConfigError: if the plan is invalid, the folder holds another comparison, or a run fails.
    """
    require(
        comparison.launcher != "slurm" or comparison.plan_only,
        "launcher is 'slurm', whose runs are jobs; submit slurm/compare.sbatch with the same options.",
    )
    plan = read_manifest(comparison.manifest) if comparison.manifest else json.loads(json.dumps(manifest(comparison)))
    for name in ("max_runs", "max_hours", "discard_checkpoints") if comparison.plan_only else ():
        require(not getattr(comparison, name), f"{name} has no effect with plan_only, which starts no run; remove it.")
    for name in ("max_runs", "max_hours"):
        value = getattr(comparison, name)
        require(value is None or value > 0, f"{name} is {value}; it must be above 0.")
    file = _write_plan(comparison, plan)
    if comparison.plan_only:
        print(file)
        return
    budget = Budget(
        runs=math.inf if comparison.max_runs is None else comparison.max_runs,
        seconds=math.inf if comparison.max_hours is None else comparison.max_hours * 3600,
    )
    execute(plan, comparison.out.resolve(), budget, comparison.discard_checkpoints)
    if any(run_dir.result(comparison.out / run["name"]) for run in plan["runs"]):
        write_report(comparison.out)
