r"""Both moments of an element in one word of 32, 16 or 8 bits: the oracle for every other implementation of these
formats.

With equal betas |m| ≤ √v for any sequence of gradients (:mod:`balanced_adam.gradient_scale`). So with a small
constant δ

.. math:: w = v + \delta^2, \qquad r = m / s, \qquad s = \text{the power of 2 next to } \sqrt w

are a number w that can't underflow and a number r in [-√2, √2]. Neither needs a scale of its data, so that an element's
word depends on nothing but the element. Both are stored as *short floats*: the bits of a float32, counted from those of
the least value and cut to a few; r as those of |r| + ζ, with a constant ζ, and a sign. So the steps are even near zero
and grow with the number beyond it. (s is a shift of w's exponent, and dividing by it a subtraction: no root and no
division beyond the update's own.)

Rounding to nearest would stall in the short formats: in one step an average moves by a small part (1 - β) of the way to
the gradient, often less than half of a level. So they round up or down, in such proportion that the *expectations of v
and m* stay what they were: w goes to the upper of its two levels with the probability that makes the expectation of
w - δ² equal v, and r is taken against the w that is stored, so that the expectation of r s is m. (Where |r| exceeds its
greatest level it is cut off: by Cauchy-Schwarz (m, v) with m² = v is an extreme point, which no average of other points
can be.)

The numbers that decide this need no generator and no state (:func:`dither`). For w they are a hash of the bits of the
element's weight and gradient and of the step. For r they are

.. math:: u = \mathrm{frac}(q\,\kappa + t\,\varphi)

with the step t, irrational κ and φ, and q = exponent and first bit of the weight: over the steps of one element a
rotation by φ, which takes all values far more evenly than independent numbers would; so the roundings of successive
steps cancel sooner, and less noise is left in m. (For w this would not do: v's roundings would depend on those before,
and leave v too small by 2 %.) Weights of different size are out of step by κ. From weights and gradients of the same
bits come the same words, in every sharding, on every device and after a restart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from balanced_adam import rule

Q_MASK = 0x7FC00000
"""Masks, in the bits of a weight, the exponent and the first bit of the fraction."""
KAPPA = 633
"""2^10 frac of the golden ratio; q has 9 bits, so κ needs no more."""
PHI = 0x9E3779B9
"""2^32 frac of the golden ratio, whose multiples are the most evenly spread."""
HASH = (0x85EBCA6B, 0x7FEB352D)
"""Odd multipliers. The higher bits of the product are used, which depend on all bits below them."""
_M32 = 0xFFFFFFFF


class Format(NamedTuple):
    """A packed format: a word holds, from its highest bit, the level of w, the sign of r, the level of |r|."""

    name: str
    word: torch.dtype
    """What the words are stored as: their bits, not their value, count (INTEGERS)."""
    w_bits: int
    w_shift: int
    """Bits of a float32 below a level of w: 20 for 8 levels in an octave, 25 for levels four octaves apart."""
    w_floor: float
    """δ², a power of 4."""
    r_bits: int
    """With the sign."""
    r_shift: int
    r_floor: float
    """ζ."""
    nearest: bool
    """Round to nearest; otherwise in proportion."""

    @property
    def w_base(self) -> int:
        """The bits of δ²."""
        return _bits_of(self.w_floor)

    @property
    def r_base(self) -> int:
        """The bits of ζ."""
        return _bits_of(self.r_floor)

    @property
    def w_top(self) -> int:
        """The greatest level of w."""
        return 2**self.w_bits - 1

    @property
    def r_top(self) -> int:
        """The greatest level of |r|."""
        return 2 ** (self.r_bits - 1) - 1


FORMATS = {
    format.name: format
    for format in (
        Format("packed32", torch.int32, 17, 13, 2.0**-80, 15, 10, 0.5, nearest=True),
        Format("packed16", torch.bfloat16, 9, 20, 2.0**-54, 7, 19, 13 / 128, nearest=False),
        Format("packed8", torch.uint8, 4, 25, 2.0**-54, 4, 22, 3 / 32, nearest=False),
    )
}
"""√v up to 2^24, 31 and 8; levels of √v 0.05 %, 3 to 6 % and a factor of 4 apart; |r| up to 1.5, 1.46 and 0.91."""
INTEGERS = {torch.bfloat16: torch.int16}
"""Words of two bytes are stored as the bits of bfloat16, since neither gloo nor NCCL sends any 16-bit integers: only so
can they be gathered, broadcast and sharded anew as any state is. As numbers they mean nothing, and some are NaN; copies
keep their bits."""
BY_WORD = {format.word: format for format in FORMATS.values()} | {torch.int16: FORMATS["packed16"]}
"""Files from before have them as int16."""


def is_cast(words: Tensor) -> bool:
    """Whether these words of two bytes are integers that have been cast by value: as numbers, all are whole, which
    words by chance are not."""
    if words.dtype != torch.bfloat16 or words.numel() < 64:
        return False
    return bool((words == words.round()).all()) and bool((words != 0).any()) and bool(words.isfinite().all())


def unpack(words: Tensor, format: Format | None = None) -> tuple[Tensor, Tensor]:
    """The moments m and v that packed words stand for; float32, the words' shape. The words' dtype tells their
    format."""
    format = format or BY_WORD[words.dtype]
    integers = words.view(INTEGERS.get(words.dtype, words.dtype)).to(torch.int64)
    code = integers & (2 ** (format.w_bits + format.r_bits) - 1)
    w = _number(((code >> format.r_bits) << format.w_shift) + format.w_base)
    m = (_number(((code & format.r_top) << format.r_shift) + format.r_base) - format.r_floor) * _scale(w)
    negative = (code >> (format.r_bits - 1)) & 1 == 1
    return torch.where(negative, -m, m), w - format.w_floor


def pack(format: Format, exp_avg: Tensor, exp_avg_sq: Tensor, dither: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The words for moments m and v, float32 of one shape; moments that came from words of this format give the same
    words.

    What is out of range is cut off. NaN becomes some finite number: what matters is the weight, which is NaN then.

    Args:
        format: one of FORMATS.
        exp_avg: m.
        exp_avg_sq: v, not negative.
        dither: from :func:`dither`, for formats that round in proportion; None to round these to nearest, too.
    """
    nearest = dither is None or format.nearest
    w = exp_avg_sq + format.w_floor
    above = _bits(w) - format.w_base
    if dither is None or format.nearest:
        level = (above + (1 << (format.w_shift - 1))) >> format.w_shift
    elif format.w_shift <= 23:  # within an octave a float's bits are linear in it
        level = (above + (dither[0] >> (32 - format.w_shift))) >> format.w_shift
    else:
        level = (above >> format.w_shift).clamp(max=format.w_top - 1)
        low = _number((level << format.w_shift) + format.w_base)
        ratio = 2.0**2 ** (format.w_shift - 23)  # of a level to the one before
        between = (dither[0] >> 9).to(torch.float32) * ((ratio - 1.0) * 2.0**-23) + 1.0
        level = level + (w > low * between).to(torch.int64)
    level = level.clamp(max=format.w_top)
    scale = _scale(_number((level << format.w_shift) + format.w_base))
    above = _bits(_ratio(exp_avg, scale) + format.r_floor) - format.r_base
    size = above + (1 << (format.r_shift - 1) if nearest else dither[1] >> (32 - format.r_shift))  # type: ignore[index]
    size = (size >> format.r_shift).clamp(max=format.r_top)
    sign = (_bits(exp_avg) >> 31).masked_fill(exp_avg.isnan(), 0)
    code = (level << format.r_bits) | (sign << (format.r_bits - 1)) | size
    integer = INTEGERS.get(format.word, format.word)
    bits = torch.iinfo(integer).bits
    if integer.is_signed:
        code = code - ((code >> (bits - 1)) << bits)
    return code.to(integer).view(format.word)


def beyond(words: Tensor, exp_avg: Tensor) -> Tensor:
    """Where m, packed into these words, was beyond the greatest level that they have for it, and was cut off; bool, the
    words' shape."""
    format = BY_WORD[words.dtype]
    _, exp_avg_sq = unpack(words)
    level = _bits(_ratio(exp_avg, _scale(exp_avg_sq + format.w_floor)) + format.r_floor) - format.r_base
    return level > format.r_top << format.r_shift


def update(
    param: Tensor,
    grad: Tensor,
    words: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    corrected: int | None = None,
    rule: Callable[..., tuple[Tensor, ...]] = rule.update,
) -> tuple[Tensor, Tensor]:
    """One step of balanced Adam with packed moments: the new weights and words; changes none of its arguments.

    As ``rule``, :func:`balanced_adam.rule.update` or another like it, for equal betas. What rounding has added to an
    average can't make a step longer than lr. Bias correction is that of step number ``corrected``, if it is another
    (:mod:`balanced_adam.bias_correction`).
    """
    new, exp_avg, exp_avg_sq = rule(
        param,
        grad,
        *unpack(words),
        step=step if corrected is None else corrected,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
        bounded=True,
    )
    numbers = dither(param.to(torch.float32), grad.to(torch.float32), step)
    return new, pack(BY_WORD[words.dtype], exp_avg, exp_avg_sq, numbers)


def dither(param: Tensor, grad: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Numbers from 0 to 2^32 - 1 (int64, ``param``'s shape) that round w and r of an element in this step.

    Args:
        param: the weights before the step, float32.
        grad: the gradients, scaled and clipped, float32.
        step: the number of the step, counted from 1.
    """
    weight, gradient = (_bits(x) & 0x7FFFFFFF for x in (param, grad))
    weight = weight.clamp(max=0x7F800000)  # one NaN is as good as another; with that of a gradient no number decides
    mixed = (weight * HASH[0] + start(step) & _M32) ^ gradient
    return (mixed ^ (mixed >> 15)) * HASH[1] & _M32, (weight & Q_MASK) * KAPPA + start(step) & _M32


def start(step: int) -> int:
    """Where the rotation is at a step: t φ modulo 1, in units of 2^-32."""
    return step * PHI & _M32


def _scale(w: Tensor) -> Tensor:
    """s: half the exponent of w."""
    return _number(((_bits(w) >> 1) & 0x7F800000) + 0x20000000)


def _ratio(exp_avg: Tensor, scale: Tensor) -> Tensor:
    """|m| / s, without a division, since s is a power of 2."""
    return exp_avg.abs() * _number(0x7F000000 - _bits(scale))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32).to(torch.int64) & _M32


def _bits_of(x: float) -> int:
    return int(torch.tensor(x, dtype=torch.float32, device="cpu").view(torch.int32))


def _number(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)
