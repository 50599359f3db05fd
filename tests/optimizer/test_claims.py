"""What papers claim of Adam and its relatives, each as a number that is worked out through the real classes.

Each says what a tie of the betas changes about it. Steps are float64 without eps and decay, unless a test says so.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

from balanced_adam import AdamNC, AdamP, AMSGrad, BalancedAdam

Betas = tuple[float, float]


def adam(
    params: Any, betas: Betas = (0.9, 0.9), lr: float = 1.0, eps: float = 0.0, kind: type[BalancedAdam] = BalancedAdam
) -> BalancedAdam:
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0}
    return kind(params, **settings, allow_unbalanced=True, fused=False)


def regret(arms: list[tuple[Any, Betas]], period: int, up: float, down: float, steps: int) -> list[float]:
    """Where x in [-1, 1] is after the losses ``up`` x, once in a period, and -``down`` x, of each optimizer."""
    points = [nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in arms]
    optimizers = []
    for kind in dict.fromkeys(kind for kind, _ in arms):
        groups = [{"params": [x], "betas": pair} for x, (each, pair) in zip(points, arms, strict=True) if each is kind]
        optimizers.append(adam(groups, kind=kind))
    for step in range(1, steps + 1):
        for x in points:
            x.grad = torch.full((), up if step % period == 1 else -down, dtype=torch.float64)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.5 / math.sqrt(step)
            optimizer.step()
        for x in points:
            x.data.clamp_(-1.0, 1.0)
    return [x.item() for x in points]


def test_a_short_memory_goes_to_the_worst_point_and_the_tie_does_not_save_it() -> None:
    """Reddi et al. (1904.09237), theorem 1: the sum of the losses is least at -1, and Adam goes to 1."""
    wrong, right = [(0.0, 0.1), (0.1, 0.1)], [(0.5, 0.5), (0.9, 0.9), (0.99, 0.99), (0.9, 0.999)]
    others = [(AMSGrad, (0.0, 0.1)), (AMSGrad, (0.9, 0.9)), (AdamNC, (0.9, 0.9))]
    found = regret([*((BalancedAdam, pair) for pair in wrong + right), *others], 3, 3.0, 1.0, 1500)
    assert all(x > 0.95 for x in found[: len(wrong)])
    assert all(x < -0.95 for x in found[len(wrong) :])


def test_what_saves_adam_is_a_memory_longer_than_the_period_tied_or_not() -> None:
    """Their synthetic example: 1010 x in one step of 101, else -10 x. Memories of 9, 19 and 199, 999 steps."""
    wrong, right = [(0.9, 0.9), (0.95, 0.95)], [(0.995, 0.995), (0.999, 0.999)]
    others = [(AMSGrad, (0.9, 0.99)), (AMSGrad, (0.9, 0.9)), (AdamNC, (0.9, 0.9))]
    found = regret([*((BalancedAdam, pair) for pair in wrong + right), *others], 101, 1010.0, 10.0, 2020)
    assert all(x > 0.95 for x in found[: len(wrong)])
    assert all(x < -0.75 for x in found[len(wrong) : -1]) and found[-1] < -0.65  # AdamNC is on its way


GROWTH = [((0.9, 0.999), 19.0), ((0.9, 0.9), 19.0), ((0.95, 0.95), 39.0)]


@pytest.mark.parametrize("kind", [BalancedAdam, AdamP])
@pytest.mark.parametrize(("betas", "growth"), GROWTH)
def test_momentum_makes_scale_invariant_weights_grow_and_beta1_alone_says_how_much(
    betas: Betas, growth: float, kind: type[BalancedAdam]
) -> None:
    """2006.08217: |w|^2 grows by 1 + 2 beta1 / (1 - beta1) times the sum of the squared steps, and AdamP's by 1."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(1, 400, generator=generator, dtype=torch.float64)
    weights = nn.Parameter(first / first.norm())
    optimizer, squares = adam([weights], betas, lr=1e-3, kind=kind), 0.0
    for _ in range(2000):
        before = weights.detach().clone()
        gradient = torch.randn(1, 400, generator=generator, dtype=torch.float64)
        weights.grad = (gradient - before * (gradient * before).sum() / (before * before).sum()) / before.norm()
        optimizer.step()
        squares += (weights.detach() - before).square().sum().item()
    expected = pytest.approx(1.0, rel=1e-6) if kind is AdamP else pytest.approx(growth, rel=0.06)
    assert (weights.detach().square().sum().item() - 1.0) / squares == expected


def loss_after(steps: int, betas: Betas, lr: float) -> float:
    """The mean of x^2 / 2 after steps on noisy gradients x + n, over 2000 coordinates."""
    generator = torch.Generator().manual_seed(0)
    x = nn.Parameter(torch.ones(2000))
    optimizer = adam([x], betas, lr, eps=1e-8)
    for _ in range(steps):
        x.grad = x.detach() + torch.randn(2000, generator=generator)
        optimizer.step()
    return x.detach().square().mean().item() / 2


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.9)])
def test_a_constant_learning_rate_reaches_a_floor_tied_or_not(betas: Betas) -> None:
    """Défossez et al. (2003.02395): with constant settings Adam does not converge."""
    assert loss_after(3200, betas, 0.02) == pytest.approx(loss_after(400, betas, 0.02), rel=0.15)


def test_a_step_and_a_memory_that_go_with_the_length_of_a_run_lower_the_floor_as_its_root() -> None:
    """The same paper: with lr a / sqrt(N) and beta2 = 1 - 1/N the loss falls as ln N / sqrt(N)."""
    short, long = (loss_after(n, (0.9, 1 - 1 / n), 0.5 / math.sqrt(n)) for n in (800, 3200))
    assert long == pytest.approx(short / 2, rel=0.2)


SIGNS = [((0.9, 0.9), 0.0, 0.66), ((0.9, 0.999), 0.0, 0.64), ((0.9, 0.9), 1.0, 0.98), ((0.9, 0.999), 1.0, 0.95)]


@pytest.mark.parametrize(("betas", "mean", "share"), SIGNS)
def test_the_share_of_the_sign_in_an_update(betas: Betas, mean: float, share: float) -> None:
    """(E|u|)^2 / E[u^2], the squared cosine of u and its sign (cf. 2507.05966): from 2/pi for noise alone up to 1, and
    higher where betas are tied. Gradients of standard deviation 1."""
    generator = torch.Generator().manual_seed(0)
    weights = nn.Parameter(torch.zeros(4000))
    optimizer = adam([weights], betas)
    for _ in range(150):
        before = weights.detach().clone()
        weights.grad = mean + torch.randn(4000, generator=generator)
        optimizer.step()
    update = (before - weights.detach()).double()
    assert (update.abs().mean() ** 2 / update.square().mean()).item() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("betas", [(0.9, 0.9), (0.95, 0.95)])
def test_reshuffled_adam_converges_where_reshuffled_sgd_diverges(betas: Betas) -> None:
    """Wang et al. (2208.09900): losses (x - c)^4 / 4, whose smoothness grows with the gradient, from x = 10."""
    generator, centres = (
        torch.Generator().manual_seed(0),
        torch.tensor([-1.0, 0.0, 1.0, 2.0, -2.0], dtype=torch.float64),
    )
    x, y = nn.Parameter(torch.full((), 10.0, dtype=torch.float64)), 10.0
    optimizer = adam([x], betas)
    order = torch.cat([torch.randperm(5, generator=generator) for _ in range(400)])
    for step, sample in enumerate(order, 1):
        optimizer.param_groups[0]["lr"] = 0.5 / math.sqrt(step)
        x.grad = (x.detach() - centres[sample]) ** 3
        optimizer.step()
        if abs(y) < 1e30:
            y -= 0.05 / math.sqrt(step) * (y - centres[sample].item()) ** 3
    assert abs(x.item()) < 0.02 and abs(y) > 1e30


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.9)])
def test_full_batches_end_at_the_margin_in_the_largest_weight_and_single_samples_at_the_euclidean_one(
    betas: Betas,
) -> None:
    """Baek, Song, Yun (2510.26303): samples whose entries have one absolute value each, exponential loss."""
    random = np.random.default_rng(1)
    samples = random.choice([-1.0, 1.0], size=(6, 12)) * random.uniform(0.5, 2, size=(6, 1))
    best = linprog(
        [0.0] * 12 + [-1.0],
        A_ub=np.hstack([-samples, np.ones((6, 1))]),
        b_ub=np.zeros(6),
        bounds=[(-1, 1)] * 12 + [(None, None)],
    ).x[-1]
    separator = minimize(lambda w: w @ w, np.ones(12), constraints={"type": "ineq", "fun": lambda w: samples @ w - 1}).x
    rows = torch.tensor(samples)
    found = {}
    for size in (6, 1):
        weights = nn.Parameter(torch.zeros(12, dtype=torch.float64))
        optimizer = adam([weights], betas)
        for step in range(8000):
            optimizer.param_groups[0]["lr"] = 0.1 / math.sqrt(step + 1)
            batch = rows if size == 6 else rows[step % 6][None]
            margins = batch @ weights.detach()
            factors = torch.softmax(-margins, 0) if size == 6 else torch.exp(-margins)
            weights.grad = -(factors[:, None] * batch).sum(0)
            optimizer.step()
        found[size] = weights.detach()
    assert _margin(rows, found[6]) > 0.98 * best > 1.2 * _margin(rows, found[1])
    cosines = [_cosine(found[size], torch.tensor(separator)) for size in (1, 6)]
    assert cosines[0] > 0.99 > cosines[1]


def test_adam_plus_averages_noise_without_lagging_behind() -> None:
    """2011.11985: z averages gradients at extrapolated points x. On a quadratic the error of z as the gradient at w
    follows e' = (1 - b) e + b noise *exactly*, whatever the steps, so that its variance is b / (2 - b), and not more
    for the drift of w, as momentum's is."""
    generator = torch.Generator().manual_seed(0)
    curvature, share, alpha = torch.linspace(0.1, 2.0, 500, dtype=torch.float64), 0.1, 0.05
    w = torch.ones(500, dtype=torch.float64)
    z, error = curvature * w, torch.zeros(500, dtype=torch.float64)
    momentum, y, squares = z.clone(), w.clone(), []
    for step in range(600):
        noise = torch.randn(500, generator=generator, dtype=torch.float64)
        rate = alpha / math.sqrt(z.norm())
        x, w = w - rate * z / share, w - rate * z
        z = (1 - share) * z + share * (curvature * x + noise)
        error = (1 - share) * error + share * noise
        assert torch.allclose(z - curvature * w, error, rtol=0.0, atol=1e-11)
        y = y - rate * momentum
        momentum = (1 - share) * momentum + share * (curvature * y + noise)
        if step > 100:
            squares.append([error.square().mean().item(), (momentum - curvature * y).square().mean().item()])
    ours, plain = np.mean(squares, axis=0)
    assert ours == pytest.approx(share / (2 - share), rel=0.02)
    assert plain > 1.02 * ours


def _margin(rows: Tensor, weights: Tensor) -> float:
    return ((rows @ weights).min() / weights.abs().max()).item()


def _cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()
