"""The rule against independent oracles: float64 AdamW written out, torch.optim.AdamW, and exact arithmetic."""

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from balanced_adam import rule

STEPS = 100
PAIRS = [(0.95, 0.95), (0.0, 0.0), (0.9, 0.999), (0.9, 0.95), (0.8, 0.5)]


def gradients(steps: int = STEPS, size: int = 257, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-6, 3, (size,), generator=generator)
    return torch.randn(steps, size, generator=generator) * scale


def run(
    grads: Tensor, betas: rule.Betas, eps: float = 1e-8, decay: float = 0.1, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Weights and moments after each step."""
    p = torch.linspace(-1, 1, grads.shape[1]).to(dtype)
    m = v = torch.zeros(grads.shape[1], dtype=rule.moments_dtype(dtype))
    for t, g in enumerate(grads, 1):
        p, m, v = rule.update(p, g, m, v, step=t, lr=1e-2, betas=betas, eps=eps, weight_decay=decay)
        yield p, m, v


def textbook(
    grads: Tensor, beta1: float, beta2: float, eps: float, decay: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """AdamW as its paper writes it, in float64: two bias corrections, eps beside the corrected root."""
    p = torch.linspace(-1, 1, grads.shape[1]).double()
    m = v = torch.zeros_like(p)
    for t, g in enumerate(grads.double(), 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        p = p - 1e-2 * ((m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps) + decay * p)
        yield p, m, v


@pytest.mark.parametrize("betas", PAIRS)
def test_rule_equals_the_textbook_formula_in_float64(betas: rule.Betas) -> None:
    grads = gradients()
    for ours, oracle in zip(run(grads, betas, dtype=torch.float64), textbook(grads, *betas, 1e-8, 0.1), strict=True):
        for a, b in zip(ours, oracle, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("betas", PAIRS)
def test_float32_rule_stays_within_rounding_of_float64(betas: rule.Betas) -> None:
    grads = gradients()
    *_, ours = run(grads, betas)
    *_, oracle = textbook(grads, *betas, 1e-8, 0.1)
    torch.testing.assert_close(ours[0].double(), oracle[0], rtol=0, atol=STEPS * 2.0**-24 * 2)


@pytest.mark.parametrize("betas", PAIRS)
def test_float32_rule_rounds_after_every_operation_as_numpy_does(betas: rule.Betas) -> None:
    """Bit for bit: a fused multiply-add anywhere, or another order, would show."""
    beta1, beta2 = map(np.float32, betas)
    rest1, rest2 = np.float32(1 - betas[0]), np.float32(1 - betas[1])
    grads = gradients(seed=3)
    m = v = np.float32(0)
    p = torch.linspace(-1, 1, grads.shape[1]).numpy()
    for t, (g, ours) in enumerate(zip(grads.numpy(), run(grads, betas), strict=True), 1):
        m = m * beta1 + g * rest1
        v = v * beta2 + (g * g) * rest2
        c1, c2 = 1 - betas[0] ** t, 1 - betas[1] ** t
        scale = 1 / math.sqrt(c2) if betas[0] == betas[1] else math.sqrt(c2) / c1
        u = m / (np.sqrt(v) + np.float32(1e-8 * math.sqrt(c2)))
        p = p * np.float32(1 - 1e-2 * 0.1) - u * np.float32(1e-2 * scale)
        for tensor, oracle in zip(ours, (p, m, v), strict=True):
            assert (tensor.numpy() == oracle).all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95])
def test_without_eps_no_update_exceeds_lr_down_to_the_smallest_numbers(beta: float) -> None:
    """Three gradients of every size, then zeros until all have faded: m must not outlive v."""
    sizes = torch.tensor([1e-45, 1e-38, 1e-30, 1e-20, 1e-19, 1e-18, 1e-6, 1.0, 1e15])
    first, others = sizes.repeat(3), torch.cat([sizes * ratio for ratio in (0.0, -1e-3, 1e3)])
    m = v = torch.zeros_like(first)
    for t in range(1, 9000):
        g = first if t == 1 else others if t < 4 else torch.zeros_like(first)
        u, m, v = rule.update(m * 0, g, m, v, step=t, lr=1.0, betas=(beta, beta), eps=0.0, weight_decay=0.0)
        assert (u.abs() <= 1 + 1e-6).all()
        assert (m.abs() <= v.sqrt() * (1 + 1e-6)).all()
        if t > 4 and not v.any():
            break
    assert not m.any() and not v.any()


@pytest.mark.parametrize("betas", [(0.5, 0.5), (0.95, 0.95), (0.9, 0.999)])
@pytest.mark.parametrize("step", [1, 2, 10, 10_000])
def test_bias_correction_is_one_scalar_when_balanced_and_the_usual_two_otherwise(betas: rule.Betas, step: int) -> None:
    c1, c2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    scale, eps = rule.bias_correction(step, betas, 1e-3)
    assert scale == pytest.approx(math.sqrt(c2) / c1, rel=1e-14)
    assert eps == pytest.approx(1e-3 * math.sqrt(c2), rel=1e-14)
    if betas[0] == betas[1]:
        assert scale == 1 / math.sqrt(1 - rule.power(betas[0], step))


@pytest.mark.parametrize("base", [0.5, 0.9, 0.95, 0.999, 0.999999])
@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 1000, 99_999])
def test_a_power_is_that_of_exact_arithmetic_to_a_few_roundings(base: float, exponent: int) -> None:
    exact = Fraction(base) ** min(exponent, 1000) * Fraction(base ** (exponent - min(exponent, 1000)))
    assert rule.power(base, exponent) == pytest.approx(float(exact), rel=1e-11)


@settings(deadline=None, max_examples=50)
@given(
    k=st.integers(-30, 30),
    beta=st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.999]),
    beta2=st.sampled_from([0.5, 0.95, 0.999]),
    seed=st.integers(0, 2**16),
)
def test_gradients_times_a_power_of_two_give_the_same_weights_bit_for_bit(
    k: int, beta: float, beta2: float, seed: int
) -> None:
    grads = torch.randn(20, 33, generator=torch.Generator().manual_seed(seed))
    grads[:, :3] = 0.0  # eps = 0 must not make 0/0 of these
    for (p, *_), (q, *_) in zip(run(grads, (beta, beta2), 0.0), run(grads * 2.0**k, (beta, beta2), 0.0), strict=True):
        assert torch.equal(p, q)
        assert torch.isfinite(q).all()


def test_roots_are_correctly_rounded_where_the_cpus_vector_library_is_not() -> None:
    v = torch.rand(1 << 18, generator=torch.Generator().manual_seed(0))
    ours = 1 / rule.direction(torch.ones_like(v), v, rule.BiasCorrection(1.0, 0.0))
    assert (ours.numpy() == 1 / (1 / np.sqrt(v.numpy()))).all()


def test_a_gradient_in_bf16_is_cast_up_before_it_is_squared() -> None:
    g = torch.tensor([1.0078125]).bfloat16()  # its square needs more bits than bf16 has
    _, _, v = rule.update(
        torch.zeros(1), g, torch.zeros(1), torch.zeros(1), step=1, lr=0, betas=(0, 0), eps=0, weight_decay=0
    )
    assert v.item() == 1.0078125**2


def test_moments_never_become_denormal() -> None:
    m = v = torch.full((4,), 1e-30)
    for t in range(1, 400):
        _, m, v = rule.update(
            torch.ones(4), torch.zeros(4), m, v, step=t, lr=0.1, betas=(0.9, 0.9), eps=1e-8, weight_decay=0
        )
        for moment in (m, v):
            assert ((moment == 0) | (moment >= 2.0**-126)).all()
    assert (m == 0).all() and (v == 0).all()


def test_a_nan_gradient_shows_and_touches_its_own_element_alone() -> None:
    g = torch.tensor([1.0, float("nan"), float("inf")])
    p, m, v = rule.update(
        torch.zeros(3), g, torch.zeros(3), torch.zeros(3), step=1, lr=1, betas=(0.9, 0.9), eps=0, weight_decay=0
    )
    assert p[0] == pytest.approx(-1)
    assert p[1].isnan() and m[1].isnan() and v[1].isnan() and p[2].isnan()


def test_the_rule_changes_none_of_its_arguments() -> None:
    tensors = [torch.ones(3), torch.ones(3), torch.ones(3), torch.ones(3)]
    rule.update(*tensors, step=1, lr=1, betas=(0.9, 0.9), eps=0, weight_decay=0.1, maximize=True)
    assert all(torch.equal(t, torch.ones(3)) for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_keep_their_dtype_and_moments_never_fall_below_float32(dtype: torch.dtype) -> None:
    *_, (p, m, v) = run(gradients(3), (0.95, 0.95), dtype=dtype)
    assert p.dtype == dtype
    assert m.dtype == v.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
