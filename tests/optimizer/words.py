"""Packed words and moments to test with, and parameters that are trained with a packed state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from balanced_adam.packed import FORMATS

SHORT = [FORMATS["packed16"], FORMATS["packed8"]]


def code(words: Tensor) -> Tensor:
    """The words as integers, whatever they are stored as; of bfloat16 some are NaN, which no comparison finds equal."""
    return words.view(torch.int16) if words.dtype == torch.bfloat16 else words


def moments(size: int, seed: int, largest: float = 0.5) -> tuple[Tensor, Tensor]:
    """m and v over the range that both short formats cover, |m| up to ``largest`` of √v."""
    generator = torch.Generator().manual_seed(seed)
    root = 2.0 ** (torch.rand(size, generator=generator) * 26 - 24)
    return root * (torch.rand(size, generator=generator) * 2 - 1) * largest, root * root


def numbers(count: int) -> tuple[Tensor, Tensor]:
    """All pairs of ``count`` evenly spaced numbers from 0 to 2^32 - 1, as dither has them."""
    step = 2**32 // count
    u_w, u_r = torch.meshgrid(*[torch.arange(count) * step + step // 2] * 2, indexing="ij")
    return u_w.flatten(), u_r.flatten()


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(33, 5), (1,), (0,), (1000,)]
    return [
        nn.Parameter(torch.randn(s, generator=generator).to(d)) for s in shapes for d in (torch.float32, torch.bfloat16)
    ]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for param in params:
            param.grad = (0.01 * torch.randn(param.shape, generator=generator)).to(param.dtype)
        optimizer.step()
