"""A run is one run in Weights & Biases, however often it starts."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.harness.runs import change, finish, out_of

pytestmark = pytest.mark.ranks
MODULE = "tests.harness.stand_in_wandb"


def calls(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


def test_a_run_that_is_killed_goes_on_as_the_same_run_from_its_first_moment_on(
    small_run: list[str], tmp_path: Path
) -> None:
    options = change(small_run, wandb="project")
    for killed_at in ("init", "20"):  # before the run's folder says that it has begun; and in step 5
        code, said = finish(options, None, MODULE, WANDB_DIR=str(tmp_path), KILLED_AT=killed_at)
        assert code == -signal.SIGKILL, said
    code, said = finish(options, None, MODULE, WANDB_DIR=str(tmp_path))
    assert code == 0, said
    starts = [call for call in calls(tmp_path) if "project" in call]
    assert len(starts) == 3 and all(start == starts[0] for start in starts)
    id_ = json.loads((out_of(options) / "wandb.json").read_text())["id"]
    assert (starts[0]["WANDB_RUN_ID"], starts[0]["WANDB_RESUME"]) == (id_, "allow")
    # The step from the checkpoint to the kill is logged again, at the same numbers of samples.
    steps = [call["step"] for call in calls(tmp_path) if "step" in call]
    again = steps.index(20) + 1
    assert min(steps[again:]) == 16 and set(steps) == {4, 8, 12, 16, 20, 24}
    other = change(options, out=tmp_path / "other")
    assert finish(other, None, MODULE, WANDB_DIR=str(tmp_path))[0] == 0
    assert json.loads((tmp_path / "other" / "wandb.json").read_text())["id"] != id_


def test_on_several_ranks_the_first_alone_logs_with_the_id_that_the_user_chose(
    small_run: list[str], tmp_path: Path
) -> None:
    options = change(small_run, wandb="project", steps=2)
    code, said = finish(options, 2, MODULE, WANDB_DIR=str(tmp_path), WANDB_RUN_ID="my-own", WANDB_RESUME="never")
    assert code == 0, said
    (start,) = [call for call in calls(tmp_path) if "project" in call]
    assert (start["rank"], start["WANDB_RUN_ID"], start["WANDB_RESUME"]) == ("0", "my-own", "never")


def test_an_id_that_is_damaged_is_refused_before_anything_is_logged(small_run: list[str], tmp_path: Path) -> None:
    options = change(small_run, wandb="project", steps=2)
    out_of(options).mkdir()
    (out_of(options) / "wandb.json").write_text('{"id": "a/b"}')
    code, said = finish(options, None, MODULE, WANDB_DIR=str(tmp_path))
    assert code == 2 and "wandb.json can't be read: id: " in said and not (tmp_path / "calls.jsonl").exists()
