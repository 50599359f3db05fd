r"""The state of TR-Adam (arXiv 2609.35392), the nearest rival of packed state: m in 8 bits and a ratio in 4.

Tied betas give v ≥ m², and TR-Adam stores m as FP8 and

.. math:: y = \frac{1-\beta}{\beta} \cdot \frac{v - m^2}{m^2}

as one of 16 fixed levels, 1.5 bytes a weight. That is what we could read of it: neither the levels nor m's scale. Here
the levels are octaves from 1/4 to 2^13, which hold what noise gives; m is float8_e4m3fn with one scale a tensor, as in
FP8 training; and both are rounded to nearest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 2.0 ** torch.arange(-2, 14)
GREATEST = 448.0
"""Of float8_e4m3fn."""


class RatioState(NamedTuple):
    """The stored moments of one tensor."""

    m: Tensor
    """float8_e4m3fn, in units of ``scale``."""
    scale: Tensor
    level: Tensor
    """uint8, below 16; two of them would share a byte."""

    @staticmethod
    def of(m: Tensor, v: Tensor, beta: float) -> RatioState:
        """Round the moments, float32 of one shape."""
        scale = (m.abs().amax() / GREATEST).clamp(min=torch.finfo(torch.float32).tiny)
        stored = (m / scale).to(torch.float8_e4m3fn)
        square = (stored.float() * scale).square()
        ratio = ((v - square) / square * ((1.0 - beta) / beta)).nan_to_num(0.0, float(LEVELS[-1]), 0.0)
        level = ratio.clamp(float(LEVELS[0]), float(LEVELS[-1])).log2().round().to(torch.int64) + 2
        return RatioState(stored, scale, level.to(torch.uint8))

    def moments(self, beta: float) -> tuple[Tensor, Tensor]:
        """m and v. Where m has become zero, v is zero with it."""
        m = self.m.float() * self.scale
        return m, m.square() * (1.0 + LEVELS[self.level.long()] * (beta / (1.0 - beta)))
