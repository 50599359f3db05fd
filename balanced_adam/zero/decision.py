"""Which way a ZeRO optimizer of DeepSpeed's takes its steps: in one pass, or in DeepSpeed's own.

The first step that is not skipped is DeepSpeed's, and watched (:mod:`balanced_adam.zero.check`). If everything was as
the one pass needs it, on all ranks, the one pass takes over. What may not have come up in that step is watched once
more, when it comes up: the first step that is clipped (or isn't), the first with another loss scale, and the first in
which a parameter has no gradient, as far as its gradient is seen (not with offload).

Ranks decide alike, and at the same time, on what all of them see. A missing gradient is seen by the rank that holds
the parameter: that rank alone watches, and keeps to DeepSpeed's passes if it has to, which changes no bit elsewhere.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from balanced_adam import kernels
from balanced_adam.relatives import Relative
from balanced_adam.zero import partitions
from balanced_adam.zero.check import DIFFERS, SAME, Check
from balanced_adam.zero.one_pass import OnePass

TURNED_OFF, NO_KERNEL = "fused or fused_zero is false", "there is no kernel for this optimizer"
LOOKS_ON_GPU = 100
"""Steps in which a GPU's norm is read for the first that is clipped, which waits for the GPU."""
NOBODY = 2**31 - 1


class Plan(Enum):
    """How the next step is taken."""

    CHECK = "one pass from the second step on"
    ONE_PASS = "one pass"
    OWN_PASSES = "in several passes"


class Decision:
    """How one ZeRO optimizer takes its steps, and the step that is under way."""

    def __init__(self, zero: Any) -> None:
        self.zero = zero
        self.obstacle = _obstacle(zero)
        """Why no step is taken in one pass, as far as that is known; None if there is no reason."""
        self.plan = Plan.CHECK
        self.way: Check | OnePass | None = None
        """The step under way; None outside of steps, and where DeepSpeed's own passes take it."""
        self._steps = 0
        self._on_cpu = all(master.device.type == "cpu" for master in partitions.masters(zero))
        self._seen: set[str] = set()
        self._new: set[str] = set()  # what comes up for the first time in this step
        self._alone = False  # whether other ranks do not check this step
        self._differs_alone = False  # whether this rank has found a difference in such a step
        self._scale: float | None = None  # the loss scale of the first check
        # Of the pieces of each group's gradient: sizes, and whether one has been other than zero.
        self._pieces: dict[int, tuple[list[int], list[bool]]] = {}
        self._refused = False

    # ---- A step.

    def begin(self) -> None:
        """A step begins. All ranks call this together."""
        self._steps += 1
        self._new, self._alone = set(), False
        if self.plan is Plan.CHECK:
            if not partitions.agree(self.zero, self.obstacle is None):
                self._keep_own_passes([self.obstacle] if self.obstacle else [])
                return
            self.way = Check(self.zero, whole=True)
        elif self.plan is Plan.ONE_PASS and self._differs_alone:
            # DeepSpeed's own passes; it still has its part in what all ranks decide together.
            self.way, self._alone = Check(self.zero, whole=False), True
        elif self.plan is Plan.ONE_PASS:
            self.way = OnePass(self.zero, self.refuse)

    def abort(self) -> None:
        """The step has failed."""
        if self.way is not None:
            self.way.close()
            self.way = None

    def end(self) -> None:
        """The step has ended. All ranks call this together."""
        way, self.way = self.way, None
        if way is None:
            return
        way.close()
        if isinstance(way, OnePass):
            return
        verdict = DIFFERS if self._differs_alone else way.verdict()
        if not self._alone:
            verdict = partitions.agree(self.zero, verdict)
        if verdict == DIFFERS and self._alone:
            if not self._differs_alone:
                self._differs_alone, self.obstacle = True, way.differences[0]
                _log(f"ZeRO's step is not taken in one pass on this rank: {self.obstacle}")
        elif verdict == DIFFERS:
            self._keep_own_passes([self.obstacle] if self.obstacle else way.differences)
        elif verdict == SAME:
            self.plan = Plan.ONE_PASS
            self._seen |= self._new

    # ---- What comes up for the first time.

    @property
    def looks_for_zeros(self) -> bool:
        """Whether it matters which gradients are zero throughout."""
        return "an absent gradient" not in self._seen and self._may_look()

    def gathers(self, group: int, gradients: Sequence[Tensor]) -> None:
        """DeepSpeed gathers these gradients of a group, whose norm it has taken."""
        zeros = None if self.way is None else self.way.squares.zeros.get(id(gradients))
        if zeros is None:
            return
        sizes = [gradient.numel() for gradient in gradients]
        before = self._pieces.setdefault(group, (sizes, [False] * len(zeros)))
        absent = before[0] != sizes or any(was and zero for was, zero in zip(before[1], zeros, strict=True))
        if before[0] == sizes:
            before[1][:] = [was or not zero for was, zero in zip(before[1], zeros, strict=True)]
        if absent and isinstance(self.way, OnePass):
            self._new.add("an absent gradient")
            self._alone = True
            self._check()

    def unscales(self, norm: Any, groups: Sequence[int]) -> None:
        """DeepSpeed unscales and clips gradients of this global norm; these groups' have been gathered."""
        if self.way is None:
            return
        scale = float(getattr(self.zero, "loss_scale", 1.0))
        news = {"another loss scale"} if scale != self._scale and self._scale is not None else set()
        self._scale = scale if self._scale is None else self._scale
        limit = float(getattr(self.zero, "clip_grad", 0.0) or 0.0)
        both_seen = {"clipping", "no clipping"} <= self._seen
        if norm is not None and limit > 0.0 and not both_seen and self._may_look():
            news.add("clipping" if (float(norm) / scale + 1e-6) / limit > 1.0 else "no clipping")
        if news - self._seen:
            self._new |= news
            self._alone = False  # all ranks have this norm and scale
            if isinstance(self.way, OnePass):
                self._check(groups)

    def _may_look(self) -> bool:
        return self._on_cpu or self._steps <= LOOKS_ON_GPU

    def _check(self, handed: Sequence[int] = ()) -> None:
        """From here on DeepSpeed's passes take this step, and it is checked; ``handed`` groups were handed over."""
        one_pass = self.way
        assert isinstance(one_pass, OnePass)
        self.way = check = Check(self.zero, whole=False)
        for group in handed:
            grad = check.masters[group].grad
            if group in one_pass.factors:
                pieces = one_pass.take_back(group)
                check.masters[group].grad = check.gradient(group, torch.cat(pieces)).to(torch.float32)
            elif grad is not None and not partitions.is_offloaded(self.zero):  # that was not taken
                check.gradient(group, grad)

    # ---- Reports.

    def refuse(self, reason: str) -> None:
        """Report, once, that a step which was to be one pass isn't."""
        if not self._refused:
            self._refused = True
            _log(f"a step of ZeRO's could not be taken in one pass, and DeepSpeed's own passes take it: {reason}")

    def _keep_own_passes(self, reasons: Sequence[str]) -> None:
        """DeepSpeed's passes take all steps from now on. The first rank that has a reason reports it."""
        self.plan = Plan.OWN_PASSES
        self.obstacle = reasons[0] if reasons else "another rank has a reason, which it has reported"
        rank = torch.distributed.get_rank()
        first = partitions.agree(self.zero, rank if reasons else NOBODY)
        if first == rank and self.obstacle not in (TURNED_OFF, NO_KERNEL):
            _log(f"ZeRO's step is not taken in one pass: {self.obstacle}")


def decision(zero: Any) -> Decision:
    """The decision on this ZeRO optimizer."""
    found = getattr(zero, "_balanced_adam", None)
    if found is None:
        found = zero._balanced_adam = Decision(zero)
    return found


def describe(zero: Any) -> str:
    """How the optimizer behind an engine takes its step, such as ``CUDA fused, ZeRO-1 one pass``.

    Before the first step it is ``one pass from the second step on``, if that bears out.

    Args:
        zero: ``engine.optimizer``.
    """
    optimizer = getattr(zero, "optimizer", zero)
    params = [*partitions.masters(zero)] or [p for group in optimizer.param_groups for p in group["params"]]
    device = params[0].device
    fused = (
        not isinstance(optimizer, Relative)
        and optimizer.defaults["fused"] is not False
        and kernels.why_not(device) is None
    )
    path = f"{device.type.upper()} {'fused' if fused else 'in plain torch'}"
    if stage := partitions.stage(zero):
        taken = decision(zero)
        plan = Plan.OWN_PASSES if taken.obstacle else taken.plan
        path += f", {stage} {plan.value}"
    return path


def _log(message: str) -> None:
    from deepspeed.utils import log_dist

    rank = torch.distributed.get_rank()
    log_dist(f"BalancedAdam, rank {rank} on {socket.gethostname()}: {message}", ranks=[rank], level=logging.WARNING)


def _obstacle(zero: Any) -> str | None:
    from balanced_adam.optimizer import BalancedAdam

    if isinstance(zero.optimizer, Relative):
        return NO_KERNEL
    if type(zero.optimizer) is not BalancedAdam:
        return f"the optimizer is a {type(zero.optimizer).__name__}, whose step() may be another"
    settings = zero.optimizer.defaults
    if settings["fused"] is False or not settings["fused_zero"]:
        return TURNED_OFF
    if settings["capturable"]:
        return "capturable is true"
    if type(zero) not in partitions.classes():
        return f"{type(zero).__name__} is not known"
    options = {
        "torch_autocast_gradscaler": "torch_autocast with a gradient scaler",
        "use_muon": "Muon",
        "_uses_muon": "Muon",
        "has_moe_layers": "groups of experts",
        "swap_optimizer": "offload to NVMe",
        "graph_harvesting": "graph_harvesting",
    }
    for attribute, option in options.items():
        if getattr(zero, attribute, None):
            return f"{option} is in use"
    if getattr(zero, "grad_acc_dtype", torch.float32) != torch.float32:  # BF16_Optimizer clips in that dtype
        return f"gradients are accumulated in {zero.grad_acc_dtype}"
    masters: list[Tensor] = partitions.masters(zero)
    if any(master.dtype != torch.float32 for master in masters):
        return f"the master weights are {masters[0].dtype}"
    return next((reason for master in masters if (reason := kernels.why_not(master.device)) is not None), None)
