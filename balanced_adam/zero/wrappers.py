"""Where ZeRO's step is reached into, in DeepSpeed 0.16.9 to 0.19.8 and whatever behaves like them.

Each point is the same in all of these versions. During a step, of what DeepSpeed calls:

Stages 1 and 2 (``DeepSpeedZeroOptimizer``)
    step                                        begins and ends ours
    has_overflow_partitioned_grads_serial()     is told the sum of all squares
    get_grad_norm_direct(gradients)             is given the gradients' norms
    flatten(averaged_gradients[group])          hands the gradients over; returns a stand-in
    _get_preflattened_grad_partition(group)     the same, where there is one (from 0.19.4)
    unscale_and_clip_grads([gradient], norm)    is given a 1, which becomes the factor
    optimizer.step()                            the one pass
    bit16[group][rank].data.copy_(master)       is left out, where the kernel has written

Stage 3 (``DeepSpeedZeroOptimizer_Stage3``)
    step, get_grad_norm_direct, flatten         as above
    has_overflow()                              scans the sum of all squares
    unscale_and_clip_grads(sub_group, norm)     finds a 1 as the gradient of its master
    fp16_flat[sub_group].data.copy_(master)     is left out

Stage 1 with gradients accumulated in fp32 (``BF16_Optimizer``)
    step                                        as above
    get_grads_for_norm()                        hands the gradients over; returns them
    get_grads_for_norm(for_clipping=True)       returns a 1, which becomes the factor
    bf16[group][rank].data.copy_(master)        is left out

With offload the gradient is an fp32 buffer on the CPU: it is handed over where it is unscaled.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from balanced_adam.relatives import AdamP
from balanced_adam.zero import fragments, partitions
from balanced_adam.zero.check import Check, probe
from balanced_adam.zero.decision import Decision, decision
from balanced_adam.zero.one_pass import OnePass

Override = tuple[type, str, Callable[..., Any]]
"""A class of DeepSpeed's, the name of a method, and ``wrapper(original, self, *args)``."""


def overrides() -> list[Override]:
    """The methods of DeepSpeed's to wrap: those it has."""
    stage12, stage3, bf16 = partitions.classes()
    wrappers: list[Override] = [
        *((cls, "step", _step) for cls in (stage12, stage3, bf16)),
        (stage12, "has_overflow_partitioned_grads_serial", _scan),
        (stage12, "get_grad_norm_direct", _norm),
        (stage12, "_get_preflattened_grad_partition", _preflattened),
        (stage12, "unscale_and_clip_grads", _unscale),
        (stage3, "has_overflow", _scan_3),
        (stage3, "get_grad_norm_direct", _norm),
        (stage3, "unscale_and_clip_grads", _unscale_3),
        (bf16, "get_grads_for_norm", _gradients_bf16),
    ]
    return [override for override in wrappers if hasattr(override[0], override[1])]


@torch.no_grad()  # DeepSpeed 0.18.9 forgets it at stages 1 and 2, and fails on several CPU ranks
def _step(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(self.optimizer, AdamP) and not self.optimizer.layouts:
        self.optimizer.layouts = fragments.layouts(self)
    taken = decision(self)
    taken.begin()
    flatten = vars(self).get("flatten")
    if taken.way is not None and flatten is not None:
        groups = {id(gradients): group for group, gradients in getattr(self, "averaged_gradients", {}).items()}
        self.flatten = lambda tensors: _flatten(taken, groups.get(id(tensors)), flatten, tensors)
    try:
        result = original(self, *args, **kwargs)
    except BaseException:
        taken.abort()
        raise
    finally:
        if flatten is not None:
            self.flatten = flatten
    taken.end()
    return result


def _flatten(taken: Decision, group: int | None, flatten: Callable[[Any], Tensor], tensors: Any) -> Tensor:
    """The gradients of a group, on their way into one flat tensor; other tensors, of no group, as ever."""
    if group is None or taken.zero.averaged_gradients.get(group) is not tensors:
        return flatten(tensors)
    return _gather(taken, group, tensors, lambda: flatten(tensors), tensors)


def _preflattened(original: Callable[..., Any], self: Any, group: int) -> Tensor | None:
    """The gradient of a group that DeepSpeed has gathered in one flat tensor while it came; None if it hasn't."""
    flat: Tensor | None = original(self, group)
    taken, gradients = decision(self), self.averaged_gradients[group]
    if flat is None or taken.way is None:
        return flat
    return _gather(taken, group, gradients, lambda: flat, [flat])


def _gather(taken: Decision, group: int, gradients: Any, gather: Callable[[], Tensor], pieces: Any) -> Tensor:
    taken.gathers(group, gradients)
    if isinstance(taken.way, Check):
        return taken.way.gradient(group, gather(), pieces)
    if isinstance(taken.way, OnePass):
        if not hasattr(gradients, "release_grad_buffers"):
            return taken.way.gradient(group, gather, pieces)
        taken.refuse("DeepCompile keeps the gradients in buffers of its own")  # gone before the step
    return gather()


def _scan(original: Callable[..., Any], self: Any) -> Any:
    way = decision(self).way
    if way is None:
        return original(self)
    lists = [self.averaged_gradients[group] for group in range(len(self.bit16_groups))]
    return way.scan(lists, lambda total: original(self) if total is None else ~total.isfinite().view(1))


def _scan_3(original: Callable[..., Any], self: Any, partition_gradients: bool = True) -> Any:
    way = decision(self).way
    if way is None:
        return original(self, partition_gradients)

    def scan(total: Tensor | None) -> bool:
        if total is None:
            return bool(original(self, partition_gradients))
        if total.is_cuda:  # DeepSpeed scans on a stream of its own
            self.reduce_and_partition_stream.wait_stream(torch.cuda.current_stream(total.device))
            total.record_stream(self.reduce_and_partition_stream)
        buffer, self.grad_partitions_flat_buffer = self.grad_partitions_flat_buffer, total.view(1)
        try:
            return bool(original(self, partition_gradients))
        finally:
            self.grad_partitions_flat_buffer = buffer

    whole = partition_gradients and not self.offload_optimizer
    return way.scan([self.averaged_gradients[i] for i in range(len(self.fp16_groups))] if whole else None, scan)


def _norm(original: Callable[..., Any], self: Any, gradients: Any, params: Any, norm_type: float = 2) -> Tensor:
    taken = decision(self)
    if taken.way is None or norm_type != 2:
        return original(self, gradients, params, norm_type)
    return taken.way.norm(gradients, lambda each: original(self, each, params, norm_type), taken.looks_for_zeros)


def _unscale(original: Callable[..., Any], self: Any, gradients: list[Tensor], norm: Any) -> None:
    taken = decision(self)
    if taken.way is None:
        return original(self, gradients, norm)
    masters = taken.way.masters
    group = next((i for i, master in enumerate(masters) if master.grad is gradients[0]), None)
    if group is None:
        if isinstance(taken.way, Check):
            taken.way.differences.append("something is unscaled that is not the gradient of a master")
        return original(self, gradients, norm)

    def call(one: Tensor | None) -> None:
        gradient = masters[group].grad if one is None else one
        original(self, [gradient], norm)

    taken.unscales(norm, [group])
    return taken.way.unscale(group, call)


def _unscale_3(original: Callable[..., Any], self: Any, sub_group: int, norm: Any) -> None:
    taken = decision(self)
    if taken.way is None:
        return original(self, sub_group, norm)

    def call(one: Tensor | None) -> None:
        if one is None:
            original(self, sub_group, norm)
            return
        masters, self.fp32_partitioned_groups_flat = (
            self.fp32_partitioned_groups_flat,
            {sub_group: SimpleNamespace(grad=one)},
        )
        try:
            original(self, sub_group, norm)
        finally:
            self.fp32_partitioned_groups_flat = masters

    taken.unscales(norm, [sub_group])
    return taken.way.unscale(sub_group, call)


def _gradients_bf16(original: Callable[..., Any], self: Any, for_clipping: bool = False) -> Any:
    """Asked for the norm's gradients, which is how a step begins; then, if it clips, for those to clip."""
    taken, groups = decision(self), range(len(self.fp32_groups_flat_partition))
    found = original(self, for_clipping)
    if taken.way is None:
        return found
    flat = self.fp32_groups_gradient_flat_partition
    if not for_clipping:
        for group in groups:
            if isinstance(taken.way, Check):
                taken.way.gradient(group, flat[group])
            elif not taken.way.hand_over(group, [flat[group]], taken.way.factors.get(0)):
                for earlier in range(group):  # all or none: the factor is one
                    taken.way.take_back(earlier)
                break
        return found
    taken.unscales(self._global_grad_norm, groups)
    if isinstance(taken.way, Check):
        numbers = probe(flat[0].device)
        for group in groups:
            taken.way.unscaled(group, numbers)
        return [*found, numbers]
    return [taken.way.factors[0]] if taken.way.factors else found
