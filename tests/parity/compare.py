"""The one comparison that every test of this folder uses: the greatest distance in units in the last place."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.parity.control import TENSORS, State


def ordered(values: Tensor) -> Tensor:
    """The position of each float on the number line, so that neighbours differ by 1; both zeros are at 0."""
    integer = torch.int32 if values.dtype == torch.float32 else torch.int16
    bits = values.contiguous().view(integer).long()
    return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)


def ulps(ours: Tensor, control: Tensor) -> float:
    """The greatest distance between two tensors of one shape and dtype, in ulp; infinite if anything is not finite."""
    if ours.shape != control.shape or ours.dtype != control.dtype:
        raise ValueError(f"{ours.dtype} {tuple(ours.shape)} against {control.dtype} {tuple(control.shape)}")
    if not (ours.isfinite().all() and control.isfinite().all()):
        return float("inf")
    return float((ordered(ours) - ordered(control)).abs().max())


def differences(ours: list[State], control: State) -> dict[str, float]:
    """weights, exp_avg, exp_avg_sq -> the greatest distance of any rank from the control, over all parameters."""
    names = control["weights"].keys()
    return {
        key: max(ulps(rank[key][name], control[key][name]) for rank in ours for name in names) for key in TENSORS
    } | {"model": max(ulps(r["model"][n], control["weights"][n].to(r["model"][n].dtype)) for r in ours for n in names)}


EXACT = {"weights": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0, "model": 0.0}
"""``model`` are the weights that the forward pass uses: the fp32 weights rounded to the model's dtype."""
