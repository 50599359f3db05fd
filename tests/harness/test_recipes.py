"""Settings from a file, the length of a run in tokens, what large presets must be given, and the micro-batch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.harness.conftest import Make
from tests.harness.runs import finish, losses
from train.common.command_line import parse
from train.common.errors import ConfigError
from train.common.files import REPOSITORY
from train.run import deepspeed_config, memory, model
from train.run.config import Preflight, Run
from train.run.memory import estimate
from train.sweep import plan
from train.sweep.options import Comparison

RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))


def written(tmp_path: Path, text: str) -> str:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    return str(file)


def settings(*arguments: str) -> Run:
    return parse(Run, ["--out", "runs/x", *arguments], "train.pretrain", None)


def test_a_file_says_what_options_would_and_options_win(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "model: small\nlr: 6e-4\nbetas: [0.9, 0.99]\nallow_unbalanced: true\nsteps: 50\nresume: false\n"
        "validation: [a=/x, b=/y]\nds_config: ds_configs/zero3.json\n",
    )
    words = "--model small --lr 6e-4 --betas 0.9 0.99 --allow-unbalanced --steps 50 --no-resume --validation a=/x b=/y"
    same = settings(*words.split(), "--ds-config", "ds_configs/zero3.json", "--config", file)
    for spelled in (["--config", file], [f"--config={file}"]):
        assert (
            settings(*spelled) == same if spelled[0] == "--config" else settings(*spelled).identity() == same.identity()
        )
    other = settings("--lr", "0.1", "--betas", "0.5", "--config", file, "--resume", "--no-allow-unbalanced")
    assert (other.optimizer.lr, other.optimizer.betas, other.optimizer.allow_unbalanced) == (0.1, 0.5, False)
    assert other.checkpoints.resume and other.schedule.steps == 50
    assert settings("--validation", "c=/z", "--config", file).data.validation == ("c=/z",)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lrr: 1\n", r"config .*settings.yaml has 'lrr', which is not an option \(did you mean lr\?\)"),
        ("lr: high\n", r"config .*settings.yaml has lr is 'high'; it must be a number"),
        ("steps: 1.5\n", r"config .*settings.yaml has steps is '1.5'; it must be a whole number"),
        ("schedule: square\n", r"config .*settings.yaml has schedule is 'square'; it must be one of"),
        ("lr: 1\nlr: 2\n", r"settings.yaml', which is not YAML: it has lr twice"),
        ("lr: {a: 1}\n", r"has lr without a value; it must have one, or a list of values"),
        ("lr:\n", r"has lr without a value"),
        ("validation: []\n", r"has validation without a value"),
        ("lr: &a [*a]\n", r"which is not YAML: found unconstructable recursive node"),
        ("lr: {!!binary aGk=: 1}\n", r"has lr without a value"),
        ("help: true\n", r"has 'help', which is not an option"),
        ("'': 3\n", r"has '', which is not an option"),
        ("save-every: 1\nsave_every: 3\n", r"has save_every twice; keep one"),
        ("validation: [a=/x, --no-resume]\n", r"has validation with the value --no-resume, which looks like an option"),
        ("wandb: no\nlr: x\n", r"has lr is 'x'"),
        ("compile: 1\n", r"has compile = 1; it must be true or false"),
        ("- lr\n", r"it must hold options and their values"),
        ("", r"it must hold options and their values"),
        ("lr: [\n", r"which is not YAML: while parsing"),
        ("config: x.yaml\n", r"has config; one file can't name another"),
        ("steps: 5\ntokens: 1e9\n", r"steps and tokens are both given; give one of them"),
        ("lr: -1\n", r"lr is -1.0; it must be above 0"),
    ],
)
def test_a_file_with_a_fault_is_refused_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as refused:
        settings("--config", written(tmp_path, text)).check()
    assert "\n" not in str(refused.value)


def test_a_value_in_a_file_is_the_text_that_stands_there(tmp_path: Path) -> None:
    file = written(tmp_path, "seed: 010\nwandb: no\ndata: --no-resume\nfinal-lr: 0\ndocument-mask: true\neps: 1e-9\n")
    run = settings("--config", file)
    assert (run.seed, run.logging.wandb, run.data.data, run.checkpoints.resume) == (10, "no", "--no-resume", True)
    assert (run.schedule.final_lr, run.data.document_mask, run.optimizer.eps) == (0.0, True, 1e-9)


def test_two_files_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path, "lr: 0.5\n")
    with pytest.raises(ConfigError, match=r"--config is given twice"):
        settings("--config", file, f"--config={file}")


@pytest.mark.parametrize(("given", "steps"), [(["--steps", "3"], 3), (["--tokens", "1e6"], 489)])
def test_a_length_on_the_command_line_wins_over_the_other_kind_in_a_file(
    tmp_path: Path, given: list[str], steps: int
) -> None:
    for text in ("tokens: 2.5e9\n", "steps: 7\n"):
        assert settings("--config", written(tmp_path, text), *given).schedule.steps == steps


@pytest.mark.parametrize("name", ["nowhere.yaml", "."])
def test_a_file_that_can_not_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"config is .*, which can't be read"):
        settings("--config", str(tmp_path / name))


def test_tokens_are_steps_rounded_up() -> None:
    options = ["--batch", "8", "--sequence-length", "100"]
    assert settings("--tokens", "8e3", *options).identity() == settings("--steps", "10", *options).identity()
    run = settings("--tokens", "8001", *options, "--schedule", "wsd", "--warmup", "2", "--betas", "refresh:1")
    assert run.schedule.steps == 11 and run.schedule.decay_steps == 2
    assert run.parameters()["betas"] == pytest.approx([1 - 1 / 11] * 2)


@pytest.mark.parametrize("tokens", ["0", "-5", "nan", "inf", "x"])
def test_tokens_that_are_no_length_are_refused(tokens: str) -> None:
    with pytest.raises(ConfigError, match=r"tokens is"):
        settings("--tokens", tokens).check()


GIVEN = ["--data", "/x", "--tokenizer", "byt5", "--sequence-length", "1024", "--tokens", "1e9"]


@pytest.mark.parametrize("preset", ["124m", "7b"])
def test_a_large_preset_must_be_given_what_only_suits_small_ones(preset: str) -> None:
    settings("--model", preset, *GIVEN)
    for place in range(0, len(GIVEN), 2):
        name = GIVEN[place].removeprefix("--").replace("-", "_").replace("tokens", "steps")
        with pytest.raises(ConfigError, match=rf"model is {preset}, and {name} would be the default"):
            settings("--model", preset, *GIVEN[:place], *GIVEN[place + 2 :])
    settings("--model", "small")


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_is_right_but_for_the_users_data(file: Path, tmp_path: Path) -> None:
    """The tokenizer of the recipe is on the hub, which tests don't reach."""
    with pytest.raises(ConfigError, match=r"and data would be the default"):
        settings("--config", str(file))
    run = settings("--config", str(file), "--data", "/x")
    run.check()
    assert run.schedule.steps * run.tokens_per_step == pytest.approx(run.schedule.tokens, rel=1e-3)
    assert run.schedule.decay == pytest.approx(run.schedule.steps / 5, rel=0.01)
    config = model.configuration(run.model, 50_257, run.data.sequence_length)
    with torch.device("meta"):
        weights = model.parameter_count(model.empty(config))
    assert run.schedule.tokens == pytest.approx(20 * weights, rel=0.05)
    for world in (8, 16):
        deepspeed_config.resolve(run, world, True)
    assert str(run.parallelism.ds_config) in file.read_text() and (REPOSITORY / run.parallelism.ds_config).exists()


@pytest.mark.ranks
def test_a_run_from_a_file_is_the_run_from_the_options(small_run: list[str], tmp_path: Path) -> None:
    assert finish(small_run)[0] == 0
    names = [name.removeprefix("--").replace("-", "_") for name in small_run[::2]]
    content = {**dict(zip(names, small_run[1::2], strict=True)), "out": tmp_path / "from-file"}
    file = written(tmp_path, "".join(f"{name}: {value}\n" for name, value in content.items()))
    code, said = finish(["--config", file, "--out", str(tmp_path / "from-file")])
    assert code == 0, said
    assert losses(["--out", str(tmp_path / "from-file")]) == losses(small_run)


# ---- train.compare


def compared(*rest: str, **values: Any) -> list[str]:
    """Arguments of the first run of a comparison."""
    comparison = Comparison(arms=("0.9",), launcher="python", ranks=1, rest=rest, **values)
    arguments: list[str] = plan.manifest(comparison)["runs"][0]["arguments"]
    return arguments


def test_a_comparison_takes_a_file_for_its_runs(tmp_path: Path) -> None:
    file = written(tmp_path, "batch: 8\nsteps: 40\nlr: 0.1\nwarmup: 7\nmodel: small\nbetas: 0.5\n")
    run = parse(Run, ["--out", "x", *compared("--config", file, batch=8, steps=40, lr=(1e-2,))], "train.pretrain", None)
    assert (run.optimizer.lr, run.optimizer.betas, run.model.model) == (1e-2, 0.9, "small")
    assert run.schedule.warmup == 7 and run.checkpoints.save_every == 10


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("batch: 8\n", "has batch = 8, which the comparison would override; give --batch before --"),
        ("tokens: 1e9\n", "has tokens = 1e9, which the comparison would override; give --tokens before --"),
        ("lr: 0.1\n", "has lr = 0.1, which the comparison would override; give --lr before --"),
        ("sequence-length: 64\n", "has sequence_length = 64, which the comparison would override"),
        ("state: packed16\n", "has state, which the comparison says; remove it"),
        ("seed: 7\n", "has seed, which the comparison says; remove it"),
    ],
)
def test_a_comparison_overrides_no_file_in_silence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        compared("--config", written(tmp_path, text))


def test_a_comparison_takes_a_recipe_whose_lines_it_repeats(tmp_path: Path) -> None:
    """By the recipe of the README, but for the length."""
    recipe = ("--config", str(REPOSITORY / "recipes" / "124m.yaml"), "--data", "/x", "--decay", "1", "--warmup", "1")
    tokens = 2_500_000_000
    arguments = compared(*recipe, batch=512, sequence_length=1024, tokens=tokens, lr=(6e-4,))
    run = parse(Run, ["--out", "x", *arguments], "train.pretrain", None)
    assert run.schedule.steps == tokens // (512 * 1024) and run.model.model == "124m"


def test_runs_of_a_comparison_branch_from_one_checkpoint() -> None:
    compared("--branch-from", "runs/x/checkpoints/step-0000100")
    with pytest.raises(ConfigError, match=r"branch_from is runs/x, whose newest checkpoint may be another"):
        compared("--branch-from", "runs/x")


# ---- The micro-batch


@pytest.mark.ranks
def test_without_a_micro_batch_it_is_the_largest_that_memory_allows(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make("--batch", "48", "--sequence-length", "64")
    ds_config = deepspeed_config.resolve(run, 2, False)
    config = model.configuration(run.model, 384, 64)

    def needed(micro: int) -> float:
        return estimate(run, config, {**ds_config, "train_micro_batch_size_per_gpu": micro}, 2, False).total

    def chosen(run: Run, there: float) -> int | None:
        monkeypatch.setattr(memory, "_memory_of", lambda device: there)
        ranks: Any = SimpleNamespace(
            world=2, device=None, is_main=False, sum_and_max=lambda sums, most: (sums, most), collective_errors=held
        )
        return memory.with_micro_batch(run, ranks, ds_config).parallelism.micro_batch

    from contextlib import nullcontext as held

    assert chosen(run, 1e12) is None  # batch / ranks, which is 24
    for micro in (12, 8, 1):
        assert chosen(run, needed(micro) / 0.8 + 1) == micro
    assert chosen(run, needed(8) / 0.8 - 1) == 6  # 7 does not divide 24
    assert chosen(run, 1.0) == 1
    assert chosen(make("--batch", "48", "--micro-batch", "24"), 1.0) == 24


def test_a_run_that_has_little_memory_says_so_and_accumulates(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.checkpoint.resumable_run import pretrain
    from train.run import trainer

    monkeypatch.setattr(memory, "_memory_of", lambda device: 1.0)
    seen: list[int] = []
    step = trainer.Trainer.train_step

    def counted(self: trainer.Trainer) -> Any:
        seen.append(self.accumulation)
        return step(self)

    monkeypatch.setattr(trainer.Trainer, "train_step", counted)
    pretrain(make("--batch", "4"))
    assert seen == [4] * 6
    assert "micro_batch is 1, not 4: by the estimate that takes 0.0 of 0.0 GiB." in capsys.readouterr().err


def test_preflight_takes_a_file_too(tmp_path: Path) -> None:
    file = written(tmp_path, "steps: 40\nranks: 3\n")
    given = parse(Preflight, ["--out", "x", "--config", file], "train.preflight", None)
    assert given.schedule.steps == 40 and given.ranks == 3
