"""The control: one process, no DeepSpeed, no BalancedAdam; the plain rule on plain tensors and all the data."""

from __future__ import annotations

from enum import Enum
from functools import cache

import torch
from torch import Tensor

from balanced_adam import rule
from tests.parity.model import EPS, GROUPS, MICRO, SHAPES, TRAINED, batch, first_weights

TENSORS = ("weights", "exp_avg", "exp_avg_sq")
State = dict[str, dict[str, Tensor]]
"""weights, exp_avg, exp_avg_sq -> name of the parameter -> value, fp32."""


class Absent(Enum):
    """What DeepSpeed gives the optimizer for a parameter that got no gradient in this step."""

    ZERO = "zeros"
    STALE = "the gradient of the last step that had one"


def gradient(step: int, name: str) -> Tensor | None:
    """The mean gradient over ranks and micro-batches, exactly; None if the step has none."""
    parts = [batch(step, micro).get(name) for micro in range(MICRO)]
    present = [part.sum(0) for part in parts if part is not None]
    return torch.stack(present).sum(0) / 16 if present else None


@cache
def train(steps: int, absent: Absent) -> State:
    """Weights and moments after ``steps`` steps."""
    weights = first_weights()
    state: State = {
        "weights": {name: weights[name] for name in TRAINED},
        "exp_avg": {name: torch.zeros(SHAPES[name]) for name in TRAINED},
        "exp_avg_sq": {name: torch.zeros(SHAPES[name]) for name in TRAINED},
    }
    last = {name: torch.zeros(SHAPES[name]) for name in TRAINED}
    for step in range(steps):
        for group in GROUPS:
            for name in filter(TRAINED.__contains__, group.names):
                grad = gradient(step, name)
                if grad is None:
                    grad = last[name] if absent is Absent.STALE else torch.zeros(SHAPES[name])
                last[name] = grad
                new = rule.update(
                    state["weights"][name],
                    grad,
                    state["exp_avg"][name],
                    state["exp_avg_sq"][name],
                    step=step + 1,
                    lr=group.lr,
                    betas=group.betas,
                    eps=EPS,
                    weight_decay=group.weight_decay,
                )
                for key, value in zip(TENSORS, new, strict=True):
                    state[key][name] = value
    return state
