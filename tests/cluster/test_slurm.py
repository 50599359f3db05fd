"""The shipped batch scripts on a real Slurm with two nodes."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import Cluster, wait_until
from tests.cluster.runs import events, losses, same
from train.run import run_dir
from train.run.metrics import read_metrics

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1800)]


class Job:
    """A batch job, and what it has said."""

    def __init__(self, cluster: Cluster, project: Path, out: Path, *command: object) -> None:
        self.cluster, self.out = cluster, out
        self.log = out.with_suffix(".log")
        line = ["env", f"--chdir={project}", "sbatch", "--parsable", "-o", self.log, *command]
        self.id = cluster.controller.check(*line).strip()

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def says(self, pattern: str, seconds: float = 400.0) -> None:
        """Wait for it."""
        try:
            wait_until(lambda: re.search(pattern, self.said()), seconds, pattern)
        except TimeoutError:
            pytest.fail(f"{pattern!r} not within {seconds:.0f} s\n{self.said()[-4000:]}")

    def state(self) -> str:
        shown = self.cluster.controller.check("scontrol", "show", "job", self.id)
        return re.search(r"JobState=(\w+)", shown)[1]  # type: ignore[index]

    def ends(self, state: str, seconds: float = 600.0) -> None:
        """Wait for the end, and see that it is this one."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_until(lambda: self.state() in over, seconds, f"job {self.id} ends")
        assert self.state() == state, self.said()[-4000:]

    def trains(self, step: int = 1) -> None:
        """Wait until a step beyond this one has been taken."""

        def far() -> bool:
            lines = read_metrics(self.out) if self.out.exists() else []
            return bool(lines) and lines[-1]["step"] > step

        wait_until(far, 90, f"step {step}")


def pretrain(cluster: Cluster, project: Path, out: Path, options: list[str], *sbatch: object) -> Job:
    return Job(cluster, project, out, *sbatch, "slurm/pretrain.sbatch", "--out", out, *options)


@pytest.fixture(scope="module")
def long(options: list[str]) -> list[str]:
    """Long enough to be disturbed."""
    return [*options, "--steps", "400", "--save-every", "50"]


@pytest.fixture(scope="module")
def straight(cluster: Cluster, project: Path, long: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, undisturbed, on one host."""
    out = tmp_path_factory.mktemp("straight") / "run"
    line = ["torchrun", "--nproc-per-node", 2, "--master-port", 29517, "-m", "train.pretrain", "--out", out, *long]
    cluster.controller.check("env", f"--chdir={project}", *line)
    return out


def test_out_of_time_preempted_and_with_a_crashed_node_it_goes_on_and_ends_with_the_bits_of_an_undisturbed_run(
    cluster: Cluster, project: Path, long: list[str], straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = pretrain(cluster, project, out, long)
    job.trains(step=20)
    cluster.controller.check("scancel", "--batch", "-s", "USR1", job.id)  # what --signal=B:USR1@300 sends
    job.says("USR1: asking the run to save and stop")
    job.says(r"restart 0\] requeue")
    job.trains(step=int(events(out)[1]["step"]) + 20)
    urgent = ["sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"]
    cluster.controller.check(*urgent)
    job.says(r"restart 1\] requeue")
    kinds = [event["event"] for event in events(out)]
    assert kinds == ["begins", "stopped", "attempt ended"] * 2
    assert 20 < events(out)[1]["step"] == events(out)[3]["step"] < events(out)[4]["step"]  # goes on where it stopped
    job.trains(step=int(events(out)[4]["step"]) + 60)
    node2 = cluster.node("node2")
    cluster.crash(node2)
    wait_until(lambda: job.state() == "PENDING", 60, "the job is taken from the crashed node")
    cluster.revive(node2)
    job.ends("COMPLETED", 150)
    assert events(out)[-1]["event"] == "finished"
    assert len(losses(out)) == 400 and same(out, straight)


def test_cancelled_it_ends_for_good(cluster: Cluster, project: Path, long: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = pretrain(cluster, project, out, long)
    job.trains(step=20)
    cluster.controller.check("scancel", job.id)
    job.ends("CANCELLED")
    time.sleep(3)
    assert job.state() == "CANCELLED"


def test_what_the_settings_do_wrong_is_said_once_and_not_tried_again(
    cluster: Cluster, project: Path, options: list[str], tmp_path: Path
) -> None:
    job = pretrain(cluster, project, tmp_path / "run", [*options, "--batch", "3"])
    job.ends("FAILED")
    assert len(re.findall("^error: ", job.said(), re.MULTILINE)) == 1
    assert "restart 1" not in job.said()


def test_no_progress_twice_stops_the_job(cluster: Cluster, project: Path, options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    out.mkdir()
    cluster.node("node2").check("mount", "--bind", hidden, out)  # a node that doesn't see the others' files
    try:
        job = pretrain(cluster, project, out, options)
        job.ends("FAILED", 150)
    finally:
        cluster.node("node2").check("umount", out)
    assert "is not shared: what rank 0 wrote there is not visible" in job.said() and "node2: " in job.said()
    assert "got no further than step 0 in two attempts; not started again" in job.said()
    assert [event["event"] for event in events(out)] == ["attempt ended"] * 2


def test_a_comparison_is_a_job_array_whose_tasks_are_requeued_one_by_one_and_a_report(
    cluster: Cluster, project: Path, options: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "comparison"
    kept = options[options.index("--validation-fraction") : options.index("--validation-fraction") + 2]
    kept += options[options.index("--data") :]
    text = "--arms 0.9 0.9,0.99 --seeds 0 --steps 300 --batch 4 --sequence-length 32 --ranks 2"
    said = cluster.controller.check(
        "env", f"--chdir={project}", "bash", "slurm/compare.sbatch", "--out", out, *text.split(), "--", *kept
    )
    match = re.search(r"Submitted 2 runs as job array (\d+), at most 4 at once, and the report as job (\d+)", said)
    assert match
    first, second = out / "beta-0.9_lr-0.001_seed-0", out / "beta-0.9-0.99_lr-0.001_seed-0"
    wait_until(lambda: first.exists() and len(read_metrics(first)) > 20, 90, "the first run trains")
    # What --signal=B:USR1@300 sends, to one task of the array.
    cluster.controller.check("scancel", "--batch", "-s", "USR1", f"{match[1]}_0")
    wait_until((out / "report.html").exists, 240, "the report")
    for run, times in ((first, 2), (second, 1)):
        ended = run_dir.result(run)
        assert ended and ended["status"] == "finished" and ended["world"] == 2
        kinds = [event["event"] for event in events(run)]
        assert kinds.count("begins") == times and kinds[-1] == "finished"
        assert kinds[: 3 * (times - 1)] == ["begins", "stopped", "attempt ended"] * (times - 1)
        assert len(losses(run)) == 300
