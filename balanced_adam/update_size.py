"""How far the last step moved the weights, from the moments that it left.

DeepSpeed calls the optimizer's ``step`` once for each group or sub-group, so that one call need not be a whole step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from balanced_adam import dtensor, kernels, rule
from balanced_adam import state as states


class UpdateSize(NamedTuple):
    """How far a step moved the weights this process holds, in units of lr and without weight decay.

    With a packed state it is computed from rounded moments, and off by as much as they are (packed8's root mean square
    is 10 % too large). Sums over processes are sums of ``sum_of_squares`` and of ``numel``; the root mean square is the
    root of their ratio.
    """

    greatest: float
    """max |update| / lr over the elements; see the bound in BalancedAdam."""
    sum_of_squares: float
    """Sum of (update / lr)^2 over the elements."""
    numel: int
    """Number of elements."""


class LastStep(NamedTuple):
    """What the size of a parameter's step depends on beside its moments."""

    step: int
    """The number of the step for bias correction."""
    betas: rule.Betas
    eps: float
    factor: float = 1.0
    """By which a variant's lr is another (:func:`balanced_adam.rule.reparametrized`)."""


def update_size(
    moved: Mapping[Tensor, LastStep], state: Mapping[Tensor, dict[str, Any]], fuses: Callable[[Tensor], bool]
) -> UpdateSize:
    """The size of these parameters' last steps.

    Args:
        moved: the parameters, and their last step.
        state: of the optimizer, which holds their moments.
        fuses: whether a kernel steps a parameter; then a kernel measures it, too.
    """
    sums = _Sums([], [])
    in_kernel: dict[torch.dtype, list[tuple[kernels.Update, float]]] = {}
    count = 0
    for param, last in moved.items():
        correction = rule.bias_correction(last.step, last.betas, last.eps)
        weights = dtensor.local(param)
        moments = {name: dtensor.local(tensor) for name, tensor in states.moment_tensors(state[param]).items()}
        count += weights.numel()
        if param.device.type == "cpu" and fuses(param):
            scalars = kernels.scalars(last.step, 0.0, last.betas, last.eps, 0.0, False)
            update = kernels.Update.of(weights, weights, moments, scalars)
            in_kernel.setdefault(update.first.dtype, []).append((update, correction.scale * last.factor))
        else:
            sums.add_in_torch(moments, correction, last.factor)
    for updates in in_kernel.values():
        sums.add_in_kernel(updates)
    if not count:
        return UpdateSize(0.0, 0.0, 0)
    greatest, squares = (_by_device(tensors) for tensors in sums)
    return UpdateSize(
        float(torch.tensor([float(torch.stack(tensors).amax()) for tensors in greatest], dtype=torch.float64).amax()),
        math.fsum(float(torch.stack(tensors).sum()) for tensors in squares),
        count,
    )


def _by_device(tensors: list[Tensor]) -> list[list[Tensor]]:
    """The tensors of each device: a value is fetched once from each."""
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device, []).append(tensor)
    return list(found.values())


class _Sums(NamedTuple):
    """0-dim float64 tensors of parts of parameters: greatest |update| / lr, and sums of (update / lr)^2."""

    greatest: list[Tensor]
    squares: list[Tensor]

    def add_in_torch(self, moments: dict[str, Tensor], correction: rule.BiasCorrection, factor: float) -> None:
        scale = correction.scale * factor
        for values in zip(*map(_parts, moments.values()), strict=True):
            m, v = states.moments(dict(zip(moments, values, strict=True)))
            size = rule.direction(m, v, correction).abs_()
            if states.PACKED in moments:
                size = size.clamp_(max=1.0 / correction.scale)
            self.greatest.append(size.amax().double() * scale)
            self.squares.append(torch.dot(size, size).double() * scale**2)

    def add_in_kernel(self, updates: list[tuple[kernels.Update, float]]) -> None:
        scale = torch.tensor([scale for _, scale in updates], dtype=torch.float64, device="cpu")
        sums, largest = kernels.directions([update for update, _ in updates])
        self.greatest.extend((largest * scale).unbind())
        self.squares.extend((sums * scale**2).unbind())


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """Parts that stay in a CPU's cache while several operations pass over them, or on a GPU need little memory for
    it."""
    if tensor.numel() == 0:
        return ()
    return tensor.reshape(-1).split(2**26 if tensor.is_cuda else 2**17)
