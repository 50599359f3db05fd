"""Numbers of ranks that don't divide the tensors: what fills up the last ranks' parts is never read, whatever it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness.conftest import Make
from tests.harness.runs import change, finish, out_of
from train.checkpoint.manifest import complete_checkpoints, newest_step
from train.checkpoint.resumable_run import pretrain
from train.common.errors import ConfigError
from train.common.files import REPOSITORY
from train.run.metrics import read_metrics
from train.run.trainer import Trainer

pytestmark = pytest.mark.ranks

CASES = [
    (3, "zero1", "fp32"),
    (3, "zero3", "packed16"),
    (5, "zero2-offload", "packed8"),
    (5, "zero3", "fp32"),
    *(
        pytest.param(ranks, config, state, marks=pytest.mark.long)
        for ranks, config, state in (
            (3, "zero2", "packed16"),
            (3, "zero3", "fp32"),
            (3, "zero3-offload", "packed32"),
            (5, "zero0", "fp32"),
            (5, "zero1", "packed32"),
        )
    ),
]


@pytest.mark.parametrize(("ranks", "config", "state"), CASES)
def test_a_run_with_nan_in_all_unwritten_memory_is_that_of_one_rank(
    small_run: list[str], tmp_path: Path, ranks: int, config: str, state: str
) -> None:
    options = change(small_run, steps=4, batch=15, save_every=2, state=state)
    alone = change(options, out=tmp_path / "alone")
    assert finish(alone, None)[0] == 0
    file = REPOSITORY / "ds_configs" / f"{config}.json"
    code, said = finish(change(options, ds_config=file), ranks, "tests.harness.uninitialised")
    assert code == 0, said
    assert [path.name for path in complete_checkpoints(out_of(options) / "checkpoints")] == [
        "step-0000002",
        "step-0000004",
    ]
    # Packed moments are rounded by the bits of the gradient, whose sums differ by an ulp.
    close, near = (1e-4, 1e-2) if state == "fp32" else (1e-3, 1e-1)
    ours, theirs = (read_metrics(out_of(each)) for each in (options, alone))
    assert len(ours) == len(theirs) == 5  # four steps and a validation
    for line, right in zip(ours, theirs, strict=True):
        assert line.keys() == right.keys()
        for key in {"loss", "validation_loss", "grad_norm", "update_rms", "update_max"} & line.keys():
            if line[key] is None:
                assert config == "zero0"  # no norm of the gradient in DeepSpeed's own passes
            else:
                assert line[key] == pytest.approx(right[key], rel=near if key.startswith("update") else close), key


def test_a_weight_that_is_not_finite_is_named_and_a_run_that_ends_with_one_has_diverged(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It shows in no loss: the embedding of a position that no sequence reaches."""
    from transformers import GPT2Config

    GPT2Config(vocab_size=384, n_positions=64, n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path / "gpt2")
    run = make("--model", str(tmp_path / "gpt2"))
    step = Trainer.train_step

    def spoiling(self: Trainer) -> dict[str, float | None]:
        line = step(self)
        if self.step == 6:
            self.engine.module.transformer.wpe.weight.data[63] = float("nan")
        return line

    monkeypatch.setattr(Trainer, "train_step", spoiling)
    with pytest.raises(
        ConfigError, match=r"has diverged: its weight transformer.wpe.weight is not finite at the end, at step 6"
    ):
        pretrain(run)
    assert "No checkpoint is written at step 6: weight transformer.wpe.weight is not finite." in capsys.readouterr().out
    assert json.loads((run.out / "result.json").read_text())["status"] == "diverged"
    assert newest_step(run.out / "checkpoints") == 3
    with pytest.raises(ConfigError, match="has already diverged"):
        pretrain(run)


def test_a_last_step_that_was_skipped_does_not_make_a_run_diverged(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run, step = make(), Trainer.train_step

    def skipped(self: Trainer) -> dict[str, float | None]:
        line = step(self)
        return {**line, "grad_norm": float("inf")} if self.step == 6 else line  # as DeepSpeed tells of one

    monkeypatch.setattr(Trainer, "train_step", skipped)
    pretrain(run)
    assert json.loads((run.out / "result.json").read_text())["status"] == "finished"
    assert newest_step(run.out / "checkpoints") == 6
