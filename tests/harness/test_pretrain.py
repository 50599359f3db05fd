"""One rank, in this process: models, schedules, monitors, and who a process is among its ranks."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from tests.harness.conftest import Make
from tests.ranks import LIMIT
from train.checkpoint.resumable_run import pretrain
from train.common.errors import EXIT_RETRY, ConfigError
from train.common.files import REPOSITORY
from train.distributed.launch import prepare_environment
from train.probe.single_rank import single_rank_run
from train.run import model
from train.run.config import Model, Run, Schedule
from train.run.engine import lr_scheduler
from train.run.metrics import read_metrics
from train.run.trainer import peak_flops
from train.sweep.launch import RANK_VARIABLES

Course = Callable[[int], float]


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in read_metrics(run.out) if "loss" in line]


def test_activation_checkpointing_changes_no_loss(make: Make, tmp_path: Path) -> None:
    plain, checkpointed = make(), make("--activation-checkpointing", "--out", str(tmp_path / "checkpointed"))
    pretrain(plain)
    pretrain(checkpointed)
    assert losses(plain) == losses(checkpointed)


def test_bf16_by_a_flag_trains_in_bf16_and_stays_near_float32(make: Make, tmp_path: Path) -> None:
    plain, bf16 = make(), make("--precision", "bf16", "--out", str(tmp_path / "bf16"))
    pretrain(plain)
    pretrain(bf16)
    assert json.loads((bf16.out / "ds_config.json").read_text())["bf16"]["enabled"] is True
    assert losses(bf16) != losses(plain)
    assert losses(bf16) == pytest.approx(losses(plain), rel=1e-2)


def test_a_moving_beta_is_a_function_of_the_step_also_after_a_resume(make: Make, tmp_path: Path) -> None:
    run = make("--betas", "from:0.5:to:0.99", "--clip", "0")
    pretrain(run)
    uncut = losses(run)
    (run.out / "result.json").unlink()
    shutil.rmtree(run.out / "checkpoints" / "step-0000006")
    pretrain(run)  # from step 3
    assert losses(run) == uncut
    start = make("--betas", "0.5", "--clip", "0", "--out", str(tmp_path / "constant"))
    pretrain(start)
    # The first two losses come before any step with another beta.
    assert [a == b for a, b in zip(losses(start), uncut, strict=True)] == [True, True, False, False, False, False]


def test_any_causal_model_of_transformers_trains_from_its_configuration(make: Make, tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(vocab_size=384, n_positions=64, n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path / "gpt2")
    run = make("--model", str(tmp_path / "gpt2"), "--lr", "1e-2", "--steps", "20")
    pretrain(run)
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("tiny", 0.5), ("small", 10), ("124m", 124), ("350m", 350), ("1.3b", 1300), ("3b", 3000), ("7b", 7000)],
)
def test_a_preset_has_about_the_parameters_that_its_name_says(preset: str, millions: float) -> None:
    from transformers import AutoModelForCausalLM

    vocabulary = 384 if preset in ("tiny", "small") else 50_304
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(model.configuration(Model(model=preset), vocabulary, 128))
    assert model.parameter_count(network) == pytest.approx(millions * 1e6, rel=0.12)


def warmup(step: int) -> float:
    return step / 10


def warmup_of_wsd(step: int) -> float:
    return 0.1 + 0.9 * step / 10


def cosine(step: int) -> float:
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 90))


def linear(step: int) -> float:
    return 1 - 0.9 * (step - 10) / 90


def stable(step: int) -> float:
    """Decay along a cosine over the last fifth, as transformers does it."""
    return 1.0 if step < 80 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 80) / 20))


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("cosine", warmup, cosine), ("linear", warmup, linear), ("wsd", warmup_of_wsd, stable)],
)
def test_a_schedule_warms_up_and_ends_at_the_final_fraction(
    name: Literal["cosine", "linear", "wsd"], before: Course, after: Course
) -> None:
    settings = Schedule(steps=100, warmup=10, schedule=name, final_lr=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = lr_scheduler(settings, 2.0)(optimizer)
    for step in range(101):
        expected = before(step) if step < 10 else after(step)
        assert scheduler.get_last_lr()[0] == pytest.approx(2.0 * expected)
        optimizer.step()
        scheduler.step()


def test_tensorboard_and_csv_get_the_metrics_through_deepspeeds_monitor(make: Make) -> None:
    run = make("--tensorboard", "--csv")
    pretrain(run)
    assert list(run.out.glob("monitor/events.out.tfevents.*"))
    written = (run.out / "monitor" / "train_loss.csv").read_text().splitlines()
    assert [float(line.split(",")[1]) for line in written[1:]] == pytest.approx(losses(run))
    assert [int(line.split(",")[0]) for line in written[1:]] == [4, 8, 12, 16, 20, 24]  # samples


SRUN = {
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


@pytest.fixture
def under_srun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in RANK_VARIABLES:
        monkeypatch.setenv(name, "")  # so that the test's end restores what prepare_environment sets
        monkeypatch.delenv(name)
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_srun_tells_a_process_its_rank(under_srun: pytest.MonkeyPatch) -> None:
    import os

    under_srun.setenv("MASTER_ADDR", "node1")
    under_srun.setenv("MASTER_PORT", "29500")
    prepare_environment()
    told = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")}
    assert told == {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": "2"}


def test_srun_without_a_meeting_point_is_refused(under_srun: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="srun started 5 ranks, but MASTER_ADDR and MASTER_PORT are not set"):
        prepare_environment()


def test_plain_python_in_a_batch_script_is_alone(under_srun: pytest.MonkeyPatch) -> None:
    import os

    under_srun.delenv("SLURM_STEP_NUM_TASKS")
    under_srun.setenv("SLURM_NTASKS", "5")
    prepare_environment()
    assert os.environ["WORLD_SIZE"] == "1"


def test_a_launcher_that_tells_only_half_is_refused(under_srun: pytest.MonkeyPatch) -> None:
    under_srun.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="RANK is 0 in the environment, but LOCAL_RANK, WORLD_SIZE"):
        prepare_environment()


LAUNCHED = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
WRONG_NUMBERS = ("", " ", "one", "-1", "1_0", "1.0", "0x1", "\u0663", "1 ", "9" * 30, "nan", "True", "1;2")
WRONG_ENVIRONMENT = [
    # Empty, LOCAL_WORLD_SIZE is as good as unset.
    *((LAUNCHED, n, value) for n in LAUNCHED for value in WRONG_NUMBERS if value or n != "LOCAL_WORLD_SIZE"),
    *((LAUNCHED, name, "0") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")),
    *[(LAUNCHED, "RANK", "5"), (LAUNCHED, "LOCAL_RANK", "2"), (LAUNCHED, "MASTER_PORT", "65536")],
    (LAUNCHED, "MASTER_ADDR", ""),
    *((SRUN, name, value) for name in SRUN for value in WRONG_NUMBERS),
    *(
        (SRUN, "SLURM_STEP_TASKS_PER_NODE", value)
        for value in ("2(x", "2(x2),", "(x2)", "2(y2)", "2,,2", "1(x9999999)")
    ),
    *[(SRUN, "SLURM_STEP_NUM_TASKS", "0"), (SRUN, "SLURM_NODEID", "3")],
]


@pytest.mark.parametrize(("told", "name", "value"), WRONG_ENVIRONMENT)
def test_an_environment_that_no_launcher_makes_is_refused_by_name(
    under_srun: pytest.MonkeyPatch, told: dict[str, str], name: str, value: str
) -> None:
    for variable in SRUN:
        under_srun.delenv(variable)
    for variable, right in {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", **told, name: value}.items():
        under_srun.setenv(variable, right)
    with pytest.raises(ConfigError, match=rf"^{name} is {re.escape(repr(value))}|^SLURM_NODEID is 3, and") as refused:
        prepare_environment()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L4", 121e12), ("NVIDIA L40", None)],
)
def test_the_peak_of_a_gpu_is_found_by_whole_words(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


@pytest.mark.parametrize(("tied", "expected"), [(True, 0), (False, 384 * 128)])
def test_an_embedding_that_is_only_looked_up_is_not_counted_as_multiplied(tied: bool, expected: int) -> None:
    config = model.configuration(Model(), 384, 128)
    config.tie_word_embeddings = tied
    assert model.looked_up(model.empty(config)) == expected


@pytest.mark.parametrize("batches", [2, 0])
def test_held_out_text_is_sampled_from_its_beginning_to_its_end(batches: int, make: Make, tmp_path: Path) -> None:
    data = make().data
    options = f"--data {data.data} --data-cache {data.data_cache} --batch 4 --sequence-length 32 --warmup 1"
    options += " --validation-fraction 0.2"
    with single_rank_run("test", tmp_path, 30, (*options.split(), "--validation-batches", str(batches))) as trainer:
        (held_out,) = trainer.validation
        count = len(held_out.blocks)
        sampled = 8 if batches else count // 4 * 4
        chosen = np.linspace(0, count, sampled, endpoint=False).astype(int)
        assert count > 16 and chosen[0] == 0 and chosen[-1] >= count * 7 // 8 - 1
        blocks = held_out.blocks.take(chosen)
        with torch.no_grad():
            losses = [trainer.engine.module(input_ids=block[None], labels=block[None]).loss for block in blocks]
        assert trainer.validate() == {"validation_loss": pytest.approx(float(sum(losses)) / len(losses), rel=1e-5)}


def test_a_rank_whose_exit_hangs_ends_with_its_code_all_the_same() -> None:
    program = (
        "import atexit, threading; from train.distributed import launch; launch.EXIT_SECONDS = 0.5\n"
        "atexit.register(threading.Event().wait); launch.exit_process(75)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, timeout=LIMIT).returncode == EXIT_RETRY
