"""Bad input gets one sentence that names the field, the value and what would be right, and changes nothing on disk."""

import dataclasses
import importlib
import io
import json
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.harness.conftest import Make
from train import accelerate_config, compare, pretrain, report, requeue
from train.checkpoint import resumable_run
from train.checkpoint.save import save_checkpoint
from train.common.command_line import parse
from train.common.errors import ConfigError
from train.run.config import Run
from train.run.metrics import Metrics, read_metrics

# (options, what the sentence must say): found before there are ranks or data.
EARLY = [
    ("--stepz 3", r"--stepz is not an option \(did you mean --steps\?\)"),
    ("--steps three", "--steps"),
    ("--schedule square", "'square'"),
    ("--betas 1.0", r"betas is \(1.0, 1.0\)|betas is 1.0|betas is \[1.0, 1.0\].*\[0, 1\)"),
    ("--betas -0.1", r"must lie in \[0, 1\)"),
    ("--betas 0.9 0.999", r"betas is \(0.9, 0.999\).*--allow-unbalanced"),
    ("--lr -0.1", "lr is -0.1; it must be above 0"),
    ("--lr nan", "lr is nan; it must be a finite number"),
    ("--eps -1", "eps is -1.0"),
    ("--weight-decay -1", "weight_decay is -1.0"),
    ("--clip -1", "clip is -1.0; it must be at least 0"),
    ("--steps 0", "steps is 0; it must be at least 1"),
    ("--warmup 6", r"warmup is 6; it must lie in \[0, steps\), and steps is 6"),
    ("--final-lr 2", r"final_lr is 2.0; it is a fraction of lr"),
    ("--batch 0", "batch is 0; it must be at least 1"),
    ("--micro-batch 3", "batch is 4; it must be a multiple of ranks x micro_batch = 1 x 3 = 3"),
    ("--sequence-length 1", "sequence_length is 1; it must be at least 2"),
    ("--save-every 4 --keep-every 6", "keep_every is 6; it must be 0 or a multiple of save_every, which is 4"),
    ("--save-every 0 --keep-every 6", "keep_every is 6; it must be 0 or a multiple of save_every, which is 0"),
    ("--validation-fraction 1.5", "validation_fraction is 1.5; it must lie between 0 and 1"),
    ("--save-every -1", "save_every is -1"),
    ("--keep 0", "keep is 0; it must be at least 1"),
    ("--seed -1", "seed is -1"),
    (f"--seed {2**64}", "seed is 18446744073709551616; it must be at least 0 and below"),
    ("--validate-every -2", "validate_every is -2"),
    ("--stop-after-nonfinite 0", "stop_after_nonfinite is 0"),
    ("--ds-config nowhere.json", "ds_config is nowhere.json, which is not a file"),
]


@pytest.mark.parametrize(("options", "sentence"), EARLY)
def test_a_bad_setting_is_refused_in_one_sentence(make: Make, options: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as refused:
        resumable_run.pretrain(make(*options.split()))
    assert "\n" not in str(refused.value)


LATE = [
    ("--data /nowhere/at/all", "data is '/nowhere/at/all', which does not exist"),
    ("--data {empty}", "which holds no text"),
    ("--data {mixed}", "mixes json and text files"),
    ("--data {json} --text-field body", "text_field is 'body', but .* has the columns text"),
    ("--data {numbers}", "text_field is 'text', which holds 7 in .*numbers/a.jsonl row 1; it must hold text"),
    ("--data {nothing}", "nothing.jsonl', which holds no text"),
    ("--data hub:", "data is 'hub:'; give hub:NAME"),
    ("--data ~nosuchuser/x", "data is ~nosuchuser/x, whose user does not exist"),
    ("--model {heads}", "heads', which .*can't"),
    ("--data {one}", "holds out 0 of 1 documents; both parts need at least one"),
    ("--batch 100000", "less than one batch of 100000"),
    ("--sequence-length 2000", "sequence_length is 2000, but model 'tiny' has 1024 positions"),
    ("--model {model}", "embeds 100 tokens, but the tokenizer has 384"),
    ("--model no/such/model", "model is 'no/such/model', which is not a preset"),
    ("--tokenizer /no/such/tokenizer", "tokenizer is '/no/such/tokenizer'"),
    ("--out {file}", "which is a file; give a folder"),
    ("--out {strangers}", "holds letter.txt but no run"),
]


@pytest.mark.parametrize(("options", "sentence"), LATE)
def test_bad_data_models_and_folders_are_refused_in_one_sentence(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, sentence: str
) -> None:
    from transformers import LlamaConfig

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    places = {
        name: tmp_path / name for name in ("empty", "mixed", "json", "numbers", "one", "model", "heads", "strangers")
    }
    for place in places.values():
        place.mkdir()
    for name in ("mixed", "json"):
        (places[name] / "a.jsonl").write_text('{"text": "x"}\n')
    for name in ("mixed", "one"):
        (places[name] / "a.txt").write_text("some text")
    (places["numbers"] / "a.jsonl").write_text('{"text": 7}\n')
    places["nothing"] = tmp_path / "nothing.jsonl"
    places["nothing"].write_text("")
    (places["heads"] / "config.json").write_text('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}')
    (places["strangers"] / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("")
    LlamaConfig(vocab_size=100).save_pretrained(places["model"])
    arguments = options.format(**places, file=tmp_path / "file").split()
    run = make(*arguments)
    with pytest.raises(ConfigError, match=sentence) as refused:
        resumable_run.pretrain(run)
    assert "\n" not in str(refused.value)
    assert (places["strangers"] / "letter.txt").read_text() == "dear"
    # A refused run has not taken its folder: the corrected one may have it.
    assert "--out" in arguments or {f.name for f in run.out.glob("*")} <= {".lock"}


def test_an_output_folder_belongs_to_one_configuration_and_one_run(make: Make) -> None:
    run = make()
    resumable_run.pretrain(run)
    before = (run.out / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"belongs to a run with lr = 0.001, not 0.1"):
        resumable_run.pretrain(make("--lr", "0.1"))
    with pytest.raises(ConfigError, match="holds this very run"):
        resumable_run.pretrain(make("--no-resume"))
    with FileLock(run.out / ".lock"), pytest.raises(ConfigError, match=r"another run is at work"):
        resumable_run.pretrain(run)
    resumable_run.pretrain(run)  # finished: nothing to do
    assert (run.out / "metrics.jsonl").read_bytes() == before


def test_a_corpus_that_has_changed_since_the_run_began_is_refused(make: Make, corpus: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(corpus, mine)
    run = make("--data", str(mine))
    resumable_run.pretrain(run)
    (run.out / "result.json").unlink()
    (mine / "new.txt").write_text("one more document")
    with pytest.raises(ConfigError, match=r"data is .*mine/', which has changed since the run"):
        resumable_run.pretrain(make("--data", f"{mine}/"))  # the slash makes no other run of it


DAMAGED = ["", "{", "[]", "{}", "null"]


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_files_of_ours_are_named(make: Make, content: str) -> None:
    run = make()
    resumable_run.pretrain(run)
    for name in ("result.json", "run.json"):
        whole = (run.out / name).read_text()
        (run.out / name).write_text(content)
        with pytest.raises(ConfigError, match=rf"{name} can't be read: .*restore it, or remove it"):
            resumable_run.pretrain(run)
        (run.out / name).write_text(whole)
    (run.out / "result.json").unlink()
    (run.out / "checkpoints" / "step-0000006" / "complete.json").write_text(content)
    with (run.out / "metrics.jsonl").open("a") as metrics:
        metrics.write(content + "\n")
    resumable_run.pretrain(run)  # from step 3
    assert [line["step"] for line in read_metrics(run.out) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_what_others_have_put_beside_the_checkpoints_is_left_alone(make: Make) -> None:
    run = make("--keep", "1")
    kept = [run.out / "checkpoints" / name for name in ("step-good", "step-0000001-notes")]
    resumable_run.pretrain(run)
    shutil.copytree(run.out / "checkpoints" / "step-0000006", kept[0])
    kept[1].mkdir()
    (run.out / "result.json").unlink()
    for line in (run.out / "checkpoints").glob("step-0000006"):
        shutil.rmtree(line)
    resumable_run.pretrain(run)
    assert all(path.exists() for path in kept)
    assert len(read_metrics(run.out)) == 7  # six steps and a validation, from the start


def test_a_disk_that_is_full_for_metrics_is_named(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    with files_at_most(100), pytest.raises(ConfigError, match=r"metrics.jsonl can't be written: File too large"):
        for step in range(10):
            metrics.write(step=step, loss=1.0)


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_while_saving_leaves_the_last_good_checkpoint(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, save = make(), save_checkpoint

    def save_on_a_full_disk(*arguments: object) -> None:
        if arguments[3] == 6:
            with files_at_most(100_000):
                save(*arguments)  # type: ignore[arg-type]
        else:
            save(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(resumable_run, "save_checkpoint", save_on_a_full_disk)
    with pytest.raises(ConfigError, match=r"step-0000006 could not be written .*last good checkpoint is step-0000003"):
        resumable_run.pretrain(run)
    monkeypatch.undo()
    resumable_run.pretrain(run)  # goes on from step 3
    assert json.loads((run.out / "result.json").read_text())["status"] == "finished"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(make: Make) -> None:
    run = make("--lr", "1e38", "--warmup", "4", "--steps", "20", "--clip", "0", "--save-every", "1")
    with pytest.raises(ConfigError, match=r"the loss or the gradient was not finite for 3 steps in a row"):
        resumable_run.pretrain(run)
    result = json.loads((run.out / "result.json").read_text())
    assert result["status"] == "diverged"
    assert not list((run.out / "checkpoints").glob(f"step-{result['step']:07d}"))
    assert list((run.out / "checkpoints").glob("step-*/complete.json"))


COMPARISONS = [
    ("--arms 0.95 1.5", "arms has '1.5'; an arm is one beta or beta1,beta2"),
    ("--arms 0.95 0.95", "arms is 0.95 0.95; give each only once"),
    ("--arms 0.95 0.95:fp32", "give each only once"),
    ("--arms 0.95 0.95:packed12", "arms has '0.95:packed12'; an arm is one beta"),
    ("--arms refresh:1000", "beta is 'refresh:1000', and 1000 refreshes in 200 steps"),
    ("--arms from:0.9:to:1", "beta is 1.0; it must lie in [0, 1)."),
    ("--grid 0.9 --arms 0.8", "arms and grid are both given; give one of them."),
    ("--grid 0.9 1.0", "grid has 1.0; each beta must lie in [0, 1)"),
    ("--lr 1e-2 --lr-from somewhere", "lr and lr_from are both given; give one of them."),
    ("--lr-from somewhere", "somewhere holds no manifest.json"),
    ("--arms refresh:100 refresh:1e2", "give each only once"),
    ("--discard-checkpoints", "has no effect with plan_only, which starts no run; remove it."),
    ("--max-hours 1", "has no effect with plan_only, which starts no run; remove it."),
    ("--arms half_life:x", "beta is 'half_life:x'; it must be a number, or refresh:R"),
    ("--arms 0.95 0.9,0.95:packed16", "packed moments need equal betas"),
    ("--seeds 1 1", "seeds is 1 1; give each only once"),
    ("--ranks 0", "ranks is 0"),
    ("--launcher python", "the launcher python starts one"),
    ("--launcher mpirun", "'mpirun'"),
    ("--tokens 5", "tokens is 5, less than one batch"),
    ("--arms 0.95 .95", "give each only once"),
    ("--arms 0.95 0.95,0.95", "give each only once"),
    ("--batch 0 --tokens 100", "batch is 0; it must be at least 1"),
    ("--lr -1", "lr is -1.0; it must be above 0"),
    ("--steps 0", "steps is 0; it must be at least 1"),
    ("--ranks 2 --batch 3", "it must be a multiple of ranks x micro_batch = 2 x 1"),
    ("-- --betas 0.9", "--betas is given after --, where it would override what is compared"),
    ("-- --warmup 999999", "warmup is 999999"),
    ("-- --stepz 5", "--stepz"),
]


@pytest.mark.parametrize(("options", "sentence"), COMPARISONS)
def test_a_bad_comparison_is_refused_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, sentence: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--out", str(tmp_path / "new"), "--plan-only", *options.split()])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and sentence in said and "\n" not in said
    assert not (tmp_path / "new").exists()


def test_a_plan_that_somebody_has_edited_is_run_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "out", tmp_path / "plan.json"
    compare.main(["--arms", "0.9", "0.8,0.9", "--seeds", "0", "--steps", "7", "--plan-only", "--out", str(tmp_path)])
    plan = json.loads((tmp_path / "manifest.json").read_text())
    for run in plan["runs"]:
        run["arguments"] += ["--clip", "0.5"]
    file.write_text(json.dumps(plan))
    compare.main(["--manifest", str(file), "--plan-only", "--out", str(out)])
    assert json.loads((out / "manifest.json").read_text())["runs"] == plan["runs"]
    for path, value, sentence in (
        (("runs", 0, "lr"), 0.5, "has lr = 0.5 for 'beta-0.9_lr-0.001_seed-0', but its arguments say 0.001"),
        (("runs", 0, "name"), "../x", "has the run '../x'; a name is a folder's"),
        (("runs", 0, "name"), "beta-0.8-0.9_lr-0.001_seed-0", "two of one name"),
        (
            ("runs", 0, "arguments", 1),
            "0.7",
            "has arm = '0.9' for 'beta-0.9_lr-0.001_seed-0', but its arguments say '0.7'",
        ),
        (
            ("runs", 1, "arguments"),
            [*plan["runs"][1]["arguments"], "--batch", "8"],
            "differ in more than betas, state, lr and seed",
        ),
        (("launcher",), "mpirun", "launcher is 'mpirun'; it must be one of"),
        (("launcher",), "python", "the launcher python starts one"),
        (("runs",), [], "has no run"),
        (("runs", 1, "arguments"), ["--clip", "-1"], "clip is -1.0; it must be at least 0"),
        (("runs", 1), {}, "which is not a plan: it has no runs.1.name; --plan-only writes one"),
        (("runs",), 3, "which is not a plan: runs: Input should be a valid list"),
    ):
        edited = json.loads(file.read_text())
        place = edited
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        (tmp_path / "edited.json").write_text(json.dumps(edited))
        with pytest.raises(SystemExit) as stopped:
            compare.main(["--manifest", str(tmp_path / "edited.json"), "--plan-only", "--out", str(tmp_path / "other")])
        assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_a_missing_launcher_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)  # as where it isn't installed
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--launcher", "accelerate", "--plan-only", "--out", "/nowhere"])
    assert stopped.value.code == 2
    assert "launcher is 'accelerate', but the package accelerate is missing" in capsys.readouterr().err


def test_a_report_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path)])
    assert stopped.value.code == 2 and "holds no manifest.json" in capsys.readouterr().err


def test_the_command_line_says_it_once_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(["--out", "/tmp/x", "--lr", "-1"]) == 2
    assert capsys.readouterr().err == "error: lr is -1.0; it must be above 0.\n"


def test_another_rank_than_the_first_stays_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert pretrain.main(["--out", "/tmp/x", "--lr", "-1"]) == 2
    assert capsys.readouterr().err == ""


PATHS = [
    "x" * 256,
    "/".join(["x" * 200] * 21),
    "/tmp/" + "/".join(["y" * 100] * 39),
]


@pytest.mark.parametrize("path", PATHS, ids=["long name", "long path", "a path too long for what goes into it"])
@pytest.mark.parametrize("command", ["pretrain", "compare", "preflight", "choose_beta", "plane"])
def test_a_path_that_no_file_can_have_is_refused(command: str, path: str) -> None:
    module = importlib.import_module(f"train.{command}")
    settings: Any = next(
        value
        for value in vars(module).values()
        if dataclasses.is_dataclass(value) and any(each.name == "out" for each in dataclasses.fields(value))
    )
    with pytest.raises(ConfigError, match=r"out is '.*, which can't be a path: File name too long") as refused:
        parse(settings, ["--out", path], f"train.{command}", None)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "given", [["--out", ""], ["--out="], ["--out", "o", "--data-cache="], ["--out=o", "--ds_config="]]
)
def test_an_option_that_a_shell_has_left_empty_is_refused(given: list[str]) -> None:
    with pytest.raises(ConfigError, match="is empty; give a path"):
        parse(Run, given, "train.pretrain", None)
    parse(Run, ["--out", ".", "--wandb", ""], "train.pretrain", None)


def test_a_folder_whose_name_is_no_text_is_printed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(os.fsdecode(os.fsencode(tmp_path / "odd") + b"\xff"))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "utf-8", errors="strict", write_through=True))
    compare.main(["--out", str(out), "--plan-only"])
    assert requeue.main([str(out / "run")]) == 1
    assert written.getvalue().count(b"odd\\udcff") == 2


@pytest.mark.parametrize("host", ["", " ", "-rf", "a b", "a;b", "node1,node2", "n\u00f6de"])
def test_a_host_without_a_name_is_refused(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert accelerate_config.main(["--hosts", "node1", host]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def test_requeue_makes_no_folder_of_a_mistyped_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert requeue.main([str(tmp_path / "rnus")]) == 1
    assert "is no folder; give the one that a run was started with" in capsys.readouterr().out
    assert not (tmp_path / "rnus").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "1")  # there the attempt may have ended before it made one
    assert requeue.main([str(tmp_path / "runs")]) == 75
