"""The response to the gradient's scale: against the rule itself and the closed forms, and on real runs."""

import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from balanced_adam import gradient_scale, rule
from tests.harness.conftest import Make
from train import response
from train.analysis.scale_response import (
    STABLE,
    Recording,
    changed,
    magnitude_lag,
    measure,
    near_eps,
    of_noise,
    of_steady,
    signal_share,
    slopes,
    update_of,
)
from train.checkpoint.resumable_run import pretrain
from train.probe.grad_recorder import Recorder
from train.probe.single_rank import single_rank_run
from train.run.metrics import read_metrics

PAIRS = [(0.9, 0.9), (0.9, 0.95), (0.9, 0.81), (0.0, 0.5)]


def recording(gradients: torch.Tensor) -> Recording:
    half = gradients.shape[1] // 2
    return Recording(gradients, {"first": slice(0, half), "second": slice(half, None)})


@pytest.mark.parametrize("betas", PAIRS)
@pytest.mark.parametrize(("kind", "value"), [("drift", 0.03), ("drift", -0.03), ("rescaled", 8.0)])
def test_an_update_on_changed_gradients_is_that_of_the_rule(
    betas: tuple[float, float], kind: str, value: float
) -> None:
    gradients = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scales = changed(40, kind, value)
    assert scales[-1] == (1.0 if kind == "drift" else value)
    param = m = v = torch.zeros(5, dtype=torch.float64)
    for step, grad in enumerate(gradients * scales[:, None], 1):
        before = param
        param, m, v = rule.update(param, grad, m, v, step=step, lr=1.0, betas=betas, eps=0.0, weight_decay=0.0)
    torch.testing.assert_close(update_of(gradients, betas, scales), before - param, rtol=1e-9, atol=1e-12)


def test_where_there_has_been_no_gradient_there_is_no_update() -> None:
    assert update_of(
        torch.zeros(3, 2, dtype=torch.float64), (0.9, 0.9), torch.ones(3, dtype=torch.float64)
    ).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("betas", PAIRS)
@pytest.mark.parametrize("rho", [-1e-2, 0.0, 1e-2])
def test_over_many_steps_theory_is_the_closed_form(betas: tuple[float, float], rho: float) -> None:
    scales = changed(1000, "drift", rho)
    assert of_steady(betas, scales) == pytest.approx(gradient_scale.update_under_drift(*betas, rho), rel=1e-9)
    assert of_noise(betas, scales) == pytest.approx(gradient_scale.update_of_noise_under_drift(*betas, rho), rel=1e-9)
    rescaled = changed(1000, "rescaled", 3.0)
    assert of_steady(betas, rescaled) == pytest.approx(gradient_scale.update_of_rescaled(*betas, 3.0), rel=1e-9)
    assert of_noise(betas, rescaled) == pytest.approx(gradient_scale.update_of_rescaled_noise(*betas, 3.0), rel=1e-9)


def test_a_steady_gradient_responds_as_theory_says_in_every_layer() -> None:
    rows = measure(recording(torch.tensor([1.0, -2.0, 3.0, 0.5]).expand(100, 4)), (0.9, 0.95))
    assert set(rows["layer"]) == {"all", "first", "second"}
    pd.testing.assert_series_equal(rows["size"], rows["steady"], check_names=False, rtol=1e-9)
    assert (rows["cosine"] - 1.0).abs().max() < 1e-12


@pytest.mark.parametrize("betas", PAIRS)
def test_noise_responds_as_theory_says_and_equal_betas_do_not_help(betas: tuple[float, float]) -> None:
    noise = torch.randn(300, 7_000, generator=torch.Generator().manual_seed(0))
    rows = measure(recording(noise), betas)
    found = slopes(rows, "drift")
    expected = gradient_scale.lag(betas[1]) - gradient_scale.lag(betas[0] ** 2)
    assert found["noise"] == pytest.approx(expected, abs=0.02)
    assert found["size"] == pytest.approx(expected, abs=0.15 * gradient_scale.lag(max(betas)))
    assert signal_share(recording(noise)) == pytest.approx(0.0, abs=2e-3)


def test_a_gradient_that_keeps_its_value_is_all_signal() -> None:
    assert signal_share(recording(torch.ones(20, 4))) == 1.0


def test_the_lag_of_a_stable_gradient_explains_its_update_to_first_order() -> None:
    rates = torch.linspace(-1e-4, 1e-4, 50, dtype=torch.float64)
    growing = torch.exp(rates * torch.arange(30, dtype=torch.float64)[:, None]) * torch.tensor([1.0, -1.0]).repeat(25)
    wavering = torch.where(torch.arange(30)[:, None] == 25, -growing, growing)
    found = magnitude_lag(recording(torch.cat([growing, wavering], dim=1)), (0.9, 0.99))
    assert found.share == 0.5
    assert found.r_squared > 0.9999 and found.correlation > 0.9999 and found.rest < 1e-3 * found.lag < found.lag
    tied = magnitude_lag(recording(growing), (0.9, 0.9))
    assert tied.lag == 0.0 and math.isnan(tied.r_squared) and tied.rest < 1e-5


def test_where_sizes_scatter_the_lag_explains_less_with_its_own_factor_than_with_the_best_one() -> None:
    """Against numpy, over the steps of the whole window; early signs change, and a gradient that was 0 is left out."""
    random = np.random.default_rng(0)
    sizes, signs = np.exp(random.normal(size=(60, 200))), np.sign(random.normal(size=(60, 200)))
    signs[-STABLE:] = signs[-1]
    gradients = sizes * signs
    gradients[20, 0] = 0.0
    found = magnitude_lag(recording(torch.from_numpy(gradients)), (0.9, 0.99))
    g, ages = gradients[:, 1:], np.arange(59, -1, -1)
    first, second = (beta**ages / (beta**ages).sum() for beta in (0.9, 0.99))
    away = np.sign(g[-1]) * (first @ g) / np.sqrt(second @ g**2) - 1.0
    lag = first @ np.log(abs(g)) - second @ np.log(abs(g))
    assert found.share == 199 / 200
    assert found.r_squared == pytest.approx(1.0 - np.var(away - lag) / np.var(away), rel=1e-9)
    assert found.correlation == pytest.approx(np.corrcoef(away, lag)[0, 1] ** 2, rel=1e-9)
    assert found.r_squared < found.correlation


def test_the_share_near_eps_is_that_of_the_smallest_gradients() -> None:
    assert near_eps(recording(torch.tensor([0.0, 9e-7, 1.1e-6, 1.0]).expand(20, 4)), 0.9) == 0.5


def test_the_recorder_keeps_the_last_gradients_of_elements_of_every_tensor() -> None:
    matrix, bias = torch.zeros(30, 10, requires_grad=True), torch.zeros(3, requires_grad=True)
    recorder = Recorder([("matrix", matrix), ("bias", bias)], window=2, elements=50)
    for step in (1.0, 2.0, 3.0):
        matrix.grad, bias.grad = torch.full((30, 10), step), None if step == 3.0 else torch.full((3,), -step)
        recorder.see()
    found = recorder.recording()
    assert found.gradients[:, found.layers["matrix"]].unique(dim=1).tolist() == [[2.0], [3.0]]
    assert found.gradients[:, found.layers["bias"]].tolist() == [[-2.0] * 3, [0.0] * 3]


@pytest.mark.ranks
def test_a_language_run_is_measured_from_its_start_and_from_a_checkpoint(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make("--save-every", "10", "--keep", "3", "--steps", "30")
    options = f"--data {run.data.data} --data-cache {run.data.data_cache} --batch 4 --sequence-length 32 --steps 30"
    options += " --warmup 1 --validation-fraction 0.2"
    line = f"--out {tmp_path / 'out'} --betas 0.9 0.9,0.99 --at 12 22 --window 12 --elements 64 -- {options}"
    assert response.main(line.split()) == 0
    said = capsys.readouterr().out
    assert [row.split(" | ")[:2] for row in said.splitlines() if row[:3] in ("| 1", "| 2")] == [
        ["| 12", "0.9"], ["| 12", "0.9,0.99"], ["| 22", "0.9"], ["| 22", "0.9,0.99"]
    ]  # fmt: skip
    table = pd.read_csv(tmp_path / "out" / "response.csv")
    assert {"all", "model.embed_tokens.weight"} < set(table["layer"]) and table["size"].gt(0.0).all()
    assert {"drift.svg", "rescaled.svg", "response.md"} < {path.name for path in (tmp_path / "out").iterdir()}

    pretrain(run)
    for step in (20, 30):
        shutil.rmtree(run.out / "checkpoints" / f"step-{step:07d}")
    with single_rank_run("test", tmp_path, 30, tuple(line.split(" -- ")[1].split()), run.out) as trainer:
        lines = [trainer.train_step() for _ in range(2)]
    before = [entry for entry in read_metrics(run.out) if "loss" in entry][10:12]
    # The weights, the batches and the learning rate are those of the run; the moments are not.
    assert lines[0]["loss"] == before[0]["loss"] and lines[1]["loss"] != before[1]["loss"]
    assert [entry["lr"] for entry in lines] == [entry["lr"] for entry in before]
    begun = line.replace("--at 12 22", f"--at 22 --checkpoint {run.out}").replace("/out ", "/begun ")
    assert response.main(begun.split()) == 0
    for wrong, sentence in (
        (begun.replace("--at 22", "--at 21"), "at is 21, less than the checkpoint's 10 steps and a window of 12."),
        (begun.replace("--at 22", "--at 31"), "at is 31, which is beyond the 30 steps of the run."),
        (begun + " --lr 0.5", "belongs to a run with lr = 0.001, not 0.5"),
        (begun.replace(str(run.out), str(tmp_path)), f"checkpoint is {tmp_path}, which is not the folder of a run."),
    ):
        assert response.main(wrong.split()) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("task", ["vit", "resnet"])
def test_a_vision_model_is_measured(task: str, tmp_path: Path) -> None:
    assert response.main(f"--task {task} --out {tmp_path} --at 12 --window 12 --elements 64 --betas 0.9".split()) == 0
    assert "| 12 | 0.9 |" in (tmp_path / "response.md").read_text()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--at 5", "at is 5 and window is 150; window must be above 10, and every step of at must be at least window."),
        ("--betas refresh:10", "betas has 'refresh:10'; give one number, or beta1,beta2, or mean:STEPS."),
        ("--betas 2", "arms has '2'"),
        ("--betas 0.9:packed8", "betas has '0.9:packed8'; give one number, or beta1,beta2, or mean:STEPS."),
        ("--task vit -- --lr 1", "task is 'vit', which takes no options of a run."),
        ("-- --out x", "--out is given after --; train.response decides it."),
        ("--elements 0", "elements is 0; it must be at least 1."),
        ("--betas", "betas is empty; give at least one pair."),
        ("--out README.md", "out is README.md, which is a file; give a folder."),
    ],
)
def test_a_bad_question_is_refused(
    options: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert response.main(["--out", str(tmp_path / "out"), *options.split()]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()
