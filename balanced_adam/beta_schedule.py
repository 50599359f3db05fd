r"""How long an average remembers: beta in other words, and rules that choose it. No step uses it.

Weight :math:`(1-\beta)\beta^j` lies on the gradient of j steps ago. Counted in steps, that is a horizon of 1 / (1 -
beta) or a half-life of log(1/2) / log(beta); counted in tokens, either of them times the tokens of a step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable


def horizon(beta: float) -> float:
    """Steps that the average reaches back: H = 1 / (1 - beta) (arXiv 2605.10119).

    Raises:
        ValueError: if ``beta`` is not in [0, 1).
    """
    _check_beta(beta)
    return 1.0 / (1.0 - beta)


def of_horizon(steps: float) -> float:
    """The beta with this horizon.

    Raises:
        ValueError: if ``steps`` is not at least 1 and finite.
    """
    if not 1.0 <= steps < math.inf:
        raise ValueError(f"a horizon is {steps} steps; it must be at least 1, and finite.")
    return 1.0 - 1.0 / steps


def half_life(beta: float) -> float:
    """Steps after which a gradient's weight has fallen to half: log(1/2) / log(beta). For beta = 0 it is 0.

    Raises:
        ValueError: if ``beta`` is not in [0, 1).
    """
    _check_beta(beta)
    return math.log(0.5) / math.log(beta) if beta else 0.0


def of_half_life(steps: float) -> float:
    """The beta with this half-life. For one in tokens, divide by the tokens of a step: kept fixed over batch sizes, as
    arXiv 2507.07101 does for beta2, larger batches get smaller betas.

    Raises:
        ValueError: if ``steps`` is not above 0 and finite.
    """
    if not 0.0 < steps < math.inf:
        raise ValueError(f"a half-life is {steps} steps; it must be above 0, and finite.")
    return float(0.5 ** (1.0 / steps))


def refreshes(beta: float, steps: float) -> float:
    """How often a run of so many steps renews the average: R = (1 - beta) T. (In arXiv 2605.10119, T is the step of the
    least validation loss, read off a finished run; before a run its planned steps have to do.)

    Raises:
        ValueError: if ``beta`` is not in [0, 1), or ``steps`` not above 0.
    """
    _check_steps(steps)
    return steps / horizon(beta)


def of_refreshes(count: float, steps: float) -> float:
    """The beta that a run of so many steps renews ``count`` times: 1 - R / T. arXiv 2605.10119 proposes R = 1000, for
    its T (:func:`refreshes`).

    Raises:
        ValueError: if ``count`` is not above 0 and at most ``steps``, or ``steps`` not above 0.
    """
    _check_steps(steps)
    if not 0.0 < count <= steps:
        raise ValueError(f"{count:g} refreshes in {steps:g} steps; there must be more than 0, and at most one a step.")
    return 1.0 - count / steps


def for_batch(beta: float, factor: float) -> float:
    r"""The beta for batches ``factor`` times as large: :math:`1 - \beta` becomes :math:`\kappa (1 - \beta)`, for both
    betas alike, so that equal ones stay equal; the learning rate is to be multiplied by :math:`\sqrt\kappa` (arXiv
    2205.10287).

    Raises:
        ValueError: if ``beta`` is not in [0, 1), or the result would not be.
    """
    _check_beta(beta)
    if not 0.0 < factor * (1.0 - beta) <= 1.0:
        raise ValueError(
            f"a batch {factor:g} times as large would make 1 - beta = {1.0 - beta:g} into {factor * (1.0 - beta):g}; "
            "it must lie in (0, 1]."
        )
    return 1.0 - factor * (1.0 - beta)


RULES: dict[str, Callable[[float, float, float], float]] = {
    "refresh": lambda count, steps, tokens: of_refreshes(count, steps),
    "half_life": lambda half_life, steps, tokens: of_half_life(half_life),
    "half_life_tokens": lambda half_life, steps, tokens: of_half_life(half_life / tokens),
    "horizon": lambda horizon, steps, tokens: of_horizon(horizon),
}
"""Name: its number, the run's steps, and the tokens of a step -> beta."""


def is_rule(text: str) -> bool:
    """Whether it is meant as a rule in words, of :func:`resolve` or :func:`schedule`."""
    return text.partition(":")[0] in (*RULES, "from")


def resolve(rule: str, *, steps: float, tokens_per_step: float) -> float:
    """The beta of a rule in words: a number, ``refresh:R``, ``half_life:STEPS``, ``half_life_tokens:TOKENS`` or
    ``horizon:STEPS``; of a :func:`schedule`, the first one.

    Args:
        rule: such as ``"0.95"``, ``"refresh:1000"`` or ``"half_life_tokens:10e6"``.
        steps: optimizer steps of the run.
        tokens_per_step: training tokens in one of them.

    Raises:
        ValueError: if there is no such rule, or it comes to no beta in [0, 1) here.
    """
    return schedule(rule, steps=steps, tokens_per_step=tokens_per_step)(0.0)


def schedule(rule: str, *, steps: float, tokens_per_step: float) -> Callable[[float], float]:
    """The beta at each step, counted from 0: that of :func:`resolve` all the time, or one that moves, ``from:A:to:B``:
    the horizon goes from that of A to that of B, by the same factor in every step.

    Args:
        rule: such as ``"0.95"`` or ``"from:0.9:to:0.99"``.
        steps: optimizer steps of the run.
        tokens_per_step: training tokens in one of them.

    Raises:
        ValueError: if there is no such rule, or it comes to no beta in [0, 1) here.
    """
    if moving := re.fullmatch(r"from:(.+?):to:(.+)", rule):
        first, last = (resolve(each, steps=steps, tokens_per_step=tokens_per_step) for each in moving.groups())
        return lambda step: 1.0 - (1.0 - first) ** (1.0 - step / steps) * (1.0 - last) ** (step / steps)
    name, _, number = rule.rpartition(":")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if name not in ("", *RULES) or math.isnan(value):
        raise ValueError(
            f"beta is {rule!r}; it must be a number, or refresh:R, half_life:STEPS, half_life_tokens:TOKENS, "
            "horizon:STEPS or from:A:to:B."
        )
    try:
        beta = RULES[name](value, steps, tokens_per_step) if name else value
        _check_beta(beta)
    except ValueError as error:
        raise ValueError(f"beta is {rule!r}, and {error}" if name else str(error)) from None
    return lambda step: beta


def _check_beta(beta: float) -> None:
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"beta is {beta}; it must lie in [0, 1).")


def _check_steps(steps: float) -> None:
    if not 0.0 < steps < math.inf:
        raise ValueError(f"a run is {steps} steps; it must be above 0, and finite.")
