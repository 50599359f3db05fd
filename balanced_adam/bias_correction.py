r"""Bias correction where equal betas change over time.

The weights of an average that began at zero sum to :math:`1 - \prod_i \beta_i`. That is :math:`1 - \beta^t` only while
beta is the same in all t steps, and dividing by less than the sum would break the bound of a step. So each parameter's
state keeps the logarithm of the product beside its step count. The rule gets the number of steps at the current beta
that makes this product, rounded up so that the bound holds: :math:`|m| \le \sqrt{(1 - \prod_i \beta_i)\, v}`
(Cauchy-Schwarz, as for :func:`balanced_adam.gradient_scale.update_bound`).

The logarithm is the parameter's own, whatever its group does meanwhile. A saved state (a state dict, a pickle, a deep
copy) holds its excess over the logarithm of as many steps at the group's beta, which is 0 where beta has never changed.
So a file that lacks it, or a loader that fills in another optimizer's value, is right wherever betas were constant. It
is a float and not a tensor, since DeepSpeed cuts the padding from every tensor of a state. A saved group whose betas
have changed says so too (GROUP_KEY), for DeepSpeed's universal checkpoints, which hold moments and step counts alone.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from balanced_adam.values import as_float, shown

LOG_PRODUCT = "log_beta_product"
"""Key of a live state: the logarithm of the product of the betas of the parameter's steps, a float; or UNKNOWN."""
EXCESS = "log_beta_excess"
"""Key of a saved state: the excess of that logarithm over that of as many steps at the saved group's beta, a float."""
LEAST = 1e-300
"""Stands for a beta of 0, of which there is no logarithm."""
GROUP_KEY = "decay"
"""Key of a saved group whose betas have changed: a beta, a number of steps, and the logarithm of the product of their
betas; the steps after those were taken at that beta."""
UNKNOWN = math.inf
"""No product of equal betas: the averages were made with unequal ones, or counted in a CUDA graph. Then all steps count
as if they had been taken at the beta of now."""
FOREVER = 10**9
"""Steps after which nothing is left of the beginning, whatever beta is."""

History = tuple[float, float, float]
"""As GROUP_KEY."""


def history(settings: dict[str, Any]) -> History | None:
    """What a saved group says of the betas that its averages were made with; None where they were unequal.

    Raises:
        ValueError: if it is damaged.
    """
    beta1, beta2 = settings["betas"]
    if beta1 != beta2:
        return None
    written = settings.get(GROUP_KEY, (beta1, 0, 0.0))
    try:
        beta, steps, logarithm = map(as_float, written)
    except (TypeError, ValueError, OverflowError):
        beta, steps, logarithm = math.nan, math.nan, math.nan
    if not (0.0 <= beta < 1.0 and 0.0 <= steps < math.inf and logarithm <= 0.0):
        raise ValueError(
            f"{GROUP_KEY} is {shown(written)} in the loaded state; it must be a beta, a number of steps and the "
            "logarithm of the product of their betas."
        )
    return beta, steps, logarithm


def log_product(made_with: History | None, steps: int, oldest: int) -> float:
    """The logarithm of the product of the betas of a parameter's ``steps`` steps, from what a saved group says.

    The group speaks of its oldest parameter, which has taken ``oldest`` steps. One that came later counts as if it had
    been there all the time: its steps may be shorter than they need be, but not longer than lr.
    """
    if steps == 0:
        return 0.0
    if made_with is None:
        return UNKNOWN
    beta, before, known = made_with
    return known + max(0.0, (oldest if before else steps) - before) * _log(beta)


def effective_steps(logarithm: float, beta: float, steps: int) -> float:
    """How many steps at ``beta`` make this product; a whole number, exactly, where beta has never changed.

    Args:
        logarithm: of the product.
        beta: in [0, 1).
        steps: that were taken, for where the product is unknown.
    """
    if logarithm == UNKNOWN:
        return float(steps)
    count = logarithm / _log(beta)
    nearest = round(count)
    return float(nearest) if abs(count - nearest) <= 1e-9 * max(1.0, count) else count


@lru_cache(maxsize=64)  # the parameters of a group are alike
def advance(logarithm: float, betas: tuple[float, float], steps: int) -> tuple[float, int]:
    """Take one more step at ``betas``: the logarithm of the product after it, and the step number for its bias
    correction.

    Args:
        logarithm: before the step.
        betas: of this step.
        steps: that were taken before it.
    """
    if betas[0] != betas[1]:
        return UNKNOWN, steps + 1
    count = effective_steps(logarithm, betas[0], steps) + 1.0
    return count * _log(betas[0]), min(max(1, math.ceil(count)), FOREVER)


def excess(logarithm: float, betas: tuple[float, float], steps: int) -> float:
    """What a saved state holds under EXCESS."""
    if betas[0] != betas[1] or logarithm == UNKNOWN:
        return 0.0
    if effective_steps(logarithm, betas[0], steps) == steps:
        return 0.0
    return logarithm - steps * _log(betas[0])


def from_excess(excess: float, betas: tuple[float, float], steps: int) -> float:
    """The reverse of :func:`excess`."""
    return UNKNOWN if betas[0] != betas[1] else steps * _log(betas[0]) + excess


def of_group(betas: tuple[float, float], steps: int, logarithm: float) -> History | None:
    """What a saved group holds under GROUP_KEY; None where all steps were taken at its betas."""
    changed = excess(logarithm, betas, steps) != 0.0
    return (betas[0], float(steps), logarithm) if changed else None


def _log(beta: float) -> float:
    return math.log(max(beta, LEAST))
