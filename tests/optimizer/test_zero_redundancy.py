"""torch's own ZeRO-1, ZeroRedundancyOptimizer, around BalancedAdam: the bits of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer

from balanced_adam import BalancedAdam
from tests import session
from tests.optimizer.layouts import STEPS, Weights, assert_same, gradient, several
from tests.ranks import spawn

pytestmark = pytest.mark.ranks

REDUNDANT = ("fp32", "packed16")


def zero_redundancy(state: str) -> Any:
    """Job: the steps through torch's own ZeRO-1, cut, consolidated and loaded in the middle."""
    model = Weights()
    settings: dict[str, Any] = {
        "optimizer_class": BalancedAdam,
        "lr": 0.1,
        "betas": 0.9,
        "weight_decay": 0.1,
        "state": state,
    }
    optimizer = ZeroRedundancyOptimizer(model.parameters(), **settings)
    for step in range(STEPS):
        if step == 3:
            optimizer.consolidate_state_dict(to=0)
            box: list[Any] = [optimizer.state_dict() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(box)
            optimizer = ZeroRedundancyOptimizer(model.parameters(), **settings)
            optimizer.load_state_dict(box[0])
        for name, param in model.named_parameters():
            param.grad = gradient(name, step)
        optimizer.step()
    return {name: param.detach() for name, param in model.named_parameters()}


@session.shared
def redundant() -> list[list[dict[str, Tensor]]]:
    """The weights on each of two ranks, for each state."""
    return spawn(several, 2, [(zero_redundancy, state) for state in REDUNDANT])


@pytest.mark.parametrize("state", REDUNDANT)
def test_zero_redundancy_optimizer_has_the_bits_of_one_process(state: str) -> None:
    model = Weights()
    alone = BalancedAdam(model.parameters(), lr=0.1, betas=0.9, weight_decay=0.1, state=state, fused=False)
    for step in range(STEPS):
        for name, param in model.named_parameters():
            param.grad = gradient(name, step)
        alone.step()
    for results in redundant():
        assert_same(results[REDUNDANT.index(state)], {name: param.detach() for name, param in model.named_parameters()})
