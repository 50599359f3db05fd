"""What goes wrong at night: ranks killed, stuck or poisoned, damaged checkpoints, lost folders. Nothing is lost."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.cluster.runs import events, losses, same
from tests.harness.conftest import Make
from tests.harness.runs import change, finish, out_of, start
from tests.harness.test_guard import poison
from tests.ranks import LIMIT
from train.checkpoint.load import find_checkpoint
from train.checkpoint.manifest import newest_step
from train.checkpoint.resumable_run import pretrain
from train.common.errors import EXIT_RETRY, ConfigError
from train.common.files import REPOSITORY
from train.distributed.launch import free_port
from train.distributed.ranks import Ranks
from train.distributed.watchdog import Watchdog
from train.run import run_dir
from train.run.metrics import read_metrics

FAULTY_RANK = "tests.fault_injection.faulty_rank"


def newest(run: Any) -> Path:
    return max((run.out / "checkpoints").glob("step-*"))


def until(true: Callable[[], bool]) -> None:
    """Wait for it.

    Raises:
        AssertionError: if it doesn't come.
    """
    end = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- Checkpoints


def test_wherever_a_checkpoint_is_truncated_or_changed_it_is_named_and_the_one_before_is_used(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make()
    pretrain(run)
    last, draw = newest(run), random.Random(0)
    files = [last / name for name in json.loads((last / "complete.json").read_text())["files"]]
    alone = Ranks(0, 0, 1, torch.device("cpu"), Watchdog(0, 1, 60.0))
    sizes = [file.stat().st_size for file in files]
    for number in range(20):
        file = draw.choices([*files, last / "complete.json"], [*sizes, max(sizes)])[0]
        whole = file.read_bytes()
        place = draw.randrange(len(whole))
        if number % 2 or file.name == "complete.json":
            file.write_bytes(whole[:place])
        else:
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = find_checkpoint(alone, last.parent)
        said = capsys.readouterr().out
        assert found and found.step == 3, f"{file.name} at {place}"
        assert re.search(rf"{last} is (incomplete|damaged) \(.+\); passed over", said)
        file.write_bytes(whole)
        if (last / "damaged.json").exists():
            (last / "damaged.json").rename(last / "complete.json")
    found = find_checkpoint(alone, last.parent)
    assert found and found.step == 6


def test_where_no_checkpoint_is_whole_it_does_not_begin_from_nothing(make: Make) -> None:
    run = make("--keep", "1")
    pretrain(run)
    (run.out / "result.json").unlink()
    file = next(newest(run).glob("*optim_states.pt"))
    file.write_bytes(bytes(file.stat().st_size))
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"holds checkpoints, and none of them is complete; restore one, or remove them"
        ):
            pretrain(run)
    assert newest_step(run.out / "checkpoints") == 0
    assert len(read_metrics(run.out)) > 5  # untouched


@pytest.mark.parametrize("forced", [None, "1"])
def test_a_checkpoint_runs_nothing_when_it_is_loaded(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forced: str | None
) -> None:
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    run = make()
    pretrain(run)
    (run.out / "result.json").unlink()
    file = next(newest(run).glob("*model_states.pt"))
    poison(newest(run), file.name, tmp_path / "evil-was-here")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"step-0000006 can't be loaded on rank 0 \(a file holds more than tensors .*remove it to resume",
    ) as refused:
        pretrain(run)
    assert "weights_only" not in str(refused.value)
    assert os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD") == forced
    assert not (tmp_path / "evil-was-here").exists()


def test_ranks_meet_at_a_port_that_nobody_has_and_no_outgoing_connection_gets() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    random.seed(0)
    ports = [free_port() for _ in range(200)]
    random.seed(0)
    assert len({*ports, free_port()}) > 190 and all(1024 <= port < lowest for port in ports)
    with socket.socket() as taken:
        taken.bind(("", ports[0]))
        assert ports[0] not in [free_port() for _ in range(200)]


def test_a_machine_without_a_free_port_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 10000))
        monkeypatch.setattr("train.distributed.launch._first_of_connections", lambda: 10001)
        with pytest.raises(ConfigError, match=r"^none of a thousand TCP ports from 10000 to 10000 is free on "):
            free_port()


def test_half_written_files_of_a_killed_run_are_removed_and_hidden_files_of_others_are_not(make: Make) -> None:
    run = make()
    run.out.mkdir(parents=True)
    half, others = run.out / f".run.json.{'0a' * 16}", [run.out / ".nfs0000", run.out / f".{'0a' * 16}"]
    for file in (half, *others):
        file.write_text("{")
    run_dir.claim(run).release()
    assert not half.exists() and all(file.exists() for file in others)


def test_a_token_file_that_has_changed_is_refused(make: Make, tmp_path: Path) -> None:
    run = make("--data-cache", str(tmp_path / "cache"))
    pretrain(run)
    (run.out / "result.json").unlink()
    file = next((tmp_path / "cache").glob("tokens-*/train.bin"))
    whole = file.read_bytes()
    file.write_bytes(whole[:100] + b"\0\0" + whole[102:])
    with pytest.raises(ConfigError, match=r"train.bin has changed since it was written; remove that folder"):
        pretrain(run)
    shutil.rmtree(file.parent)
    pretrain(run)


def weights(out: Path) -> dict[str, torch.Tensor]:
    """float32, by name, of the last checkpoint."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    last = max((out / "checkpoints").glob("step-???????"))
    found: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(last.parent), last.name)
    return found


def greatest_ulp(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The greatest difference in any tensor, in ulp of that tensor's greatest number."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[name] - right).abs().max() / torch.finfo(torch.float32).eps / 2 ** right.abs().max().log2().floor())
        for name, right in theirs.items()
    )


@pytest.mark.ranks
def test_another_world_and_another_stage_go_on_with_the_same_batches(small_run: list[str], tmp_path: Path) -> None:
    options = change(small_run, steps=12, batch=12, save_every=3, keep=9)
    assert finish(change(options, out=tmp_path / "straight"), None)[0] == 0
    out = out_of(options)
    said = ""
    for ranks, stage, stop in ((4, 1, 3), (2, 3, 6), (3, 2, 9), (1, 1, 12)):
        config = REPOSITORY / "ds_configs" / f"zero{stage}.json"
        # The last one in a fresh interpreter, and with it the converter that it starts.
        launcher, number = (None, ranks) if ranks > 1 else ("python", None)
        code, said = finish(change(options, ds_config=config), number, launcher=launcher)
        assert code == 0, said
        for later in range(stop + 3, 13, 3):  # back to where it shall go on on another world
            shutil.rmtree(out / "checkpoints" / f"step-{later:07d}")
        if stop < 12:
            (out / "result.json").unlink()
    assert "converting step-0000009: " in said and "step-0000009-universal" in said
    # Where arithmetic is exact nothing differs at all: tests/parity/test_elastic.py.
    assert losses(out) == pytest.approx(losses(tmp_path / "straight"), rel=1e-5)
    ours, theirs = weights(out), weights(tmp_path / "straight")
    assert greatest_ulp(ours, theirs) <= 32.0
    assert {event["ranks"] for event in events(out) if event["event"] == "begins"} == {4, 2, 3, 1}


# ---- Ranks


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Undisturbed runs, by their options."""
    return {"": tmp_path_factory.mktemp("straight")}


def undisturbed(options: list[str], straight: dict[str, Path]) -> Path:
    key = " ".join(change(options, out="-"))
    if key not in straight:
        straight[key] = straight[""] / str(len(straight))
        code, said = finish(change(options, out=straight[key]))
        assert code == 0, said
    return straight[key]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("rank", "moment", "count"),
    [(1, "forward", 17), (0, "finishing", 2)],  # more in python -m tests.fault_injection
)
def test_a_rank_that_is_killed_is_named_and_the_run_ends_with_the_bits_of_an_undisturbed_one(
    small_run: list[str], straight: dict[str, Path], rank: int, moment: str, count: int
) -> None:
    options = change(small_run, steps=12, save_every=4)
    code, said = finish(options, module=FAULTY_RANK, FAULT=f"{rank} {moment} {count} kill")
    assert code != 0
    if moment == "forward":  # rank 0 kept the meeting point, and can't tell of itself
        assert re.search(
            rf"^error: .*rank {rank} on \S+ does not answer \(killed, stopped or cut off\)", said, re.MULTILINE
        ), said
    code, said = finish(options)
    assert code == 0, said
    assert same(out_of(options), undisturbed(options, straight))


@pytest.mark.ranks
def test_a_rank_that_is_stuck_is_named_within_the_time_out(small_run: list[str], straight: dict[str, Path]) -> None:
    options = change(small_run, steps=12, save_every=4, timeout=20)
    code, said = finish(options, module=FAULTY_RANK, FAULT="0 forward 19 stop", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5")
    since = time.time() - (out_of(options) / "metrics.jsonl").stat().st_mtime
    assert code != 0 and since < 90
    assert re.search(r"^error: .*rank 0 on \S+ does not answer", said, re.MULTILINE), said
    assert finish(options)[0] == 0
    assert same(out_of(options), undisturbed(options, straight))


@pytest.mark.ranks
def test_a_conversion_that_is_killed_is_made_anew(small_run: list[str], tmp_path: Path) -> None:
    options = change(small_run, steps=6, save_every=3)
    for name in ("killed", "spared"):
        assert finish(change(options, out=tmp_path / name))[0] == 0
        (tmp_path / name / "result.json").unlink()
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-0000006")
    killed = change(options, out=tmp_path / "killed")
    assert finish(killed, None, FAULTY_RANK, FAULT="0 finishing 1 kill")[0] == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoints" / ".step-0000003-universal").exists()
    for name in ("killed", "spared"):
        assert finish(change(options, out=tmp_path / name), None)[0] == 0
    assert same(tmp_path / "killed", tmp_path / "spared")


@pytest.mark.ranks
def test_ranks_whose_launcher_is_killed_save_and_end(small_run: list[str], straight: dict[str, Path]) -> None:
    options = change(small_run, steps=60, save_every=100)
    process = start(options)
    out = out_of(options)
    until(lambda: len(read_metrics(out)) >= 5)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 2
    process.kill()
    assert not psutil.wait_procs(family, timeout=LIMIT)[1]
    step = newest_step(out / "checkpoints")
    assert step > 0 and step % 100, "saved when it was asked, not when it was due"
    assert finish(options)[0] == 0
    assert same(out, undisturbed(options, straight))


@pytest.mark.ranks
def test_stopped_by_a_file_or_a_signal_it_saves_and_says_so_by_its_exit_code(
    small_run: list[str], tmp_path: Path
) -> None:
    options = change(small_run, steps=100000, save_every=0, keep=1)
    out = out_of(options)
    for number, how in enumerate(("file", "SIGTERM", "SIGUSR1")):
        process, before = start(options, None), len(read_metrics(out))
        until(lambda: len(read_metrics(out)) >= before + 3)  # noqa: B023
        if how == "file":
            (out / "STOP").touch()
        else:
            process.send_signal(getattr(signal, how))
        assert process.wait() == EXIT_RETRY, process.said()
        assert re.search(r"Stopped at step (\d+) and saved up to step \1, as asked", process.said())
        assert [event["event"] for event in events(out)] == ["begins", "stopped"] * (number + 1)
        assert newest_step(out / "checkpoints") == len(losses(out))


@pytest.mark.ranks
def test_a_second_job_in_the_same_folder_waits_and_then_refuses(
    small_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = change(small_run, steps=100000, save_every=0)
    first = start(options, None)
    until(lambda: len(read_metrics(out_of(options))) >= 3)
    code, said = finish(options, None)
    first.end()
    assert code == 2 and "waiting 15 s for it to end" in said
    assert re.search(r"^error: .*where another run is at work now", said, re.MULTILINE)


# ---- Numbers


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_nan_in_one_ranks_gradient_is_skipped_on_all_and_counted(small_run: list[str], stage: int) -> None:
    options = change(small_run, steps=8, ds_config=REPOSITORY / "ds_configs" / f"zero{stage}.json")
    code, said = finish(options, module=FAULTY_RANK, FAULT="1 - 4 nan")
    assert code == 0, said
    lines = [line for line in read_metrics(out_of(options)) if "loss" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert all(line["loss"] is not None for line in lines) and lines[-1]["loss"] < lines[0]["loss"]
    assert lines[3]["grad_norm"] is None and lines[4]["grad_norm"] is not None


@pytest.mark.ranks
def test_nan_again_and_again_stops_the_run_with_the_last_good_checkpoint_kept(small_run: list[str]) -> None:
    options = change(small_run, steps=20, save_every=2)
    code, said = finish(options, module=FAULTY_RANK, FAULT="1 - -6 nan")
    assert code != 0 and "the loss or the gradient was not finite for 3 steps in a row, up to step 8" in said
    out = out_of(options)
    assert run_dir.result(out) and newest_step(out / "checkpoints") == 4


# ---- Disks (a mount of our own, so root)


@pytest.fixture
def disk(tmp_path: Path) -> Any:
    """A file system of 16 MB."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place]).returncode:
        pytest.skip("mount is not permitted")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["full", "read-only", "vanishing"])
def test_a_disk_that_fails_while_saving_is_named_and_nothing_older_is_lost(
    small_run: list[str], disk: Path, how: str, tmp_path: Path
) -> None:
    options = change(small_run, steps=100000, save_every=20, out=disk / "run", keep=1)
    process = start(options)
    out = disk / "run"
    until(lambda: newest_step(out / "checkpoints") >= 20)
    if how == "full":
        with (disk / "filler").open("wb") as filler, pytest.raises(OSError, match="No space"):
            while True:
                filler.write(bytes(2**16))
                filler.flush()
    elif how == "read-only":
        saved = out / "checkpoints"
        subprocess.run(["mount", "--bind", saved, saved], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", saved], check=True)
    else:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
    assert process.wait() != 0
    said = process.said()
    expected = {"full": "No space left|GB free", "read-only": "Read-only file system", "vanishing": "was moved"}[how]
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert errors and re.search(expected, errors[0]), said[-3000:]
    if how == "vanishing":
        return
    if how == "full":
        (disk / "filler").unlink()
    else:
        subprocess.run(["umount", out / "checkpoints"], check=True)
    before = newest_step(out / "checkpoints")
    assert before >= 20
    again = start(options)
    until(lambda: len(events(out)) >= 4 or newest_step(out / "checkpoints") > before)
    again.send_signal(signal.SIGTERM)
    again.wait()
    assert newest_step(out / "checkpoints") > before
    losses(out)  # every step once
