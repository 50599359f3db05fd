"""Checkpoints as they are saved: where the folder goes away meanwhile, and which of them stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.corpus import write_corpus
from tests.harness.test_files import settings
from train.checkpoint import manifest, resumable_run, save
from train.common.errors import ConfigError


def test_a_folder_that_was_moved_away_during_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out is .*/gone, which was moved or removed while the run was at work"):
        manifest.make_room(tmp_path / "gone" / "checkpoints", 1)


@pytest.mark.parametrize("moment", ["make_room", "written", "finish", "_rotate"])
def test_whenever_in_saving_the_folder_is_moved_away_that_is_said_and_no_new_one_is_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    run = settings(tmp_path / "run")
    write_corpus(Path(run.data.data))
    place = manifest if moment == "finish" else save
    inner = getattr(place, moment)

    def moving(*given: Any) -> Any:
        done = inner(*given) if moment == "make_room" else None
        if run.out.exists():
            run.out.rename(tmp_path / "elsewhere")
        return done if moment == "make_room" else inner(*given)

    monkeypatch.setattr(place, moment, moving)
    with pytest.raises(ConfigError, match=r"out is .*/run, which was moved or removed while the run was at work"):
        resumable_run.pretrain(run)
    assert (tmp_path / "elsewhere" / "run.json").exists()


@pytest.mark.parametrize(
    ("more", "left"), [((), [6]), (("--keep-every", "2"), [2, 4, 6]), (("--keep-every", "4"), [4, 6])]
)
def test_checkpoints_of_every_so_many_steps_stay(tmp_path: Path, more: tuple[str, ...], left: list[int]) -> None:
    run = settings(tmp_path / "run", "--save-every", "1", "--keep", "1", *more)
    write_corpus(Path(run.data.data))
    resumable_run.pretrain(run)
    assert [manifest.step_of(path) for path in manifest.all_checkpoints(run.out / "checkpoints")] == left
    assert "keep_every" not in str(run.identity())
