"""Overflow and norm of the gradients from one pass over them: their sums of squares.

DeepSpeed scans the gradients for overflow, and takes their norm from fp64 copies. Here a scan is told the sum of all
squares, which is finite where every gradient is, and a norm is taken of the tensors' norms.

(The sums are taken in double in another order than torch's. Where they aren't exact they may differ in the last bit of
a double. Stages 1 and 2 round the norm to float, stage 3 only the factor: so weights could differ in about one step in
10^8, and at stage 3 ``get_global_grad_norm`` may show that bit.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from balanced_adam import kernels

Gradients = Sequence[Tensor | None]


class Squares:
    """Sums of squares of lists of gradients: from the scan to the norm of one step."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}  # by the list's id
        self.zeros: dict[int, list[bool]] = {}
        """By the list's id, as far as that was looked at: which gradients are zero throughout. They fill a partition
        up, or a parameter got none in this step."""

    def total(self, lists: Sequence[Gradients]) -> Tensor | None:
        """The sum of all squares in these lists, whose own sums the norm will take; None where that can't be had."""
        found = {}
        for gradients in lists:
            sums = sums_of_squares(gradients)
            if sums is None:
                self._sums = {}
                return None
            found[id(gradients)] = sums
        self._sums = found
        return torch.cat(list(found.values())).sum()

    def norms(self, gradients: Gradients, look_for_zeros: bool) -> list[Tensor] | None:
        """The norm of each gradient, in double; None where that can't be had."""
        sums = self._sums.pop(id(gradients), None)
        sums = sums_of_squares(gradients) if sums is None else sums
        if sums is None:
            return None
        if sums.device.type == "cpu":  # torch's root is not always correctly rounded there
            norms = [torch.tensor([math.sqrt(s) if s >= 0.0 else s], dtype=sums.dtype) for s in sums.tolist()]
        else:
            norms = list(sums.sqrt().split(1))
        for norm, gradient in zip(norms, gradients, strict=True):
            if getattr(gradient, "_zero_padding", False):
                norm._zero_padding = True  # type: ignore[attr-defined]
        if look_for_zeros:
            self.zeros[id(gradients)] = (sums == 0.0).tolist()
        return norms


def sums_of_squares(gradients: Gradients) -> Tensor | None:
    """The sums of squares of these tensors, in one pass; None where that can't be had."""
    present = [gradient for gradient in gradients if gradient is not None]
    places = {(gradient.dtype, gradient.device) for gradient in present}
    if len(present) != len(gradients) or len(places) != 1 or not all(map(Tensor.is_contiguous, present)):
        return None
    ((dtype, device),) = places
    if dtype not in kernels.DTYPES or kernels.why_not(device) is not None:
        return None
    return kernels.sums_of_squares(present)
