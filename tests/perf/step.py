"""The optimizer's step alone, on the CPU; ``python -m tests.perf step``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from balanced_adam import BalancedAdam
from balanced_adam.kernels.cpu import ISA, load
from balanced_adam.packed import FORMATS
from tests.perf.measure import interleaved, machine, ratio
from train.analysis.plots import markdown_table

SETTINGS: dict[str, Any] = {"lr": 1e-4, "eps": 1e-8, "weight_decay": 0.1}
BETAS = (0.95, 0.95)


def gpt2_small() -> list[tuple[int, ...]]:
    """The shapes of GPT-2's 148 tensors, 124 million parameters."""
    width = 768
    norm = [(width,), (width,)]
    block = [*norm, (width, 3 * width), (3 * width,), (width, width), (width,), *norm]
    block += [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *(block * 12), *norm]


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 1e-3
    return params


def contenders(shapes: list[tuple[int, ...]]) -> dict[str, Callable[[], object]]:
    """Those that step in one pass, on tensors of these shapes, fp32."""
    found: dict[str, Callable[[], object]] = {
        "BalancedAdam": ours(shapes),
        **{f"BalancedAdam, {state}": ours(shapes, state=state) for state in FORMATS},
        "torch AdamW, fused": torchs(shapes, fused=True),
    }
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        found["DeepSpeedCPUAdam"] = DeepSpeedCPUAdam(parameters(shapes), betas=BETAS, **SETTINGS).step
    except Exception as error:  # its extension is compiled at first use, and much can go wrong with that
        warnings.warn(f"DeepSpeedCPUAdam can't be measured: {error}", stacklevel=1)
    return found


def in_many_passes(shapes: list[tuple[int, ...]]) -> dict[str, Callable[[], object]]:
    """Optimizers that make large temporary tensors, beside BalancedAdam; apart, since they leave cold memory behind."""
    return {
        "BalancedAdam": ours(shapes),
        "torch AdamW, foreach": torchs(shapes, foreach=True),
        "torch AdamW, for-loop": torchs(shapes, foreach=False),
        "BalancedAdam, fused=False": ours(shapes, fused=False),
    }


def ours(shapes: list[tuple[int, ...]], fused: bool = True, state: str = "fp32") -> Callable[[], object]:
    return BalancedAdam(parameters(shapes), betas=BETAS, fused=fused, state=state, **SETTINGS).step


def torchs(shapes: list[tuple[int, ...]], **how: bool) -> Callable[[], object]:
    return torch.optim.AdamW(parameters(shapes), betas=BETAS, **SETTINGS, **how).step


def sixteen_bits(size: int) -> Callable[[], object]:
    """A bf16 gradient, and a bf16 copy of the new weights: ZeRO's case."""
    (param,) = parameters([(size,)])
    assert param.grad is not None
    gradient, copy, param.grad = param.grad.bfloat16(), torch.empty(size, dtype=torch.bfloat16), None
    factor = torch.tensor([0.5])
    optimizer = BalancedAdam([param], betas=BETAS, fused=True, **SETTINGS)

    def step() -> None:
        optimizer.set_fused_grad(param, [gradient], factor, copy)
        optimizer.step()

    return step


def in_place(size: int) -> Callable[[], object]:
    """What memory allows: read and write as many bytes as a step does (28 an element), and compute next to nothing."""
    array = torch.zeros(size * 28 // 8)
    return lambda: array.mul_(1.0)


def report(title: str, found: dict[str, Callable[[], object]], rounds: int) -> str:
    times = interleaved(found, rounds)
    ours = times["BalancedAdam"].seconds
    rows = [{"step": name, "ms": str(t), "ratio to BalancedAdam": ratio(t.seconds, ours)} for name, t in times.items()]
    return f"{title}, median of {rounds} [min .. max]:\n\n{markdown_table(rows)}\n"


def main(rounds: int = 11) -> None:
    size = 40_000_000
    print(f"{machine()}, {ISA[load().isa]}\n")
    flat = contenders([(size,)])
    flat["BalancedAdam, bf16 gradient and bf16 copy"] = sixteen_bits(size)
    flat["(560 MB multiplied by 1 in place)"] = in_place(size)
    print(report("One tensor of 40 M elements, fp32", flat, rounds))
    del flat
    print(report("The same, with those that make large temporary tensors", in_many_passes([(size,)]), rounds))
    print(report("GPT-2 small: 148 tensors, 124 M elements, fp32", contenders(gpt2_small()), rounds))
    print(report("The same, with those that make large temporary tensors", in_many_passes(gpt2_small()), rounds))
