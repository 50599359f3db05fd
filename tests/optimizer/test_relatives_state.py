"""State and settings of LpAdam, AMSGrad, AdamNC and AdamP: what goes on, what is refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from balanced_adam import AdamNC, AdamP, AMSGrad, BalancedAdam, LpAdam, unpacked
from balanced_adam.relatives import RELATIVES
from balanced_adam.zero.packed_state import keep_formats
from tests.optimizer.kinds import KINDS
from tests.optimizer.steps import assert_same, parameters, train


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_state_goes_on_as_if_it_had_not_been_saved(name: str) -> None:
    kind, own = KINDS[name]
    for state in ("fp32", "packed16") if kind in (LpAdam, AdamP) else ("fp32",):
        ours, theirs = parameters(), parameters()
        optimizer = kind(ours, 0.01, 0.9, state=state, **own)
        train(optimizer, ours, range(5))
        train(kind(theirs, 0.01, 0.9, state=state, **own), theirs, range(10))
        with torch.no_grad():
            resumed = [nn.Parameter(p.clone()) for p in ours]
        other = kind(resumed, 0.5, 0.5, state=state, **own)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(other, resumed, range(5, 10))
        assert_same(resumed, theirs)
        copied = copy.deepcopy(other)
        again = copied.param_groups[0]["params"]
        train(copied, again, range(10, 12))
        train(other, resumed, range(10, 12))
        assert_same(again, resumed)
        assert not torch.equal(resumed[0], theirs[0])


@pytest.mark.parametrize("ours", [BalancedAdam, *RELATIVES])
@pytest.mark.parametrize("theirs", [BalancedAdam, *RELATIVES])
def test_a_state_with_another_second_moment_is_refused_both_ways(ours: Any, theirs: Any) -> None:
    params = parameters()
    saved = theirs(params)
    train(saved, params, range(2))
    taken = ours(parameters())
    if ours is theirs or {ours, theirs} == {BalancedAdam, AdamP}:
        taken.load_state_dict(saved.state_dict())
        assert taken.param_groups[0].keys() >= ours.OWN.keys()
        return
    with pytest.raises(ValueError, match=r"in the loaded state, .* and this optimizer takes .* alone: it has another"):
        taken.load_state_dict(saved.state_dict())
    assert not taken.state


def test_a_state_of_another_p_is_refused_and_an_unpacked_one_is_not() -> None:
    params = parameters()
    packed = LpAdam(params, 0.1, 0.9, p=1, state="packed16")
    train(packed, params, range(3))
    with pytest.raises(ValueError, match=r"in the loaded state, p is 1\.0, and this optimizer takes 3\.0 alone"):
        LpAdam(parameters(), 0.1, 0.9, p=3).load_state_dict(packed.state_dict())
    whole = LpAdam(parameters(), 0.1, 0.9, p=1)
    whole.load_state_dict(unpacked(packed.state_dict()))
    for state in whole.state.values():
        assert bool((state["exp_avg"].abs() <= state["exp_avg_sq"].sqrt() * 1.5 + 1e-6).all())


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        (LpAdam, {"p": 4}, "p is 4; it must be one of 1, 1.5, 2, 3, 6"),
        (LpAdam, {"p": True}, "p is True; it must be a number"),
        (LpAdam, {"p": "3"}, "p is '3'; it must be a number"),
        (LpAdam, {"betas": (0.9, 0.99)}, "needs equal betas"),
        (
            LpAdam,
            {"betas": (0.9, 0.99), "allow_unbalanced": True, "state": "packed16"},
            "packed moments need equal betas",
        ),
        (AMSGrad, {"state": "packed16"}, "state is 'packed16', and AMSGrad .* must be 'fp32'"),
        (AdamNC, {"state": "packed8"}, "state is 'packed8', and AdamNC .* must be 'fp32'"),
        (AMSGrad, {"amsgrad": False}, "amsgrad is False, and this optimizer takes True alone"),
        (AdamP, {"delta": -1}, "delta is -1.0; it must be a finite number, at least 0"),
        (AdamP, {"wd_ratio": 1.5}, "wd_ratio is 1.5; it must lie in"),
        (AdamP, {"fused": True}, "fused is True, and AdamP has no kernel"),
        (LpAdam, {"capturable": True}, "capturable is True, and LpAdam has no kernel"),
        (AdamP, {"dleta": 1}, "AdamP has no argument 'dleta'; did you mean 'delta'"),
        (AdamP, {"p": 3}, "AdamP has no argument 'p'"),
    ],
)
def test_bad_settings_are_named_in_one_sentence(kind: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=sentence):
        kind(parameters(), **options)


def test_settings_that_change_between_steps_are_checked() -> None:
    params = parameters()
    optimizer = LpAdam(params)
    train(optimizer, params, range(2))
    optimizer.param_groups[0]["p"] = 2.5
    before = copy.deepcopy(params)
    with pytest.raises(ValueError, match=r"p is 2\.5"):
        train(optimizer, params, range(2, 3))
    assert_same(params, before)


def test_p_stays_what_its_averages_were_made_with() -> None:
    params = parameters()
    groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:], "p": 1}]
    optimizer = LpAdam(groups)
    train(optimizer, params, range(2))
    optimizer.param_groups[0]["p"] = 1
    with pytest.raises(ValueError, match=r"p is 1\.0 at this step, and steps before had 3\.0; it must stay"):
        train(optimizer, params, range(2, 3))


@pytest.mark.parametrize("ours", [BalancedAdam, AdamP, LpAdam])
@pytest.mark.parametrize("state", ["fp32", "packed16"])
def test_a_maximum_that_torch_has_left_is_nobodys(ours: Any, state: str) -> None:
    """torch keeps max_exp_avg_sq where amsgrad has been switched off again."""
    reference, more = parameters(), {"p": 2} if ours is LpAdam else {}
    adam = torch.optim.AdamW(reference, 0.01, (0.9, 0.9), amsgrad=True)
    train(adam, reference, range(3))
    saved = copy.deepcopy(adam.state_dict())
    saved["param_groups"][0]["amsgrad"] = False
    assert "max_exp_avg_sq" in saved["state"][0]
    ends = []
    for stale in (True, False):
        with torch.no_grad():
            params = [nn.Parameter(p.clone()) for p in reference]
        if not stale:
            for each in saved["state"].values():
                del each["max_exp_avg_sq"]
        optimizer = ours(params, 0.01, 0.9, fused=False, state=state, **more)
        optimizer.load_state_dict(copy.deepcopy(saved))
        train(optimizer, params, range(3, 8))
        ends.append(params)
    assert_same(*ends)


def test_amsgrad_needs_its_maximum_when_it_loads() -> None:
    params = parameters()
    optimizer = AMSGrad(params)
    train(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][1]["max_exp_avg_sq"]
    with pytest.raises(ValueError, match="the loaded state has no max_exp_avg_sq"):
        AMSGrad(parameters()).load_state_dict(saved)


def test_a_groups_own_keys_are_the_users() -> None:
    params = parameters()
    train(BalancedAdam([{"params": params, "p": "encoder"}]), params, range(2))


def test_a_load_that_fails_leaves_the_settings() -> None:
    optimizer = AdamP(parameters(), delta=0.5)

    def fails(self: Any) -> None:
        assert "delta" not in self.optimizer.param_groups[0]
        raise OSError

    zero = SimpleNamespace(optimizer=optimizer)
    for _ in range(2):
        with pytest.raises(OSError):
            keep_formats(fails, zero)
        assert optimizer.param_groups[0]["delta"] == 0.5 and optimizer.param_groups[0]["wd_ratio"] == 0.1
