"""Which pieces of which tensors a flat partition of ZeRO's holds, for sums over rows of whole tensors.

At stages 1 and 2 and in BF16_Optimizer parameters lie one after the other in a flat tensor, of which each rank has an
equal part; at stage 3 each parameter is cut in equal parts. (DeepSpeed's own addresses of fragments at stages 1 and 2
are not those of ``round_robin_gradients``, which puts parameters in another order.)
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from balanced_adam.tensor_rows import Layout, Piece
from balanced_adam.zero import partitions


def layouts(zero: Any) -> dict[Tensor, Layout]:
    """The layout of every flat fp32 partition of this rank.

    Args:
        zero: a ZeRO optimizer of DeepSpeed's.

    Raises:
        ValueError: if tensors are cut by tensor parallelism, too.
    """
    mpu = getattr(zero, "mpu", None)
    if mpu is not None and mpu.get_model_parallel_world_size() > 1:
        raise ValueError(
            f"AdamP needs sums over rows of whole tensors, and tensor parallelism over "
            f"{mpu.get_model_parallel_world_size()} ranks has cut them; use ZeRO alone."
        )
    masters = partitions.masters(zero)
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return {flat: _of_sub_group(zero, params) for flat, params in zip(masters, zero.fp16_groups, strict=True)}
    groups = getattr(zero, "round_robin_bit16_groups", None) or zero.bf16_groups
    found = {}
    for number, (flat, params) in enumerate(zip(masters, groups, strict=True)):
        group, shapes = zero.real_dp_process_group[number], _shapes(zero, number, params)
        ends = accumulate((math.prod(shape) for shape in shapes), initial=0)
        offsets = getattr(zero, "round_robin_bit16_offsets", None)  # with gaps, if parameters are aligned
        begins = offsets[number] if offsets else list(ends)[:-1]
        first = torch.distributed.get_rank(group) * flat.numel()
        pieces = [
            _fragment(shape, begin - first, flat.numel())
            for shape, begin in zip(shapes, begins, strict=True)
            if len(shape) > 1
        ]
        found[flat] = Layout(pieces, group)
    return found


def _shapes(zero: Any, group: int, params: list[Any]) -> list[Any]:
    """Of the parameters, also while DeepSpeed has taken their memory away."""
    metas = getattr(zero, "round_robin_bit16_meta", None)
    return [tensor.shape for tensor in (metas[group] if metas else params)]


def _fragment(shape: Any, begin: int, size: int) -> Piece:
    """What of a tensor that begins there lies between 0 and ``size``."""
    numel = math.prod(shape)
    first, last = min(max(begin, 0), size), min(max(begin + numel, 0), size)
    return Piece(shape[0], numel, min(max(-begin, 0), numel), first, last - first)


def _of_sub_group(zero: Any, params: list[Any]) -> Layout:
    """Each rank holds one of equal parts of every parameter; the last part is padded."""
    pieces = []
    for param in params:
        if len(param.ds_shape) > 1:
            each, rank = param.partition_numel(), torch.distributed.get_rank(param.ds_process_group)
            start = min(rank * each, param.ds_numel)
            offset = zero.grad_position[zero.get_param_id(param)][1]
            pieces.append(Piece(param.ds_shape[0], param.ds_numel, start, offset, min(each, param.ds_numel - start)))
    return Layout(pieces, params[0].ds_process_group)
