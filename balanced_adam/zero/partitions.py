"""DeepSpeed's ZeRO optimizers: where each keeps its master weights, gradients and 16-bit weights.

Below, a *group* is what DeepSpeed steps at a time: a parameter group at stages 1 and 2 and in BF16_Optimizer, a
sub-group at stage 3. Each has one flat fp32 master, this rank's partition of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """The place of one tensor in a list of DeepSpeed's."""

    tensors: list[Tensor]
    index: int

    @property
    def tensor(self) -> Tensor:
        """What is there now."""
        return self.tensors[self.index]

    def put(self, tensor: Tensor) -> None:
        """Put another there."""
        self.tensors[self.index] = tensor


def classes() -> tuple[type, type, type]:
    """DeepSpeed's ZeRO optimizers: of stages 1 and 2, of stage 3, and BF16_Optimizer."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    return DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer


def stage(zero: Any) -> str | None:
    """``ZeRO-1``, ``ZeRO-2`` or ``ZeRO-3``; None for anything else."""
    stage12, stage3, bf16 = classes()
    names = {stage12: "ZeRO-2" if getattr(zero, "partition_gradients", False) else "ZeRO-1", stage3: "ZeRO-3"}
    return {**names, bf16: "ZeRO-1"}.get(type(zero))


def masters(zero: Any) -> list[Tensor]:
    """The flat fp32 weights of this rank, by group."""
    for attribute in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        if hasattr(zero, attribute):
            return list(getattr(zero, attribute))
    return []


def _rank(zero: Any, group: int) -> int:
    return torch.distributed.get_rank(group=zero.real_dp_process_group[group])


def is_offloaded(zero: Any) -> bool:
    """Whether the gradients of the masters lie in fp32 buffers on the CPU that last from step to step."""
    return bool(getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False))


def weights(zero: Any, group: int, master: Tensor) -> Slot | None:
    """Where the 16-bit weights are that DeepSpeed copies this group's ``master`` into, after its step.

    None if a kernel can't write there: they are the master itself (fp32), on another device, or there is no such place.
    """
    if hasattr(zero, "fp16_partitioned_groups_flat"):
        slot = Slot(zero.fp16_partitioned_groups_flat, group)
    elif is_offloaded(zero):
        if not hasattr(zero, "param_buffer_of_bit16_for_cpu_offload_groups"):  # up to DeepSpeed 0.16
            return None
        slot = Slot(zero.param_buffer_of_bit16_for_cpu_offload_groups, group)
    else:
        partitions = getattr(zero, "parallel_partitioned_bit16_groups", None) or zero.bf16_partitioned_groups
        slot = Slot(partitions[group], _rank(zero, group))
    if slot.tensor is None or slot.tensor.data_ptr() == master.data_ptr() or slot.tensor.device != master.device:
        return None
    return slot


def agree(zero: Any, value: int) -> int:
    """The least ``value`` of all ranks that share this model: they partition it, or hold other parts of it.

    All of them must call this at the same time.
    """
    from deepspeed import comm
    from deepspeed.accelerator import get_accelerator

    shared = torch.tensor([value], dtype=torch.int32, device=get_accelerator().current_device_name())
    mpu = getattr(zero, "mpu", None)
    parallel = getattr(zero, "model_parallel_group", None) or (mpu and mpu.get_model_parallel_group())
    for process_group in (zero.dp_process_group, parallel):
        if process_group is not None:
            comm.all_reduce(shared, op=comm.ReduceOp.MIN, group=process_group)
    return int(shared)
