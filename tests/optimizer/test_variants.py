"""AdamD and AdamProx: AdamW at another learning rate and decay, with the steps of their papers' own formulas."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from balanced_adam import BalancedAdam, rule
from tests.optimizer.steps import assert_same, parameters, set_gradients, train

LR, DECAY, EPS = 0.05, 0.3, 1e-8
VARIANTS = rule.VARIANTS[1:]


def by_its_paper(variant: str, betas: tuple[float, float], weights: Any, gradients: list[Any]) -> Any:
    """The weights after these gradients, in float64, by arXiv 2110.10828 (AdamD) or 2202.00089 (AdamProx)."""
    m, v = np.zeros_like(weights), np.zeros_like(weights)
    for step, g in enumerate(gradients, 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        root = np.sqrt(v / (1 - betas[1] ** step)) + EPS
        if variant == "adamd":
            weights = (1 - LR * DECAY) * weights - LR * m / root
        else:
            weights = (weights - LR * m / (1 - betas[0] ** step) / root) / (1 + LR * DECAY)
    return weights


@pytest.mark.parametrize("betas", [(0.9, 0.9), (0.9, 0.999), (0.0, 0.0)])
@pytest.mark.parametrize(("dtype", "fused", "close"), [(torch.float64, False, 1e-13), (torch.float32, None, 1e-5)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_those_of_the_papers_formula(
    variant: str, dtype: torch.dtype, fused: bool | None, close: float, betas: tuple[float, float]
) -> None:
    generator = np.random.default_rng(0)
    first, gradients = generator.normal(size=50), list(generator.normal(size=(100, 50)))
    param = nn.Parameter(torch.tensor(first, dtype=dtype))
    settings: dict[str, Any] = {"lr": LR, "betas": betas, "eps": EPS, "weight_decay": DECAY, "variant": variant}
    optimizer = BalancedAdam([param], **settings, fused=fused, allow_unbalanced=True)
    for gradient in gradients:
        param.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()
    np.testing.assert_allclose(param.detach().numpy(), by_its_paper(variant, betas, first, gradients), close, close)


@pytest.mark.parametrize("state", ["fp32", "packed32", "packed16", "packed8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernels_have_the_bits_of_plain_torch(variant: str, state: str) -> None:
    fused, plain = parameters(), parameters()
    for params, how in ((fused, None), (plain, False)):
        optimizer = BalancedAdam(params, lr=LR, weight_decay=DECAY, variant=variant, state=state, fused=how)
        train(optimizer, params, range(6))
    assert_same(fused, plain)


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.99])
def test_no_step_of_adamd_exceeds_one_less_the_power_of_beta(beta: float) -> None:
    """|m| <= sqrt(c v) by Cauchy-Schwarz, so that |m| / sqrt(v / c) <= c = 1 - beta^t; a steady gradient reaches it."""
    params, steady = parameters(torch.float64), nn.Parameter(torch.zeros((), dtype=torch.float64))
    settings: dict[str, Any] = {"lr": 1.0, "betas": beta, "eps": 0.0, "weight_decay": 0.0, "variant": "adamd"}
    optimizer, other = BalancedAdam(params, **settings), BalancedAdam([steady], **settings)
    for step in range(1, 30):
        set_gradients(params, step)
        steady.grad = torch.full((), -3.0, dtype=torch.float64)
        before = float(steady)
        optimizer.step()
        other.step()
        bound = 1.0 - beta**step
        assert optimizer.update_size().greatest <= bound * (1 + 1e-12)
        assert float(steady) - before == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("variant", rule.VARIANTS)
def test_the_size_of_a_step_is_the_distance_over_lr(variant: str, fused: bool | None) -> None:
    param = nn.Parameter(torch.zeros(64))
    optimizer = BalancedAdam([param], lr=LR, weight_decay=0.0, variant=variant, fused=fused)
    for step in range(3):
        before = param.detach().clone()
        param.grad = torch.randn(64, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        moved = ((param.detach() - before) / LR).double()
        size = optimizer.update_size()
        assert size.greatest == pytest.approx(float(moved.abs().max()), rel=1e-4)
        assert size.sum_of_squares == pytest.approx(float(moved.square().sum()), rel=1e-4)


@pytest.mark.parametrize("variant", rule.VARIANTS)
def test_weights_do_not_feel_the_scale_of_each_coordinate(variant: str) -> None:
    """Scale-freeness (arXiv 2202.00089): exact for powers of two without eps; an L2 penalty would feel it."""
    scale = 2.0 ** torch.arange(-20, 20)
    results = []
    for factor in (torch.ones(40), scale):
        param = nn.Parameter(torch.linspace(-1, 1, 40))
        optimizer = BalancedAdam([param], lr=LR, eps=0.0, weight_decay=DECAY, variant=variant)
        for step in range(100):
            param.grad = torch.randn(40, generator=torch.Generator().manual_seed(step)) * factor
            optimizer.step()
        results.append(param)
    assert torch.equal(*results)


@pytest.mark.parametrize("value", ["adamw", "AdamD", None, 1, ["adamd"]])
def test_another_variant_is_refused(value: Any) -> None:
    for build in (
        lambda: BalancedAdam(parameters(), variant=value),
        lambda: BalancedAdam([{"params": parameters(), "variant": value}]),
    ):
        with pytest.raises(ValueError, match=r"variant is .*; it must be one of adam, adamd, adamprox"):
            build()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cuda_graph_takes_no_variant(variant: str) -> None:
    with pytest.raises(ValueError, match=f"capturable is True and variant is '{variant}'; in a CUDA graph it must be"):
        BalancedAdam(parameters(), variant=variant, capturable=True)


def test_a_variant_is_saved_and_what_does_not_name_one_changes_none() -> None:
    params = parameters()
    optimizer = BalancedAdam(params, variant="adamd")
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    other = BalancedAdam(parameters())
    other.load_state_dict(copy.deepcopy(saved))
    assert other.param_groups[0]["variant"] == "adamd"
    del saved["param_groups"][0]["variant"]  # as torch's AdamW, or an earlier version of ours
    kept = BalancedAdam(parameters(), variant="adamprox")
    kept.load_state_dict(saved)
    assert kept.param_groups[0]["variant"] == "adamprox"
    saved["param_groups"][0]["variant"] = "nadam"
    with pytest.raises(ValueError, match="in the loaded state, variant is 'nadam'"):
        kept.load_state_dict(saved)
