"""What can't be tested with an older DeepSpeed, since it has defects of its own, and from which version on it can.

``python -m tests.compat`` runs the tests with any version; docs/compatibility.md lists what is left out of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import deepspeed
import torch
from packaging.version import Version

from tests.parity.cases import Case

DEEPSPEED = Version(deepspeed.__version__.strip())


def since(version: str) -> bool:
    """Whether this DeepSpeed is that version, or a later one."""
    return Version(version) <= DEEPSPEED


@cache
def why_not(case: Case) -> str | None:
    """Why this cell can't be run with this DeepSpeed; None if it can."""
    if case.stage == 0 and not since("0.19.8") and not torch.cuda.is_available():
        return "DeepSpeed before 0.19.8 drops all gradients of stage 0's all-reduce on a CPU"
    if case.stage == 1 and case.grad_accum and Version(torch.__version__) < Version("2.5"):
        return "with torch 2.4 BF16_Optimizer fails on several CPU ranks, where it gathers weights into views"
    if case.stage == 1 and case.grad_accum and since("0.17") and not since("0.19"):
        if not since("0.18.5"):
            return "DeepSpeed 0.17.0 to 0.18.4 makes none of ZeRO's optimizers of fp32 accumulation at stage 1"
        # runtime/engine.py, _backward_epilogue: allreduce_gradients comes before BF16_Optimizer's backward_epilogue.
        return "DeepSpeed 0.18.5 to 0.18.9 does not reduce a step's last gradient over the ranks in BF16_Optimizer"
    if case.stage == 2 and not case.offload and since("0.17.6") and not since("0.18.3"):
        # runtime/zero/stage_1_and_2.py, independent_gradient_partition_epilogue
        return "DeepSpeed 0.17.6 to 0.18.2 keeps the last of a step's accumulated gradients alone at stage 2"
    return None


def why_not_universal(case: Case) -> str | None:
    """Why there is no universal checkpoint of this cell; None if there can be one."""
    if case.stage == 3 and not since("0.19.5"):
        return "DeepSpeed before 0.19.5 fails to convert a checkpoint of stage 3 with tensors that ranks do not divide"
    return why_not(case)


def possible(cases: Iterable[Case]) -> list[Case]:
    """Those that can be run."""
    return [case for case in cases if why_not(case) is None]
