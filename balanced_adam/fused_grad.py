"""Gradients that a caller keeps in its own form for the next step, instead of a ``param.grad``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from balanced_adam import kernels


class FusedGrad(NamedTuple):
    """One parameter's gradient as it is, and what the same pass over memory shall do beside the step."""

    shards: list[Tensor]
    """Dense tensors of one dtype of ``kernels.DTYPES`` on the parameter's device; they tile the parameter in order."""
    grad_factor: Tensor | None
    """One float32 on the same device, which multiplies the gradient (torch's fused optimizers divide by their
    ``grad_scale``). It is read when the step is taken."""
    lp_param_out: Tensor | None
    """Dense, on the same device, as many elements as the parameter: receives the new weights in its own dtype."""
    store_scaled_grad: bool
    """Whether grad_factor * gradient is stored in place of the gradient (float32 on CPUs only)."""

    def fits(self, param: Tensor) -> bool:
        """Whether a kernel steps ``param`` with this; what does not fit otherwise is refused by the step itself."""
        if param.dtype != torch.float32 or not param.is_contiguous():
            return False
        dtypes = {shard.dtype for shard in self.shards}  # one: neighbours in memory are joined
        if len(dtypes) > 1 or (
            self.store_scaled_grad and (bool(dtypes - {torch.float32}) or param.device.type != "cpu")
        ):
            return False
        tensors = [*self.shards, *([] if self.lp_param_out is None else [self.lp_param_out])]
        alike = all(t.dtype in kernels.DTYPES and t.device == param.device and t.is_contiguous() for t in tensors)
        return alike and sum(shard.numel() for shard in self.shards) == param.numel()


def join_neighbours(shards: Sequence[Tensor]) -> list[Tensor]:
    """The same elements in as few tensors as possible: neighbours in one storage become one."""
    joined: list[Tensor] = []
    for shard in filter(Tensor.numel, shards):
        if joined:
            last = joined[-1]
            together = last.untyped_storage().data_ptr() == shard.untyped_storage().data_ptr()
            if together and last.storage_offset() + last.numel() == shard.storage_offset():
                joined[-1] = last.as_strided((last.numel() + shard.numel(),), (1,))
                continue
        joined.append(shard)
    return joined


class FormerNames:
    """The former names of two methods of BalancedAdam, for one release."""

    def hand_over(
        self: Any, param: Tensor, pieces: Any, factor: Any = None, copy: Any = None, keep: bool = False
    ) -> bool:
        """Former name of ``set_fused_grad``."""
        warnings.warn("hand_over is now set_fused_grad", DeprecationWarning, stacklevel=2)
        return bool(self.set_fused_grad(param, pieces, factor, copy, keep))

    def take_back(self: Any, param: Tensor) -> None:
        """The former name of ``clear_fused_grad``."""
        warnings.warn("take_back is now clear_fused_grad", DeprecationWarning, stacklevel=2)
        self.clear_fused_grad(param)
