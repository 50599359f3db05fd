"""Fused kernels of the update rule: for CPUs built at install, for CUDA compiled at run time; both from ``rule.h``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from balanced_adam.kernels import cpu, cuda
from balanced_adam.kernels.table import DTYPES, KernelUnavailable, Recipe, Update, Variant, is_dense, scalars

__all__ = [
    "DTYPES",
    "KernelUnavailable",
    "Recipe",
    "Update",
    "directions",
    "is_dense",
    "scalars",
    "step",
    "sums_of_squares",
    "why_not",
]


@cache
def why_not(device: torch.device) -> str | None:
    """Why there are no kernels for this device, in a sentence; None if there are."""
    try:
        if device.type == "cpu":
            cpu.load()
        elif device.type == "cuda" and torch.version.hip is None:
            cuda.module(Variant(DTYPES[torch.float32], DTYPES[torch.float32], 0, False), device.index)
        else:
            return f"there are no fused kernels for {'ROCm' if device.type == 'cuda' else device.type} devices"
    except KernelUnavailable as error:
        return str(error)
    return None


def step(updates: Sequence[Update]) -> None:
    """Carry out all updates, each on its own device.

    Raises:
        ValueError: if the tensors of one do not fit together (:meth:`Update.check`); nothing is changed then.
    """
    for update in updates:
        update.check()
    on_cpu = [update for update in updates if update.param.device.type == "cpu"]
    on_cuda = [update for update in updates if update.param.device.type == "cuda"]
    if on_cpu:
        cpu.load().step(on_cpu)
    if on_cuda:
        cuda.step(on_cuda)


def sums_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of each tensor in double, shape (len(tensors),), in one pass over memory.

    The tensors, one or more, are dense, and of one dtype of ``DTYPES`` and one device. A sum is infinite or NaN if and
    only if one of its tensor's elements is. It doesn't depend on the number of threads, nor on the instruction set.

    Raises:
        ValueError: if they are not.
    """
    first = tensors[0]
    for tensor in tensors:
        if (
            tensor.dtype != first.dtype
            or tensor.device != first.device
            or not is_dense(tensor)
            or tensor.dtype not in DTYPES
        ):
            raise ValueError(
                f"a tensor is {tensor.dtype} on {tensor.device} with strides {tensor.stride()}, and the first "
                f"{first.dtype} on {first.device}; they must be alike, of a dtype that kernels take, and without gaps."
            )
    return cpu.load().sums_of_squares(tensors) if tensors[0].device.type == "cpu" else cuda.sums_of_squares(tensors)


def directions(updates: Sequence[Update]) -> tuple[Tensor, Tensor]:
    """Measure each update's direction (:func:`balanced_adam.rule.direction`, from the moments as they are and
    ``scalars``): the sum of squares and the greatest absolute value, two float64 tensors of shape (len(updates),), in
    one pass over memory. The states are of one dtype.

    For the CPU alone; on a GPU the few passes that torch needs are nothing beside a training step.
    """
    for update in updates:
        update.check()
        if update.first.dtype != updates[0].first.dtype:
            raise ValueError(
                f"a state is {update.first.dtype}, and the first {updates[0].first.dtype}; they must be of one dtype."
            )
    return cpu.load().measure(updates, directions=True)
