"""BalancedAdam with a packed state: the bound on a step, bits, orders in memory, and what is refused or warned of."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

from balanced_adam import BalancedAdam
from balanced_adam.packed import FORMATS
from balanced_adam.state import FORMATS as STATES
from balanced_adam.warn import _warned
from tests.optimizer.words import code, parameters, train


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("fused", [None, False], ids=["kernel", "torch"])
def test_no_step_exceeds_lr_however_the_gradient_runs(state: str, fused: bool | None) -> None:
    param = nn.Parameter(torch.zeros(64))
    optimizer = BalancedAdam([param], lr=1.0, betas=0.9, weight_decay=0.0, state=state, fused=fused)
    generator = torch.Generator().manual_seed(0)
    for step in range(150):
        before = param.detach().clone()
        growth = 1.2 ** (step % 40) * 1e-6
        param.grad = growth * torch.where(torch.arange(64) % 2 == 0, 1.0, torch.randn(64, generator=generator))
        optimizer.step()
        assert (param - before).abs().max() <= 1.0 + 1e-4  # fp32 numbers around 100
        assert optimizer.update_size().greatest <= 1.0 + 1e-6


@pytest.mark.parametrize("state", STATES)
def test_kernel_and_torch_have_the_same_bits_and_a_cut_run_those_of_one_that_was_not(state: str) -> None:
    uncut, cut = parameters(), parameters()
    whole = BalancedAdam(uncut, lr=0.1, state=state, fused=False)
    train(whole, uncut, range(6))
    first = BalancedAdam(cut, lr=0.1, state=state)
    train(first, cut, range(3))
    saved = copy.deepcopy(first.state_dict())
    assert saved["param_groups"][0]["state"] == state
    second = BalancedAdam(cut, lr=0.1, state=state)
    second.load_state_dict(saved)
    train(second, cut, range(3, 6))
    for ours, theirs in zip(cut, uncut, strict=True):
        assert torch.equal(ours, theirs)
        for name, value in whole.state[theirs].items():
            same = (
                value == second.state[ours][name]
                if isinstance(value, float)
                else torch.equal(code(value), code(second.state[ours][name]))
            )
            assert same, name
    bytes_each = {"fp32": 8, "packed32": 4, "packed16": 2, "packed8": 1}[state]
    stored = [v for v in second.state[cut[0]].values() if isinstance(v, Tensor) and v.dim()]
    assert sum(v.element_size() for v in stored) == bytes_each


@pytest.mark.parametrize("state", FORMATS)
def test_parameters_in_any_order_in_memory_are_packed_as_contiguous_ones_are(state: str) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(2, 3, 4, 5, generator=generator), torch.randn(6, 4, generator=generator)]
    laid = [plain[0].to(memory_format=torch.channels_last), plain[1].T.contiguous().T]
    found = []
    for tensors in (plain, laid):
        params = [nn.Parameter(tensor.clone(memory_format=torch.preserve_format)) for tensor in tensors]
        first = BalancedAdam(params, lr=0.01)
        train(first, params, range(2))
        second = BalancedAdam(params, lr=0.01, state=state)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        train(second, params, range(2, 4))
        found.append([(param.detach(), code(second.state[param]["packed"])) for param in params])
    for ours, theirs in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


BAD = [
    ({"state": "packed12"}, "state is 'packed12'; it must be one of fp32, packed32, packed16, packed8"),
    ({"state": "packed16", "betas": (0.9, 0.95), "allow_unbalanced": True}, "packed moments need equal betas"),
    ({"state": None}, "state is None"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=str)
def test_a_format_that_cannot_be_is_refused_in_one_sentence(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalancedAdam([nn.Parameter(torch.zeros(2))], **settings)


@pytest.mark.parametrize("state", FORMATS)
def test_an_eps_far_below_the_least_moment_is_warned_of_where_it_matters(state: str) -> None:
    _warned.clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        BalancedAdam([nn.Parameter(torch.ones(4))], eps=1e-15, state=state)
        BalancedAdam([nn.Parameter(torch.ones(4))], eps=1e-9, state=state)
    assert len([w for w in said if "eps is 1e-15" in str(w.message)]) == (state != "packed32")


def test_float64_parameters_keep_their_moments_and_say_so() -> None:
    with pytest.raises(ValueError, match="a parameter is float64; its moments must be 'fp32'"):
        BalancedAdam([nn.Parameter(torch.zeros(2, dtype=torch.float64))], state="packed16")


def test_betas_may_change_over_time_while_they_are_equal() -> None:
    params = [nn.Parameter(torch.zeros(4))]
    optimizer = BalancedAdam(params, betas=0.9, state="packed16")
    for beta in (0.9, 0.95, 0.99):
        optimizer.param_groups[0]["betas"] = (beta, beta)
        train(optimizer, params, range(1))
    optimizer.param_groups[0]["betas"] = (0.9, 0.95)
    with pytest.raises(ValueError, match=r"betas are equal|equal betas"):
        optimizer.step()


class Opaque(Tensor):
    """A tensor whose class decides what operations do."""

    @classmethod
    def __torch_dispatch__(cls, *_: Any, **__: Any) -> NoReturn:
        raise AssertionError("not in a test of what is refused")


class Plain(nn.Parameter):
    """One that does as any other."""


def test_a_tensor_that_may_do_with_integers_what_it_likes_is_not_packed() -> None:
    opaque = torch.ones(3).as_subclass(Opaque)
    with pytest.raises(
        ValueError, match="a parameter is of the class Opaque, which may do with integers what it likes"
    ):
        BalancedAdam([opaque], state="packed16")
    params: list[nn.Parameter] = [Plain(torch.ones(3))]
    optimizer = BalancedAdam(params, state="packed16")
    train(optimizer, params, range(2))
    assert optimizer.state[params[0]]["packed"].dtype == torch.bfloat16
