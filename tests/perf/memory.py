"""Bytes a weight of all that a step needs, by component, beside other optimizers; ``python -m tests.perf.memory``.

One process, bf16 weights and gradients with fp32 master weights. Each optimizer is built on real tensors and takes one
step; then the storages of all tensors alive are counted. The command prints a table and writes docs/figures/memory.svg
(docs/packed-state.md).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from balanced_adam import BalancedAdam
from balanced_adam.state import FORMATS
from tests.perf.measure import machine
from tests.perf.scaling import alive
from train.analysis.plots import as_svg, markdown_table
from train.common.files import REPOSITORY

TENSORS, SIZE = 10, 1_000_000
FIGURE = REPOSITORY / "docs" / "figures" / "memory.svg"
COLOURS = {
    "weight, bf16": "#7c9fd3",
    "gradient, bf16": "#dd8452",
    "gradient, fp32 copy for the step": "#f2c9a8",
    "master weight, fp32": "#b0b0b0",
    "optimizer state": "#6dbb80",
}
"""Component: its colour."""

Sizes = dict[str, float]
Build = Callable[[list[Tensor]], torch.optim.Optimizer]


def contenders() -> dict[str, Build]:
    """Name: what builds it on the master weights; bitsandbytes must have been installed."""

    def balanced(state: str) -> Build:
        return lambda master: BalancedAdam(master, lr=1e-3, state=state, fused=True)

    eight_bit = import_module("bitsandbytes").optim.AdamW8bit
    return {
        "torch AdamW": lambda master: torch.optim.AdamW(master, lr=1e-3, fused=True),
        f"bitsandbytes {version('bitsandbytes')} AdamW8bit": lambda master: eight_bit(master, lr=1e-3),
        **{f"BalancedAdam {state}": balanced(state) for state in FORMATS},
    }


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a nest of dicts and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def measured(build: Build) -> Sizes:
    """Bytes a weight by component after one step of a fresh optimizer; together they are all that is alive."""
    before, generator = alive(), torch.Generator().manual_seed(0)
    weights = [torch.randn(SIZE + 7 * k, generator=generator).mul_(0.02).bfloat16() for k in range(TENSORS)]
    gradients = [torch.randn(w.shape, generator=generator).mul_(1e-3).bfloat16() for w in weights]
    master = [weight.float() for weight in weights]
    optimizer = build(master)
    if isinstance(optimizer, BalancedAdam):  # its kernels read the bf16 gradient, and write the bf16 weight
        for param, gradient, weight in zip(master, gradients, weights, strict=True):
            assert optimizer.set_fused_grad(param, [gradient], lp_param_out=weight)
        optimizer.step()
    else:
        for param, gradient in zip(master, gradients, strict=True):
            param.grad = gradient.float()  # torch takes no gradient of another dtype than its parameter's
        optimizer.step()
        torch._foreach_copy_(weights, master)
    parts = [weights, gradients, [p.grad for p in master if p.grad is not None], master, dict(optimizer.state)]
    sizes = []
    for part in parts:
        storages = [tensor.untyped_storage() for tensor in tensors_in(part)]
        sizes.append(sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))
    numel = sum(map(Tensor.numel, weights))
    assert abs(alive() - before - sum(sizes)) < 1e-3 * numel, "something is alive that is in no component"
    return {name: size / numel for name, size in zip(COLOURS, sizes, strict=True)}


def draw(found: dict[str, Sizes]) -> str:
    """Horizontal bars, one for each optimizer."""
    figure, axes = plt.subplots(figsize=(8.4, 3.2), layout="constrained")
    for row, sizes in enumerate(found.values()):
        left = 0.0
        for name, size in sizes.items():
            if size:
                axes.barh(row, size, left=left, color=COLOURS[name], label=name if row == 0 else None)
                axes.text(left + size / 2, row, f"{size:.2f}".removesuffix(".00"), ha="center", va="center", fontsize=9)
            left += size
        axes.text(left + 0.15, row, f"{left:.2f}", va="center", fontsize=10, fontweight="bold")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set(xlim=(0, 22), xticks=range(0, 21, 4), xlabel="bytes a weight during a step, one process")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.38, 1.0), ncols=3, frameon=False, fontsize=9)
    return as_svg(figure)


if __name__ == "__main__":
    if find_spec("bitsandbytes") is None:
        sys.exit("error: bitsandbytes is not installed; pip install --no-deps bitsandbytes.")
    print(f"{machine()}\n")
    found = {name: measured(build) for name, build in contenders().items()}
    FIGURE.write_text(draw(found))
    numbers = {name: {**sizes, "sum": sum(sizes.values())} for name, sizes in found.items()}
    print(markdown_table([{"optimizer": k, **{c: f"{n:.2f}" for c, n in v.items()}} for k, v in numbers.items()]))
