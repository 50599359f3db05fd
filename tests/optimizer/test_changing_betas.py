"""Betas that change from step to step: bias correction, the bound on a step, and runs that are cut."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

from balanced_adam import BalancedAdam
from tests.optimizer.steps import parameters, raw, set_gradients, train


def test_betas_made_unequal_by_hand_are_refused_and_a_common_change_is_followed() -> None:
    params = parameters()
    optimizer = BalancedAdam(params)
    set_gradients(params, 0)
    optimizer.param_groups[0]["betas"] = 0.5
    optimizer.step()
    optimizer.param_groups[0]["betas"] = (0.5, 0.6)
    with pytest.raises(ValueError, match="at this step, and BalancedAdam"):
        optimizer.step()


@pytest.mark.parametrize("fused", [None, False], ids=["kernel", "torch"])
@pytest.mark.parametrize("course", ["rising", "falling", "random"])
def test_m_stays_within_the_root_of_v_whatever_common_betas_and_gradients_there_have_been(
    course: str, fused: bool | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(2000))
    optimizer = BalancedAdam([p], lr=1e-3, fused=fused)
    for step in range(60):
        chance = float(torch.rand((), generator=generator))
        beta = {"rising": 0.5 + step / 125, "falling": 0.99 - step / 100, "random": chance}[course]
        optimizer.param_groups[0]["betas"] = (beta, beta)
        # All sizes; half of them have one sign, which brings m closest to the root of v.
        sizes = 10.0 ** (8.0 * torch.rand(2000, generator=generator) - 4.0)
        p.grad = torch.where(torch.arange(2000) % 2 == 0, sizes, sizes * torch.randn(2000, generator=generator))
        optimizer.step()
        state = optimizer.state[p]
        assert bool((state["exp_avg"].double() ** 2 <= state["exp_avg_sq"].double() * (1 + 1e-5)).all())


def moving(course: str, step: int) -> float:
    return {
        "slowly up": 1.0 - 0.2 * 0.05 ** (step / 200),
        "fast up": 1.0 - 0.2 * 0.0005 ** (step / 200),
        "down": 0.999 - 0.004 * step,
        "jumps": (0.9, 0.99, 0.5, 0.0)[step // 5 % 4],
    }[course]


@pytest.mark.parametrize("fused", [None, False], ids=["kernel", "torch"])
@pytest.mark.parametrize("state", ["fp32", "packed16"])
@pytest.mark.parametrize("course", ["slowly up", "fast up", "down", "jumps"])
def test_while_betas_change_no_step_exceeds_lr_and_the_correction_is_off_by_one_factor_of_beta_at_the_most(
    course: str, state: str, fused: bool | None
) -> None:
    """On the sequence that attains the bound, a constant gradient, whose average is the sum of the weights."""
    p = torch.nn.Parameter(torch.zeros(50))
    optimizer = BalancedAdam([p], lr=1.0, betas=moving(course, 0), eps=0.0, weight_decay=0.0, fused=fused, state=state)
    product = 1.0
    for step in range(200):
        beta = moving(course, step)
        product *= beta
        optimizer.param_groups[0]["betas"] = (beta, beta)
        with torch.no_grad():
            p.zero_()
        p.grad = torch.ones_like(p)
        optimizer.step()
        weights, most = math.sqrt(1.0 - product), 1.0 + 1e-6
        # The number of steps that makes the product is rounded up: at most one factor of beta in the sum of weights.
        least = weights / math.sqrt(1.0 - product * beta)
        assert float(p.abs().max()) <= most
        if state == "fp32":
            assert float(p.abs().min()) >= least * (1 - 1e-5)


Route = Callable[[BalancedAdam, list[nn.Parameter]], tuple[BalancedAdam, list[nn.Parameter]]]


def written(optimizer: BalancedAdam, params: list[nn.Parameter]) -> tuple[BalancedAdam, list[nn.Parameter]]:
    """Through a state dict in a file, into an optimizer with other settings."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded = BalancedAdam(params, betas=0.5, state=optimizer.param_groups[0]["state"])
    loaded.load_state_dict(torch.load(buffer))
    return loaded, params


def written_before_states_held_it(
    optimizer: BalancedAdam, params: list[nn.Parameter]
) -> tuple[BalancedAdam, list[nn.Parameter]]:
    """As a file from before, and as DeepSpeed's universal checkpoints: the group alone tells anything of the betas."""
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        del state["log_beta_excess"]
    loaded = BalancedAdam(params, betas=0.5, state=optimizer.param_groups[0]["state"])
    loaded.load_state_dict(saved)
    return loaded, params


def copied(optimizer: BalancedAdam, params: list[nn.Parameter]) -> tuple[BalancedAdam, list[nn.Parameter]]:
    """With its parameters, as an ensemble or a test does."""
    params, optimizer = copy.deepcopy((params, optimizer))
    return optimizer, params


def pickled(optimizer: BalancedAdam, params: list[nn.Parameter]) -> tuple[BalancedAdam, list[nn.Parameter]]:
    params, optimizer = pickle.loads(pickle.dumps((params, optimizer)))
    return optimizer, params


ROUTES: list[Route] = [written, written_before_states_held_it, copied, pickled]
"""What a run may be cut by; the optimizer and its parameters go in and come out."""


@pytest.mark.parametrize("state", ["fp32", "packed32", "packed16", "packed8"])
@pytest.mark.parametrize("seed", range(4))
def test_a_run_whose_betas_change_may_be_cut_anywhere_and_keeps_its_bits(seed: int, state: str) -> None:
    """Steps, changes of betas and cuts in any order; so also a change between a step and the save after it."""
    actions: list[str | Route] = ["step", "step", "betas", *ROUTES]
    draw = random.Random(seed)
    params = parameters()
    again = copy.deepcopy(params)
    uncut, cut = (BalancedAdam(p, lr=0.1, betas=0.9, state=state) for p in (params, again))
    for number in range(60):
        action = draw.choice(actions)
        if callable(action):
            cut, again = action(cut, again)
        elif action == "step":
            for optimizer, group in ((uncut, params), (cut, again)):
                set_gradients(group, number)
                optimizer.step()
        else:
            beta = draw.choice([0.0, 0.5, 0.9, 0.95, 0.99, 0.999, draw.random()])
            for optimizer in (uncut, cut):
                optimizer.param_groups[0]["betas"] = (beta, beta)
        assert all(map(torch.equal, params, again)), (number, action)
    ours, theirs = uncut.state_dict(), cut.state_dict()
    for mine, other in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert mine.pop("decay", None) == pytest.approx(other.pop("decay", None), rel=1e-13)
        assert mine == other
    for number, values in ours["state"].items():
        for name, value in values.items():
            rounded = name == "log_beta_excess"  # it is a difference, rounded at each save
            same = raw(theirs["state"][number][name])
            assert raw(value) == (pytest.approx(same, rel=1e-9, abs=1e-9) if rounded else same), name


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("state", ["fp32", "packed16"])
def test_betas_that_a_schedule_has_set_before_the_save_leave_no_step_longer_than_lr(route: Route, state: str) -> None:
    """Three steps at 0.9, then 0.99, then a save: with the averages taken for those of 0.99, a step was 2.66 lr."""
    params = [torch.nn.Parameter(torch.zeros(50))]
    optimizer = BalancedAdam(params, lr=1.0, betas=0.9, eps=0.0, weight_decay=0.0, state=state)
    for number in range(6):
        if number == 3:
            optimizer.param_groups[0]["betas"] = (0.99, 0.99)
            optimizer, params = route(optimizer, params)
        before = params[0].detach().clone()
        params[0].grad = torch.ones(50)
        optimizer.step()
        assert float((params[0] - before).abs().max()) <= 1.0 + 1e-6


def test_a_parameter_that_gets_its_first_gradient_after_a_change_of_betas_is_corrected_for_its_own_steps() -> None:
    late, early = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = BalancedAdam([early, late], lr=1.0, betas=0.9, eps=0.0, weight_decay=0.0)
    for number in range(6):
        if number == 4:
            optimizer.param_groups[0]["betas"] = (0.99, 0.99)
        early.grad = torch.ones(3)
        late.grad = torch.ones(3) if number >= 4 else None
        optimizer.step()
    assert torch.allclose(late, torch.full((3,), -2.0), rtol=1e-6)


def test_betas_that_never_change_leave_the_groups_as_they_were() -> None:
    params = parameters()
    optimizer = BalancedAdam(params, betas=0.9)
    for number in range(3):
        optimizer.param_groups[0]["betas"] = [0.9, 0.9]
        set_gradients(params, number)
        optimizer.step()
    assert "decay" not in optimizer.param_groups[0]


def test_a_loader_that_fills_in_what_a_file_lacks_leaves_bias_correction_right() -> None:
    """As torch's set_optimizer_state_dict does for a whole state dict, with what an optimizer has after one step."""
    params = parameters()
    old = torch.optim.AdamW(params, lr=0.1, betas=(0.9, 0.9))
    train(old, params, range(30))
    saved = copy.deepcopy(old.state_dict())
    again = copy.deepcopy(params)
    train(old, params, range(30, 33))
    new = BalancedAdam(again, betas=0.95)
    filled = copy.deepcopy(new.state_dict())
    train(new, again, range(1))
    filled = copy.deepcopy(new.state_dict())
    for number, state in filled["state"].items():
        state.update(saved["state"][number])
    filled["param_groups"] = saved["param_groups"]
    for p, q in zip(again, [torch.nn.Parameter(p.detach()) for p in parameters()], strict=True):
        p.data.copy_(q)
    new.load_state_dict(filled)
    for p in again:
        assert new.state[p]["log_beta_product"] == pytest.approx(30 * math.log(0.9), rel=1e-14)


def test_a_late_parameter_of_a_file_that_lacks_the_product_takes_no_step_longer_than_lr() -> None:
    early, late = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = BalancedAdam([early, late], lr=1.0, betas=0.99, eps=0.0, weight_decay=0.0)
    for number in range(106):
        early.grad = torch.ones(3)
        late.grad = torch.ones(3) if number >= 100 else None
        optimizer.step()
    optimizer.param_groups[0]["betas"] = (0.5, 0.5)
    optimizer.step()
    loaded, _ = written_before_states_held_it(optimizer, [early, late])
    for _ in range(3):
        before = late.detach().clone()
        loaded.step()
        assert 0.1 < float((late - before).abs().max()) <= 1.0 + 1e-6
        loaded.load_state_dict(copy.deepcopy(loaded.state_dict()))  # what it writes it reads


@pytest.mark.parametrize("change", [lambda o, p: None, lambda o, p: o.state.update({p: dict(o.state[p])})])
def test_a_state_put_there_by_hand_counts_as_made_with_the_betas_of_then(
    change: Callable[[BalancedAdam, nn.Parameter], None],
) -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    adamw = torch.optim.AdamW([param], lr=1.0, betas=(0.9, 0.9), eps=0.0, weight_decay=0.0)
    for _ in range(3):
        param.grad = torch.ones(3)
        adamw.step()
    ours = BalancedAdam([param], lr=1.0, betas=0.9, eps=0.0, weight_decay=0.0)
    ours.state[param] = adamw.state[param]
    change(ours, param)
    ours.param_groups[0]["betas"] = (0.99, 0.99)
    before = param.detach().clone()
    ours.step()
    assert float((param - before).abs().max()) <= 1.0 + 1e-6
