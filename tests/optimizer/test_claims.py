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

from balanced_adam import BalancedAdam

Betas = tuple[float, float]


def adam(params: Any, betas: Betas = (0.9, 0.9), lr: float = 1.0, eps: float = 0.0) -> BalancedAdam:
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0}
    return BalancedAdam(params, **settings, allow_unbalanced=True, fused=False)


def regret(betas: list[Betas], amsgrad: list[Betas], period: int, up: float, down: float, steps: int) -> list[float]:
    """Where x in [-1, 1] is after the losses ``up`` x, once in a period, and -``down`` x; ``amsgrad`` is torch's."""
    points = [nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in [*betas, *amsgrad]]
    ours, theirs = points[: len(betas)], points[len(betas) :]
    optimizers: list[Any] = [adam([{"params": [x], "betas": pair} for x, pair in zip(ours, betas, strict=True)])]
    groups = [{"params": [x], "betas": pair} for x, pair in zip(theirs, amsgrad, strict=True)]
    optimizers += [torch.optim.Adam(groups, eps=1e-30, amsgrad=True)]
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
    found = regret(wrong + right, [(0.0, 0.1), (0.9, 0.9)], 3, 3.0, 1.0, 1500)
    assert all(x > 0.95 for x in found[: len(wrong)])
    assert all(x < -0.95 for x in found[len(wrong) :])


def test_what_saves_adam_is_a_memory_longer_than_the_period_tied_or_not() -> None:
    """Their synthetic example: 1010 x in one step of 101, else -10 x. Memories of 9, 19 and 199, 999 steps."""
    wrong, right = [(0.9, 0.9), (0.95, 0.95)], [(0.995, 0.995), (0.999, 0.999)]
    found = regret(wrong + right, [(0.9, 0.99), (0.9, 0.9)], 101, 1010.0, 10.0, 2020)
    assert all(x > 0.95 for x in found[: len(wrong)])
    assert all(x < -0.75 for x in found[len(wrong) :])


@pytest.mark.parametrize(("betas", "growth"), [((0.9, 0.999), 19.0), ((0.9, 0.9), 19.0), ((0.95, 0.95), 39.0)])
def test_momentum_makes_scale_invariant_weights_grow_and_beta1_alone_says_how_much(betas: Betas, growth: float) -> None:
    """AdamP (2006.08217): |w|^2 grows by 1 + 2 beta1 / (1 - beta1) times the sum of the squared steps."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(400, generator=generator, dtype=torch.float64)
    weights = nn.Parameter(first / first.norm())
    optimizer, squares = adam([weights], betas, lr=1e-3), 0.0
    for _ in range(2000):
        before = weights.detach().clone()
        gradient = torch.randn(400, generator=generator, dtype=torch.float64)
        weights.grad = (gradient - before * (gradient @ before) / (before @ before)) / before.norm()
        optimizer.step()
        squares += (weights.detach() - before).square().sum().item()
    assert (weights.detach().square().sum().item() - 1.0) / squares == pytest.approx(growth, rel=0.06)


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


def _margin(rows: Tensor, weights: Tensor) -> float:
    return ((rows @ weights).min() / weights.abs().max()).item()


def _cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()
