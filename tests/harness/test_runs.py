"""Whole runs with real ranks: every launcher, every shipped ds_config, cut and resumed."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness.runs import change, finish, losses, out_of, start
from tests.ranks import LIMIT, Forking
from train import compare, report
from train.common.errors import ConfigError, RetryError
from train.common.files import REPOSITORY, read_lines, write_json
from train.common.progress import Progress
from train.run import run_dir
from train.run.metrics import read_metrics
from train.sweep import execute
from train.sweep.launch import launch_command

CONFIGS = sorted((REPOSITORY / "ds_configs").glob("zero*.json"))


@pytest.mark.ranks
@pytest.mark.parametrize(("launcher", "ranks"), [("deepspeed", 2), ("torchrun", 2), ("accelerate", 2), ("python", 1)])
def test_twenty_steps_under_each_launcher(small_run: list[str], launcher: str, ranks: int) -> None:
    options = change(small_run, steps=20, save_every=0)
    code, said = finish(options, ranks, launcher=launcher)
    assert code == 0, said
    result = run_dir.result(out_of(options))
    assert result and result["status"] == "finished" and result["world"] == ranks and result["step"] == 20
    assert len(losses(options)) == 20 and losses(options)[-1] < losses(options)[0]
    forked = change(options, out=out_of(options).with_name("forked"))
    code, said = finish(forked, ranks if ranks > 1 else None, own_threads=True)
    assert code == 0, said
    assert losses(forked) == losses(options)  # so the other tests may fork their ranks


@pytest.mark.ranks
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_ds_config_trains_and_starts_from_the_same_weights(
    small_run: list[str], config: Path, tmp_path: Path
) -> None:
    options = change(small_run, ds_config=config)
    code, said = finish(options)
    assert code == 0, said
    reference = change(small_run, ds_config=REPOSITORY / "ds_configs" / "zero0.json", out=tmp_path / "one-rank")
    assert finish(reference, None)[0] == 0
    assert losses(options) == pytest.approx(losses(reference), rel=2e-5)


@pytest.mark.ranks
def test_with_a_packed_state_it_trains_as_well_and_writes_smaller_checkpoints(
    small_run: list[str], tmp_path: Path
) -> None:
    runs = {state: change(small_run, state=state, out=tmp_path / state) for state in ("fp32", "packed16")}
    for options in runs.values():
        assert finish(options, None)[0] == 0
    sizes = {
        state: sum(
            f.stat().st_size for f in (tmp_path / state / "checkpoints" / "step-0000006").glob("*optim_states.pt")
        )
        for state in runs
    }
    # fp32 master weights and the state: 4 + 8 and 4 + 2 bytes a weight.
    assert sizes["packed16"] / sizes["fp32"] == pytest.approx(0.5, abs=0.03)
    assert losses(runs["packed16"]) == pytest.approx(losses(runs["fp32"]), rel=1e-3)
    assert losses(runs["packed16"]) != losses(runs["fp32"])


@pytest.mark.ranks
def test_two_ranks_say_it_once_and_end_with_a_failure(small_run: list[str]) -> None:
    code, said = finish(change(small_run, sequence_length=2000))
    assert code != 0
    assert len(re.findall(r"^error: ", said, re.MULTILINE)) == 1
    assert "sequence_length is 2000" in said


@pytest.mark.ranks
def test_a_dry_run_estimates_memory_and_writes_nothing(small_run: list[str]) -> None:
    code, said = finish([*small_run, "--dry-run"], None)
    assert code == 0, said
    assert "ZeRO-3 with offload" in said and "one batch: loss" in said and "estimated memory of a rank: 0.0" in said
    assert not out_of(small_run).exists()


def check_that_a_killed_report_leaves_each_file_whole(out: Path) -> None:
    reports = {file: file.read_bytes() for file in out.glob("report.*")}
    codes = []
    for seconds in (0.1, 0.3, 0.7, 1.5):  # whenever it is killed, each file is a whole one
        process = start([str(out)], None, "train.report")
        time.sleep(seconds)
        process.end()
        codes.append(process.returncode)
        assert {file: file.read_bytes() for file in out.glob("report.*")} == reports
    assert -signal.SIGKILL in codes


def check_that_learning_rates_come_from(
    out: Path, tuned: Path, rest: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    compare.main(["--arms", "0.9", "--lr-from", str(out), "--out", str(tuned), "--plan-only", *rest])
    assert {run["lr"] for run in json.loads((tuned / "manifest.json").read_text())["runs"]} == {0.002}
    # A plan that was made with other learning rates, or from elsewhere, is not taken for one that was tuned here.
    compare.main(["--arms", "0.9", "--lr", "0.5", "--out", str(tuned), "--plan-only", *rest])
    elsewhere = json.loads((tuned / "manifest.json").read_text())
    write_json(tuned / "manifest.json", {**elsewhere, "lr_from": ["somewhere"]})
    compare.main(["--arms", "0.9", "--lr-from", str(out), "--out", str(tuned), "--plan-only", *rest])
    assert {run["lr"] for run in json.loads((tuned / "manifest.json").read_text())["runs"]} == {0.002}
    compare.main(["--grid", "0.9", "0.8", "--out", str(tuned), "--plan-only", *rest])
    assert {run["lr"] for run in json.loads((tuned / "manifest.json").read_text())["runs"]} == {5e-4, 1e-3, 2e-3}
    with pytest.raises(SystemExit):
        compare.main(["--arms", "0.8", "--lr-from", str(out), "--out", str(tuned), "--plan-only", *rest])
    assert "where no run of the arm 0.8 has ended; there are 0.9, 0.9,0.99." in capsys.readouterr().err


def check_that_two_comparisons_are_reported_as_one(
    out: Path, plan: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in ("beta-0.9_lr-0.002_seed-0", "beta-0.9-0.99_lr-0.002_seed-0"):  # as if the arms were two comparisons
        half = tmp_path / run
        shutil.copytree(out / run, half / run)
        write_json(half / "manifest.json", {**plan, "runs": [each for each in plan["runs"] if each["name"] == run]})
    halves = sorted(tmp_path.glob("beta-*"), reverse=True)
    report.main(list(map(str, halves)))
    assert "| 0.9 | 0.002 | 1 |" in (said := capsys.readouterr().out) and "| 0.9,0.99 | 0.002 | 1 |" in said
    with pytest.raises(SystemExit):
        report.main([str(halves[0]), str(out)])
    assert "runs has beta-0.9_lr-0.002_seed-0 twice" in capsys.readouterr().err


@pytest.mark.ranks
def test_workers_share_a_comparison_which_skips_what_is_finished_goes_on_with_what_was_cut_and_reports(
    small_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", Forking)
    out = tmp_path / "comparison"
    kept = small_run[small_run.index("--data") : small_run.index("--data") + 4]
    text = "--seeds 0 1 --steps 4 --batch 4 --sequence-length 32 --ranks 1 --launcher python"
    rest = [*text.split(), "--", *kept, "--validation-fraction", "0.2"]
    arguments = ["--arms", "0.9", "0.9,0.99", "--lr", "0.002", "--out", str(out), *rest]
    with start(arguments, None, "train.compare") as other:
        compare.main(["--max-runs", "1", *arguments])
    assert other.returncode == 0
    assert "The budget is spent: 1 runs in 0.0" in (said := capsys.readouterr().out) and "h on one worker" in said
    compare.main(arguments)
    said = capsys.readouterr().out
    assert "| 0.9,0.99 |" in said and str(out / "report.html") in said
    page = (out / "report.html").read_text()
    assert "One learning rate (0.002) was used for all arms" in page and "http" not in page.replace(
        "http://www.w3.org", ""
    )
    plan = json.loads((out / "manifest.json").read_text())
    assert [run["arm"] for run in plan["runs"]] == ["0.9", "0.9,0.99"] * 2 and plan["packages"]["torch"]
    for run in plan["runs"]:
        events = [line["event"] for line in read_lines(out / run["name"] / "attempts.jsonl")]
        assert events == ["begins", "finished"]  # by one worker
    first = {run["name"]: losses(["--out", str(out / run["name"])])[0] for run in plan["runs"]}
    assert len(set(first.values())) == 2  # arms of a seed start alike
    stamps = [(out / run["name"] / "metrics.jsonl").stat().st_mtime_ns for run in plan["runs"]]
    (out / plan["runs"][-1]["name"] / "result.json").unlink()
    compare.main(["--discard-checkpoints", *arguments])
    assert "3 of 4 runs are finished already" in capsys.readouterr().out
    again = [(out / run["name"] / "metrics.jsonl").stat().st_mtime_ns for run in plan["runs"]]
    assert stamps[:-1] == again[:-1] and stamps[-1] != again[-1]
    assert [(out / run["name"] / "checkpoints").exists() for run in plan["runs"]] == [True] * 3 + [False]
    check_that_a_killed_report_leaves_each_file_whole(out)
    check_that_learning_rates_come_from(out, tmp_path / "tuned", rest, capsys)
    check_that_two_comparisons_are_reported_as_one(out, plan, tmp_path, capsys)


@pytest.mark.parametrize("name", [".worker", ".lock"])
def test_a_run_that_a_worker_or_its_ranks_are_at_is_nobody_elses(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    with run_dir.sole_worker(run) as mine:
        assert mine
    hold = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
    hold += "print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(run / name)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        with run_dir.sole_worker(run) as mine:
            assert not mine
        other.kill()  # nothing is left of its claim
    with run_dir.sole_worker(run) as mine:
        assert mine


def is_asked_to_end(pid: int) -> bool:
    """Whether a suspended process has a SIGTERM waiting for it, or has been killed."""
    file = Path(f"/proc/{pid}/status")
    try:
        status = file.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    pending = [int(mask, 16) for mask in re.findall(r"^(?:SigPnd|ShdPnd):\s*(\w+)", status, re.MULTILINE)]
    return any(mask >> (signal.SIGTERM - 1) & 1 for mask in pending)


@pytest.mark.ranks
def test_ctrl_c_ends_a_comparison_with_all_its_ranks_and_the_same_command_goes_on(
    small_run: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "comparison"
    kept = small_run[small_run.index("--data") : small_run.index("--data") + 4]
    text = "--arms 0.9 --seeds 0 --steps 400 --batch 4 --sequence-length 32"
    line = [
        *("env", "--default-signal=INT"),  # a job in the background of a shell ignores it
        *(sys.executable, "-m", "train.compare"),
        *text.split(),
        "--out",
        str(out),
        "--",
        *kept,
        *("--validation-fraction", "0.2"),
        *("--ds-config", str(REPOSITORY / "ds_configs" / "zero0.json")),  # the fewest collectives
    ]
    run = out / "beta-0.9_lr-0.001_seed-0"
    process = subprocess.Popen(line, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + LIMIT
    while not (run / "checkpoints" / "step-0000100" / "complete.json").exists() and time.monotonic() < until:
        time.sleep(0.02)
    ranks = psutil.Process(process.pid).children(recursive=True)
    assert len(ranks) >= 3  # the launcher and two ranks
    # On a fast machine the run would be over before its launcher has passed the signal on.
    training = [rank for rank in ranks if not rank.children()]
    for rank in training:
        rank.suspend()
    assert run_dir.result(run) is None
    process.send_signal(signal.SIGINT)
    for rank in training:
        while not is_asked_to_end(rank.pid) and time.monotonic() < until:
            time.sleep(0.02)
        with suppress(psutil.NoSuchProcess):
            rank.resume()
    _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 130 and "Run the same command again to resume" in said
    assert not psutil.wait_procs(ranks, timeout=60)[1]
    assert run_dir.result(run) is None
    code, said = finish(line[line.index("train.compare") + 1 :], None, "train.compare")
    assert code == 0, said
    assert re.search(r"Resuming from .*step-0000[1-3]\d\d", (run / "log.txt").read_text())
    steps = [entry["step"] for entry in read_metrics(run) if "loss" in entry]
    assert steps == list(range(1, 401)) and (out / "report.html").exists()
    assert "400/400" in said  # the progress line


@pytest.mark.parametrize(
    ("code", "kind", "output"),
    [
        (75, RetryError, "error: a rank is gone"),
        (247, ConfigError, "error: a rank is gone"),  # a rank was killed before it got any further
        (2, ConfigError, "error: bad"),
        (1, ConfigError, ""),
    ],
)
def test_a_failed_run_is_reported_with_its_own_error_and_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[ConfigError], output: str
) -> None:
    log = tmp_path / "x" / "log.txt"
    log.parent.mkdir()
    log.write_text("error: of the attempt before\n")
    line = [sys.executable, "-c", f"import sys; print({output!r}); sys.exit({code})"]
    monkeypatch.setattr(execute, "launch_command", lambda *_: line)
    expected = re.escape(output.removeprefix("error: ") or f"see {log}")
    with Progress(1, 0, "x", enabled=False) as progress, pytest.raises(kind, match=f"^run x failed: {expected}$") as e:
        execute._execute({"runs": []}, {"name": "x"}, tmp_path, progress, 0)
    assert type(e.value) is kind


def test_a_run_whose_rank_was_killed_may_be_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_run: list[str]
) -> None:
    place = small_run.index("--out")
    run: dict[str, Any] = {"name": "x", "arguments": small_run[:place] + small_run[place + 2 :]}
    (tmp_path / "x").mkdir()
    right = launch_command({"launcher": "torchrun", "ranks": 2}, run, tmp_path)
    faulty = [each.replace("train.pretrain", "tests.fault_injection.faulty_rank") for each in right]
    monkeypatch.setattr(execute, "launch_command", lambda *_: faulty)
    monkeypatch.setenv("FAULT", "1 step 2 kill")
    with Progress(1, 0, "x", enabled=False) as progress, pytest.raises(RetryError, match=r"^run x failed: "):
        execute._execute({"runs": []}, run, tmp_path, progress, 0)


def test_python_that_runs_the_tests_is_the_one_that_runs_the_harness() -> None:
    assert (
        launch_command({"launcher": "torchrun", "ranks": 2}, {"name": "x", "arguments": []}, Path("y"))[0]
        == sys.executable
    )


def test_a_comparison_whose_first_run_is_only_starting_keeps_its_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--out", str(tmp_path), "--steps", "40", "--seeds", "0", "--arms"]
    compare.main([*options, "0.9", "--plan-only"])
    compare.main([*options, "0.95", "--plan-only"])  # a plan alone may be replaced
    plan = (tmp_path / "manifest.json").read_bytes()
    with run_dir.sole_worker(tmp_path / json.loads(plan)["runs"][0]["name"]):  # and has written nothing yet
        for more in ([], ["--plan-only"]):
            with pytest.raises(SystemExit, match="2"):
                compare.main([*options, "0.9", *more])
    assert capsys.readouterr().err.count("holds another comparison (1 runs); give another folder") == 2
    assert (tmp_path / "manifest.json").read_bytes() == plan
