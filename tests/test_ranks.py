"""Forked ranks are what fresh ones are, and shared work is done once."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import forkserver, session
from tests.ranks import Program, environment, spawn, start

pytestmark = pytest.mark.ranks

OF_ONE_START = {"MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE", "TORCH_EXTENSIONS_DIR"}


def surroundings(_: None) -> dict[str, object]:
    """Job: what a rank finds."""
    return {
        "environment": {name: value for name, value in os.environ.items() if name not in OF_ONE_START},
        "threads": torch.get_num_threads(),
        "world": torch.distributed.get_world_size(),
        "main": sys.modules["__main__"].__spec__.name if sys.modules["__main__"].__spec__ else None,
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks are not forked where there are GPUs")
def test_a_forked_rank_finds_what_torchrun_gives_a_fresh_one() -> None:
    assert spawn(surroundings, 2, None) == spawn(surroundings, 2, None, fresh=True)


def draw(_: None) -> list[float]:
    """Job: random numbers of each generator, and this process."""
    return [random.random(), float(torch.rand(())), float(np.random.random()), os.getpid()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks are not forked where there are GPUs")
def test_forked_ranks_draw_different_random_numbers() -> None:
    one, other = spawn(draw, 2, None)
    assert all(a != b for a, b in zip(one, other, strict=True)) and os.getpid() not in (one[-1], other[-1])


def test_a_rank_that_fails_ends_the_others_and_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"fail on 3 ranks ended with 1:[\s\S]*ValueError: rank 1 is no good"):
        spawn(fail, 3, None)


def fail(_: None) -> None:
    """Job: rank 1 fails while the others wait for it."""
    if torch.distributed.get_rank() == 1:
        raise ValueError("rank 1 is no good")
    torch.distributed.barrier()


def test_a_program_that_hangs_is_killed_when_its_time_is_over(tmp_path: Path) -> None:
    started = start(Program("tests.sleeper", [], environment(), tmp_path / "log", 2))
    with pytest.raises(TimeoutError, match="has not ended within 1 s"):
        started.wait(1.0)
    assert started.poll() is not None


@pytest.mark.parametrize(
    ("server", "sentence"),
    [
        ("threads", "the fork server has 2 threads"),
        ("modules", "has not imported no.such"),
        ("other", "was not forked"),
    ],
)
def test_a_server_that_is_not_fit_is_refused(
    server: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "task" / "1").mkdir(parents=True)
    if server == "threads":
        (tmp_path / "task" / "2").mkdir()
    monkeypatch.setattr(forkserver, "Path", lambda _: tmp_path / "task")
    monkeypatch.setattr(forkserver, "MODULES", ["sys"] + ["no.such"] * (server == "modules"))
    with pytest.raises(RuntimeError, match=sentence):
        forkserver.check(os.getppid() + 1)


def test_shared_work_is_done_once_and_its_failure_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(session.VARIABLE, str(tmp_path))
    calls = []

    def work(number: int) -> int:
        calls.append(number)
        if number < 0:
            raise ValueError("negative")
        return number + 1

    ours, of_another_worker = session.shared(work), session.shared(work)
    assert [f(1) for f in (ours, ours, of_another_worker)] == [2, 2, 2] and calls == [1]
    for f in (ours, of_another_worker):
        with pytest.raises(RuntimeError, match="ValueError: negative"):
            f(-1)
    assert calls == [1, -1]
