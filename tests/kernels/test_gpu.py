"""On a real NVIDIA GPU: the CUDA kernels have the CPU's bits, on any stream, in graphs, and beyond 2^31 elements.

Collected everywhere; skipped, with the reason, where there is no GPU. Not yet run on one.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from balanced_adam import BalancedAdam, kernels
from balanced_adam.kernels.table import Variant
from balanced_adam.packed import FORMATS
from tests.kernels.bits import SIZES, VARIANTS, Setting, State, expected, first, same, update
from train.common.files import REPOSITORY

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


def on_gpu(state: State, shift: int = 0) -> State:
    """At ``shift`` elements past an allocation's start."""
    moved: list[Tensor | None] = []
    for tensor in state:
        if tensor is None:
            moved.append(None)
            continue
        buffer = torch.empty(tensor.numel() + shift, dtype=tensor.dtype, device="cuda")
        buffer[shift:].copy_(tensor)
        moved.append(buffer[shift:])
    return State._make(moved)


def back(state: State) -> State:
    return State._make(None if tensor is None else tensor.cpu() for tensor in state)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_flat_and_multi_have_the_bits_of_the_rule(variant: Variant) -> None:
    for shift in range(4):
        states = [on_gpu(first(variant, size, seed=size), shift) for size in (*SIZES, 100_003)]
        controls = [expected(first(variant, size, seed=size), Setting(), 1) for size in (*SIZES, 100_003)]
        kernels.step([update(state, Setting(), 1) for state in states])  # multi
        assert all(same(back(state), control) for state, control in zip(states, controls, strict=True))
        for size in SIZES:
            state = on_gpu(first(variant, size, seed=size), shift)
            kernels.step([update(state, Setting(), 1)])  # flat
            assert same(back(state), expected(first(variant, size, seed=size), Setting(), 1))


@pytest.mark.parametrize("dtype", list(kernels.DTYPES), ids=str)
def test_sums_of_squares_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, 5, 16_385, 1_000_003)]
    ours = kernels.sums_of_squares([tensor.cuda() for tensor in tensors]).cpu()
    torch.testing.assert_close(ours, kernels.sums_of_squares(tensors), rtol=1e-14, atol=0.0)
    tensors[2][7] = torch.nan
    assert kernels.sums_of_squares([tensor.cuda() for tensor in tensors]).isfinite().tolist() == [
        True,
        True,
        False,
        True,
    ]


def test_two_streams_do_not_wait_for_each_other_and_have_the_same_bits() -> None:
    controls, states = [], []
    for seed in (1, 2):
        state = first(VARIANTS[0], 1_000_003, seed)
        controls.append(expected(state, Setting(), 1))
        states.append(on_gpu(state))
    torch.cuda.synchronize()
    for state in states:
        with torch.cuda.stream(torch.cuda.Stream()):
            kernels.step([update(state, Setting(), 1)])
    torch.cuda.synchronize()
    assert all(same(back(state), control) for state, control in zip(states, controls, strict=True))


@pytest.mark.parametrize("state", ["fp32", *FORMATS])
def test_a_captured_graph_replays_steps_with_a_changing_lr_bit_for_bit(state: str) -> None:
    def parameters(device: str) -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(n, generator=generator).to(device)) for n in (7, 1000, 65_537)]

    lr = torch.tensor(0.1, device="cuda")
    ours, control = parameters("cuda"), parameters("cpu")
    for mine, theirs in zip(ours, control, strict=True):
        theirs.grad = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
        mine.grad = theirs.grad.cuda()
    optimizer = BalancedAdam(ours, lr=lr, capturable=True, state=state)
    plain = BalancedAdam(control, lr=0.1, fused=False, state=state)
    optimizer.step()
    plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(5):
        lr.fill_(0.1 / (step + 1))
        plain.param_groups[0]["lr"] = float(lr)
        graph.replay()
        plain.step()
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, control, strict=True))
    assert int(optimizer.state[ours[0]]["step"]) == 6


def test_two_tensors_beyond_2_31_elements() -> None:
    size = 2**31 + 1027
    if torch.cuda.get_device_properties(0).total_memory < 2 * size * 12:
        pytest.skip("not enough memory")
    states = []
    for _ in range(2):
        param = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
        grad = torch.ones_like(param)
        m, v = (torch.zeros(size, device="cuda") for _ in range(2))
        states.append(State(param, grad, m, v, None, None))
    kernels.step([update(state, Setting(weight_decay=0.0), 1) for state in states])
    small = State._make(t[:8].cpu() if t is not None else None for t in states[0])
    control = expected(
        small._replace(param=torch.zeros(8).bfloat16(), first=torch.zeros(8), second=torch.zeros(8)),
        Setting(weight_decay=0.0),
        1,
    )
    assert control.second is not None
    for state in states:
        assert state.second is not None
        for tensor, value in ((state.param, control.param[0]), (state.second, control.second[0])):
            assert bool(torch.eq(tensor, value.cuda()).all())


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    import shutil

    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer")
    command = [sanitizer, f"--tool={tool}", "--error-exitcode=9", sys.executable, "-m", "balanced_adam"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
