"""Loading packed states: any format from any other, and what is damaged or misnamed is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from balanced_adam import BalancedAdam, packed, unpacked
from balanced_adam.packed import FORMATS
from balanced_adam.state import FORMATS as STATES
from balanced_adam.warn import _warned
from tests.optimizer.words import code, parameters, train


@pytest.mark.parametrize("before", STATES)
@pytest.mark.parametrize("after", STATES)
def test_a_run_may_change_from_any_format_to_any_other(before: str, after: str) -> None:
    params = parameters()
    old = BalancedAdam(params, lr=0.01, state=before)
    train(old, params, range(3))
    saved = copy.deepcopy(old.state_dict())
    new = BalancedAdam(params, lr=0.01, state=after)
    new.load_state_dict(copy.deepcopy(saved))
    assert new.param_groups[0]["state"] == after
    for param in params:
        param.grad = torch.zeros_like(param)
    new.step()
    for number, param in enumerate(params):
        state = new.state[param]
        assert ("packed" in state) == (after != "fp32") and state["step"] == 4
        if after == "fp32":  # one step without a gradient from what was decoded
            was = unpacked(saved)["state"][number]["exp_avg"]
            assert torch.equal(state["exp_avg"], was * torch.tensor(0.95))


@pytest.mark.parametrize("state", FORMATS)
def test_torchs_adamw_goes_on_from_an_unpacked_state_and_back_again(state: str) -> None:
    params = [nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(0)))]
    ours = BalancedAdam(params, lr=0.01, state=state)
    train(ours, params, range(3))
    theirs = torch.optim.AdamW(params)
    theirs.load_state_dict(unpacked(ours.state_dict()))
    assert theirs.param_groups[0]["betas"] == (0.95, 0.95)
    train(theirs, params, range(3, 5))
    back = BalancedAdam(params, lr=0.01, state=state)
    back.load_state_dict(theirs.state_dict())
    train(back, params, range(5, 6))
    assert back.state[params[0]]["step"] == 6 and back.state[params[0]]["packed"].dtype == FORMATS[state].word


@pytest.mark.parametrize("state", FORMATS)
def test_moments_of_unequal_betas_are_cut_and_counted_once(state: str) -> None:
    params = [nn.Parameter(torch.zeros(4))]
    _warned.discard("cut")  # once a process
    plain = BalancedAdam(params, betas=(0.0, 0.999), allow_unbalanced=True)
    train(plain, params, range(1))  # m = g, v = g^2 / 1000
    ours = BalancedAdam(params, state=state, betas=0.95)
    with pytest.warns(UserWarning, match="goes on with"):
        ours.load_state_dict(plain.state_dict())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(ours, params, range(1, 4))
    told = [str(w.message) for w in said if "beyond what its packed form holds" in str(w.message)]
    assert len(told) == 1 and told[0].startswith("4 elements")
    m, v = packed.unpack(ours.state[params[0]]["packed"])
    assert (m.abs() <= v.sqrt() * 1.5 + 1e-8).all()


@pytest.mark.parametrize("state", FORMATS)
def test_moments_that_come_from_words_are_packed_again_without_a_warning(state: str) -> None:
    params = [nn.Parameter(torch.randn(2000, generator=torch.Generator().manual_seed(0)))]
    _warned.discard("cut")
    first = BalancedAdam(params, state=state)
    train(first, params, range(5))
    second = BalancedAdam(params, state=state)
    second.load_state_dict(unpacked(copy.deepcopy(first.state_dict())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(second, params, range(5, 6))


def test_a_parameter_without_gradient_is_brought_to_the_new_format_too() -> None:
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))]
    first = BalancedAdam(params, state="packed16")
    train(first, params, range(2))
    second = BalancedAdam(params, state="packed8")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    params[0].grad, params[1].grad = torch.ones(4), None
    second.step()
    assert [second.state[p]["packed"].dtype for p in params] == [torch.uint8] * 2
    assert second.state_dict()["param_groups"][0]["state"] == "packed8"


@pytest.mark.parametrize(
    ("state", "called", "message"),
    [
        (
            {"step": torch.tensor(500.0), "state1": torch.ones(4), "absmax1": torch.ones(1)},
            "fp32",
            r"has \['step', 'state1', 'absmax1'\]; it must",
        ),
        (
            {"step": torch.tensor(5.0), "exp_avg": torch.ones(4)},
            "fp32",
            r"has \['step', 'exp_avg'\]; it must have 'step', and either 'exp_avg' and 'exp_avg_sq'",
        ),
        ({"momentum_buffer": torch.ones(4)}, "fp32", r"has \['momentum_buffer'\]; it must have 'step'"),
        (
            {"exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4)},
            "fp32",
            r"has \['exp_avg', 'exp_avg_sq'\]; it must have 'step'",
        ),
        (
            {"step": torch.tensor(5.0), "packed": torch.ones(4, dtype=torch.int16)},
            "packed32",
            "called packed32, and what it holds is packed16",
        ),
        (
            {"step": torch.tensor(5.0), "packed": torch.ones(4, dtype=torch.int16)},
            "fp32",
            "called fp32, and what it holds is packed16",
        ),
    ],
    ids=["another_optimizers", "half", "momentum", "without_step", "mismatched", "unnamed"],
)
def test_a_state_that_is_not_what_it_is_called_is_refused_and_nothing_changes(
    state: dict, called: str, message: str
) -> None:
    params = [nn.Parameter(torch.ones(4))]
    optimizer = BalancedAdam(params, state="packed16")
    train(optimizer, params, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    group = {**before["param_groups"][0], "state": called}
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict({"state": {0: state}, "param_groups": [group]})
    after = optimizer.state_dict()
    assert torch.equal(code(after["state"][0]["packed"]), code(before["state"][0]["packed"]))
    assert after["param_groups"] == before["param_groups"]


def test_a_group_that_was_saved_while_its_format_changed_loads_again() -> None:
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))]
    first = BalancedAdam(params, state="packed16")
    train(first, params, range(2))
    saved = copy.deepcopy(first.state_dict())
    saved["state"][1]["packed"] = torch.ones(3, dtype=torch.uint8)
    second = BalancedAdam(params, state="packed8")
    second.load_state_dict(saved)
    train(second, params, range(2, 3))
    assert {second.state[p]["packed"].dtype for p in params} == {torch.uint8}


def test_a_state_that_is_loaded_and_saved_before_a_step_is_called_what_it_is_and_loads_again_in_any_format() -> None:
    params = [nn.Parameter(torch.ones(4))]
    first = BalancedAdam(params, state="packed16")
    train(first, params, range(2))
    second = BalancedAdam(params, state="packed8")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert (
        second.state_dict()["param_groups"][0]["state"] == "packed16" and second.param_groups[0]["state"] == "packed8"
    )
    for state in STATES:
        third = BalancedAdam(params, state=state)
        third.load_state_dict(copy.deepcopy(second.state_dict()))
        train(third, params, range(2, 3))
        assert third.state[params[0]]["step"] == 3


def test_moments_that_were_put_beside_words_are_the_newer_ones() -> None:
    params = [nn.Parameter(torch.ones(4))]
    optimizer = BalancedAdam(params, state="packed16")
    train(optimizer, params, range(2))
    newer = {"exp_avg": torch.full((4,), 0.25), "exp_avg_sq": torch.full((4,), 1.0)}
    optimizer.state[params[0]].update(newer)
    assert torch.equal(unpacked(optimizer.state_dict())["state"][0]["exp_avg"], newer["exp_avg"])
    params[0].grad = torch.zeros(4)
    optimizer.step()
    assert "exp_avg" not in optimizer.state[params[0]]
    assert packed.unpack(optimizer.state[params[0]]["packed"])[0].allclose(torch.tensor(0.2375), rtol=0.2)


def test_unequal_betas_of_a_loaded_state_are_not_taken_over_where_the_state_is_packed() -> None:
    params = [nn.Parameter(torch.ones(4))]
    plain = torch.optim.AdamW(params, betas=(0.9, 0.999))
    train(plain, params, range(2))
    ours = BalancedAdam(params, state="packed16", allow_unbalanced=True)
    with pytest.warns(UserWarning, match="goes on with"):
        ours.load_state_dict(plain.state_dict())
    train(ours, params, range(2, 3))
    assert ours.param_groups[0]["betas"] == (0.95, 0.95)


def test_words_decoded_for_float64_parameters_are_float64() -> None:
    words = BalancedAdam([nn.Parameter(torch.ones(4))], state="packed16")
    train(words, words.param_groups[0]["params"], range(2))
    param = nn.Parameter(torch.full((4,), 1 / 3, dtype=torch.float64))
    optimizer = BalancedAdam([param], lr=0.0, weight_decay=0.0)
    optimizer.load_state_dict(copy.deepcopy(words.state_dict()))
    param.grad = torch.zeros(4, dtype=torch.float64)
    optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    optimizer.step()
    assert torch.equal(param, torch.full((4,), 1 / 3, dtype=torch.float64))


def test_a_checkpoint_in_an_unknown_format_is_refused_and_nothing_changes() -> None:
    params = [nn.Parameter(torch.zeros(4))]
    optimizer = BalancedAdam(params, state="packed16")
    train(optimizer, params, range(2))
    words = optimizer.state[params[0]]["packed"].clone()
    for name, dtype, message in (
        ("packed12", torch.int16, "is in the format 'packed12'; this version"),
        ("packed16", torch.int64, "packed moments of torch.int64, which no format has; it is damaged"),
    ):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["state"] = name
        saved["state"][0]["packed"] = saved["state"][0]["packed"].to(dtype)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)
        assert torch.equal(code(optimizer.state[params[0]]["packed"]), code(words))


@pytest.mark.parametrize("state", FORMATS)
def test_words_that_a_loader_has_cast_by_value_are_refused(state: str) -> None:
    """torch's own Optimizer.load_state_dict does that where weights are bfloat16, as does a copy into another dtype."""
    params = [nn.Parameter(torch.randn(100, generator=torch.Generator().manual_seed(0)))]
    optimizer = BalancedAdam(params, state=state)
    train(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    for dtype in (torch.bfloat16, torch.float32):
        words = code(saved["state"][0]["packed"]).to(dtype)
        with pytest.raises(ValueError, match=r"what they were is lost|which no format has"):
            optimizer.load_state_dict({**saved, "state": {0: {**saved["state"][0], "packed": words}}})
        optimizer.state[params[0]]["packed"] = words
        if state != "packed16" or dtype == torch.float32:
            with pytest.raises(ValueError, match=r"what they were is lost|which no format has"):
                train(optimizer, params, range(3, 4))
