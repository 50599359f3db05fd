r"""Bias correction where equal betas change over time.

The weights of an average that began at zero sum to :math:`1 - \prod_i \beta_i`, which is :math:`1 - \beta^t` only while beta is the
same in all t steps. Dividing by less than that sum would break the bound of a step; so the product is kept, in its group, from
the first change on, and the rule is told the number of steps at the beta of now that make it. Rounded up, so that the bound holds:
:math:`|m| \le \sqrt{(1 - \prod_i \beta_i)\, v}` (Cauchy-Schwarz, as for :func:`balanced_adam.gradient_scale.update_bound`).

The product is the group's, not a parameter's: one that gets its first gradient after a change (unfrozen then, or an expert that is rarely
asked) is corrected as if it had been there all the time, so that its first steps are smaller than lr, as without bias correction.
"""

from __future__ import annotations

import math
from typing import Any

KEY = "decay"
"""Of a group whose equal betas have changed: the last of them, the number of steps before they were, and the logarithm of the product of
the betas of those steps. It is saved with the group."""
FOREVER = 10**9
"""Steps after which nothing is left of the beginning, whatever beta is."""


def follow(group: dict[str, Any], last: tuple[float, float], steps: int) -> None:
    """Take note of a change, ahead of a step.

    Args:
        group: of the optimizer's, with the betas of the coming step.
        last: its betas in the step before, where it has no note of them.
        steps: that its parameters have taken.
    """
    if group["betas"][0] != group["betas"][1]:  # plain AdamW
        group.pop(KEY, None)
        return
    before = group[KEY][0] if KEY in group else last[0]
    if group["betas"][0] != before and (KEY in group or last[0] == last[1]) and steps:
        group[KEY] = (group["betas"][0], steps, _logarithm(group, before, steps))


def corrected(group: dict[str, Any], step: int) -> int:
    """The step number for the bias correction in a parameter's step number ``step``, counted from 1."""
    beta = group["betas"][0]
    if KEY not in group or not 0.0 < beta < 1.0:
        return step
    # 1e-9: where beta hasn't changed after all, rounding must not make it one more.
    return min(max(1, math.ceil(_logarithm(group, beta, step) / math.log(beta) - 1e-9)), FOREVER)


def _logarithm(group: dict[str, Any], beta: float, steps: int) -> float:
    """Of the product of all betas of ``steps`` steps, those since the last change being ``beta``."""
    _, before, known = group.get(KEY, (beta, 0, 0.0))
    return max(float(known + (steps - before) * (math.log(beta) if beta else -math.inf)), -1e9)
