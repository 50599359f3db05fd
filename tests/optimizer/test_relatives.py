"""LpAdam, AMSGrad, AdamNC and AdamP in one process: their papers' formulas, bounds, scales; tests/parity has them under
ZeRO."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from balanced_adam import AdamP, AMSGrad, BalancedAdam, LpAdam, power_mean
from tests.optimizer.kinds import DELTA, KINDS, RATIO
from tests.optimizer.steps import assert_same, parameters, train

LR, DECAY, EPS, STEPS = 0.05, 0.3, 1e-8, 60


def gradients(shape: tuple[int, ...], steps: int = STEPS) -> list[Any]:
    """Noise whose size differs a thousandfold between elements, and grows and shrinks."""
    generator = np.random.default_rng(1)
    scale = 10.0 ** generator.uniform(-2, 1, size=shape)
    return [generator.normal(size=shape) * scale * math.exp(math.sin(step / 5)) for step in range(steps)]


def by_its_paper(name: str, betas: tuple[float, float], w: Any, seen: list[Any]) -> Any:
    """The weights after these gradients, in float64: 2106.05449, 1904.09237 (its maximum as torch's), 2006.08217."""
    p = float(name[1:]) if name[1:2].isdigit() else 2.0
    m, v, greatest = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(seen, 1):
        beta2 = 1 - 1 / t if name == "adamnc" else betas[1]
        m, v = betas[0] * m + (1 - betas[0]) * g, beta2 * v + (1 - beta2) * np.abs(g) ** p
        greatest = np.maximum(greatest, v)
        c2 = 1.0 if name == "adamnc" else 1 - betas[1] ** t
        u = m / (1 - betas[0] ** t) / (((greatest if name == "amsgrad" else v) / c2) ** (1 / p) + EPS)
        decay = DECAY
        if name == "adamp":
            for rows in (len(w), 1):
                a, b, c = (x.reshape(rows, -1) for x in (w, g, u))
                cosine = np.abs((a * b).sum(1)) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
                if cosine.max() < DELTA / math.sqrt(a.shape[1]):
                    unit = a / (np.linalg.norm(a, axis=1, keepdims=True) + EPS)
                    u, decay = (c - unit * (unit * c).sum(1, keepdims=True)).reshape(w.shape), DECAY * RATIO
                    break
        w = (1 - LR * decay) * w - LR * u
    return w


def stepped(name: str, betas: tuple[float, float], dtype: torch.dtype, **more: Any) -> tuple[nn.Parameter, Any]:
    kind, own = KINDS[name]
    seen = gradients((4, 6))
    param = nn.Parameter(torch.tensor(seen[0] / 3, dtype=dtype))
    optimizer = kind([param], LR, betas, EPS, DECAY, allow_unbalanced=True, **own, **more)
    for gradient in seen:
        param.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()
    return param, optimizer


@pytest.mark.parametrize("betas", [(0.9, 0.9), (0.9, 0.99), (0.0, 0.0)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", KINDS)
def test_steps_are_those_of_the_papers_formula(
    name: str, dtype: torch.dtype, close: float, betas: tuple[float, float]
) -> None:
    param, _ = stepped(name, betas, dtype)
    expected = by_its_paper(name, betas, gradients((4, 6))[0] / 3, gradients((4, 6)))
    np.testing.assert_allclose(param.detach().numpy(), expected, close, close)


def test_amsgrad_is_torchs() -> None:
    ours, theirs = parameters(), parameters()
    mine = AMSGrad(ours, 0.01, (0.9, 0.999), weight_decay=0.1, allow_unbalanced=True)
    reference = torch.optim.AdamW(theirs, 0.01, (0.9, 0.999), weight_decay=0.1, amsgrad=True)
    train(mine, ours, range(20))
    train(reference, theirs, range(20))
    mine.load_state_dict(copy.deepcopy(reference.state_dict()))
    reference.load_state_dict(copy.deepcopy(mine.state_dict()))
    train(mine, ours, range(20, 30))
    train(reference, theirs, range(20, 30))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("state", ["fp32", "packed16"])
def test_p_2_is_balanced_adam_to_the_last_bit(state: str) -> None:
    ours, theirs = parameters(), parameters()
    train(LpAdam(ours, 0.01, 0.9, p=2, state=state), ours, range(10))
    train(BalancedAdam(theirs, 0.01, 0.9, state=state), theirs, range(10))
    assert_same(ours, theirs)


@pytest.mark.parametrize("p", power_mean.POWERS)
def test_a_power_mean_is_right_to_the_last_bit_and_the_same_in_any_slice(p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mean = (torch.randn(100_003, generator=generator) * 10).exp()
    grad = torch.randn(100_003, generator=generator) * mean.sqrt()
    found = power_mean.update(mean, grad, 0.9, p)
    exact = (
        0.9 * mean.numpy().astype(np.longdouble) ** (p / 2)
        + (1.0 - 0.9) * np.abs(grad.numpy().astype(np.longdouble)) ** p
    ) ** (2 / p)
    if p != 2.0:  # whose sum is rounded in float32, as Adam's
        assert int((found.numpy() != exact.astype(np.float32)).sum()) <= 1  # numpy's own powers are off, too
    for first in range(9):
        part = slice(first, first + 1001)
        assert torch.equal(power_mean.update(mean[part], grad[part], 0.9, p), found[part])
    limits = power_mean.update(torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.0, math.inf, math.nan]), 0.9, p)
    assert limits[:2].tolist() == [0.0, math.inf] and limits[2].isnan()


@given(
    st.sampled_from(power_mean.POWERS),
    st.floats(0.0, 0.999),
    st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_no_tied_step_of_any_p_exceeds_lr(p: float, beta: float, seen: list[float]) -> None:
    param = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = LpAdam([param], 1.0, beta, 0.0, 0.0, p=p)
    for gradient in seen:
        before = float(param.detach())
        param.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        assert abs(float(param.detach()) - before) <= 1.0 + 1e-9  # Hoelder
        assert optimizer.update_size().greatest <= 1.0 + 1e-12


@pytest.mark.parametrize("name", [name for name in KINDS if name != "adamp"])
def test_a_scale_of_an_elements_gradients_changes_no_bit(name: str) -> None:
    """2202.00089, with eps = 0 and powers of two. (AdamP's weights couple the elements of a row.)"""
    ends = []
    for exponent in (-20, 0, 12):
        kind, own = KINDS[name]
        param = nn.Parameter(torch.zeros(4, 6))
        optimizer = kind([param], LR, 0.9, 0.0, DECAY, **own)
        for gradient in gradients((4, 6), 20):
            param.grad = torch.tensor(gradient, dtype=torch.float32) * 2.0**exponent
            optimizer.step()
        ends.append(param.detach())
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[1], ends[2])


@pytest.mark.parametrize("name", KINDS)
def test_the_reported_size_is_how_far_the_weights_went(name: str) -> None:
    kind, own = KINDS[name]
    param = nn.Parameter(torch.tensor(gradients((4, 6))[0]))
    optimizer = kind([param], LR, 0.9, EPS, 0.0, **own)
    for gradient in gradients((4, 6), 9):
        before = param.detach().clone()
        param.grad = torch.tensor(gradient)
        optimizer.step()
        size, moved = optimizer.update_size(), (param.detach() - before) / LR
        assert size.numel == 24
        assert size.greatest == pytest.approx(float(moved.abs().max()), rel=1e-9)
        assert size.sum_of_squares == pytest.approx(float(moved.square().sum()), rel=1e-9)
    assert optimizer.update_size().numel == 0


def test_rows_of_zeros_are_orthogonal_to_everything_also_where_eps_is_0() -> None:
    generator = torch.Generator().manual_seed(0)
    first, gradient = torch.randn(5, 8, generator=generator), torch.randn(5, 8, generator=generator)
    first[1], gradient[2] = 0.0, 0.0
    ends = []
    for eps in (0.0, 1e-30):
        param = nn.Parameter(first.clone())
        param.grad = gradient.clone()
        optimizer = AdamP([param], 0.1, 0.9, eps, delta=100.0)
        optimizer.step()
        assert optimizer.projected() == (1, 1) and optimizer.projected() == (0, 0)
        ends.append(param.detach())
    assert torch.equal(*ends) and bool(ends[0].isfinite().all())


@pytest.mark.parametrize("mark", ["_fsdp_flattened", "tensor_model_parallel"])
def test_adamp_refuses_what_others_have_cut(mark: str) -> None:
    param = nn.Parameter(torch.zeros(12))
    setattr(param, mark, True)
    with pytest.raises(ValueError, match="is what FSDP1 or tensor parallelism has cut"):
        AdamP([param])


def test_fsdp1_marks_the_parameters_that_it_cuts() -> None:
    from torch.distributed.fsdp import _common_utils

    param = nn.Parameter(torch.zeros(3))
    _common_utils._set_fsdp_flattened(param)
    assert param._fsdp_flattened is True  # type: ignore[attr-defined]
