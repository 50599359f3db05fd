"""How the step of each optimizer responds to the scale of a steady gradient: formulas, and the real classes driven.

The gradient is s e^(rho (t - T)) h in steps t = 1 to T, so that the last one is s h whatever rho is. Then, at rho = 0
and s = 1, for the size |u| of the last step:

* degree: d log|u| / d log s, of all gradients together; 0 is scale-free;
* first: d log|u| / d rho, in steps;
* second: d^2 log|u| / d rho^2, in steps squared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from balanced_adam import AdamNC, AdamP, AMSGrad, BalancedAdam, LpAdam
from tests.theory import references

STEPS, SINCE = 400, 300
RHO = 1e-4
"""The step of the differences."""
PAIRS = ((0.9, 0.95), (0.9, 0.9))
Betas = tuple[float, float]
Make = Callable[[list[nn.Parameter], Betas], torch.optim.Optimizer]


def size(make: Make, betas: Betas, rho: float, scale: float = 1.0, steps: int = STEPS, settled: int = 0) -> float:
    """The norm of the last step, over lr = 1, of weights that are put back after each.

    Args:
        make: the optimizer.
        betas: its betas.
        rho: the drift.
        scale: of all gradients.
        steps: T.
        settled: steps before, with the gradient of the first one.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    direction = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    # Orthogonal to the weights, row by row: AdamP then projects.
    direction -= weights * (direction * weights).sum(1, keepdim=True) / (weights * weights).sum(1, keepdim=True)
    param = nn.Parameter(weights.clone())
    optimizer = make([param], betas)
    for step in (*[1] * settled, *range(1, steps + 1)):
        with torch.no_grad():
            param.copy_(weights)
        param.grad = direction * (scale * math.exp(rho * (step - steps)))
        optimizer.step()
    return float((param.detach() - weights).norm())


class Response(NamedTuple):
    """The three numbers."""

    degree: float
    first: float
    second: float


def measured(make: Make, betas: Betas) -> Response:
    """Of an optimizer, by central differences."""
    low, here, high = (math.log(size(make, betas, rho)) for rho in (-RHO, 0.0, RHO))
    doubled = math.log(size(make, betas, 0.0, scale=2.0))
    return Response((doubled - here) / math.log(2.0), (high - low) / (2 * RHO), (high + low - 2 * here) / RHO**2)


def one_sided(make: Make, betas: Betas, sign: int) -> float:
    """d log|u| / d rho from one side, where there is a kink at 0; v has settled, and T is SINCE."""
    near, far, here = (math.log(size(make, betas, sign * rho, 1.0, SINCE + 1, STEPS)) for rho in (RHO, 2 * RHO, 0.0))
    return sign * (4 * near - far - 3 * here) / (2 * RHO)


def tau(beta: float) -> float:
    """The mean age of an average's gradients; the variance of their ages is tau (1 + tau)."""
    return beta / (1.0 - beta)


def variance(beta: float) -> float:
    """Of the ages."""
    return tau(beta) * (1.0 + tau(beta))


def of_power(p: float, degree: float = 0.0) -> Callable[[Betas], Response]:
    """A mean over the p-th root of a mean of p-th powers."""
    return lambda b: Response(degree, tau(b[1]) - tau(b[0]), variance(b[0]) - p * variance(b[1]))


def of_first_alone(share: float, degree: float) -> Callable[[Betas], Response]:
    """This power of the first moment, over something that doesn't respond."""
    return lambda b: Response(degree, -share * tau(b[0]), share * variance(b[0]))


MEAN_AGE, MEAN_VARIANCE = (STEPS - 1) / 2, (STEPS**2 - 1) / 12
"""Of a plain mean of all gradients."""


class Row(NamedTuple):
    """An optimizer of the table."""

    name: str
    make: Make
    formula: Callable[[Betas], Response]
    first: str
    """The formula of ``Response.first``, with mean ages τ1 and τ2."""
    zero: str
    """When that is 0."""
    bound: str
    """The greatest |u| of a weight where the betas are equal."""


def ours(kind: type[BalancedAdam], **more: Any) -> Make:
    """One of the package."""
    return lambda params, betas: kind(params, 1.0, betas, 0.0, 0.0, allow_unbalanced=True, **more)


def torchs(kind: Any, **more: Any) -> Make:
    """One of torch's that takes betas; its least eps instead of 0, so that 0 / 0 can't be."""
    return lambda params, betas: kind(params, lr=1.0, betas=betas, eps=1e-30, **more)


LAG, VARIES = "τ2 - τ1", "β1 = β2"
ROWS = [
    Row("Adam (BalancedAdam)", ours(BalancedAdam), of_power(2), LAG, VARIES, "1"),
    Row("AdamD", ours(BalancedAdam, variant="adamd"), of_power(2), LAG, VARIES, "1 - βᵗ"),
    Row("AdamProx", ours(BalancedAdam, variant="adamprox"), of_power(2), LAG, VARIES, "1"),
    Row("AdamP, projecting", ours(AdamP), of_power(2), LAG, VARIES, "(1 + √d) / 2"),
    *(Row(f"L^{p:g} (LpAdam)", ours(LpAdam, p=p), of_power(p), LAG, VARIES, "1") for p in (1.0, 1.5, 3.0, 6.0)),
    Row(
        "Adamax (L^∞, torch)",
        torchs(torch.optim.Adamax),
        of_first_alone(1.0, 0.0),
        "-τ1",
        "β1 = 0",
        "(1 - β) t / (1 - βᵗ)",
    ),
    Row(
        "AdamNC",
        ours(AdamNC),
        lambda b: Response(0.0, MEAN_AGE - tau(b[0]), variance(b[0]) - 2 * MEAN_VARIANCE),
        "(T - 1) / 2 - τ1",
        "τ1 = (T - 1) / 2",
        "none",
    ),
    Row(
        "both plain means of all",
        lambda params, betas: references.Means(params),
        lambda b: Response(0.0, 0.0, -MEAN_VARIANCE),
        "0",
        "always",
        "1",
    ),
    Row(
        "NAdam (torch)",
        torchs(torch.optim.NAdam, momentum_decay=0.0),
        lambda b: Response(0.0, tau(b[1]) - b[0] / 2 * tau(b[0]), _nadam(b)),
        "τ2 - μ τ1, μ its momentum",
        "τ2 = μ τ1",
        "",
    ),
    Row(
        "RMSprop (torch)",
        lambda params, betas: torch.optim.RMSprop(params, lr=1.0, alpha=betas[1], eps=0.0),
        lambda b: Response(0.0, tau(b[1]), -2 * variance(b[1])),
        "τ2",
        "β2 = 0",
        "1 / √(1 - β)",
    ),
    Row(
        "Signum", lambda params, betas: references.Signum(params, 1.0, betas), of_first_alone(0, 0), "0", "always", "1"
    ),
    Row("Lion", lambda params, betas: references.Lion(params, 1.0, betas), of_first_alone(0, 0), "0", "always", "1"),
    Row(
        "SGD with momentum (torch)",
        lambda params, betas: torch.optim.SGD(params, lr=1.0, momentum=betas[0]),
        of_first_alone(1.0, 1.0),
        "-τ1",
        "β1 = 0",
        "none",
    ),
    Row(
        "Adam+",
        lambda params, betas: references.AdamPlus(params, 1.0, betas),
        of_first_alone(0.5, 0.5),
        "-τ1 / 2",
        "β1 = 0",
        "none",
    ),
    Row(
        "SAdam",
        lambda params, betas: references.SAdam(params, 1.0, betas),
        lambda b: Response(-1.0, 2 * tau(b[1]) - tau(b[0]), variance(b[0]) - 4 * variance(b[1])),
        "2 τ2 - τ1",
        "2 τ2 = τ1",
        "none",
    ),
]
"""RAdam is Adam once it has begun to rectify; Adagrad is AdamNC with β1 = 0. Decay of weights has no part in this."""


def _nadam(betas: Betas) -> float:
    """Second derivative of NAdam's mean, which gives weight 1 - mu to the gradient and mu to its average."""
    mu = betas[0] / 2  # torch's, with momentum_decay = 0
    first, square = mu * tau(betas[0]), mu * (variance(betas[0]) + tau(betas[0]) ** 2)
    return square - first**2 - 2 * variance(betas[1])


AMSGRAD = ours(AMSGrad)


def table() -> list[dict[str, str]]:
    """The table of docs/theory.md."""
    rows = []
    for row in ROWS:
        found = [measured(row.make, betas) for betas in PAIRS]
        rows.append(
            {
                "optimizer": row.name,
                "degree": f"{found[0].degree:.3g}" if abs(found[0].degree) > 1e-6 else "0",
                "first order": row.first,
                "zero if": row.zero,
                **{f"at {betas}": f"{each.first:.2f}" for betas, each in zip(PAIRS, found, strict=True)},
                **{f"second, {betas}": f"{each.second:.0f}" for betas, each in zip(PAIRS, found, strict=True)},
                "greatest step, tied": row.bound,
            }
        )
    right, left = ([one_sided(AMSGRAD, betas, sign) for betas in PAIRS] for sign in (1, -1))
    for side, first, found_here in (
        ("growing", LAG, right),
        ("shrinking", f"S - τ1, here S = {SINCE}", left),
    ):
        rows.append(
            {
                "optimizer": f"AMSGrad, {side} gradient",
                "degree": "0",
                "first order": first,
                "zero if": VARIES if side == "growing" else "S = τ1",
                **{f"at {betas}": f"{each:.2f}" for betas, each in zip(PAIRS, found_here, strict=True)},
                **{f"second, {betas}": "" for betas in PAIRS},
                "greatest step, tied": "1",
            }
        )
    return rows
