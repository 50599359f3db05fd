"""The statements of docs/theory.md, each through the real classes in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from balanced_adam import AdamNC, BalancedAdam, LpAdam, power_mean
from tests.perf.baselines import RestartedMean
from tests.theory.responses import (
    AMSGRAD,
    PAIRS,
    RHO,
    ROWS,
    SINCE,
    Betas,
    Row,
    measured,
    one_sided,
    ours,
    size,
    tau,
    torchs,
    variance,
)

POWERS = power_mean.POWERS


def step_of(make: Any, gradients: Tensor, betas: list[Betas] | None = None) -> Tensor:
    """The last step over lr of a float64 weight for each column of these gradients, (steps, weights)."""
    param = nn.Parameter(torch.zeros(gradients.shape[1], dtype=torch.float64))
    optimizer = make([param])
    for number, gradient in enumerate(gradients):
        with torch.no_grad():
            param.zero_()
        if betas:
            optimizer.param_groups[0]["betas"] = betas[number]
        param.grad = gradient.clone()
        optimizer.step()
    return -param.detach()


def lp(p: float, betas: Any = 0.9) -> Any:
    return lambda params: LpAdam(params, 1.0, betas, 0.0, 0.0, p=p, allow_unbalanced=True)


def age(weights: Tensor) -> float:
    """The mean age under these weights, which are in the order of time."""
    ages = torch.arange(len(weights) - 1, -1, -1, dtype=torch.float64)
    return float((weights * ages).sum() / weights.sum())


# ---- Steady gradients


@pytest.mark.parametrize("betas", PAIRS, ids=str)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_table_of_responses(row: Row, betas: Betas) -> None:
    found, formula = measured(row.make, betas), row.formula(betas)
    assert found.degree == pytest.approx(formula.degree, abs=1e-9)
    assert found.first == pytest.approx(formula.first, rel=1e-4, abs=2e-4)
    assert found.second == pytest.approx(formula.second, rel=2e-3, abs=0.5)


@pytest.mark.parametrize("betas", PAIRS, ids=str)
def test_amsgrad_has_a_kink_and_for_a_shrinking_gradient_no_tie_helps(betas: Betas) -> None:
    assert one_sided(AMSGRAD, betas, 1) == pytest.approx(tau(betas[1]) - tau(betas[0]), abs=0.01)
    assert one_sided(AMSGRAD, betas, -1) == pytest.approx(SINCE - tau(betas[0]), rel=1e-3)


@pytest.mark.parametrize("p", POWERS)
def test_whatever_the_average_a_tie_has_no_first_order_and_minus_p_minus_1_times_its_variance(p: float) -> None:
    """Betas that change in every step make averages of almost any weights."""
    generator = torch.Generator().manual_seed(3)
    betas = [(b, b) for b in (1.0 - 0.5 * torch.rand(60, generator=generator, dtype=torch.float64)).tolist()]
    impulses = torch.eye(60, dtype=torch.float64)
    weights = step_of(lp(1.0), impulses, betas)  # of one gradient alone p = 1 shows the weight over itself: 1
    assert bool(((weights - 1.0).abs() < 1e-9).all())
    products = torch.tensor([b for b, _ in betas], dtype=torch.float64)
    weights = torch.tensor(
        [float((1 - products[k]) * products[k + 1 :].prod()) for k in range(60)], dtype=torch.float64
    )
    weights /= weights.sum()
    ages = torch.arange(59, -1, -1, dtype=torch.float64)
    spread = float((weights * ages.square()).sum()) - age(weights) ** 2
    low, here, high = (
        math.log(float(step_of(lp(p), torch.exp(rho * -ages)[:, None], betas))) for rho in (-1e-4, 0.0, 1e-4)
    )
    assert (high - low) / 2e-4 == pytest.approx(0.0, abs=1e-5)
    assert (high + low - 2 * here) / 1e-8 == pytest.approx(-(p - 1.0) * spread, rel=1e-4, abs=1e-5)


def test_a_tied_p_of_1_is_blind_to_every_change_of_scale_and_no_other_p_is() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (torch.randn(100, 7, generator=generator, dtype=torch.float64) * 3).exp()  # over many orders of magnitude
    assert torch.allclose(step_of(lp(1.0), sizes), torch.ones(7, dtype=torch.float64), rtol=0.0, atol=1e-12)
    before = torch.ones(7, dtype=torch.float64)
    for p in POWERS[1:]:
        step = step_of(lp(p), sizes)
        assert bool((step < before - 1e-3).all())  # the larger p, the shorter
        before = step
    constant = torch.ones(50, 1, dtype=torch.float64) * 1e-3
    assert all(float(step_of(lp(p), constant)) == pytest.approx(1.0, abs=1e-12) for p in POWERS)


def test_the_limit_of_large_p_is_not_adamax() -> None:
    slopes = []
    for make in (ours(LpAdam, p=6.0), torchs(torch.optim.Adamax)):
        low, high = (math.log(size(make, (0.9, 0.95), rho)) for rho in (-RHO, RHO))
        slopes.append((high - low) / (2 * RHO))
    assert slopes[0] == pytest.approx(10.0, abs=1e-2) and slopes[1] == pytest.approx(-9.0, abs=1e-2)


@pytest.mark.parametrize("betas", PAIRS, ids=str)
@pytest.mark.parametrize("p", POWERS)
def test_to_the_last_gradient_alone_the_response_is_beta2_less_beta1_for_every_p(p: float, betas: Betas) -> None:
    steps = torch.ones(400, 2, dtype=torch.float64)
    steps[-1] = torch.tensor([-1e-5, 1e-5], dtype=torch.float64).exp()
    low, high = step_of(lp(p, betas), steps).log().tolist()
    assert (high - low) / 2e-5 == pytest.approx(betas[1] - betas[0], abs=1e-5)


# ---- Noise


def weights_of(make: Any, steps: int) -> tuple[Tensor, Tensor]:
    """What each step's gradient counts for in m and in v after the last one, seen from impulses."""
    param = nn.Parameter(torch.zeros(steps, dtype=torch.float64))
    optimizer = make([param])
    for gradient in torch.eye(steps, dtype=torch.float64):
        param.grad = gradient
        optimizer.step()
    state = optimizer.state[param]
    return (state["exp_avg"], state["exp_avg_sq"]) if isinstance(state, dict) else state[0]


def noise_response(a: Tensor, b: Tensor) -> float:
    """d log sqrt(E m^2 / E v) / d rho for noise whose scale drifts, from the weights."""
    ages = torch.arange(len(a) - 1, -1, -1, dtype=torch.float64)
    low, high = (
        0.5 * math.log((a.square() * (-2 * rho * ages).exp()).sum() / (b * (-2 * rho * ages).exp()).sum())
        for rho in (-1e-5, 1e-5)
    )
    return (high - low) / 2e-5


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.9), (0.9, 0.81)], ids=str)
def test_for_noise_the_numerators_age_is_that_of_its_squared_weights(betas: Betas) -> None:
    a, b = weights_of(lambda params: BalancedAdam(params, 1.0, betas, allow_unbalanced=True), 500)
    formula = tau(betas[1]) - betas[0] ** 2 / (1 - betas[0] ** 2)
    assert noise_response(a, b) == pytest.approx(formula, abs=1e-6)
    assert noise_response(a, b) == pytest.approx(age(b) - age(a.square()), abs=1e-6)


@pytest.mark.parametrize("betas", PAIRS, ids=str)
def test_the_signal_to_noise_ratio_of_an_average_answers_by_the_same_two_ages(betas: Betas) -> None:
    """Which is how the sign of an average, in Signum, answers to drift under noise: -tau / (1 + beta1)."""
    a, _ = weights_of(lambda params: BalancedAdam(params, 1.0, betas, allow_unbalanced=True), 500)
    ages = torch.arange(499, -1, -1, dtype=torch.float64)
    low, high = (
        math.log((a * (-rho * ages).exp()).sum() / (a.square() * (-2 * rho * ages).exp()).sum().sqrt())
        for rho in (-1e-5, 1e-5)
    )
    assert (high - low) / 2e-5 == pytest.approx(-tau(betas[0]) / (1 + betas[0]), abs=1e-6)
    assert (high - low) / 2e-5 == pytest.approx(age(a.square()) - age(a), abs=1e-6)


def test_of_averages_in_a_row_the_two_ages_approach_each_other_and_of_a_plain_mean_they_are_one() -> None:
    beta, steps = 0.999, 60_000
    impulse = torch.zeros(steps, dtype=torch.float64)
    impulse[0] = 1.0
    decay = beta ** torch.arange(steps, dtype=torch.float64) * (1 - beta)
    weights = impulse
    for k in (1, 2, 3, 4):
        spectrum = torch.fft.rfft(weights, 2 * steps) * torch.fft.rfft(decay, 2 * steps)
        weights = torch.fft.irfft(spectrum, 2 * steps)[:steps]
        ratio = age(weights.flip(0).square()) / age(weights.flip(0))
        assert ratio == pytest.approx((2 * k - 1) / (2 * k), rel=2e-3)
    triangle = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0], dtype=torch.float64)  # as every window that is symmetric in time
    assert age(triangle.square()) == pytest.approx(age(triangle))
    mean = weights_of(lambda params: AdamNC(params, 1.0, 0.9), 80)[1]  # its v
    assert torch.allclose(mean, torch.full((80,), 1 / 80, dtype=torch.float64))
    assert age(mean.square()) == pytest.approx(age(mean))


@pytest.mark.parametrize("steps", [1, 11, 12, 13, 24, 25, 36, 40, 100, 101])
def test_a_restarted_mean_is_invariant_to_drift_of_steady_and_of_noisy_gradients(steps: int) -> None:
    def make(params: Any) -> Any:
        group = {"params": params, "lr": 1.0, "betas": (0.9, 0.9), "eps": 0.0, "weight_decay": 0.0}
        return RestartedMean([group])

    param = nn.Parameter(torch.zeros(steps, dtype=torch.float64))
    optimizer = make([param])
    assert optimizer.period == 24  # mean ages from 5.5 to 11.5, as 0.9's 9
    for gradient in torch.eye(steps, dtype=torch.float64):
        param.grad = gradient
        optimizer.step()
    pairs = optimizer.state[param]
    a, b = max(pairs, key=lambda pair: int((pair[0] > 0).sum()))  # the older one
    alive = int((a > 0).sum())
    assert alive == steps if steps <= 12 else 12 < alive <= 24
    assert torch.allclose(a[-alive:], torch.full((alive,), 1 / alive, dtype=torch.float64)) and torch.equal(a, b)
    assert noise_response(a[-alive:], b[-alive:]) == pytest.approx(0.0, abs=1e-6)
    ages = torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    drifting = torch.stack([(rho * -ages).exp() for rho in (-1e-5, 1e-5)], 1)
    low, high = step_of(make, drifting).log().tolist()
    assert (high - low) / 2e-5 == pytest.approx(0.0, abs=1e-5)


# ---- The bound


GREATEST = {1.5: (15.48, 1.277), 2.0: (7.270, 1.165), 3.0: (3.611, 1.092), 6.0: (1.869, 1.039)}
"""The greatest step over lr at (0.9, 0.999) and (0.9, 0.95), as in docs/theory.md."""


def greatest(p: float, beta1: float, beta2: float) -> float:
    q, r = p / (p - 1), (beta1**p / beta2) ** (1 / (p - 1))
    return float((1 - beta1) * (1 - beta2) ** (-1 / p) * (1 - r) ** (-1 / q))


@pytest.mark.parametrize("p", GREATEST)
def test_without_the_tie_the_greatest_step_is_this_and_is_reached(p: float) -> None:
    assert [greatest(p, 0.9, beta2) for beta2 in (0.999, 0.95)] == pytest.approx(list(GREATEST[p]), abs=5e-3)
    beta1, beta2 = 0.9, 0.95
    bound = greatest(p, beta1, beta2)
    ages = torch.arange(799, -1, -1, dtype=torch.float64)
    worst = (beta1 / beta2) ** (ages / (p - 1))
    assert float(step_of(lp(p, (beta1, beta2)), worst[:, None])) == pytest.approx(bound, rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    heavy = torch.randn(800, 2000, generator=generator, dtype=torch.float64)
    heavy *= (torch.randn(800, 2000, generator=generator, dtype=torch.float64) * 2).exp()
    assert bool((step_of(lp(p, (beta1, beta2)), heavy).abs() <= bound).all())


@pytest.mark.parametrize("p", [1.0, *GREATEST])
def test_the_tie_is_the_only_way_to_the_bound(p: float) -> None:
    """Of any two averages the greatest |u| is above 1, unless they are one."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        a, b = torch.rand(2, 9, generator=generator, dtype=torch.float64).softmax(1)
        q = p / (p - 1) if p > 1 else math.inf
        best = (a / b) ** (1 / (p - 1)) if p > 1 else (a / b == (a / b).max()).double()
        reached = float((a * best).sum() / (b * best**p).sum() ** (1 / p))
        bound = float((a**q * b ** (-q / p)).sum() ** (1 / q)) if p > 1 else float((a / b).max())
        assert reached == pytest.approx(bound) and bound > 1.0


def test_of_a_signal_in_noise_the_response_lies_between() -> None:
    ages, signal, spread = torch.arange(399, -1, -1, dtype=torch.float64), 0.3, 1.0
    a, b = weights_of(lambda params: BalancedAdam(params, 1.0, (0.9, 0.95), allow_unbalanced=True), 400)
    low, high = (
        0.5
        * math.log(
            (
                signal**2 * (a * (-rho * ages).exp()).sum() ** 2
                + spread**2 * (a.square() * (-2 * rho * ages).exp()).sum()
            )
            / (b * (-2 * rho * ages).exp()).sum()
        )
        for rho in (-1e-5, 1e-5)
    )
    share = signal**2 / (signal**2 + spread**2 * float(a.square().sum()))
    expected = age(b) - share * age(a) - (1 - share) * age(a.square())
    assert (high - low) / 2e-5 == pytest.approx(expected, abs=1e-5)


def test_without_the_tie_a_p_of_1_is_bounded_by_the_ratio_of_the_last_weights() -> None:
    lonely = torch.zeros(400, 1, dtype=torch.float64)
    lonely[-1] = 1.0
    assert float(step_of(lp(1.0, (0.9, 0.95)), lonely)) == pytest.approx(0.1 / 0.05, rel=1e-8)


def test_tied_adamax_has_no_bound() -> None:
    beta, steps = 0.9, 200
    falling = beta ** torch.arange(steps, dtype=torch.float64)[:, None]
    step = step_of(lambda params: torchs(torch.optim.Adamax)(params, (beta, beta)), falling)
    assert float(step) == pytest.approx((1 - beta) * steps / (1 - beta**steps), rel=1e-6)
    assert float(step) > 19.0
    assert variance(beta) == pytest.approx(90.0)
