"""The settings of an optimizer and its groups: what is refused, and what counts as a number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from balanced_adam import BalancedAdam
from tests.optimizer.steps import parameters, train

BAD: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, "lr is -1.0; it must be a finite number, at least 0"),
    ({"lr": float("nan")}, "lr is nan"),
    ({"lr": torch.ones(2)}, r"lr is a tensor of shape \(2,\); give a number or a 0-dim tensor"),
    ({"betas": 1.0}, r"betas is 1.0; each beta must lie in \[0, 1\)"),
    ({"betas": (-0.1, -0.1)}, r"each beta must lie in \[0, 1\)"),
    ({"betas": (0.9, 0.999)}, r"betas is \(0.9, 0.999\).*allow_unbalanced=True"),
    ({"betas": "auto"}, "betas is 'auto'; give one number"),
    ({"betas": (0.9, 0.9, 0.9)}, "give one number, or a pair"),
    ({"eps": -1e-8}, "eps is -1e-08"),
    ({"eps": "auto"}, "eps is 'auto'; it must be a number"),
    ({"lr": None}, "lr is None; it must be a number"),
    ({"weight_decay": float("inf")}, "weight_decay is inf"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_settings_are_named_in_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalancedAdam(parameters(), **options)
    with pytest.raises(ValueError, match=message):  # and in a group as well
        BalancedAdam([{"params": parameters(), **options}])


def test_numbers_written_as_text_are_numbers() -> None:
    params = parameters()
    as_text: dict[str, Any] = {"lr": "1e-3", "eps": "1e-8", "weight_decay": "0.1"}  # YAML reads 1e-8 as text
    train(BalancedAdam(params, **as_text), params, range(1))


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    optimizer = BalancedAdam(parameters())
    with pytest.raises(ValueError, match="lr is -1"):
        optimizer.add_param_group({"params": parameters(), "lr": -1})
    with pytest.raises(ValueError, match="complex"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ["eps", "weight_decay"])
def test_a_setting_that_is_a_tensor_is_read_where_it_is_now(name: str) -> None:
    value = torch.tensor(0.0)
    results = []
    for fused in (None, False):
        value.fill_(0.0)
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = BalancedAdam([param], lr=0.1, fused=fused)
        for number in range(2):
            optimizer.param_groups[0][name] = value
            value.fill_(0.0 if number == 0 else 5.0)
            param.grad = torch.ones(3)
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results) and float(results[0][0]) != pytest.approx(0.8, abs=1e-3)
