"""BalancedAdam as a torch.optim.Optimizer: groups, dtypes, state, loading from and to torch.optim.AdamW."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from balanced_adam import BalancedAdam, rule


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((3, 5), (1,), (), (7,))]


def set_gradients(params: list[nn.Parameter], step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    gradients = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient
    return gradients


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def assert_same(a: list[nn.Parameter], b: list[nn.Parameter]) -> None:
    for p, q in zip(a, b, strict=True):
        assert torch.equal(p, q)


def raw(tensor: torch.Tensor | float) -> bytes | float:
    """Its bytes; a number itself."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    return bytes(tensor.detach().reshape(-1).view(torch.uint8).numpy())


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


def test_the_optimizer_never_shares_memory_with_the_state_it_loaded() -> None:
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
    """As DeepSpeed does with a universal checkpoint; the averages were made with another beta than this run began with."""
    ends = []
    for by_hand in (True, False):
        params = [torch.nn.Parameter(torch.ones(4))]
        old = BalancedAdam(params, lr=0.1, betas=0.9)
        train(old, params, range(5))
        saved = copy.deepcopy(old.state_dict())
        new = BalancedAdam(params, lr=0.1, betas=0.95)
        if by_hand:
            new.param_groups[0]["decay"] = (0.5, 3, -0.1)  # of before
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


def test_the_state_of_an_optimizer_without_betas_is_refused_and_nothing_changes() -> None:
    params = [torch.nn.Parameter(torch.ones(4))]
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    train(sgd, params, range(1))
    optimizer = BalancedAdam(params)
    with pytest.raises(ValueError, match="groups without betas"):
        optimizer.load_state_dict(sgd.state_dict())
    train(optimizer, params, range(1))


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


def test_a_sparse_gradient_is_refused_before_anything_moves() -> None:
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    params[0].grad, params[1].grad = torch.ones(2), torch.ones(2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        BalancedAdam(params).step()
    assert torch.equal(params[0], torch.ones(2))


def test_betas_made_unequal_by_hand_are_refused_and_a_common_change_is_followed() -> None:
    params = parameters()
    optimizer = BalancedAdam(params)
    set_gradients(params, 0)
    optimizer.param_groups[0]["betas"] = 0.5
    optimizer.step()
    optimizer.param_groups[0]["betas"] = (0.5, 0.6)
    with pytest.raises(ValueError, match="betas are equal"):
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
        # Of any size, and for half of them with one sign, which brings m closest to the root of v.
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
        # The number of steps that makes the product is rounded up: the sum of the weights by one factor of beta, at the most.
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
    """As a file from before, and as DeepSpeed's universal checkpoints: what is known of the betas, the group alone says."""
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
            rounded = name == "log_beta_excess"  # that of a difference, at each save
            same = raw(theirs["state"][number][name])
            assert raw(value) == (pytest.approx(same, rel=1e-9, abs=1e-9) if rounded else same), name


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("state", ["fp32", "packed16"])
def test_betas_that_a_schedule_has_set_before_the_save_leave_no_step_longer_than_lr(route: Route, state: str) -> None:
    """Three steps at 0.9, then 0.99, then a save: where the averages were taken for those of 0.99, a step was 2.66 lr."""
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


@pytest.mark.parametrize("change", ["amsgrad", "coupled", "shape", "groups"])
def test_a_foreign_state_is_refused(change: str) -> None:
    params = parameters()
    optimizer = BalancedAdam(params)
    train(optimizer, params, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    if change == "amsgrad":
        state["param_groups"][0]["amsgrad"] = True
    elif change == "coupled":
        state = torch.optim.Adam(params, weight_decay=0.1).state_dict()
    elif change == "shape":
        state["state"][0]["exp_avg"] = torch.zeros(4)
    else:
        state["param_groups"].append(dict(state["param_groups"][0], params=[]))
    message = {
        "amsgrad": "amsgrad=True",
        "coupled": r"weight_decay = 0\.1 added to the gradient",
        "shape": r"exp_avg has shape \(4,\), its parameter \(3, 5\)",
        "groups": "groups",
    }
    with pytest.raises(ValueError, match=message[change]):
        optimizer.load_state_dict(state)
    assert optimizer.state[params[0]]["exp_avg"].shape == (3, 5)


NO_NUMBERS = [math.nan, math.inf, -1.0, "much", None, [0.1], torch.ones(3), 10**400]
BAD_STATES: dict[str, list[Any]] = {  # where in a loaded state, and what must not be there
    "group lr": NO_NUMBERS,
    "group eps": NO_NUMBERS,
    "group weight_decay": NO_NUMBERS,
    "group betas": [math.nan, 1.0, -0.1, (0.9, 1.5), (0.9, math.nan), (0.9,), (0.9, 0.9, 0.9), "0.9, 0.9", None, {}],
    "group maximize": ["false", 1, None],
    "group state": ["packed12", None, 3, "packed8"],
    "group decay": [3, (0.9,), (0.9, -1, -1.0), (0.9, 3, 1.0), (math.nan, 3, -1.0), ("a", "b", "c")],
    "state step": [-1, -1.0, math.nan, math.inf, 2.5, "three", torch.ones(2), torch.tensor(-1.0), None],
    "state exp_avg": [
        torch.zeros(4),
        torch.zeros(3, 6),
        torch.zeros(()),
        None,
        3.0,
        torch.zeros(3, 5).to_sparse(),
        torch.zeros(3, 5, dtype=torch.complex64),
        torch.zeros(3, 5, device="meta"),
    ],
    "state exp_avg_sq": [torch.zeros(4), torch.full((3, 5), -1e-12), -torch.eye(5)[:3]],
    "state log_beta_excess": [0.5, math.nan, -math.inf, "a", torch.ones(2), 3 * 0.105361],  # the last: a product of 1
}


@pytest.mark.parametrize(
    ("place", "value"),
    [(place, value) for place, values in BAD_STATES.items() for value in values],
    ids=lambda v: repr(v)[:30],
)
def test_a_state_with_a_bad_value_is_refused_and_nothing_changes(place: str, value: Any) -> None:
    params = parameters()
    optimizer = BalancedAdam(params, lr=0.1, betas=0.9)
    train(optimizer, params, range(3))
    before, groups = copy.deepcopy(optimizer.state_dict()), [dict(g) for g in optimizer.param_groups]
    bad = copy.deepcopy(before)
    kind, name = place.split()
    (bad["param_groups"][0] if kind == "group" else bad["state"][0])[name] = value
    with pytest.raises(ValueError, match=rf"\b{name}\b|called packed8|lr is a tensor") as refusal:
        optimizer.load_state_dict(bad)
    assert "\n" not in str(refusal.value)
    assert [dict(g) for g in optimizer.param_groups] == groups
    for number, values in optimizer.state_dict()["state"].items():
        assert {k: raw(v) for k, v in values.items()} == {k: raw(v) for k, v in before["state"][number].items()}


@pytest.mark.parametrize("missing", ["param_groups", "state", "params", "step", "exp_avg", "exp_avg_sq"])
def test_a_state_that_lacks_something_is_refused_and_nothing_changes(missing: str) -> None:
    params = parameters()
    optimizer = BalancedAdam(params, lr=0.1, betas=0.9)
    train(optimizer, params, range(3))
    bad = copy.deepcopy(optimizer.state_dict())
    del next(
        part
        for part in (bad, bad["param_groups"][0], bad["state"][1])
        if missing in part and (missing != "state" or part is bad)
    )[missing]
    twin, again = BalancedAdam(copy.deepcopy(params), lr=0.1, betas=0.9), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=missing):
        optimizer.load_state_dict(bad)
    twin.load_state_dict(again)
    train(optimizer, params, range(3, 5))
    train(twin, twin.param_groups[0]["params"], range(3, 5))
    assert_same(params, twin.param_groups[0]["params"])


def test_a_loader_that_fills_in_what_a_file_lacks_leaves_bias_correction_right() -> None:
    """As torch's set_optimizer_state_dict does for a whole state dict: with what another optimizer has after one step."""
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
    """files/state_0d6eb9e.pt: words of 16 bits are int16, and what is known of changed betas stands in the groups. ``after`` are that
    version's own weights six steps later."""
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
