r"""The theory of the gradient's scale, as functions: what equal betas do to the size of the update. No step uses it.

Throughout, u is the normalized update of :mod:`balanced_adam.rule` (the step divided by lr) with eps = 0.
"""

from __future__ import annotations

import math


def lag(beta: float) -> float:
    r"""The mean age, in steps, of the gradients in a moving average: tau = beta / (1 - beta).

    Weight :math:`(1-\beta)\beta^j` lies on the gradient of j steps ago, and
    :math:`\sum_j j\,(1-\beta)\beta^j = \beta/(1-\beta)`.

    Raises:
        ValueError: if ``beta`` is not in [0, 1).
    """
    _check(beta)
    return beta / (1.0 - beta)


def update_under_drift(beta1: float, beta2: float, rho: float) -> float:
    r"""The size |u| that the update settles at when the gradient's scale drifts as :math:`e^{\rho t}`.

    Let :math:`g_t = e^{\rho t} h` with constant h. The averages become geometric sums,
    :math:`m_t = (1-\beta_1)\sum_j \beta_1^j g_{t-j} = g_t (1-\beta_1)/(1-\beta_1 e^{-\rho})` and
    :math:`v_t = g_t^2 (1-\beta_2)/(1-\beta_2 e^{-2\rho})`, so that, once bias correction has faded,

    .. math:: |u| = \frac{(1-\beta_1)/(1-\beta_1 e^{-\rho})}{\sqrt{(1-\beta_2)/(1-\beta_2 e^{-2\rho})}}.

    The principle is that of arXiv 2601.21739; this closed form follows from the two sums.

    Args:
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        rho: growth of the gradient's logarithm per step; 0.01 is about one per cent a step.

    Raises:
        ValueError: if a beta is out of range, or the gradient shrinks so fast that the sums diverge
            (:math:`\beta_1 e^{-\rho} \ge 1` or :math:`\beta_2 e^{-2\rho} \ge 1`).
    """
    _check(beta1, beta2)
    first, second = beta1 * math.exp(-rho), beta2 * math.exp(-2.0 * rho)
    if first >= 1.0 or second >= 1.0:
        raise ValueError(
            f"rho is {rho}: the gradient shrinks faster than betas ({beta1}, {beta2}) forget; it must exceed "
            f"{max(math.log(beta1) if beta1 else -math.inf, 0.5 * math.log(beta2) if beta2 else -math.inf):.6g}."
        )
    return (1.0 - beta1) / (1.0 - first) / math.sqrt((1.0 - beta2) / (1.0 - second))


def drift_sensitivity(beta1: float, beta2: float) -> float:
    r"""The derivative of log |u| by :math:`\rho` at :math:`\rho = 0`: tau2 - tau1, in steps.

    From :func:`update_under_drift`, :math:`\log|u| = \mathrm{const} - \log(1-\beta_1 e^{-\rho})
    + \tfrac12\log(1-\beta_2 e^{-2\rho})`, whose derivative at 0 is
    :math:`-\beta_1/(1-\beta_1) + \beta_2/(1-\beta_2)`. As :math:`\beta/(1-\beta)` is strictly increasing, it is zero
    **if and only if the betas are equal**: first-order invariance to the gradient's scale (arXiv 2601.21739).

    Raises:
        ValueError: if a beta is not in [0, 1).
    """
    return lag(beta2) - lag(beta1)


def update_of_noise_under_drift(beta1: float, beta2: float, rho: float) -> float:
    r"""The root of :math:`E[m^2]/E[v]` where the gradient is noise whose scale drifts: :math:`g_t = e^{\rho t} n_t`, n
    independent, of mean 0 and variance 1.

    What is squared before it is averaged keeps its size, what is averaged first cancels: :math:`E[m_t^2] = e^{2\rho t}
    (1-\beta_1)^2 \sum_j \beta_1^{2j} e^{-2\rho j}`, and :math:`E[v_t]` is as in :func:`update_under_drift`, so that

    .. math::

        \sqrt{\frac{E[m^2]}{E[v]}}
        = \sqrt{\frac{(1-\beta_1)^2/(1-\beta_1^2 e^{-2\rho})}{(1-\beta_2)/(1-\beta_2 e^{-2\rho})}}.

    The derivative of its logarithm at 0 is :math:`\beta_2/(1-\beta_2) - \beta_1^2/(1-\beta_1^2)`: **zero if and only
    if** :math:`\beta_2 = \beta_1^2`, **not where the betas are equal**. The invariance of arXiv 2601.21739 is that of a
    gradient which keeps its sign; noise is another matter, and real gradients lie between.

    Args:
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        rho: growth of the scale's logarithm per step.

    Raises:
        ValueError: if a beta is out of range, or the scale shrinks so fast that the sums diverge.
    """
    _check(beta1, beta2)
    first, second = beta1**2 * math.exp(-2.0 * rho), beta2 * math.exp(-2.0 * rho)
    if first >= 1.0 or second >= 1.0:
        raise ValueError(f"rho is {rho}: the gradient shrinks faster than betas ({beta1}, {beta2}) forget.")
    return (1.0 - beta1) / math.sqrt((1.0 - first) * (1.0 - beta2) / (1.0 - second))


def update_of_rescaled(beta1: float, beta2: float, scale: float) -> float:
    r"""The size |u| where a constant gradient is multiplied by ``scale`` in the current step alone (definition 3.1 of
    arXiv 2601.21739): with m and v settled at g and g^2,

    .. math:: |u| = \frac{\beta_1 + (1-\beta_1) s}{\sqrt{\beta_2 + (1-\beta_2) s^2}},

    whose derivative by :math:`\log s` at 1 is :math:`\beta_2 - \beta_1`.

    Raises:
        ValueError: if a beta is not in [0, 1), or ``scale`` is not above 0.
    """
    _check(beta1, beta2)
    _check_scale(scale)
    return (beta1 + (1.0 - beta1) * scale) / math.sqrt(beta2 + (1.0 - beta2) * scale**2)


def update_of_rescaled_noise(beta1: float, beta2: float, scale: float) -> float:
    r"""The root of :math:`E[m^2]/E[v]` where the gradient is noise (:func:`update_of_noise_under_drift` with rho = 0),
    and is multiplied by ``scale`` in the current step alone:

    .. math:: \sqrt{\frac{\beta_1^2 (1-\beta_1)/(1+\beta_1) + (1-\beta_1)^2 s^2}{\beta_2 + (1-\beta_2) s^2}},

    of which the derivative of the logarithm by :math:`\log s` at 1 is :math:`\beta_2 - \beta_1^2`.

    Raises:
        ValueError: if a beta is not in [0, 1), or ``scale`` is not above 0.
    """
    _check(beta1, beta2)
    _check_scale(scale)
    before = beta1**2 * (1.0 - beta1) / (1.0 + beta1)
    return math.sqrt((before + ((1.0 - beta1) * scale) ** 2) / (beta2 + (1.0 - beta2) * scale**2))


def update_bound(beta1: float, beta2: float, step: int | None = None) -> float:
    r"""The largest |u| that any gradient sequence can produce: at step ``step``, or at any step (the default).

    Write :math:`a_j = \beta_1^j/\sum_i\beta_1^i` and :math:`b_j = \beta_2^j/\sum_i\beta_2^i` for the bias-corrected
    weights of the gradient of j steps ago, j < t. By Cauchy-Schwarz

    .. math:: \hat m^2 = \Big(\sum_j \frac{a_j}{\sqrt{b_j}} \sqrt{b_j}\, g_{t-j}\Big)^2
              \le \sum_j \frac{a_j^2}{b_j} \cdot \hat v ,

    with equality for :math:`g_{t-j} \propto a_j/b_j \propto (\beta_1/\beta_2)^j`. The sum is geometric in
    :math:`r = \beta_1^2/\beta_2`; it never decreases with t, so the bound for all steps is its limit

    .. math:: |u| \le \frac{1-\beta_1}{\sqrt{(1-\beta_2)(1-r)}},

    infinite if r ≥ 1. With equal betas a = b and the bound is 1 at every step: no weight ever moves by more than lr.
    At (0.9, 0.999) it is 7.27.

    Raises:
        ValueError: if a beta is not in [0, 1) or ``step`` is below 1.
    """
    _check(beta1, beta2)
    if step is not None and step < 1:
        raise ValueError(f"step is {step}; steps are counted from 1.")
    if beta1 == beta2 or step == 1:
        return 1.0
    # With beta2 = 0, v is the last gradient alone, and nothing bounds an older one.
    ratio = beta1 * beta1 / beta2 if beta2 else math.inf
    ratio = 1.0 if math.isclose(ratio, 1.0, rel_tol=1e-15) else ratio  # 0.7 * 0.7 / 0.49 is rounded to less
    if step is None:
        return (1.0 - beta1) / math.sqrt((1.0 - beta2) * (1.0 - ratio)) if ratio < 1.0 else math.inf
    if ratio > 1.0 and step * math.log(ratio) > 700.0:  # beyond double precision
        return math.inf
    total = float(step) if ratio == 1.0 else (1.0 - ratio**step) / (1.0 - ratio)
    c1, c2 = 1.0 - beta1**step, 1.0 - beta2**step
    return (1.0 - beta1) / c1 * math.sqrt(c2 / (1.0 - beta2) * total)


def _check(*betas: float) -> None:
    for beta in betas:
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"beta is {beta}; it must lie in [0, 1).")


def _check_scale(scale: float) -> None:
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; it must be above 0, and finite.")
