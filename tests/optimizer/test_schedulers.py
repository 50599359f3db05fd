"""Learning-rate schedulers, torch's and DeepSpeed's: the optimizer takes the lr that they set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules
from torch.optim import Optimizer, lr_scheduler

from balanced_adam import BalancedAdam
from tests.optimizer.steps import parameters, train

STEPS = 12
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "LinearLR to 0, which rounds to -5e-20": lambda o: lr_scheduler.LinearLR(o, 1 / 3, 0.0, 8),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 3, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=STEPS + 1, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 8)], [4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "DeepSpeed's LRRangeTest": lambda o: lr_schedules.LRRangeTest(o, lr_range_test_step_size=2),
    "DeepSpeed's OneCycle": lambda o: lr_schedules.OneCycle(
        o, 1e-3, 1e-2, cycle_first_step_size=4, cycle_momentum=False
    ),
    "DeepSpeed's WarmupLR": lambda o: lr_schedules.WarmupLR(o, warmup_max_lr=1e-2, warmup_num_steps=4),
    "DeepSpeed's WarmupDecayLR": lambda o: lr_schedules.WarmupDecayLR(o, STEPS, warmup_max_lr=1e-2, warmup_num_steps=4),
    "DeepSpeed's WarmupCosineLR": lambda o: lr_schedules.WarmupCosineLR(o, STEPS, warmup_num_steps=4),
}
MOMENTUM: dict[str, Callable[[Optimizer], Any]] = {
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=STEPS + 1),
    "DeepSpeed's OneCycle": lambda o: lr_schedules.OneCycle(o, 1e-3, 1e-2, cycle_first_step_size=4),
}


def advance(scheduler: Any) -> None:
    scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))


@pytest.mark.filterwarnings("ignore:.*epoch parameter in `scheduler.step\\(\\)`:UserWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_steps_under_a_scheduler_are_those_of_the_learning_rates_that_it_sets(name: str) -> None:
    sgd = torch.optim.SGD(parameters(), lr=1e-2)
    scheduler, rates = SCHEDULERS[name](sgd), []
    for _ in range(STEPS):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        advance(scheduler)
    assert len(set(rates)) > 1
    ours, control = parameters(), parameters()
    optimizer, by_hand = BalancedAdam(ours, lr=1e-2), BalancedAdam(control, lr=1e-2)
    scheduler = SCHEDULERS[name](optimizer)
    for step, rate in enumerate(rates):
        train(optimizer, ours, range(step, step + 1))
        advance(scheduler)
        by_hand.param_groups[0]["lr"] = rate
        train(by_hand, control, range(step, step + 1))
    assert all(map(torch.equal, ours, control))


@pytest.mark.parametrize("name", MOMENTUM)
def test_a_scheduler_that_cycles_one_beta_is_refused_by_name(name: str) -> None:
    params = parameters()
    optimizer = BalancedAdam(params)
    scheduler = MOMENTUM[name](optimizer)
    with pytest.raises(ValueError, match=f"at this step, and BalancedAdam.*{name}.*give them cycle_momentum=False"):
        for step in range(STEPS):
            before = [p.detach().clone() for p in params]
            train(optimizer, params, range(step, step + 1))
            scheduler.step()
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("name", MOMENTUM)
def test_where_betas_may_differ_one_may_be_cycled(name: str) -> None:
    params = parameters()
    optimizer = BalancedAdam(params, betas=(0.9, 0.95), allow_unbalanced=True)
    scheduler = MOMENTUM[name](optimizer)
    for step in range(3):
        train(optimizer, params, range(step, step + 1))
        scheduler.step()
    assert optimizer.param_groups[0]["betas"] != (0.9, 0.95)
