"""Parameters that are DTensors (FSDP2, tensor parallelism): the bits of one process, or a refusal in a sentence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

pytest.importorskip("torch", "2.6", reason="before torch 2.6 FSDP2 and DTensor have no public names")
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from balanced_adam import BalancedAdam
from balanced_adam.state import FORMATS
from tests import session
from tests.optimizer.layouts import (
    LAYOUTS,
    STEPS,
    Weights,
    assert_same,
    everything,
    in_one_process,
    optimizer_of,
    several,
    sharded,
    take,
    whole,
)
from tests.ranks import device, spawn

pytestmark = pytest.mark.ranks
# Older than that, torch rounds the norm of a DTensor on each rank before it sums (seen with 2.9).
CLIP = 0.25 if Version(torch.__version__) >= Version("2.13") else None


def train(layout: str) -> Any:
    """Job: for each format, everything after all steps, and this rank's update sizes."""
    result = {}
    for state in FORMATS:
        model = sharded(Weights(), layout)
        optimizer = optimizer_of(model, state, fused=True)  # which insists on the kernels
        sizes = take(model, optimizer, range(STEPS), clip=CLIP)
        result[state] = everything(model, optimizer), sizes
    return result


@session.shared
def on(world: int) -> list[dict[str, Any]]:
    """What all jobs for so many ranks have returned on each of them, by name."""
    jobs: dict[str, tuple[Any, Any]] = {
        name: (train, name) for name, (shape, _) in LAYOUTS.items() if torch.Size(shape).numel() == world
    }
    if world == 2:
        jobs |= {"refused": (refused, None), "travel": (travel, None), "stepped between": (stepped_between, None)}
    return [dict(zip(jobs, results, strict=True)) for results in spawn(several, world, list(jobs.values()))]


@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtensors_have_the_bits_of_one_process(layout: str, state: str) -> None:
    shape, placements = LAYOUTS[layout]
    ranks = [results[layout][state] for results in on(torch.Size(shape).numel())]
    expected, sizes = in_one_process(state, clip=CLIP)
    for values, _ in ranks:
        assert_same(values, expected)
    copies = 2 if Replicate() in placements else 1
    for number, size in enumerate(sizes):
        of_ranks = [mine[number] for _, mine in ranks]
        assert sum(s.numel for s in of_ranks) == copies * size.numel
        assert max(s.greatest for s in of_ranks) == pytest.approx(size.greatest, rel=1e-12)
        assert sum(s.sum_of_squares for s in of_ranks) == pytest.approx(copies * size.sum_of_squares, rel=1e-6)


def refused(_: None) -> list[str]:
    """Job: what is said of sums that haven't been taken, of gradients placed otherwise, and of state from elsewhere."""
    mesh = init_device_mesh(device(2), (2,))
    said = []

    def attempt(action: Any) -> None:
        try:
            action()
        except ValueError as error:
            said.append(str(error))

    part = torch.ones(4, 4, device=mesh.device_type)
    partial = DTensor.from_local(part, mesh, [Partial()])
    attempt(lambda: BalancedAdam([nn.Parameter(partial)]))
    param = nn.Parameter(distribute_tensor(part, mesh, [Shard(0)]))
    before = whole(param)
    optimizer = BalancedAdam([param], lr=0.1)
    for gradient in (partial, distribute_tensor(part, mesh, [Replicate()])):
        param.grad = None
        param.__dict__.pop("grad", None)
        param.grad = gradient
        attempt(optimizer.step)
    assert torch.equal(before, whole(param)) and not optimizer.state
    param.grad = distribute_tensor(part, mesh, [Shard(0)])
    optimizer.step()
    plain = BalancedAdam([nn.Parameter(part.clone())], lr=0.1)
    attempt(lambda: plain.load_state_dict(optimizer.state_dict()))
    # A state dict of one process is cut to the parameter's parts.
    plain.param_groups[0]["params"][0].grad = part.clone()
    plain.step()
    other = BalancedAdam([param], lr=0.1)
    other.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert torch.equal(whole(other.state[param]["exp_avg"]), whole(plain.state_dict()["state"][0]["exp_avg"]))
    return said


def test_what_cannot_be_stepped_in_parts_is_refused_in_a_sentence() -> None:
    said = on(2)[0]["refused"]
    assert len(said) == 4
    assert "parameter of shape (4, 4) is a DTensor placed as (Partial(sum),)" in said[0]
    assert "gradient of shape (4, 4) is a DTensor placed as (Partial(sum),)" in said[1]
    assert "placed as (Replicate(),)" in said[2] and "redistribute the gradient" in said[2]
    assert "its parameter is a plain tensor" in said[3]


def stepped_between(_: None) -> list[str]:
    """Job: what autograd says of a step between forward and backward."""
    param = nn.Parameter(distribute_tensor(torch.ones(4, 4), init_device_mesh(device(2), (2,)), [Shard(0)]))
    optimizer = BalancedAdam([param], lr=0.1)
    said = []
    for fused in (True, False):
        optimizer = BalancedAdam([param], lr=0.1, fused=fused)
        loss = (param * param).sum()
        param.grad = torch.ones_like(param)
        optimizer.step()
        try:
            loss.backward()
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_autograd_notices_a_step_of_a_dtensor() -> None:
    said = on(2)[0]["stepped between"]
    assert len(said) == 2 and all("modified by an inplace operation" in each for each in said)


EVERY_WORD = torch.arange(-(2**15), 2**15, dtype=torch.int16)


def test_every_word_of_two_bytes_travels_and_is_copied_bit_for_bit() -> None:
    for results in on(2):
        assert all(torch.equal(EVERY_WORD, value) for value in results["travel"])


def travel(_: None) -> list[Tensor]:
    """Job: words that rank 0 has, in every way that states travel."""
    place = device(2)
    mine = EVERY_WORD.view(torch.bfloat16).to(place)
    empty = torch.zeros_like(mine) if dist.get_rank() else mine.clone()
    dist.broadcast(empty, 0)
    gathered = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(gathered, mine)
    mesh = init_device_mesh(place, (2,))
    cut = distribute_tensor(mine, mesh, [Shard(0)])
    copied = torch.empty_like(mine).copy_(mine)
    strided = torch.empty_like(mine.view(256, 256)).copy_(mine.view(256, 256).t()).t().reshape(-1)
    joined = torch.cat(mine.split(7))
    return [t.view(torch.int16).cpu() for t in (empty, *gathered, cut.full_tensor(), copied, strided, joined)]
