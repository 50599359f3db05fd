r"""The power mean of squared gradients: the second moment of L^p Adam (arXiv 2106.05449), kept as a square.

L^p Adam averages :math:`|g|^p` and divides by the p-th root of that. Kept here is

.. math:: w_t = \Big( (1-\beta) \sum_j \beta^j |g_{t-j}|^p \Big)^{2/p},

which is Adam's v where p = 2. Its square root is the denominator for every p, and by Hölder's inequality :math:`|m| \le
\sqrt w` for every p ≥ 1, if m has the same β. So w takes v's place in state, kernels of measurement and packed words.

It is worked out in double precision, where :math:`|g|^6` of any float32 has room. ``torch.pow`` is not used, nor is
``torch.sqrt``: both have one code for the vectorised part of a tensor and another for its end, whose last bits differ,
so that a shard could differ from the whole. Sums, products and quotients of doubles are rounded one by one, and the
same everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

POWERS = (1.0, 1.5, 2.0, 3.0, 6.0)
"""What ``p`` may be."""
_SEEDS = {2: 0x1FF7A3BE_A91D9B1B, 3: 0x2A9F7893_00000000}
"""Bits of a double that, added to the k-th part of a number's bits, are within 4 % of its k-th root."""


def update(mean: Tensor, grad: Tensor, beta: float, p: float) -> Tensor:
    """w after one more gradient.

    Args:
        mean: w, any shape, float32 or float64, not negative.
        grad: the gradient, same shape and dtype.
        beta: decay rate of the average, in [0, 1).
        p: one of POWERS.
    """
    if p == 2.0:  # with the bits of balanced_adam.rule
        return mean * beta + (grad * grad) * (1.0 - beta)
    average = _power(mean.double(), p) * beta + _power(grad.double().square(), p) * (1.0 - beta)
    return _inverse(average, p).to(mean.dtype)


def _power(square: Tensor, p: float) -> Tensor:
    """square^(p/2), of doubles."""
    if p == 6.0:
        return square * square * square
    magnitude = root(square, 2)
    if p == 1.0:
        return magnitude
    return square * magnitude if p == 3.0 else magnitude * root(magnitude, 2)


def _inverse(power: Tensor, p: float) -> Tensor:
    """power^(2/p), of doubles."""
    if p == 1.0:
        return power * power
    cube_root = root(power, 3)
    if p == 6.0:
        return cube_root
    return cube_root * cube_root if p == 3.0 else power * cube_root


def root(value: Tensor, k: int) -> Tensor:
    """The k-th root, k 2 or 3, of doubles that are not negative, to an ulp or two. NaN and infinity stay what they
    are."""
    guess = (value.contiguous().view(torch.int64) // k + _SEEDS[k]).view(torch.float64)
    for _ in range(5):  # 4 %, 0.2 %, 4e-6, 2e-11, and rounding
        power = guess if k == 2 else guess * guess
        guess = guess - (power * guess - value) / (power * float(k))
    return torch.where((value > 0.0) & value.isfinite(), guess, value)
