"""A run that begins with the state of another, and a wsd run that is made longer."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import session
from tests.corpus import write_corpus
from tests.harness.runs import change, cut, finish, losses, out_of
from train.common.files import REPOSITORY
from train.common.schemas import RunFile, read_schema
from train.run.metrics import read_metrics

LR = 2e-3


def options_in(folder: Path, **values: Any) -> list[str]:
    """Options of a wsd run of 10 steps, of which 8 are before the decay, with checkpoints at 3, 6, 9 and 10."""
    text = (
        f"--steps 10 --warmup 2 --schedule wsd --lr {LR} --batch 12 --sequence-length 32 --validation-fraction 0.2 "
        f"--save-every 3 --keep 9 --validate-every 0 --data {folder}/corpus --data-cache {folder}/cache"
    )
    return change(change(text.split(), out=folder / "run"), **values)


@session.shared
def parent() -> Path:
    """A folder with such a run of two ranks at stage 1, and its corpus."""
    folder = session.folder() / "branching"
    folder.mkdir(exist_ok=True)
    write_corpus(folder / "corpus")
    code, said = finish(options_in(folder))
    assert code == 0, said
    return folder


def branch(tmp_path: Path, **values: Any) -> list[str]:
    """Options of a run that branches from that one, after 6 steps."""
    folder = parent()
    given = {"branch_from": folder / "run" / "checkpoints" / "step-0000006", **values}
    return change(options_in(folder, out=tmp_path / "branch"), **given)


def rates(options: list[str]) -> dict[int, float]:
    """The learning rate of each step."""
    return {line["step"]: line["lr"] for line in read_metrics(out_of(options)) if "lr" in line}


def cosine(step: int, total: int) -> float:
    """What transformers' cosine gives for the step that is taken after ``step`` steps: warm-up 2, floor 0.1."""
    return LR * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / (total - 2))))


@pytest.mark.ranks
@pytest.mark.parametrize(("stage", "ranks"), [(1, 2), (2, 3), (3, 2), (1, None)])
def test_a_branch_with_the_same_settings_goes_on_as_the_run_that_it_comes_from(
    tmp_path: Path, stage: int, ranks: int | None
) -> None:
    options = branch(tmp_path, ds_config=REPOSITORY / "ds_configs" / f"zero{stage}.json")
    code, said = finish(options, ranks)
    assert code == 0, said
    theirs = losses(options_in(parent()))
    assert [line["step"] for line in read_metrics(out_of(options)) if "loss" in line] == [7, 8, 9, 10]
    assert losses(options) == (theirs[6:] if (stage, ranks) == (1, 2) else pytest.approx(theirs[6:], rel=1e-5))
    assert rates(options) == {step: rate for step, rate in rates(options_in(parent())).items() if step > 6}


@pytest.mark.ranks
def test_a_branch_has_its_own_schedule_and_records_what_it_comes_from(tmp_path: Path) -> None:
    options = branch(tmp_path, schedule="cosine", steps=14, seed=5, lr=LR / 2, keep=1)
    code, said = finish(options, 3)
    assert code == 0, said
    expected = {step + 1: pytest.approx(cosine(step, 14) / 2, rel=1e-9) for step in range(6, 14)}
    assert rates(options) == expected
    record = read_schema(RunFile, out_of(options) / "run.json").parent
    source = parent() / "run" / "checkpoints" / "step-0000006"
    assert record is not None and (record.checkpoint, record.step) == (str(source.resolve()), 6)
    assert set(record.files) == {file.name for file in source.glob("*.pt")}
    result = json.loads((out_of(options) / "result.json").read_text())
    assert result["step"] == 14 and result["tokens"] == 14 * 12 * 32
    # The parent is as it was, though the branch has removed its copy.
    assert not (out_of(options) / "checkpoints" / "step-0000006").exists()
    assert {path.name for path in source.iterdir()} >= {"complete.json", *record.files}
    assert len(list(source.parent.glob("step-*"))) == 4


@pytest.mark.ranks
def test_a_branch_that_was_cut_resumes_without_its_parent(tmp_path: Path) -> None:
    shutil.copytree(parent() / "run", tmp_path / "mine")
    options = branch(tmp_path, branch_from=tmp_path / "mine", steps=16, schedule="linear")
    code, said = finish(options)
    assert code == 0, said
    assert read_schema(RunFile, out_of(options) / "run.json").parent.step == 10  # type: ignore[union-attr] # the newest
    uncut = losses(options)
    shutil.rmtree(tmp_path / "mine")
    for newest in (15, 12, 10):  # the last is the one that it began with
        for step in (16, 15, 12):
            if step > newest:
                shutil.rmtree(out_of(options) / "checkpoints" / f"step-{step:07d}")
        (out_of(options) / "result.json").unlink()
        code, said = finish(options)
        assert code == 0, said
        assert f"Resuming from {out_of(options) / 'checkpoints' / f'step-{newest:07d}'}." in said
        assert losses(options) == uncut


@pytest.mark.ranks
def test_a_start_that_was_killed_between_the_copy_and_run_json_is_made_anew(tmp_path: Path) -> None:
    options = branch(tmp_path)
    copied = tmp_path / "branch" / "checkpoints" / "step-0000006"
    shutil.copytree(parent() / "run" / "checkpoints" / "step-0000006", copied)
    (copied / "complete.json").unlink()
    code, said = finish(options)
    assert code == 0, said
    assert losses(options) == losses(options_in(parent()))[6:]


@pytest.mark.ranks
def test_the_tokens_of_a_mixture_are_counted_from_the_branch_on(tmp_path: Path) -> None:
    mixture = tmp_path / "mixture.yaml"
    for name in ("a", "b"):
        write_corpus(tmp_path / name)
    (tmp_path / "b" / "more.txt").write_text("Another text altogether. " * 2000)
    mixture.write_text(f"- {{name: a, path: {tmp_path}/a, weight: 1}}\n- {{name: b, path: {tmp_path}/b, weight: 1}}\n")
    options = branch(tmp_path, data=mixture)
    code, said = finish(options)
    assert code == 0, said
    last = next(line for line in reversed(list(read_metrics(out_of(options)))) if "loss" in line)
    assert last["tokens/a"] + last["tokens/b"] == 4 * 12 * 32 and min(last["tokens/a"], last["tokens/b"]) > 0


@pytest.mark.ranks
def test_a_branch_whose_checkpoints_are_gone_begins_again_where_it_did_and_from_nothing_else(tmp_path: Path) -> None:
    shutil.copytree(parent() / "run", tmp_path / "mine")
    options = branch(tmp_path, branch_from=tmp_path / "mine", steps=14, schedule="linear")
    assert finish(options)[0] == 0
    uncut = losses(options)
    shutil.rmtree(tmp_path / "branch" / "checkpoints")
    (tmp_path / "branch" / "result.json").unlink()
    shutil.copytree(tmp_path / "mine" / "checkpoints" / "step-0000010", tmp_path / "aside")
    assert finish(options)[0] == 0
    assert losses(options) == uncut
    shutil.rmtree(tmp_path / "branch" / "checkpoints")
    (tmp_path / "branch" / "result.json").unlink()
    shutil.rmtree(tmp_path / "mine" / "checkpoints" / "step-0000010")
    code, said = finish(options)
    assert code == 75 and "step-0000010, which is gone, or was removed while it was read; start again" in said


@pytest.mark.ranks
def test_what_an_earlier_start_took_from_another_run_is_not_resumed(tmp_path: Path) -> None:
    shutil.copytree(parent() / "run", tmp_path / "mine")
    options = branch(tmp_path, branch_from=tmp_path / "mine", steps=14)
    code, said = finish(change(options, data=tmp_path / "nowhere"))
    assert code == 2 and (tmp_path / "branch" / "checkpoints" / "step-0000010").exists()
    shutil.rmtree(tmp_path / "mine" / "checkpoints" / "step-0000010")
    code, said = finish(options)
    assert code == 0, said
    assert [line["step"] for line in read_metrics(out_of(options)) if "loss" in line] == list(range(10, 15))
    assert read_schema(RunFile, out_of(options) / "run.json").parent.step == 9  # type: ignore[union-attr]


@pytest.mark.ranks
def test_a_link_to_a_checkpoint_is_that_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(parent() / "run" / "checkpoints" / "step-0000006")
    options = branch(tmp_path, branch_from=tmp_path / "link")
    code, said = finish(options)
    assert code == 0, said
    assert losses(options) == losses(options_in(parent()))[6:]


@pytest.mark.ranks
def test_a_tokenizer_is_known_by_its_content(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path / "same")
    ByT5Tokenizer(extra_ids=100).save_pretrained(tmp_path / "other")
    code, said = finish(branch(tmp_path, tokenizer=tmp_path / "same"), None)
    assert code == 0, said
    code, said = finish(branch(tmp_path, tokenizer=tmp_path / "other", out=tmp_path / "second"), None)
    assert code == 2 and "whose run had another tokenizer; give it." in said


@pytest.mark.ranks
@pytest.mark.parametrize("module", ["train.preflight", "train.pretrain"])
def test_a_check_before_the_run_looks_at_the_checkpoint(tmp_path: Path, module: str) -> None:
    more = ["--dry-run"] if module == "train.pretrain" else ["--ranks", "2"]
    code, said = finish([*branch(tmp_path, steps=5, warmup=1), *more], None, module=module)
    assert code == 2 and "steps counts those of the parent, so give more than 6" in said


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no run": ({"branch_from": "/tmp"}, "branch_from is /tmp, which is not a run's folder nor its checkpoint"),
    "no checkpoint": (
        {"branch_from": "{run}/checkpoints/step-0000007"},
        "step-0000007, which is not a complete checkpoint: it has no complete.json",
    ),
    "a copy for other ranks": (
        {"branch_from": "{run}/checkpoints/step-0000006-universal"},
        "which is a copy for other ranks; give the checkpoint without -universal",
    ),
    "too short": ({"steps": 6}, "steps is 6, and branch_from is .*; steps counts those of the parent"),
    "other betas": ({"betas": 0.9}, r"of a run with betas = 0.95, not 0.9; only schedule, lr, clip, data and seed"),
    "other state": ({"state": "packed16"}, 'of a run with state = null, not "packed16"'),
    "other model": ({"model": "small"}, 'of a run with model = "tiny", not "small"'),
    "other batch": ({"batch": 6}, "of a run with batch = 12, not 6"),
    "other sequences": ({"sequence_length": 16}, "of a run with sequence_length = 32, not 16"),
    "stage 0": ({"ds_config": REPOSITORY / "ds_configs" / "zero0.json"}, "DeepSpeed converts between the stages 1"),
}


@pytest.mark.ranks
@pytest.mark.parametrize("wrong", WRONG)
def test_a_branch_that_can_not_go_on_is_refused_in_a_sentence(tmp_path: Path, wrong: str) -> None:
    values, sentence = WRONG[wrong]
    filled = {k: v.replace("{run}", str(parent() / "run")) if isinstance(v, str) else v for k, v in values.items()}
    code, said = finish(branch(tmp_path, **filled), None)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and re.search(sentence, line)
    assert not (tmp_path / "branch" / "run.json").exists()


# ---- A wsd run is made longer


@pytest.mark.ranks
def test_a_wsd_run_that_is_made_longer_before_its_decay_is_the_longer_run(tmp_path: Path) -> None:
    folder = parent()
    whole = options_in(folder, out=tmp_path / "whole", steps=15)
    assert finish(whole)[0] == 0
    options = options_in(folder, out=tmp_path / "longer")
    shutil.copytree(folder / "run", tmp_path / "longer")
    for _ in range(2):  # the newest checkpoint is that of step 6, before the decay begins at 8
        shutil.rmtree(max((tmp_path / "longer" / "checkpoints").glob("step-*")))
    (tmp_path / "longer" / "result.json").unlink()
    longer = change(options, steps=15)
    code, said = finish(longer)
    assert code == 0, said
    assert losses(longer) == losses(whole)
    assert rates(longer) == rates(whole)
    assert json.loads((tmp_path / "longer" / "run.json").read_text())["identity"]["schedule"]["steps"] == 15
    code, said = finish(longer)
    assert code == 0 and "already finished" in said
    code, said = finish(options)
    assert code == 2 and "which belongs to a run with steps = 15, not 10" in said


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "steps = 10, not 15 (it began to decay at step 8; --branch-from an earlier checkpoint)"),
        ({"schedule": "cosine"}, "steps = 10, not 15"),
        ({"betas": "refresh:1"}, "steps = 10, not 15"),
    ],
)
def test_a_run_that_decays_or_whose_beta_depends_on_its_length_is_not_made_longer(
    tmp_path: Path, values: dict[str, Any], sentence: str
) -> None:
    options = options_in(parent(), out=tmp_path / "run", **values)
    assert finish(options, None)[0] == 0
    cut(tmp_path / "run")  # its newest checkpoint is that of step 9
    if values:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-0000009")
    code, said = finish(change(options, steps=15), None)
    assert code == 2 and sentence in said
    assert finish(options, None)[0] == 0  # it goes on as it was


def test_the_decay_of_wsd_is_as_long_as_asked() -> None:
    from train.run.config import Schedule
    from train.run.engine import lr_scheduler

    settings = Schedule(steps=20, warmup=2, schedule="wsd", final_lr=0.0, decay=3)
    schedule = lr_scheduler(settings, 1.0)(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0))
    found = []
    for _ in range(21):
        found.append(schedule.get_last_lr()[0])
        schedule.step()
    assert found[2:18] == [1.0] * 16 and found[18] < 1.0 and found[20] == pytest.approx(0.0)
