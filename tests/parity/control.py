"""The control: one process, no DeepSpeed, no BalancedAdam; the plain rule on plain tensors and all the data."""

from __future__ import annotations

import math
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from balanced_adam import packed, rule
from tests.parity import relatives
from tests.parity.model import EPS, GROUPS, MICRO, SHAPES, TRAINED, batch, first_weights, moving_beta

TENSORS = ("weights", "exp_avg", "exp_avg_sq")
State = dict[str, dict[str, Tensor]]
"""weights, exp_avg, exp_avg_sq -> name of the parameter -> value, fp32."""


class MissingGrad(Enum):
    """What DeepSpeed gives the optimizer for a parameter that got no gradient in this step."""

    ZERO = "zeros"
    STALE = "the gradient of the last step that had one"
    STALE_AND_CLIPPED = "what it got last time, times this step's clipping factor; not part of this step's norm"


class Clip(NamedTuple):
    """How DeepSpeed clips: the norm is the norm of the groups' norms, and each of these is rounded to ``dtype``."""

    limit: float
    dtype: torch.dtype
    groups: tuple[tuple[str, ...], ...]
    exact: bool = False
    """Whether the groups' roots are correctly rounded. On a CPU torch takes MKL's, which aren't on AMD's."""
    ranks: int = 1
    """The norm is a mean over so many ranks, which all have the same, by a sum of quotients."""

    def factor(self, grads: dict[str, Tensor]) -> float:
        """What every gradient is multiplied by: 1 / max(1, (norm + 1e-6) / limit), in ``dtype``."""
        # Sums of squares of dyadic rationals, exact in any order.
        squares = [sum(float(grads[n].double().square().sum()) for n in group if n in grads) for group in self.groups]
        by_torch = torch.tensor(squares, dtype=self.dtype).sqrt()
        roots = torch.tensor([math.sqrt(each) for each in squares], dtype=self.dtype) if self.exact else by_torch
        part = torch.linalg.vector_norm(roots) / self.ranks
        norm = sum([part] * self.ranks, torch.zeros_like(part))
        return float(1.0 / torch.clamp((norm + 1e-6) / self.limit, min=1.0))


def gradient(step: int, name: str) -> Tensor | None:
    """The mean gradient over ranks and micro-batches, exactly; None if the step has none."""
    parts = [batch(step, micro).get(name) for micro in range(MICRO)]
    present = [part.sum(0) for part in parts if part is not None]
    return torch.stack(present).sum(0) / 16 if present else None


@cache
def train(
    steps: int,
    absent: MissingGrad,
    clip: Clip | None = None,
    device: str = "cpu",
    stored: str = "fp32",
    moving: bool = False,
    variant: str = "adam",
    later: tuple[tuple[int, str], ...] = (),
    relative: relatives.Control | None = None,
) -> State:
    """Weights and moments after ``steps`` steps, worked out on the ranks' kind of device and returned on the CPU.

    Moments are stored as ``stored``, and from each step in ``later`` on (counted from 0) in the format named there.
    ``variant`` is AdamW's, by its own paper's formula, or one of tests/parity/relatives.py.
    """
    if variant in relatives.RELATIVES:
        relative = relative or relatives.Control(variant)
    weights = first_weights()
    state: State = {
        "weights": {name: weights[name].to(device) for name in TRAINED},
        "exp_avg": {name: torch.zeros(SHAPES[name], device=device) for name in TRAINED},
        "exp_avg_sq": {name: torch.zeros(SHAPES[name], device=device) for name in TRAINED},
    }
    given = {name: torch.zeros(SHAPES[name]) for name in TRAINED}
    betas_of = stored
    for step in range(steps):
        for when, fmt in later:
            if step == when:
                stored, betas_of = fmt, "packed16"  # whichever came first, betas are equal from now on
                if fmt != "fp32":
                    _pack_again(packed.FORMATS[fmt], state, step)
        grads = {name: grad for name in TRAINED if (grad := gradient(step, name)) is not None}
        if absent is MissingGrad.ZERO:
            given = {name: torch.zeros(SHAPES[name]) for name in TRAINED}
        given |= grads
        factor = clip.factor(grads if absent is MissingGrad.STALE_AND_CLIPPED else given) if clip else 1.0
        clipped = {name: grad * factor for name, grad in given.items()}
        if absent is MissingGrad.STALE_AND_CLIPPED:
            given = clipped
        for number, group in enumerate(GROUPS):
            settings = {**group.settings(betas_of), "step": step + 1, "eps": EPS}
            if moving:
                betas = [moving_beta(number, each) for each in range(step + 1)]
                # As many steps at the beta of now as make the product of all, or one more.
                settings["step"] = math.ceil(sum(map(math.log, betas)) / math.log(betas[-1]) - 1e-9)
                settings["betas"] = (betas[-1], betas[-1])
            lr, decay = settings["lr"], settings["weight_decay"]
            if variant == "adamd":  # the first moment is not corrected (arXiv 2110.10828)
                corrected = 1.0 - rule.power(settings["betas"][0], settings["step"])
                settings |= {"lr": lr * corrected, "weight_decay": decay / corrected}
            elif variant == "adamprox":  # the weights are divided by 1 + lr x decay after the step (arXiv 2202.00089)
                settings["lr"] = lr / (1.0 + lr * decay)
            for name in filter(TRAINED.__contains__, group.names):
                old = [state[key][name] for key in TENSORS]
                each: dict[str, Any] = {**settings, "bounded": stored != "fp32"}
                given_now = clipped[name].to(device)
                if relative:
                    new = relative.update(name, step + 1, old[0], given_now, *old[1:], **each)
                else:
                    new = rule.update(old[0], given_now, *old[1:], **each)
                if stored != "fp32":
                    numbers = packed.dither(old[0], given_now, step + 1)
                    new = (new[0], *packed.unpack(packed.pack(packed.FORMATS[stored], *new[1:], numbers)))
                for key, value in zip(TENSORS, new, strict=True):
                    state[key][name] = value
    return {key: {name: value.cpu() for name, value in values.items()} for key, values in state.items()}


def _pack_again(fmt: packed.Format, state: State, step: int) -> None:
    """Moments in another format from now on: rounded as a step would, but by m instead of the gradient."""
    for name in TRAINED:
        weights, exp_avg, exp_avg_sq = (state[key][name] for key in TENSORS)
        words = packed.pack(fmt, exp_avg, exp_avg_sq, packed.dither(weights, exp_avg, step))
        state["exp_avg"][name], state["exp_avg_sq"][name] = packed.unpack(words)
