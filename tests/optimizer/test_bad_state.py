"""A state that can't be gone on with is refused, and the optimizer stays as it was."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from balanced_adam import BalancedAdam
from tests.optimizer.steps import assert_same, parameters, raw, train


def test_the_state_of_an_optimizer_without_betas_is_refused_and_nothing_changes() -> None:
    params = [torch.nn.Parameter(torch.ones(4))]
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    train(sgd, params, range(1))
    optimizer = BalancedAdam(params)
    with pytest.raises(ValueError, match="groups without betas"):
        optimizer.load_state_dict(sgd.state_dict())
    train(optimizer, params, range(1))


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
        if "decoupled_weight_decay" not in state["param_groups"][0]:
            pytest.skip("the Adam of this torch does not say how its weight decay works")
    elif change == "shape":
        state["state"][0]["exp_avg"] = torch.zeros(4)
    else:
        state["param_groups"].append(dict(state["param_groups"][0], params=[]))
    message = {
        "amsgrad": "amsgrad is True, and this optimizer takes False alone",
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
