"""Optimizers that are neither in torch nor in the package, from their papers' formulas, for the table of responses.

They have what the table needs: float64 state of one parameter after another, no decay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Reference(torch.optim.Optimizer, ABC):
    """Steps by :meth:`move`."""

    def __init__(self, params: Any, lr: float = 1.0, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state["step"] = state.get("step", 0) + 1
                param.sub_(group["lr"] * self.move(param.grad, state, *group["betas"]))

    @abstractmethod
    def move(self, grad: Tensor, state: dict[str, Any], beta1: float, beta2: float) -> Tensor:
        """The step over lr."""


def averaged(state: dict[str, Any], name: str, value: Tensor, beta: float) -> Tensor:
    """The moving average of that name after one more value, from zero, uncorrected."""
    average = state[name] = beta * state.get(name, torch.zeros_like(value)) + (1.0 - beta) * value
    return average


class Signum(Reference):
    """The sign of an average (arXiv 1802.04434)."""

    def move(self, grad: Tensor, state: dict[str, Any], beta1: float, beta2: float) -> Tensor:
        return averaged(state, "m", grad, beta1).sign()


class Lion(Reference):
    """The sign of beta1 m + (1 - beta1) g, and then m's average with beta2 (arXiv 2302.06675)."""

    def move(self, grad: Tensor, state: dict[str, Any], beta1: float, beta2: float) -> Tensor:
        sign = (beta1 * state.get("m", torch.zeros_like(grad)) + (1.0 - beta1) * grad).sign()
        averaged(state, "m", grad, beta2)
        return sign


class AdamPlus(Reference):
    """z / sqrt(|z|), z an average of gradients and |z| the norm of all of it (arXiv 2011.11985, alpha = 1)."""

    def move(self, grad: Tensor, state: dict[str, Any], beta1: float, beta2: float) -> Tensor:
        z = averaged(state, "z", grad, beta1)
        return z / z.norm().sqrt()


class SAdam(Reference):
    """m / v, without a root, as for strongly convex losses (arXiv 1905.02957), but for its learning rate of 1 / t."""

    def move(self, grad: Tensor, state: dict[str, Any], beta1: float, beta2: float) -> Tensor:
        return averaged(state, "m", grad, beta1) / averaged(state, "v", grad.square(), beta2)


class Means(Reference):
    """Adam whose averages are plain means of all gradients."""

    def move(self, grad: Tensor, state: dict[str, Any], beta1: float, beta2: float) -> Tensor:
        beta = 1.0 - 1.0 / state["step"]
        return averaged(state, "m", grad, beta) / averaged(state, "v", grad.square(), beta).sqrt()
