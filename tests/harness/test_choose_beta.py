"""The pilot: its estimators on gradients whose noise and drift are known, and the whole of it on a small run."""

import math

import pytest
import torch

from tests.harness.conftest import Make
from train import choose_beta
from train.choose_beta import Choice, Probes, estimate, summarize


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
    """By trying all: an average with weights (1 - beta) beta^j of a mean that moves straight on, and independent noise."""
    noise, drift = 0.04, 4e-6

    def cost(beta: float) -> float:
        left = noise * (1 - beta) / (1 + beta)  # the sum of the squared weights
        behind = math.sqrt(drift) * beta / (1 - beta)  # the sum of the weights times their ages
        return left + behind**2

    found = Choice(noise, drift, 0.0).beta
    best = min((k / 10_000 for k in range(5000, 9999)), key=cost)
    assert found == pytest.approx(best, abs=5e-3) and cost(found) < 1.01 * cost(best)


def test_without_drift_it_is_said_that_there_is_none_in_most_trials() -> None:
    plan = {"steps": 2000, "tokens_per_step": 1}
    told = [choose_beta.report(estimate(probes(4, 16, 50, 0.0, 1.0, seed=seed), 50), plan) for seed in range(40)]
    assert sum("can't be told from noise" in text for text in told) >= 34
    assert Choice(1.0, -1e-9, 0.0).horizon == math.inf and Choice(1.0, -1e-9, 0.0).beta == 0.999


def test_a_fast_drift_needs_no_memory() -> None:
    assert estimate(probes(2, 4, gap=1, speed=10.0, noise=0.1), gap=1).beta == 0.0


@pytest.mark.ranks
def test_a_pilot_recommends_a_beta_and_says_what_other_rules_would(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make().data
    options = f"--batch 4 --sequence-length 32 --validation-fraction 0.2 --data {data.data} --data-cache {data.data_cache} --warmup 1"
    line = f"--steps 9 --probes 3 --checkpoints 3 --planned-steps 4000 -- {options}"
    assert choose_beta.main(line.split()) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-3:] == ["0.95: 0.9500", "0.944: 0.9440", "refresh:1000: 0.7500"]
    assert said[-5].startswith("noise V = ") or said[-6].startswith("noise V = ")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--probes 1", "probes is 1; it must be at least 2."),
        ("--checkpoints 1", "checkpoints is 1; it must be at least 2."),
        ("--steps 3", "steps is 3; it must be at least the number of checkpoints, 4."),
        ("--planned-steps 100", "planned_steps is 100; it must be at least the pilot's 200."),
        (
            "-- --betas 0.9",
            "--betas is given after --; the pilot runs at 0.95 with fp32 state, and --planned-steps has the run's length.",
        ),
        (
            "-- --steps 9",
            "--steps is given after --; the pilot runs at 0.95 with fp32 state, and --planned-steps has the run's length.",
        ),
    ],
)
def test_a_pilot_that_can_not_be_is_refused(options: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_beta.main(options.split()) == 2
    assert capsys.readouterr().err.strip() == f"error: {sentence}"
