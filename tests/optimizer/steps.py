"""Parameters of a few shapes, with gradients that the number of the step gives, and steps on them."""

from __future__ import annotations

import torch
from torch import nn


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((3, 5), (1,), (), (7,))]


def set_gradients(params: list[nn.Parameter], step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    gradients = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient
    return gradients


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def assert_same(a: list[nn.Parameter], b: list[nn.Parameter]) -> None:
    for p, q in zip(a, b, strict=True):
        assert torch.equal(p, q)


def raw(tensor: torch.Tensor | float) -> bytes | float:
    """Its bytes; a number itself."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    return bytes(tensor.detach().reshape(-1).view(torch.uint8).numpy())
