"""DistributedDataParallel: every rank steps all weights, with the bits of one process on all the data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from balanced_adam import BalancedAdam
from balanced_adam.state import FORMATS
from tests import session
from tests.optimizer.layouts import several
from tests.ranks import device, spawn

WORLD, STEPS, SIZE = 2, 5, 7


def network() -> nn.Linear:
    """Its weights are dyadic rationals, so that its gradients and their mean over ranks are exact in any order."""
    linear = nn.Linear(SIZE, 1)
    for param in linear.parameters():
        nn.init.constant_(param, 0.5)
    return linear


def rows(step: int) -> Tensor:
    """The data of all ranks, (WORLD, SIZE): small dyadic rationals."""
    return torch.randint(-16, 17, (WORLD, SIZE), generator=torch.Generator().manual_seed(step)) / 32.0


def under_ddp(state: str) -> dict[str, Tensor]:
    """Job: a rank's weights after some steps on its own rows."""
    place = device(WORLD)
    model = DistributedDataParallel(network().to(place))
    optimizer = BalancedAdam(model.parameters(), lr=0.1, betas=0.9, weight_decay=0.1, state=state)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(rows(step)[[torch.distributed.get_rank()]].to(place)).mean().backward()
        optimizer.step()
    return {name: param.detach().cpu() for name, param in model.module.named_parameters()}


@session.shared
def everything() -> list[list[dict[str, Tensor]]]:
    """The weights on each rank, for each format of the state."""
    return spawn(several, WORLD, [(under_ddp, state) for state in FORMATS])


@pytest.mark.ranks
@pytest.mark.parametrize("state", FORMATS)
def test_ddp_has_the_bits_of_one_process(state: str) -> None:
    model = network()
    alone = BalancedAdam(model.parameters(), lr=0.1, betas=0.9, weight_decay=0.1, state=state, fused=False)
    for step in range(STEPS):
        alone.zero_grad()
        model(rows(step)).mean().backward()
        alone.step()
    for results in everything():
        for name, param in model.named_parameters():
            assert torch.equal(results[FORMATS.index(state)][name], param.detach())
