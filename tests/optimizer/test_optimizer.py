"""BalancedAdam as a torch.optim.Optimizer: steps, groups, schedulers, closures, copies, and the size of updates."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from balanced_adam import BalancedAdam, rule
from tests.optimizer.steps import assert_same, parameters, set_gradients, train


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.95)])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_it_follows_torch_adamw_with_the_same_betas(betas: tuple[float, float], maximize: bool, eps: float) -> None:
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    options: dict[str, Any] = {"lr": 1e-2, "betas": betas, "weight_decay": 0.1, "maximize": maximize, "eps": eps}
    train(BalancedAdam(ours, allow_unbalanced=True, **options), ours, range(50))
    train(torch.optim.AdamW(theirs, **options), theirs, range(50))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_the_step_is_the_rule_bit_for_bit() -> None:
    params = parameters()
    optimizer = BalancedAdam(params, lr=1e-2, betas=0.9)
    expected = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    for step in range(1, 6):
        gradients = set_gradients(params, step)
        optimizer.step()
        expected = [
            rule.update(w, g, m, v, step=step, lr=1e-2, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.01)
            for g, (w, m, v) in zip(gradients, expected, strict=True)
        ]
    for p, (w, m, v) in zip(params, expected, strict=True):
        assert torch.equal(p, w)
        assert torch.equal(optimizer.state[p]["exp_avg"], m) and torch.equal(optimizer.state[p]["exp_avg_sq"], v)


def test_each_group_has_its_own_settings_as_in_torch_adamw() -> None:
    own: list[dict[str, Any]] = [
        {"lr": 1e-3},
        {"betas": (0.5, 0.5), "weight_decay": 0.0},
        {"eps": 1.0},
        {"maximize": True},
    ]
    results = []
    for cls in (BalancedAdam, torch.optim.AdamW):
        groups = [parameters(torch.float64) for _ in own]
        named = [{"params": group, **options} for group, options in zip(groups, own, strict=True)]
        optimizer = cls(named[:-1], lr=1e-2, betas=(0.95, 0.95))
        optimizer.add_param_group(named[-1])
        every = [p for group in groups for p in group]
        train(optimizer, every, range(20))
        results.append(every)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_a_parameter_without_gradient_keeps_its_value_and_its_own_step_count() -> None:
    params = parameters()
    optimizer = BalancedAdam(params)
    before = params[0].detach().clone()
    set_gradients(params, 0)
    params[0].grad = None
    optimizer.step()
    assert torch.equal(params[0], before) and params[0] not in optimizer.state
    set_gradients(params, 1)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1 and optimizer.state[params[1]]["step"] == 2


def test_lr_may_be_a_tensor_and_schedulers_work_on_both() -> None:
    as_float, as_tensor = parameters(), parameters()
    for params, lr in ((as_float, 0.1), (as_tensor, torch.tensor(0.1, dtype=torch.float64))):
        optimizer = BalancedAdam(params, lr=lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
        for step in range(4):
            train(optimizer, params, range(step, step + 1))
            scheduler.step()
        assert float(optimizer.param_groups[0]["lr"]) == 0.1 / 16
    assert_same(as_float, as_tensor)


def test_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = BalancedAdam([p], lr=0.5, weight_decay=0.0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert p.item() == pytest.approx(1.5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_like_the_original(copied: Callable[[BalancedAdam], BalancedAdam]) -> None:
    params = parameters()
    optimizer = BalancedAdam(params, betas=(0.9, 0.99), allow_unbalanced=True)
    train(optimizer, params, range(3))
    twin = copied(optimizer)
    twins = twin.param_groups[0]["params"]
    train(optimizer, params, range(3, 6))
    train(twin, twins, range(3, 6))
    assert_same(params, twins)


def test_update_size_is_the_distance_moved_divided_by_lr() -> None:
    params = parameters(torch.float64)
    optimizer = BalancedAdam(params, lr=0.25, betas=(0.9, 0.999), weight_decay=0.0, allow_unbalanced=True)
    assert optimizer.update_size().numel == 0
    train(optimizer, params, range(5))
    before = [p.detach().clone() for p in params]
    assert optimizer.update_size().numel > 0
    assert optimizer.update_size().numel == 0  # nothing has moved since
    set_gradients(params, 5)
    params[0].grad = None
    optimizer.step()
    params, before = params[1:], before[1:]
    moved = torch.cat([(p - q).flatten() / 0.25 for p, q in zip(params, before, strict=True)])
    size = optimizer.update_size()
    assert size.numel == moved.numel()
    assert size.greatest == pytest.approx(float(moved.abs().max()), rel=1e-12)
    assert size.sum_of_squares == pytest.approx(float((moved**2).sum()), rel=1e-12)


def test_balanced_steps_never_exceed_lr_and_unbalanced_ones_do() -> None:
    for betas, bounded in ((0.9, True), ((0.9, 0.999), False)):
        p = nn.Parameter(torch.zeros(1))
        optimizer = BalancedAdam([p], lr=1.0, betas=betas, eps=0.0, weight_decay=0.0, allow_unbalanced=True)
        largest = 0.0
        for step in range(200):
            p.grad = torch.tensor([1.1**step])
            optimizer.step()
            largest = max(largest, optimizer.update_size().greatest)
        assert (largest <= 1 + 1e-6) is bounded


def test_a_sparse_gradient_is_refused_before_anything_moves() -> None:
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    params[0].grad, params[1].grad = torch.ones(2), torch.ones(2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        BalancedAdam(params).step()
    assert torch.equal(params[0], torch.ones(2))
