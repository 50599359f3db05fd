"""Loading a state: from BalancedAdam, torch.optim.AdamW, other Adams and earlier versions, and back."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from balanced_adam import BalancedAdam
from tests.optimizer.steps import assert_same, parameters, raw, train


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_moments_survive_a_save_and_load_in_their_own_dtype_and_the_run_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    straight, cut = parameters(dtype), parameters(dtype)
    train(BalancedAdam(straight), straight, range(10))
    optimizer = BalancedAdam(cut)
    train(optimizer, cut, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = BalancedAdam(cut)
    again.load_state_dict(torch.load(file, weights_only=True))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for p in cut:
        assert again.state[p]["exp_avg"].dtype == again.state[p]["exp_avg_sq"].dtype == expected
        assert torch.equal(again.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])
    train(again, cut, range(5, 10))
    assert_same(straight, cut)


@pytest.mark.parametrize("to_torch", [False, True])
def test_a_run_switches_between_torch_adamw_and_ours_in_the_middle(to_torch: bool) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.95, 0.95), "weight_decay": 0.1}
    classes = [torch.optim.AdamW, BalancedAdam]
    if to_torch:
        classes.reverse()
    straight, switched = parameters(torch.float64), parameters(torch.float64)
    train(torch.optim.AdamW(straight, **options), straight, range(20))
    first = classes[0](switched, **options)
    train(first, switched, range(10))
    second = classes[1](switched, lr=123.0, betas=0.5 if classes[1] is BalancedAdam else (0.5, 0.5))
    second.load_state_dict(first.state_dict())
    train(second, switched, range(10, 20))
    for p, q in zip(straight, switched, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_bf16_moments_of_torch_adamw_are_loaded_into_float32() -> None:
    params = parameters(torch.bfloat16)
    theirs = torch.optim.AdamW(params, betas=(0.95, 0.95))
    train(theirs, params, range(3))
    ours = BalancedAdam(params)
    ours.load_state_dict(theirs.state_dict())
    for p in params:
        assert ours.state[p]["exp_avg"].dtype == torch.float32
        assert torch.equal(ours.state[p]["exp_avg"], theirs.state[p]["exp_avg"].float())


def test_moments_of_16_bit_weights_share_no_memory_with_the_state_that_is_loaded() -> None:
    params = parameters(torch.bfloat16)
    first = BalancedAdam(params)
    train(first, params, range(2))
    saved = first.state_dict()
    before = copy.deepcopy(saved["state"])
    second = BalancedAdam(params)
    second.load_state_dict(saved)
    train(second, params, range(2, 4))
    for number, state in before.items():
        assert all(raw(saved["state"][number][key]) == raw(value) for key, value in state.items())


def test_settings_that_somebody_loads_into_the_groups_count_as_those_of_load_state_dict() -> None:
    """As DeepSpeed does with a universal checkpoint; the averages were made with another beta than the new one."""
    ends = []
    for by_hand in (True, False):
        params = [torch.nn.Parameter(torch.ones(4))]
        old = BalancedAdam(params, lr=0.1, betas=0.9)
        train(old, params, range(5))
        saved = copy.deepcopy(old.state_dict())
        new = BalancedAdam(params, lr=0.1, betas=0.95)
        if by_hand:
            new.param_groups[0]["decay"] = (0.5, 3, -0.1)  # left from before
            with new.keeping_own():
                new.param_groups[0].update({k: v for k, v in saved["param_groups"][0].items() if k != "params"})
            new.state[params[0]] = saved["state"][0]
        else:
            new.load_state_dict(saved)
        assert new.param_groups[0]["betas"] == (0.9, 0.9)
        train(new, params, range(5, 6))
        assert "decay" not in new.param_groups[0]
        ends.append(params[0].detach())
    assert torch.equal(*ends)


def test_what_a_load_hook_makes_of_the_state_is_what_is_loaded() -> None:
    params = parameters(torch.bfloat16)
    theirs = BalancedAdam(params)
    train(theirs, params, range(3))
    saved = theirs.state_dict()
    backwards = copy.deepcopy(saved)
    backwards["param_groups"][0]["params"].reverse()  # a state whose parameters come in another order
    ours = BalancedAdam(params)

    def reorder(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "param_groups": [{**g, "params": g["params"][::-1]} for g in state["param_groups"]]}

    ours.register_load_state_dict_pre_hook(reorder)
    ours.load_state_dict(backwards)
    for p in params:
        assert torch.equal(ours.state[p]["exp_avg"], theirs.state[p]["exp_avg"])


def test_a_checkpoint_never_brings_the_permission_for_unequal_betas() -> None:
    params = parameters()
    baseline = BalancedAdam(params, betas=(0.9, 0.999), allow_unbalanced=True)
    train(baseline, params, range(2))
    saved = baseline.state_dict()
    assert all("allow_unbalanced" not in group for group in saved["param_groups"])
    ours = BalancedAdam(params, betas=0.9)
    with pytest.warns(UserWarning, match="goes on with"):
        ours.load_state_dict(saved)
    ours.param_groups[0].update(saved["param_groups"][0])  # as DeepSpeed's universal checkpoints do
    with pytest.raises(ValueError, match=r"betas is \(0.9, 0.999\)"):
        ours.step()


def test_unequal_betas_in_a_checkpoint_do_not_sneak_in() -> None:
    params = parameters()
    theirs = torch.optim.AdamW(params, lr=0.5)
    train(theirs, params, range(3))
    ours = BalancedAdam(params, betas=0.9)
    with pytest.warns(UserWarning, match=r"betas \(0.9, 0.999\); this BalancedAdam goes on with \(0.9, 0.9\)"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["betas"] == (0.9, 0.9) and ours.param_groups[0]["lr"] == 0.5
    baseline = BalancedAdam(params, allow_unbalanced=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        baseline.load_state_dict(theirs.state_dict())
    assert baseline.param_groups[0]["betas"] == (0.9, 0.999)


def test_a_step_count_that_is_an_int_works_as_a_tensor_does() -> None:
    ours, theirs = parameters(), parameters()
    a, b = BalancedAdam(ours), BalancedAdam(theirs)
    train(a, ours, range(3))
    train(b, theirs, range(3))
    for p in ours:
        a.state[p]["step"] = int(a.state[p]["step"])
    train(a, ours, range(3, 6))
    train(b, theirs, range(3, 6))
    assert_same(ours, theirs)


def test_parameters_that_share_one_step_tensor_are_counted_apart() -> None:
    """As after loading a universal checkpoint of DeepSpeed at stage 3."""
    ours, theirs = parameters(), parameters()
    a, b = BalancedAdam(ours), BalancedAdam(theirs)
    train(a, ours, range(3))
    train(b, theirs, range(3))
    shared = torch.tensor(3.0)
    for p in ours:
        a.state[p]["step"] = shared
    train(a, ours, range(3, 6))
    train(b, theirs, range(3, 6))
    assert_same(ours, theirs)


SAVED_BY_OTHERS: dict[str, dict[str, Any]] = {  # the settings of a group, as each saves them
    "deepspeed.ops.adam.FusedAdam": {"bias_correction": True, "step": 3},
    "deepspeed.ops.adam.DeepSpeedCPUAdam": {"bias_correction": True, "amsgrad": False},
    "torch 1.8's AdamW": {"amsgrad": False},
    "torch 2.0's AdamW": {
        **{"amsgrad": False, "foreach": None, "maximize": False, "capturable": False, "differentiable": False},
        "fused": None,
    },
}


@pytest.mark.parametrize("name", SAVED_BY_OTHERS)
@pytest.mark.parametrize("state", ["fp32", "packed16"])
def test_the_state_of_another_adam_is_gone_on_with(name: str, state: str) -> None:
    """Settings that it doesn't have stay as they are here; DeepSpeed's count steps in ints."""
    params, others = parameters(), parameters()
    betas = (0.95, 0.95)
    theirs = torch.optim.AdamW(others, lr=1e-2, betas=betas, weight_decay=0.1)
    train(theirs, others, range(3))
    saved = copy.deepcopy(theirs.state_dict())
    for group in saved["param_groups"]:
        kept = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "params")}
        group.clear()
        group.update({**kept, **SAVED_BY_OTHERS[name]})
    for each in saved["state"].values():
        each["step"] = int(each["step"])
    for ours, other in zip(params, others, strict=True):
        ours.data.copy_(other.data)
    optimizer = BalancedAdam([{"params": params, "maximize": False}], lr=1.0, betas=0.9, state=state)
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["maximize"], group["state"]) == (1e-2, betas, False, state)
    train(optimizer, params, range(3, 6))
    train(theirs, others, range(3, 6))
    for ours, other in zip(params, others, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5 if state == "fp32" else 2e-2)


@pytest.mark.parametrize("fused", [None, False], ids=["kernel", "torch"])
@pytest.mark.parametrize("state", ["fp32", "packed32", "packed16", "packed8"])
def test_a_state_dict_of_an_earlier_version_goes_on_with_the_bits_that_it_had_there(
    state: str, fused: bool | None
) -> None:
    """files/state_0d6eb9e.pt: words of 16 bits are int16, and what is known of changed betas stands in the groups.

    ``after`` are that version's own weights six steps later.
    """
    file = Path(__file__).parent / "files" / "state_0d6eb9e.pt"
    old = torch.load(file, weights_only=True)[state]
    params = [nn.Parameter(w.clone()) for w in old["weights"]]
    groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
    optimizer = BalancedAdam(groups, state=state, fused=fused)
    optimizer.load_state_dict(old["saved"])
    for step in range(8, 14):
        beta = (0.9, 0.9, 0.99, 0.99, 0.8, 0.95)[step % 6]
        for group in optimizer.param_groups:
            group["betas"] = (beta, beta)
        for number, p in enumerate(params):
            generator = torch.Generator().manual_seed(10 * step + number)
            p.grad = torch.randint(-16, 17, p.shape, generator=generator) / 32
        optimizer.step()
    assert_same(params, old["after"])


@pytest.mark.parametrize("extra", [{"ema": {"x": torch.zeros(1)}}, {"global_step": torch.tensor(3)}, {7: {}}])
def test_state_that_belongs_to_no_parameter_is_kept_as_torch_keeps_it(extra: dict[Any, Any]) -> None:
    params = parameters()
    optimizer = BalancedAdam(params)
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    saved["state"] |= extra
    again = BalancedAdam(params)
    again.load_state_dict(saved)
    assert all(again.state[key] is value or again.state[key] == value for key, value in extra.items())
    saved["state"] |= {9: saved["state"].pop(0)}
    with pytest.raises(ValueError, match="has moments of the parameter 9, which none of its groups has"):
        again.load_state_dict(saved)


def test_ids_may_be_numpys_and_none_is_there_twice() -> None:
    params = parameters()
    optimizer = BalancedAdam(params)
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["params"] = list(np.arange(len(params)))
    BalancedAdam(params).load_state_dict(saved)
    saved["param_groups"][0]["params"][1] = 0
    with pytest.raises(ValueError, match=r"has .*0.* among its groups' params; .* in one place"):
        BalancedAdam(params).load_state_dict(saved)
