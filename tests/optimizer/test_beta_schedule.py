"""Beta in other words: against sums of the weights, and the examples of the papers."""

import math
from itertools import pairwise

import pytest

from balanced_adam import beta_schedule

BETAS = (0.0, 0.5, 0.9, 0.944, 0.95, 0.999)


@pytest.mark.parametrize("beta", BETAS)
def test_the_horizon_is_the_mean_age_counted_from_one(beta: float) -> None:
    ages = sum((1 - beta) * beta**age * (age + 1) for age in range(40_000))
    assert beta_schedule.horizon(beta) == pytest.approx(ages, rel=1e-9)
    assert beta_schedule.of_horizon(beta_schedule.horizon(beta)) == pytest.approx(beta, abs=1e-15)


@pytest.mark.parametrize("beta", BETAS[1:])
def test_after_a_half_life_a_weight_is_half(beta: float) -> None:
    assert beta ** beta_schedule.half_life(beta) == pytest.approx(0.5, rel=1e-12)
    assert beta_schedule.of_half_life(beta_schedule.half_life(beta)) == pytest.approx(beta, rel=1e-12)


def test_without_memory_the_half_life_is_nothing() -> None:
    assert beta_schedule.half_life(0.0) == 0.0


def test_refreshes_are_steps_over_horizon() -> None:
    assert beta_schedule.refreshes(0.95, 20_000) == pytest.approx(1000)
    assert beta_schedule.of_refreshes(1000, 20_000) == pytest.approx(0.95)
    assert beta_schedule.of_refreshes(1000, 1000) == 0.0


@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0, 16.0])
def test_a_larger_batch_leaves_the_horizon_in_samples(factor: float) -> None:
    samples = factor * beta_schedule.horizon(beta_schedule.for_batch(0.95, factor))
    assert samples == pytest.approx(beta_schedule.horizon(0.95))


@pytest.mark.parametrize(
    ("rule", "beta"),
    [
        ("0.95", 0.95),
        ("0", 0.0),
        ("refresh:1000", 0.9),
        ("half_life:1", 0.5),
        ("half_life_tokens:10e6", 0.5**0.2),
        ("horizon:20", 0.95),
    ],
)
def test_rules_in_words(rule: str, beta: float) -> None:
    assert beta_schedule.resolve(rule, steps=10_000, tokens_per_step=2e6) == pytest.approx(beta, abs=1e-15)


NO_RULE = " it must be a number, or refresh:R, half_life:STEPS, half_life_tokens:TOKENS, horizon:STEPS or from:A:to:B."
BAD = [
    ("much", f"beta is 'much';{NO_RULE}"),
    ("nan", f"beta is 'nan';{NO_RULE}"),
    ("renew:3", f"beta is 'renew:3';{NO_RULE}"),
    ("refresh:", f"beta is 'refresh:';{NO_RULE}"),
    ("1", "beta is 1.0; it must lie in [0, 1)."),
    (
        "refresh:1000",
        "beta is 'refresh:1000', and 1000 refreshes in 400 steps; there must be more than 0, and at most one a step.",
    ),
    ("half_life:0", "beta is 'half_life:0', and a half-life is 0.0 steps; it must be above 0, and finite."),
    ("half_life:1e30", "beta is 'half_life:1e30', and beta is 1.0; it must lie in [0, 1)."),
    ("horizon:0.5", "beta is 'horizon:0.5', and a horizon is 0.5 steps; it must be at least 1, and finite."),
    ("horizon:inf", "beta is 'horizon:inf', and a horizon is inf steps; it must be at least 1, and finite."),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "message"), BAD, ids=[rule for rule, _ in BAD])
def test_what_is_no_beta_is_said_in_one_sentence(rule: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        beta_schedule.resolve(rule, steps=400, tokens_per_step=1000)
    assert str(raised.value) == message


def test_a_moving_beta_has_a_horizon_that_grows_by_the_same_factor_in_every_step() -> None:
    beta = beta_schedule.schedule("from:0.9:to:refresh:4", steps=400, tokens_per_step=1.0)
    horizons = [beta_schedule.horizon(beta(step)) for step in range(401)]
    assert horizons[0] == pytest.approx(10.0) and horizons[-1] == pytest.approx(100.0)
    assert all(b / a == pytest.approx(10 ** (1 / 400)) for a, b in pairwise(horizons))
    assert beta_schedule.schedule("0.9", steps=400, tokens_per_step=1.0)(399) == 0.9
    with pytest.raises(ValueError, match=r"^beta is 1.0; it must lie in \[0, 1\)\.$"):
        beta_schedule.schedule("from:0.9:to:1", steps=400, tokens_per_step=1.0)


def test_values_out_of_range_are_refused() -> None:
    for call in (
        lambda: beta_schedule.horizon(1.0),
        lambda: beta_schedule.half_life(-0.1),
        lambda: beta_schedule.refreshes(0.9, 0),
        lambda: beta_schedule.of_refreshes(1, math.inf),
        lambda: beta_schedule.for_batch(0.95, 21.0),
        lambda: beta_schedule.for_batch(0.95, 0.0),
    ):
        with pytest.raises(ValueError, match="must"):
            call()
