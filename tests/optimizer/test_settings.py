"""The settings of an optimizer and its groups: what is refused, and what counts as a number."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from torch import nn

from balanced_adam import BalancedAdam
from tests.optimizer.steps import parameters, train


def in_words(value: Any) -> str:
    return "a torch.float32 tensor of shape (2,)" if isinstance(value, torch.Tensor) else repr(value)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, "lr is -1.0; it must be a finite number, at least 0"),
    ({"lr": float("nan")}, "lr is nan"),
    (
        {"lr": torch.ones(2)},
        r"lr is a torch.float32 tensor of shape \(2,\); give a number, or a tensor with one element",
    ),
    ({"lr": torch.tensor(True)}, "lr is a torch.bool tensor"),
    ({"lr": torch.tensor(1e-3 + 0j)}, "lr is a torch.complex64 tensor"),
    ({"betas": 1.0}, r"betas is 1.0; each beta must lie in \[0, 1\)"),
    ({"betas": (-0.1, -0.1)}, r"each beta must lie in \[0, 1\)"),
    ({"betas": (0.9, 0.999)}, r"betas is \(0.9, 0.999\).*allow_unbalanced=True"),
    ({"betas": "auto"}, "betas is 'auto'; give one number"),
    ({"betas": (0.9, 0.9, 0.9)}, "give one number, or a pair"),
    ({"eps": -1e-8}, "eps is -1e-08"),
    ({"eps": "auto"}, "eps is 'auto'; it must be a number"),
    ({"lr": None}, "lr is None; it must be a number"),
    ({"weight_decay": float("inf")}, "weight_decay is inf"),
    ({"maximize": "false"}, "maximize is 'false'; it must be True or False"),
    ({"maximize": 0}, "maximize is 0; it must be True or False"),
    *(
        ({field: wrong}, rf"{field} is {re.escape(in_words(wrong))}; (it must be a|give one) number")
        for field in ("lr", "eps", "weight_decay", "betas")
        for wrong in (True, "0.5", "1e-4", np.True_, 1j, Decimal("0.5"), [0.5, "0.5"], torch.tensor([0.5, 0.5]))
        if field != "lr" or not isinstance(wrong, torch.Tensor)
    ),
    ({"amsgrad": True}, "amsgrad is True, and (BalancedAdam|this optimizer) takes False alone: it"),
    ({"differentiable": True}, "differentiable is True, and BalancedAdam takes (True|False) alone"),
    ({"bias_correction": False}, "bias_correction is False, and BalancedAdam takes (True|False) alone"),
    (
        {"adam_w_mode": False},
        "adam_w_mode is False, and BalancedAdam takes (True|False) alone: its weight decay is AdamW's",
    ),
    ({"adamw_mode": 0}, "adamw_mode is 0, and"),
    ({"decoupled_weight_decay": False}, "decoupled_weight_decay is False, and"),
    ({"fp32_optimizer_states": False}, "fp32_optimizer_states is False, and"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_settings_are_named_in_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalancedAdam(parameters(), **options)
    with pytest.raises(ValueError, match=message):  # and in a group as well
        BalancedAdam([{"params": parameters(), **options}])


def tensor_of_one(value: float) -> torch.Tensor:
    return torch.tensor([value])


@pytest.mark.parametrize("kind", [float, Fraction, np.float32, np.float64, torch.tensor, tensor_of_one])
def test_real_numbers_of_any_type_and_lr_as_a_tensor_of_one_have_the_same_bits(kind: Callable[[Any], Any]) -> None:
    ours, control = parameters(), parameters()
    other: Any = float if kind in (torch.tensor, tensor_of_one) else kind
    settings: dict[str, Any] = {"eps": other(2**-20), "weight_decay": other(2**-4), "betas": (other(0.75),) * 2}
    train(BalancedAdam(ours, lr=kind(2**-7), **settings), ours, range(3))
    train(BalancedAdam(control, lr=2**-7, eps=2**-20, weight_decay=2**-4, betas=0.75), control, range(3))
    assert all(map(torch.equal, ours, control))


LEFT_OVER: dict[str, Any] = {
    "foreach": True,
    "amsgrad": False,
    "differentiable": False,
    "decoupled_weight_decay": True,
    "torch_adam": True,
    "adam_w_mode": True,
    "adamw_mode": True,
    "bias_correction": True,
    "set_grad_none": True,
    "fp32_optimizer_states": True,
}
"""What configurations of torch's AdamW and of DeepSpeed's FusedAdam and DeepSpeedCPUAdam may have."""


def test_what_is_left_of_another_adam_and_changes_nothing_is_accepted() -> None:
    names = {
        name for cls in (torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam) for name in inspect.signature(cls).parameters
    }
    own = inspect.signature(BalancedAdam).parameters.keys() | {"model_params"}
    assert names - own <= LEFT_OVER.keys()
    ours, control = parameters(), parameters()
    train(BalancedAdam([{"params": ours, **LEFT_OVER}], **LEFT_OVER), ours, range(3))
    train(BalancedAdam(control), control, range(3))
    assert all(map(torch.equal, ours, control))


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="BalancedAdam has no argument 'weigth_decay'; did you mean 'weight_decay'"):
        BalancedAdam(parameters(), weigth_decay=0.1)


@pytest.mark.parametrize("switch", ["allow_unbalanced", "fused_zero"])
def test_a_setting_of_the_whole_optimizer_is_refused_in_a_group(switch: str) -> None:
    default = switch == "fused_zero"
    BalancedAdam([{"params": parameters(), switch: default}])
    with pytest.raises(
        ValueError, match=f"{switch} is .* in a parameter group; it is a setting of the whole optimizer"
    ):
        BalancedAdam([{"params": parameters(), switch: not default}])


@pytest.mark.parametrize(
    "dtype", sorted({torch.int64, torch.int8, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2}, key=str)
)
def test_parameters_that_no_step_is_defined_for_are_refused(dtype: torch.dtype) -> None:
    frozen = nn.Parameter(torch.zeros(4).to(dtype), requires_grad=False)
    BalancedAdam([*parameters(), frozen])  # as torch's optimizers; it never gets a gradient
    if not dtype.is_floating_point:
        return
    param = nn.Parameter(torch.zeros(4).to(dtype))
    with pytest.raises(
        ValueError, match=rf"a parameter of shape \(4,\) is {dtype}; BalancedAdam takes float16, bfloat16,"
    ):
        BalancedAdam([*parameters(), param])


DELETED = object()
CHANGED: list[tuple[str, Any, str | None]] = [
    ("lr", float("nan"), "lr is nan at this step; it must be a finite number, at least 0"),
    ("lr", -1e-3, "lr is -0.001 at this step"),
    ("lr", "1e-3", "lr is '1e-3' at this step; it must be a number"),
    ("lr", torch.tensor(float("inf")), "lr is inf at this step"),
    ("eps", None, "eps is None at this step"),
    ("weight_decay", True, "weight_decay is True at this step"),
    ("betas", 0.9, None),
    ("betas", (0.9, float("nan")), "each beta must lie in"),
    ("maximize", "false", "maximize is 'false'; it must be True or False"),
    ("state", "packed", "state is 'packed'; it must be one of"),
    ("lr", -5e-20, None),  # as torch's LinearLR ends at 0
    *(
        (field, DELETED, f"{field} is (None|\\(\\))")
        for field in ("lr", "eps", "weight_decay", "betas", "state", "maximize")
    ),
]


@pytest.mark.parametrize(("field", "value", "message"), CHANGED)
def test_a_setting_that_is_changed_between_steps_is_checked_before_anything_moves(
    field: str, value: Any, message: str | None
) -> None:
    params = parameters()
    optimizer = BalancedAdam([{"params": params[:1]}, {"params": params[1:]}])
    train(optimizer, params, range(2))
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[1][field] = value
    if value is DELETED:
        del optimizer.param_groups[1][field]
    if message is None:
        train(optimizer, params, range(2, 3))
        return
    with pytest.raises(ValueError, match=message):
        train(optimizer, params, range(2, 3))
    assert all(map(torch.equal, params, before))


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
