"""What BalancedAdam is built with, what its groups are changed to, and the state dicts that it loads.

What it takes is held against AdamW in float64 numpy.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import nn

from balanced_adam import AdamP, BalancedAdam, LpAdam
from tests.fuzz.edits import WEIRD, places
from tests.fuzz.outcome import Outcome, attempt
from tests.optimizer.steps import parameters, set_gradients, train

NO_NUMBERS: list[Any] = [True, "0.5", "auto", None, [0.5], 1j, {}, Decimal("0.5"), np.True_, torch.ones(2), object()]
NO_SETTINGS: list[Any] = [*NO_NUMBERS, -1.0, math.nan, math.inf, -math.inf, 10**400, torch.tensor(math.nan)]
NUMBERS: list[Any] = [0, 0.0, 1, 0.25, Fraction(1, 4), np.float32(0.25), np.int64(1), torch.tensor(0.25)]
NO_SWITCHES: list[Any] = ["true", 1, 0, [], np.True_]
NO_BETAS: list[Any] = [*NO_NUMBERS, 1.0, -0.1, math.nan, (0.9, 0.999), (0.9,), (0.9, 0.9, 0.9), "0.9,0.9", (0.9, "0.9")]
IN_GROUPS: dict[str, tuple[list[Any], list[Any]]] = {
    "lr": ([*NUMBERS, torch.tensor([0.25])], NO_SETTINGS),
    "eps": (NUMBERS, NO_SETTINGS),
    "weight_decay": (NUMBERS, NO_SETTINGS),
    "betas": ([0.9, (0.9, 0.9), [0.5, 0.5], 0, (np.float64(0.75),) * 2, torch.tensor(0.5)], NO_BETAS),
    "state": (["fp32", "packed32"], ["packed", "FP32", 16, None, True, ["fp32"], b"fp32"]),
    "maximize": ([True, False], ["false", 0, 1, None, []]),
    "variant": (["adam", "adamprox"], ["adamw", "AdamD", 1, None, ["adam"]]),
    "amsgrad": ([False], [True, 1, "no", None]),
    "differentiable": ([False], [True, 1]),
    "bias_correction": ([True], [False, 0]),
    "adam_w_mode": ([True], [False, 1, None]),
    "foreach": ([True, False, None], []),
}
"""Right and wrong values of what a group may have."""
OF_ALL: dict[str, tuple[list[Any], list[Any]]] = {
    "allow_unbalanced": ([True, False], [*NO_SWITCHES, None]),
    "fused_zero": ([True, False], [*NO_SWITCHES, None]),
    "capturable": ([False], [*NO_SWITCHES, None]),
    "momentum": ([], [0.9]),
    "weigth_decay": ([], [0.1]),
    "beta1": ([], [0.9]),
}
"""Of what is the whole optimizer's."""
KINDS: dict[type[BalancedAdam], dict[str, tuple[list[Any], list[Any]]]] = {
    BalancedAdam: {"p": ([2], [3, 1.0]), "fused": ([True, False, None], NO_SWITCHES)},
    LpAdam: {"p": ([1, 1.5, 2.0, 3, np.float64(6)], [*NO_SETTINGS, 0, 4, 2.5])},
    AdamP: {"delta": ([0, 0.1, 5], NO_SETTINGS), "wd_ratio": ([0, 0.5, 1], [*NO_SETTINGS, 1.5])},
}
"""Optimizers, and what their groups have beside the others'; LpAdam and AdamP have no kernels."""
CHECKED_AT_STEPS = ("lr", "eps", "weight_decay", "betas", "state", "maximize", "variant")
PARAMS: dict[str, Callable[[], Any]] = {
    "no list": lambda: nn.Parameter(torch.ones(2)),
    "text": lambda: ["w"],
    "numbers": lambda: [1.0],
    "nothing": list,
    "none": lambda: [None],
    "no params": lambda: [{"lr": 0.1}],
    "twice": lambda: (lambda p: [{"params": [p]}, {"params": [p]}])(nn.Parameter(torch.ones(2))),
    "complex": lambda: [nn.Parameter(torch.ones(2, dtype=torch.complex64))],
    "float8": lambda: [nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn))],
    "no leaf": lambda: [nn.Parameter(torch.ones(2)) * 2],
    "sparse gradient": lambda: (lambda p: [p])(_with_sparse_gradient()),
}
"""Wrong parameters."""
STEPS = 3


def _with_sparse_gradient() -> torch.Tensor:
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    return table.weight


def adamw(saved: dict[str, Any], weights: list[Any], step: int) -> list[Any]:
    """The weights after one more step from a state dict, in float64 (arXiv 1711.05101, algorithm 2; 2202.00089;
    2106.05449)."""
    group = saved["param_groups"][0]
    lr, eps, decay = (float(group[name]) for name in ("lr", "eps", "weight_decay"))
    betas = group["betas"]
    beta1, beta2 = map(float, betas if isinstance(betas, list | tuple) else (betas, betas))
    p, stepped = float(group.get("p", 2.0)), []
    with np.errstate(all="ignore"):
        for number, (weight, gradient) in enumerate(zip(weights, set_gradients(parameters(), step), strict=True)):
            state = saved["state"].get(number, {})
            g = gradient.double().numpy() * (-1 if group["maximize"] else 1)
            m = beta1 * _array(state, "exp_avg") + (1 - beta1) * g
            v = beta2 * _array(state, "exp_avg_sq") ** (p / 2) + (1 - beta2) * np.abs(g) ** p
            t = float(state.get("step", 0)) + 1
            update = m / (1 - beta1**t) / ((v / (1 - beta2**t)) ** (1 / p) + eps)
            proximal = group.get("variant") == "adamprox"
            new = (weight - lr * update) / (1 + lr * decay) if proximal else weight * (1 - lr * decay) - lr * update
            stepped.append(new)
    return stepped


def _array(state: dict[str, Any], name: str) -> Any:
    return state[name].double().numpy() if name in state else 0.0


def assert_close(params: list[nn.Parameter], expected: list[Any], what: str) -> None:
    for param, value in zip(params, expected, strict=True):
        if not np.all(np.abs(value) < 1e30):
            continue  # float32 ends there
        ours, theirs = param.detach().numpy(), np.asarray(value, dtype=np.float64).astype(np.float32)
        assert np.allclose(ours, theirs, rtol=2e-5, atol=2e-5, equal_nan=True), f"{what}: {ours}, not {theirs}"


def outcome(seed: int) -> Outcome:
    """Of one drawn input."""
    draw = random.Random(seed)
    return draw.choice([of_settings, of_settings, of_state, of_state, of_parameters])(draw)


def of_settings(draw: random.Random) -> Outcome:
    """Some right settings and perhaps a wrong one: of the optimizer, of a group, or of a group between steps."""
    place = draw.choice(["optimizer", "group", "between steps"])
    kinds: list[type[BalancedAdam]] = [BalancedAdam, *KINDS]
    kind = draw.choice(kinds)
    own = {name: values for name, values in KINDS[kind].items() if name != "fused" or place == "optimizer"}
    table = {
        "optimizer": {**IN_GROUPS, **OF_ALL, **own},
        "group": {**IN_GROUPS, **own},
        "between steps": {name: IN_GROUPS[name] for name in CHECKED_AT_STEPS} | own,
    }[place]
    if place != "group" and kind is BalancedAdam:
        table.pop("p")  # a setting of no group of it
    if place == "between steps" and kind is LpAdam:
        table["p"] = ([], [*table["p"][1], 1, 6.0])  # it was 3
    names = draw.sample(sorted(name for name, (right, _) in table.items() if right), 3)
    settings = {name: draw.choice(table[name][0]) for name in names}
    field = draw.choice(sorted(name for name, (_, wrong) in table.items() if wrong)) if draw.random() < 0.7 else ""
    if field:
        settings[field] = draw.choice(table[field][1])
    if settings.get("allow_unbalanced") is True and settings.get("betas") == (0.9, 0.999):
        del settings["allow_unbalanced"]
    if place == "between steps" and not field:
        settings.pop("state", None)  # what it holds then is not what the oracle reads

    def do() -> None:
        params = parameters()
        of_optimizer = settings if place == "optimizer" else {}
        of_group = settings if place == "group" else {}
        optimizer = kind([{"params": params, **of_group}], **of_optimizer)
        if place == "between steps":
            train(optimizer, params, range(STEPS))
            optimizer.param_groups[0].update(settings)
        before = [p.detach().double().numpy().copy() for p in params]
        number = STEPS if place == "between steps" else 0
        saved = copy.deepcopy(optimizer.state_dict()) if not field else {}
        try:
            train(optimizer, params, range(number, number + 1))
        except ValueError:
            assert all(np.array_equal(p.detach().numpy(), b) for p, b in zip(params, before, strict=True)), "it moved"
            raise
        if not field and optimizer.param_groups[0]["state"] == "fp32":
            if kind is AdamP and optimizer.param_groups[0]["delta"] > 0:
                return  # it may project: tests/optimizer
            if place == "between steps" and "betas" in settings:
                return  # changed betas are corrected by the product of all of them: tests/optimizer
            assert_close(params, adamw(saved, before, number), str(settings))

    return attempt(
        f"{kind.__name__}, {place}: {settings!r}", do, (ValueError, TypeError, RuntimeError), bool(field), field
    )


def of_parameters(draw: random.Random) -> Outcome:
    """Wrong parameters, with any right settings."""
    kind = draw.choice(sorted(PARAMS))
    name = draw.choice(["lr", "eps", "weight_decay", "betas"])
    settings = {name: draw.choice(IN_GROUPS[name][0])}

    def do() -> None:
        BalancedAdam(PARAMS[kind](), **settings).step()

    return attempt(f"parameters: {kind}, {settings!r}", do, (ValueError, TypeError, RuntimeError), True)


def of_state(draw: random.Random) -> Outcome:
    """A state dict in which one value is another."""
    params = parameters()
    optimizer = BalancedAdam(params, lr=2**-7, betas=0.75, state=draw.choice(["fp32", "fp32", "packed16"]))
    train(optimizer, params, range(STEPS))
    saved = copy.deepcopy(optimizer.state_dict())
    place = draw.choice([place for place in places(saved) if place])
    node: Any = saved
    for key in place[:-1]:
        node = node[key]
    tensors: list[Any] = [torch.ones(2), torch.ones(3, 5), -torch.ones(3, 5), torch.full((3, 5), math.nan)]
    tensors += [torch.ones(3, 2, dtype=torch.int64), torch.ones(3, 5).bfloat16(), torch.tensor(2.0)]
    value = draw.choice([*WEIRD, *tensors])
    if draw.random() < 0.15 and isinstance(node, dict):
        del node[place[-1]]
        value = "(removed)"
    else:
        try:
            node[place[-1]] = value
        except TypeError:  # in a tuple
            return Outcome("no edit", None)
    before = [p.detach().clone() for p in params]
    groups = [dict(group) for group in optimizer.param_groups]

    def do() -> None:
        given = copy.deepcopy(saved)
        try:
            optimizer.load_state_dict(given)
        except ValueError:
            assert [dict(group) for group in optimizer.param_groups] == groups, "a refused state has changed a group"
            raise
        weights = [p.detach().double().numpy().copy() for p in params]
        # What a state lacks stays as it is. (As torch's, the optimizer has the memory of what was given.)
        loaded = {**saved, "param_groups": [{**groups[0], **saved["param_groups"][0]}]}
        fp32 = all("exp_avg" in state for state in saved["state"].values())
        history = {"log_beta_excess", "decay"}  # a made-up history of betas: tests/optimizer has the right ones
        expected = adamw(loaded, weights, STEPS) if fp32 and not history & set(map(str, place)) else None
        train(optimizer, params, range(STEPS, STEPS + 1))
        if expected:
            assert_close(params, expected, str(place))

    found = attempt(f"state dict: {place} = {value!r:.80}", do, (ValueError,))
    if found.said:
        assert all(map(torch.equal, params, before))
    return found
