r"""The update rule of balanced Adam, as pure functions on tensors: the oracle for every other implementation of it.

With gradient :math:`g_t`, learning rate :math:`\eta`, decay :math:`\lambda` and betas :math:`(\beta_1, \beta_2)`:

.. math::

    m_t &= \beta_1 m_{t-1} + (1-\beta_1)\, g_t, \qquad v_t = \beta_2 v_{t-1} + (1-\beta_2)\, g_t^2 \\
    u_t &= \frac{m_t / c_1}{\sqrt{v_t / c_2} + \epsilon}, \qquad c_i = 1 - \beta_i^t \\
    \theta_t &= (1 - \eta\lambda)\, \theta_{t-1} - \eta\, u_t

which is AdamW (arXiv 1711.05101). Multiply numerator and denominator of :math:`u_t` by :math:`\sqrt{c_2}`:

.. math::

    u_t = \frac{\sqrt{c_2}}{c_1} \cdot \frac{m_t}{\sqrt{v_t} + \epsilon\sqrt{c_2}}.

So bias correction is two *scalars*, computed once per step in double precision, and the work per element is one root
and one division. When the betas are equal (balanced), :math:`c_1 = c_2 = c` and the first scalar is
:math:`1/\sqrt{c}`: a single bias correction.

Three properties of the arithmetic, each of them tested:

* In float32 only separate IEEE additions, multiplications, divisions and roots are used, in a stated order, so that any
  other implementation can have the same bits. ``torch.add(alpha=)``, ``addcmul`` and ``addcdiv`` are avoided: on some
  processors torch contracts them to a fused multiply-add, which rounds once where a portable kernel rounds twice.
* Moments below the smallest normal number become zero. Otherwise the moments of a row that sees no gradient would get
  stuck among the denormals, where processors are an order of magnitude slower. When the betas are equal, m becomes zero
  with v, so that :math:`|m| \le \sqrt v` holds there too and ``eps = 0`` keeps its bound; this touches only elements
  whose gradients have been below about 1e-18. (With :math:`\beta_1 > \beta_2` AdamW's m may outlive its v by far; left
  so.)
* The denominator's constant is at least the smallest normal number, so that ``eps = 0`` gives 0 rather than 0/0 where
  both moments are zero. Any nonzero root is too large to feel it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Betas = tuple[float, float]


class BiasCorrection(NamedTuple):
    """The two scalars that bias correction comes down to; see the module's docstring."""

    scale: float
    """sqrt(c2) / c1; 1 / sqrt(c) when the betas are equal."""
    eps: float
    """eps * sqrt(c2)."""


def power(base: float, exponent: int) -> float:
    """``base ** exponent`` for exponents from 0, by squaring: multiplications alone, so that a GPU has the same
    bits."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def bias_correction(step: int, betas: Betas, eps: float) -> BiasCorrection:
    """The scalars of step number ``step`` (the first step is 1), in double precision."""
    beta1, beta2 = betas
    c2 = 1.0 - power(beta2, step)
    if beta1 == beta2:
        return BiasCorrection(1.0 / math.sqrt(c2), eps * math.sqrt(c2))
    c1 = 1.0 - power(beta1, step)
    return BiasCorrection(math.sqrt(c2) / c1, eps * math.sqrt(c2))


VARIANTS = ("adam", "adamd", "adamprox")
"""What :func:`reparametrized` knows."""


def reparametrized(variant: str, lr: float, weight_decay: float, step: int, beta1: float) -> tuple[float, float]:
    r"""The learning rate and the decay with which AdamW takes a variant's step.

    * AdamD (arXiv 2110.10828) leaves :math:`m_t` uncorrected, so that its first steps are small: :math:`\eta c_1` in
      place of :math:`\eta`, and :math:`\lambda / c_1` in place of :math:`\lambda`, so that decay is what it was.
    * AdamProx (arXiv 2202.00089) decays by the proximal step :math:`\theta \leftarrow (\theta - \eta u) / (1 + \eta
      \lambda)`: :math:`\eta / (1 + \eta\lambda)` in place of :math:`\eta`.

    Both are exact: :math:`1 - \eta'\lambda = 1 / (1 + \eta\lambda)` where :math:`\eta' = \eta / (1 + \eta\lambda)`.

    Args:
        variant: one of VARIANTS.
        lr: learning rate.
        weight_decay: decoupled decay.
        step: the number of the step for bias correction, from 1.
        beta1: decay rate of m, in [0, 1).
    """
    if variant == "adamd":
        corrected = 1.0 - power(beta1, step)
        return lr * corrected, weight_decay / corrected
    if variant == "adamprox":
        return lr / (1.0 + lr * weight_decay), weight_decay
    return lr, weight_decay


def moments_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that moments and arithmetic have for parameters of ``dtype``: double for double, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def direction(exp_avg: Tensor, exp_avg_sq: Tensor, correction: BiasCorrection) -> Tensor:
    """The normalized update before its scale, m / (sqrt(v) + eps'); same shape and dtype as the moments.

    ``correction.scale`` times the result is u_t, the step divided by the learning rate.
    """
    tiny = torch.finfo(exp_avg.dtype).tiny
    return exp_avg / (root(exp_avg_sq) + max(correction.eps, tiny))


def update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: Betas,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    bounded: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of (balanced) AdamW; changes none of its arguments.

    Args:
        param: the weights, any shape, a real floating dtype.
        grad: the gradient, same shape; cast to the moments' dtype first.
        exp_avg: first moment m, same shape, float32 (float64 for float64 parameters).
        exp_avg_sq: second moment v, same shape and dtype as ``exp_avg``.
        step: the number of this step, counted from 1.
        lr: learning rate.
        betas: decay rates of m and v, each in [0, 1).
        eps: added to the root of the bias-corrected v.
        weight_decay: decoupled decay; the weights shrink by ``lr * weight_decay`` of themselves.
        maximize: ascend instead of descend.
        bounded: for moments that are about to be packed (:mod:`balanced_adam.packed`): keep |u_t| ≤ 1, which rounded
            moments might exceed, and leave alone what is below the smallest normal number, since packing sees to it.

    Returns:
        The new weights (in ``param``'s dtype) and the new moments (in the moments' dtype).
    """
    beta1, beta2 = betas
    grad = -grad.to(exp_avg.dtype) if maximize else grad.to(exp_avg.dtype)
    exp_avg = exp_avg * beta1 + grad * (1.0 - beta1)
    exp_avg_sq = exp_avg_sq * beta2 + (grad * grad) * (1.0 - beta2)
    if not bounded:
        exp_avg, exp_avg_sq = flushed(exp_avg, exp_avg_sq, tied=beta1 == beta2)
    correction = bias_correction(step, betas, eps)
    move = direction(exp_avg, exp_avg_sq, correction)
    if bounded:
        move = move.clamp(-1.0 / correction.scale, 1.0 / correction.scale)
    return moved(param, move, lr * correction.scale, 1.0 - lr * weight_decay), exp_avg, exp_avg_sq


def moved(param: Tensor, move: Tensor, rate: float, kept: float | Tensor) -> Tensor:
    """The new weights, in ``param``'s dtype: kept x param - rate x move."""
    return (param.to(move.dtype) * kept - move * rate).to(param.dtype)


def flushed(exp_avg: Tensor, exp_avg_sq: Tensor, tied: bool) -> tuple[Tensor, Tensor]:
    """The moments, changed in place, with denormals replaced by zero; if they are ``tied``, m is zero where v is."""
    exp_avg, exp_avg_sq = _flush(exp_avg), _flush(exp_avg_sq)
    if tied:
        exp_avg = exp_avg.masked_fill_(exp_avg_sq == 0.0, 0.0)
    return exp_avg, exp_avg_sq


def root(moment: Tensor) -> Tensor:
    """The correctly rounded square root of float32.

    On CPU torch takes roots from a vector library whose last bit is wrong for one number in 160; a root in float64,
    rounded once more, is right, since the root of a 24-bit number is never that close to the middle of two others.
    """
    if moment.dtype == torch.float32 and moment.device.type == "cpu":
        return moment.double().sqrt().float()
    return moment.sqrt()


def _flush(moment: Tensor) -> Tensor:
    """Replace denormals by zero; NaN stays NaN."""
    return moment.masked_fill_(moment.abs() < torch.finfo(moment.dtype).tiny, 0.0)
