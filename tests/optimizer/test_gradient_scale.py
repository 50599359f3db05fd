"""The theory against the rule itself: simulated sequences, hypothesis, and the sequence that attains the bound."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balanced_adam import rule
from balanced_adam.gradient_scale import (
    drift_sensitivity,
    lag,
    update_bound,
    update_of_noise_under_drift,
    update_of_rescaled,
    update_of_rescaled_noise,
    update_under_drift,
)

PAIRS = [(0.9, 0.999), (0.9, 0.95), (0.95, 0.95), (0.5, 0.5), (0.98, 0.95), (0.0, 0.9)]
beta = st.just(0.0) | st.floats(1e-9, 0.999)


def updates(grads: list[float], beta1: float, beta2: float) -> list[float]:
    """|u| at every step, by the rule in float64 with eps = 0: the weight moves by lr * u."""
    p = m = v = torch.zeros(1, dtype=torch.float64)
    sizes = []
    for t, g in enumerate(grads, 1):
        q, m, v = rule.update(
            p,
            torch.tensor([g], dtype=torch.float64),
            m,
            v,
            step=t,
            lr=1.0,
            betas=(beta1, beta2),
            eps=0.0,
            weight_decay=0.0,
        )
        sizes.append(abs(float(q - p)))
        p = torch.zeros_like(q)
    return sizes


@pytest.mark.parametrize("betas", PAIRS)
@pytest.mark.parametrize("rho", [-1e-2, -1e-4, 0.0, 1e-4, 1e-2])
def test_closed_form_equals_a_simulated_drift(betas: tuple[float, float], rho: float) -> None:
    kept = max(betas[0] * math.exp(-rho), betas[1] * math.exp(-2 * rho))
    if kept >= 1:
        with pytest.raises(ValueError, match="rho"):
            update_under_drift(*betas, rho)
        return
    steps = int(25 / (1 - max(kept, *betas)))  # the sums and the bias corrections have settled to 1e-11
    t = range(-steps, 0)
    assert updates([math.exp(rho * i) for i in t], *betas)[-1] == pytest.approx(
        update_under_drift(*betas, rho), rel=1e-8
    )


@pytest.mark.parametrize("betas", PAIRS)
def test_sensitivity_is_the_derivative_of_the_closed_form(betas: tuple[float, float]) -> None:
    h = 1e-6
    slope = (math.log(update_under_drift(*betas, h)) - math.log(update_under_drift(*betas, -h))) / (2 * h)
    assert slope == pytest.approx(drift_sensitivity(*betas), rel=1e-4, abs=1e-6)


@given(beta, beta)
def test_sensitivity_is_zero_if_and_only_if_the_betas_are_equal(beta1: float, beta2: float) -> None:
    assert drift_sensitivity(beta1, beta1) == 0
    if abs(beta1 - beta2) > 1e-12:
        assert math.copysign(1, drift_sensitivity(beta1, beta2)) == math.copysign(1, beta2 - beta1)


@given(beta)
def test_lag_is_the_mean_age_of_the_gradients_in_the_average(b: float) -> None:
    n = 40_000
    ages = torch.arange(n, dtype=torch.float64)
    assert lag(b) == pytest.approx(float((ages * (1 - b) * b**ages).sum()), rel=1e-9)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40), beta, beta)
def test_no_gradient_sequence_exceeds_the_bound(grads: list[float], beta1: float, beta2: float) -> None:
    grads = [g if abs(g) > 1e-6 else 0.0 for g in grads]
    for step, size in enumerate(updates(grads, beta1, beta2), 1):
        assert size <= update_bound(beta1, beta2, step) * (1 + 1e-9)
        assert size <= update_bound(beta1, beta2) * (1 + 1e-9)
    for size in updates(grads, beta1, beta1):
        assert size <= 1 + 1e-9


@pytest.mark.parametrize("betas", [*PAIRS, (0.95, 0.8), (0.9, 0.81)])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_the_worst_sequence_attains_the_bound_at_its_step(betas: tuple[float, float], steps: int) -> None:
    ratio = betas[0] / betas[1]
    grads = [ratio**j for j in reversed(range(steps))]
    assert updates(grads, *betas)[-1] == pytest.approx(update_bound(*betas, steps), rel=1e-9)


@given(beta, beta, st.integers(1, 300))
def test_the_bound_never_decreases_with_the_step(beta1: float, beta2: float, step: int) -> None:
    assert update_bound(beta1, beta2, step) <= update_bound(beta1, beta2, step + 1) * (1 + 1e-9)
    assert update_bound(beta1, beta2, step) <= update_bound(beta1, beta2) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("betas", "bound"),
    [
        ((0.9, 0.999), 7.27),
        ((0.9, 0.95), 1.165),
        ((0.95, 0.95), 1.0),
        ((0.0, 0.0), 1.0),
        ((0.9, 0.8), math.inf),
        ((0.7, 0.49), math.inf),
        ((0.9, 0), math.inf),
    ],
)
def test_known_bounds(betas: tuple[float, float], bound: float) -> None:
    assert update_bound(*betas) == pytest.approx(bound, abs=5e-3)
    if math.isfinite(bound):
        assert update_bound(*betas, 20_000) == pytest.approx(update_bound(*betas), rel=1e-6)


@pytest.mark.parametrize("bad", [-0.1, 1.0, math.nan])
def test_betas_out_of_range_are_named(bad: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        update_bound(0.9, bad)
    with pytest.raises(ValueError, match="steps are counted from 1"):
        update_bound(0.9, 0.9, 0)


def of_noise(beta1: float, beta2: float, scales: list[float]) -> float:
    """The root of E[m^2] / E[v] after independent gradients of mean 0 and these scales, without a closed form."""
    age = torch.arange(len(scales) - 1, -1, -1, dtype=torch.float64)
    squares = torch.tensor(scales, dtype=torch.float64) ** 2
    weights1, weights2 = (1 - beta1) * beta1**age, (1 - beta2) * beta2**age
    return math.sqrt(float((weights1**2 * squares).sum() / (weights2 * squares).sum()))


@pytest.mark.parametrize("betas", PAIRS)
@pytest.mark.parametrize("rho", [-1e-2, -1e-4, 0.0, 1e-4, 1e-2])
def test_the_closed_form_for_noise_is_that_of_the_weights(betas: tuple[float, float], rho: float) -> None:
    kept = max(betas[0] ** 2, betas[1]) * math.exp(-2 * rho)
    if kept >= 1:
        with pytest.raises(ValueError, match="rho"):
            update_of_noise_under_drift(*betas, rho)
        return
    steps = int(40 / (1 - max(kept, *betas)))
    scales = [math.exp(rho * t) for t in range(-steps + 1, 1)]
    assert update_of_noise_under_drift(*betas, rho) == pytest.approx(of_noise(*betas, scales), rel=1e-8)


@pytest.mark.parametrize("scale", [0.125, 1.0, 8.0])
@pytest.mark.parametrize("betas", PAIRS)
def test_rescaling_the_current_gradient_alone(betas: tuple[float, float], scale: float) -> None:
    steps = int(20 / (1 - max(betas)))
    scales = [1.0] * steps + [scale]
    assert updates(scales, *betas)[-1] == pytest.approx(update_of_rescaled(*betas, scale), rel=1e-8)
    assert of_noise(*betas, scales) == pytest.approx(update_of_rescaled_noise(*betas, scale), rel=1e-8)


def slope(of_log: Callable[[float], float]) -> float:
    """The slope of the logarithm, at 0."""
    return (math.log(of_log(1e-6)) - math.log(of_log(-1e-6))) / 2e-6


def slope_by_scale(update: Callable[[float, float, float], float], beta1: float, beta2: float) -> float:
    """The same, by the logarithm of the scale of the current gradient."""
    return slope(lambda x: update(beta1, beta2, math.exp(x)))


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.95])
def test_a_steady_gradient_wants_equal_betas_and_noise_wants_beta2_to_be_beta1_squared(beta: float) -> None:
    for other, steady, noise in ((beta, 0.0, beta - beta**2), (beta**2, beta**2 - beta, 0.0)):
        assert slope_by_scale(update_of_rescaled, beta, other) == pytest.approx(steady, abs=1e-6)
        assert slope_by_scale(update_of_rescaled_noise, beta, other) == pytest.approx(noise, abs=1e-6)
    assert slope(lambda x: update_under_drift(beta, beta, x)) == pytest.approx(0.0, abs=1e-3)
    assert slope(lambda x: update_of_noise_under_drift(beta, beta**2, x)) == pytest.approx(0.0, abs=1e-3)
    assert slope(lambda x: update_of_noise_under_drift(beta, beta, x)) == pytest.approx(
        lag(beta) - lag(beta**2), rel=1e-4
    )


def test_a_scale_of_nothing_is_refused() -> None:
    for function in (update_of_rescaled, update_of_rescaled_noise):
        with pytest.raises(ValueError, match=r"^scale is 0.0; it must be above 0, and finite.$"):
            function(0.9, 0.0, 0.0)
