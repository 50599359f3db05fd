"""A model with awkward shapes whose gradient is its input, and data whose every sum and mean is exact.

A step sees MICRO x SAMPLES samples; each is an integer tensor per parameter. Rank r of W takes SAMPLES / W of every
micro-batch and feeds the model W times their sum, in sixteenths, so that the mean over ranks and micro-batches is
the sum over all samples / 16, whatever W. No number on the way needs more than bf16's 8 bits, also where DeepSpeed sums
before it divides: 4 ranks x 2 micro-batches x 12 samples x 2 = 192 < 256.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MICRO = 2
SAMPLES = 12  # divisible by every world size
WORLDS = (1, 2, 3, 4)
LARGEST = 2

SHAPES = {
    "matrix": (7, 9),
    "one": (1,),
    "few": (3,),  # fewer elements than four ranks
    "frozen": (5,),
    "long": (101,),
    "sometimes": (13,),
    "last": (2, 3, 5),
}
TRAINED = [name for name in SHAPES if name != "frozen"]
WITHOUT_GRADIENT = {"sometimes": (0, 2, 3, 12)}  # the steps, counted from 0, in which the model leaves it out


class Group(NamedTuple):
    """One parameter group: the names in it and its own settings."""

    names: tuple[str, ...]
    lr: float
    betas: tuple[float, float]
    weight_decay: float

    def settings(self, state: str = "fp32") -> dict[str, Any]:
        """As the optimizer takes them; a packed state has its second beta alone."""
        betas = self.betas if state == "fp32" else (self.betas[1],) * 2
        return {"lr": self.lr, "betas": betas, "weight_decay": self.weight_decay}


def moving_beta(group: int, step: int) -> float:
    """The betas of a group in a step where they change over time: up by much, and to and fro."""
    return 1.0 - 0.5 * 0.6**step if group == 0 else (0.9, 0.5, 0.99)[step % 3]


EPS = 2.0**-10  # large enough to be seen
GROUPS = (
    Group(("matrix", "one", "few", "frozen"), 1e-2, (0.9, 0.9), 0.1),
    Group(("long", "sometimes", "last"), 3e-3, (0.9, 0.99), 0.01),
)


def integers(shape: tuple[int, ...], largest: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


def first_weights() -> dict[str, Tensor]:
    """The weights before training, in sixty-fourths: exact in bf16."""
    return {name: integers(shape, 64, seed) / 64 for seed, (name, shape) in enumerate(SHAPES.items())}


def batch(step: int, micro: int) -> dict[str, Tensor]:
    """All samples of a micro-batch: name -> (SAMPLES, *shape); a parameter that the model leaves out is absent."""
    seed = 1000 * (MICRO * step + micro + 1)
    return {
        name: integers((SAMPLES, *shape), LARGEST, seed + number)
        for number, (name, shape) in enumerate(SHAPES.items())
        if step not in WITHOUT_GRADIENT.get(name, ())
    }


def share(step: int, micro: int, rank: int, world: int) -> dict[str, Tensor]:
    """What rank ``rank`` feeds the model."""
    each = SAMPLES // world
    part = slice(rank * each, (rank + 1) * each)
    return {name: values[part].sum(0) * world / 8 for name, values in batch(step, micro).items()}


class AwkwardModel(nn.Module):
    """loss = sum of parameter * input, so that the gradient is the input whatever the weights are."""

    def __init__(self) -> None:
        super().__init__()
        for name, weight in first_weights().items():
            self.register_parameter(name, nn.Parameter(weight, requires_grad=name in TRAINED))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        terms = [(getattr(self, name) * value).sum().float() for name, value in inputs.items()]
        return torch.stack(terms).sum()

    def groups(self, state: str = "fp32") -> list[dict[str, Any]]:
        """The parameter groups, as users hand them to ``deepspeed.initialize``."""
        return [{"params": [getattr(self, name) for name in group.names], **group.settings(state)} for group in GROUPS]
