"""The pilot: its estimators on gradients whose noise and drift are known, and the whole of it on a small run."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.harness.conftest import Make
from train import choose_beta
from train.probe.pilot import Choice, Probes, draw, estimate, report, summarize
from train.probe.single_rank import single_rank_run


def probes(
    checkpoints: int, count: int, gap: int, speed: float, noise: float, elements: int = 4000, seed: int = 0
) -> list[Probes]:
    """Means that move by ``speed`` a step in each element, straight on; independent noise."""
    generator = torch.Generator().manual_seed(seed)
    return [
        summarize(speed * gap * k + noise * torch.randn(count, elements, generator=generator, dtype=torch.float64))
        for k in range(checkpoints)
    ]


def test_mean_and_variance_are_those_of_all_gradients_at_once() -> None:
    gradients = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    found = summarize(iter(gradients))
    torch.testing.assert_close(found.mean, gradients.double().mean(dim=0), rtol=1e-12, atol=1e-14)
    assert found.noise == pytest.approx(float(gradients.double().var(dim=0).sum()), rel=1e-12) and found.drawn == 7


def test_noise_and_drift_are_estimated_without_bias() -> None:
    found = estimate(probes(4, 16, gap=50, speed=1e-3, noise=0.2), gap=50)
    assert found.noise == pytest.approx(4000 * 0.04, rel=0.02)
    assert found.drift == pytest.approx(4000 * 1e-6, rel=0.05)
    assert found.horizon == pytest.approx((0.04 / 4e-6) ** (1 / 3), rel=0.02)
    assert found.range[0] < found.beta < found.range[1] and found.drift > 2 * found.error


def test_the_horizon_is_where_noise_and_lag_cost_least_together() -> None:
    """By trying all: an average with weights (1 - beta) beta^j of a mean that moves evenly, and independent noise."""
    noise, drift = 0.04, 4e-6

    def cost(beta: float) -> float:
        left = noise * (1 - beta) / (1 + beta)  # the sum of the squared weights
        behind = math.sqrt(drift) * beta / (1 - beta)  # the sum of the weights times their ages
        return left + behind**2

    found = Choice(noise, drift, 0.0).beta
    best = min((k / 10_000 for k in range(5000, 9999)), key=cost)
    assert found == pytest.approx(best, abs=5e-3) and cost(found) < 1.01 * cost(best)


def test_without_drift_it_is_said_that_there_is_none_in_most_trials() -> None:
    plan = {"steps": 2000, "tokens_per_step": 1, "gap": 50}
    told = [report(estimate(probes(4, 16, 50, 0.0, 1.0, seed=seed), 50), plan) for seed in range(40)]
    assert sum("is not distinguishable from noise" in text for text in told) >= 34
    nothing = Choice(1.0, -1e-9, 2e-9)
    assert nothing.horizon == math.inf and math.isnan(nothing.beta)
    assert "\nbeta = none (0.0000 to 0.9990" in report(Choice(1e-9, -1e-9, 2e-9), plan)


def test_a_fast_drift_needs_no_memory() -> None:
    assert estimate(probes(3, 4, gap=1, speed=10.0, noise=0.1), gap=1).beta == 0.0


def test_gradients_are_drawn_from_different_batches_at_the_same_weights(make: Make, tmp_path: Path) -> None:
    """Each is the mean over its sequences, whose loss is taken anew here; the weights stay, no gradient is left."""
    data = make().data
    options = f"--data {data.data} --data-cache {data.data_cache} --batch 4 --sequence-length 32 --warmup 1"
    options += " --validation-fraction 0.2"
    with single_rank_run("test", tmp_path, 30, tuple(options.split())) as trainer:
        module = trainer.engine.module
        before = [parameter.clone() for parameter in module.parameters()]
        drawn = list(draw(trainer, 3))
        assert all(parameter.grad is None for parameter in module.parameters())
        random = np.random.default_rng([trainer.run.seed, trainer.step])
        for gradient in drawn:
            module.zero_grad()
            for index in random.integers(len(trainer.train), size=4):
                tokens = trainer.train.take(np.array([index]))
                (module(input_ids=tokens, labels=tokens).loss / 4).backward()
            expected = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
        assert not torch.equal(drawn[0], drawn[1])
        assert all(map(torch.equal, before, module.parameters()))


@pytest.mark.ranks
def test_a_pilot_recommends_a_beta_and_says_what_other_rules_would(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make().data
    options = f"--data {data.data} --data-cache {data.data_cache} --batch 4 --sequence-length 32 --warmup 1"
    options += " --validation-fraction 0.2"
    line = f"--steps 9 --probes 3 --checkpoints 3 --planned-steps 4000 --out {tmp_path} -- {options}"
    assert choose_beta.main(line.split()) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-3:] == ["0.95: 0.9500", "0.944: 0.9440", "refresh:1000: 0.7500"]
    assert said[-5].startswith("noise V = ") or said[-6].startswith("noise V = ")
    kept = json.loads((tmp_path / "pilot.json").read_text())
    assert (kept["steps"], kept["tokens_per_step"], kept["gap"]) == (4000, 128, 3) and kept["noise"] > 0.0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--probes 1", "probes is 1; it must be at least 2."),
        (
            "--checkpoints 2",
            "checkpoints is 2; it must be at least 3.",
        ),
        ("--planned-steps 0", "planned_steps is 0; it must be at least the pilot's 200."),
        ("--steps 3", "steps is 3; it must be at least the number of checkpoints, 4."),
        ("--planned-steps 100", "planned_steps is 100; it must be at least the pilot's 200."),
        (
            "-- --betas 0.9",
            "--betas is given after --; the pilot runs at 0.95 with fp32 state, "
            "and --planned-steps sets the run's length.",
        ),
        (
            "-- --steps 9",
            "--steps is given after --; the pilot runs at 0.95 with fp32 state, "
            "and --planned-steps sets the run's length.",
        ),
    ],
)
def test_a_pilot_that_can_not_be_is_refused(options: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_beta.main(options.split()) == 2
    assert capsys.readouterr().err.strip() == f"error: {sentence}"
