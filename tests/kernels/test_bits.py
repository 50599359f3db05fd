"""The CPU kernels in every instruction set, and the CUDA source run on the CPU, have the bits of the torch rule."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balanced_adam import packed, rule
from balanced_adam.kernels.cpu import ISA, Library, load
from balanced_adam.kernels.table import Recipe, Update, Variant, scalars
from tests.kernels.bits import (
    BETAS,
    KEEP,
    SIZES,
    VARIANTS,
    WORDS,
    Run,
    Setting,
    State,
    emulated_flat,
    emulated_multi,
    expected,
    first,
    runs,
    same,
    update,
)
from tests.kernels.build import cpu_library, needs_compiler
from train.common.files import REPOSITORY

pytestmark = needs_compiler


def on_cpu(isa: int) -> Run:
    kernels = Library(cpu_library(), isa)
    return lambda update: kernels.step([update])


RUNS: dict[str, Callable[[], Run]] = {
    **{name: partial(on_cpu, number) for number, name in enumerate(ISA)},
    "CUDA flat": lambda: emulated_flat,
    "CUDA multi": lambda: emulated_multi,
}


def run_of(name: str) -> Run:
    if name in ISA and ISA.index(name) > load().best_isa:
        pytest.skip(f"this processor has no {name}")
    return RUNS[name]()


def name_of(variant: Variant) -> str:
    dtypes = ("none", "fp32", "bf16", "fp16")
    keep = "-kept" * variant.keep + ("", "-packed32", "-packed16", "-packed8")[variant.state]
    return f"param_{dtypes[variant.param]}-grad_{dtypes[variant.grad]}-copy_{dtypes[variant.copy]}{keep}"


CASES = [(name, v) for name in RUNS for v in VARIANTS + (KEEP if name in ISA else [])]


@pytest.mark.parametrize(("name", "variant"), CASES, ids=[f"{name}-{name_of(v)}" for name, v in CASES])
def test_every_size_and_alignment_has_the_bits_of_the_rule(name: str, variant: Variant) -> None:
    run = run_of(name)
    for number, size in enumerate(SIZES):
        for shift in range(4):
            setting = Setting(betas=BETAS[number % 2], maximize=shift == 1, eps=0.0 if shift == 2 else 1e-8)
            state = first(variant, size, seed=number).clone(shift)
            if shift == 3:  # arrays that disagree about where a vector begins
                state = state._replace(first=state.clone(1).first)
            assert all(runs(state, setting, 3, variant, size, run, seed=number)), (size, shift)


@pytest.mark.parametrize("betas", BETAS, ids=str)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("words", WORDS, ids=str)
def test_a_hundred_steps_have_the_bits_of_the_rule(name: str, words: torch.dtype, betas: tuple[float, float]) -> None:
    number = WORDS.index(words)
    variant = Variant(1, 2, 2, False, number) if number else Variant(1, 1, 2, False)
    state = first(variant, 257, seed=0).clone()
    assert all(runs(state, Setting(betas=betas), 100, variant, 257, run_of(name), seed=0))
    assert state.param.isfinite().all()


@settings(deadline=None, max_examples=150)
@given(
    words=st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 4), min_size=1, max_size=40),
    stored=st.sampled_from(WORDS),
    step=st.integers(1, 100_000),
    lr=st.floats(0, 1e3),
    betas=st.tuples(st.floats(0, 0.999999), st.floats(0, 0.999999)) | st.floats(0, 0.999999).map(lambda b: (b, b)),
    eps=st.just(0.0) | st.floats(1e-12, 1e3),
    weight_decay=st.floats(0, 10),
    factor=st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False),
)
def test_any_bits_at_all_have_the_bits_of_the_rule(
    words: list[tuple[int, int, int, int]],
    stored: torch.dtype,
    step: int,
    lr: float,
    betas: rule.Betas,
    eps: float,
    weight_decay: float,
    factor: float | None,
) -> None:
    param, grad, first, second = torch.tensor(words, dtype=torch.int64).int().view(torch.float32).T.contiguous()
    second.abs_()
    scale = None if factor is None else torch.tensor([factor])
    state = State(param, grad, first, second, torch.zeros(len(param), dtype=torch.bfloat16), scale)
    if stored != torch.float32:
        state = state._replace(first=first.view(torch.int32).to(stored), second=None)
    setting = Setting(lr, betas, eps, weight_decay)
    control = expected(state, setting, step)
    for name in RUNS:
        if name not in ISA or ISA.index(name) <= load().best_isa:
            ours = state.clone()
            RUNS[name]()(update(ours, setting, step))
            assert same(ours, control), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_gradient_is_read_as_torch_reads_it(dtype: torch.dtype) -> None:
    """With beta = 0 the first moment is the gradient."""
    words = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    variant = Variant(1, {torch.bfloat16: 2, torch.float16: 3}[dtype], 0, False)
    for name in RUNS:
        if name in ISA and ISA.index(name) > load().best_isa:
            continue
        state = first(variant, len(words), 0, None)._replace(grad=words.clone())
        RUNS[name]()(update(state, Setting(betas=(0.0, 0.5)), 1))
        flushed = torch.where(words.float().abs() < torch.finfo(torch.float32).tiny, 0.0, words.float())
        assert torch.equal(state.first.nan_to_num(nan=7.0), flushed.nan_to_num(nan=7.0)), name


@pytest.mark.parametrize("copy", [2, 3], ids=["bf16", "fp16"])
def test_weights_of_every_exponent_are_rounded_to_16_bits_as_torch_rounds_them(copy: int) -> None:
    """lr = 0: the copy is the weight. Steps of 4099 through all bit patterns meet every exponent and many ties."""
    words = torch.arange(-(2**31), 2**31, 4099 * 16, dtype=torch.int64).int()
    ties = (words & ~0x1FFF) | torch.tensor([0x1000, 0x8000, 0])[torch.arange(len(words)) % 3].int()
    param = torch.cat([words, ties]).view(torch.float32)
    state = first(Variant(1, 1, copy, False), len(param), 0, None, tame=True)._replace(param=param.clone())
    control = expected(state, Setting(lr=0.0, weight_decay=0.0), 1)
    for name in RUNS:
        if name not in ISA or ISA.index(name) <= load().best_isa:
            ours = state.clone()
            RUNS[name]()(update(ours, Setting(lr=0.0, weight_decay=0.0), 1))
            assert same(ours, control), name


def test_the_callers_denormal_mode_changes_no_bit_and_is_left_as_it_was() -> None:
    variant = Variant(1, 1, 0, False)
    state, setting = first(variant, 1027, 1), Setting()
    state.first.copy_(first(variant, 1027, 5).grad.nan_to_num(0, 0, 0))
    control = expected(state, setting, 2)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        load().step([update(state, setting, 2)])
        assert not torch.tensor([1e-45]).mul(1.0).any()  # still flushing
    finally:
        torch.set_flush_denormal(False)
    assert same(state, control)


def test_the_number_of_threads_changes_no_bit() -> None:
    variant, before = Variant(1, 2, 2, False), torch.get_num_threads()
    states = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            state = first(variant, 100_003, 2).clone()
            parts = [update(state, Setting(), 1)._replace(grad=state.grad[a:b], offset=a) for a, b in
                     ((0, 40_001), (40_001, 40_001), (40_001, 40_004), (40_004, 100_003))]  # fmt: skip
            load().step(parts)
            states.append(state)
    finally:
        torch.set_num_threads(before)
    control = expected(first(variant, 100_003, 2), Setting(), 1)
    assert all(same(state, control) for state in states)


def test_torchs_own_openmp_runtime_is_used_and_no_other_is_loaded() -> None:
    """In a fresh interpreter: other tests load libraries that bring a runtime of their own, such as scikit-learn."""
    code = """
import sys; sys.modules["deepspeed"] = None
from balanced_adam.kernels import cpu
library = cpu.load()
(loaded,) = cpu._openmp()
print(loaded == library.openmp)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", range(len(ISA)), ids=ISA)
def test_sums_of_squares_are_those_of_exact_arithmetic_for_any_isa_and_threads(isa: int, dtype: torch.dtype) -> None:
    run_of(ISA[isa])
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(n, generator=generator).to(dtype) for n in (1, 15, 16, 17, 511, 513, 16_384, 50_001)]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            sums = Library(cpu_library(), isa).sums_of_squares(tensors)
            exact = [math.fsum(x * x for x in tensor.double().tolist()) for tensor in tensors]
            assert sums.tolist() == pytest.approx(exact, rel=1e-14)
            assert torch.equal(sums, load().sums_of_squares(tensors))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", range(len(ISA)), ids=ISA)
def test_directions_are_measured_as_the_rule_has_them_for_any_isa_and_threads(isa: int) -> None:
    run_of(ISA[isa])
    generator = torch.Generator().manual_seed(4)
    moments = [(torch.randn(n, generator=generator), torch.rand(n, generator=generator)) for n in (1, 17, 513, 50_001)]
    step, betas, eps = 7, (0.95, 0.95), 1e-3
    updates = [Update(m, m, m, v, scalars(step, 0.0, betas, eps, 0.0, False)) for m, v in moments]
    directions = [rule.direction(m, v, rule.bias_correction(step, betas, eps)) for m, v in moments]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            squares, greatest = Library(cpu_library(), isa).measure(updates, directions=True)
            exact = [math.fsum(x * x for x in direction.double().tolist()) for direction in directions]
            assert squares.tolist() == pytest.approx(exact, rel=1e-14)
            assert greatest.tolist() == [float(direction.abs().max()) for direction in directions]
            assert torch.equal(squares, load().measure(updates, directions=True)[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", range(len(ISA)), ids=ISA)
@pytest.mark.parametrize("words", WORDS[1:], ids=str)
def test_directions_of_packed_moments_are_those_of_the_rule_within_their_bound(words: torch.dtype, isa: int) -> None:
    run_of(ISA[isa])
    generator = torch.Generator().manual_seed(5)
    state = torch.randint(0, 2**31, (1027,), generator=generator).to(words)
    step, betas, eps = 7, (0.95, 0.95), 1e-8
    correction = rule.bias_correction(step, betas, eps)
    limit = 1.0 / correction.scale
    direction = rule.direction(*packed.unpack(state), correction).clamp(-limit, limit)
    update = Update(state, state, state, None, scalars(step, 0.0, betas, eps, 0.0, False))
    squares, greatest = Library(cpu_library(), isa).measure([update], directions=True)
    assert float(squares) == pytest.approx(math.fsum(x * x for x in direction.double().tolist()), rel=1e-14)
    assert float(greatest) == float(direction.abs().max())


def test_a_tie_between_two_levels_of_packed8_is_decided_alike() -> None:
    """Gradients whose w is on the threshold that their own hash sets, or one bit beside; beta is 0, so v is g^2."""
    found = []
    for exponent in range(-12, -2):
        grad = 2.0**exponent * (1.0 + torch.arange(2**20) * 2.0**-20)
        param = torch.full(grad.shape, 0.5)
        w = grad * grad + packed.FORMATS["packed8"].w_floor
        level = 16.0 ** torch.floor(torch.log2(w) / 4 + 13.5) * packed.FORMATS["packed8"].w_floor
        between = (packed.dither(param, grad, 1)[0] >> 9).float() * (15.0 * 2.0**-23) + 1.0
        found.append(grad[((w / (level * between) - 1.0).abs() < 2.0**-20)])
    grad = torch.cat(found)
    assert len(grad) > 5
    param, words = torch.full(grad.shape, 0.5), torch.zeros(grad.shape, dtype=torch.uint8)
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.0, 0.0), "eps": 1e-8, "weight_decay": 0.0}
    _, right = packed.update(param, grad, words, step=1, **settings)
    load().step([Update(param, grad, words, None, scalars(1, **settings, maximize=False))])
    assert torch.equal(words, right)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_the_greatest_direction_is_not_finite_where_one_is_not(value: float) -> None:
    for at in (0, 17, 39_999):
        m = torch.zeros(40_000)
        m[at] = value
        _, greatest = load().measure(
            [Update(m, m, m, m.isnan().float(), scalars(1, 0.0, (0.9, 0.9), 1.0, 0.0, False))], directions=True
        )
        assert not greatest.isfinite().any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_sum_of_squares_is_finite_exactly_when_all_elements_are(value: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        largest = torch.full((40_000,), torch.finfo(dtype).max, dtype=dtype)
        assert load().sums_of_squares([largest]).isfinite().all()
        for at in (0, 17, 39_999):
            spoilt = largest.clone()
            spoilt[at] = value
            assert not load().sums_of_squares([spoilt]).isfinite().any()


@pytest.mark.parametrize("betas", [(0.95, 0.95), (0.9, 0.999), (0.0, 0.0), (0.999, 0.9)], ids=str)
def test_scalars_made_on_a_device_are_those_made_on_the_host(betas: tuple[float, float]) -> None:
    import ctypes

    prepare = ctypes.CDLL(str(cpu_library())).balanced_adam_cpu_prepare
    for step in (1, 2, 3, 10, 999, 1000, 123_456):
        for lr, eps in ((1e-3, 1e-8), (0.5, 0.0), (3e-4, 1e-3)):
            count = torch.tensor(float(step - 1))
            for rate in (lr, torch.tensor(lr)):
                count.fill_(step - 1)
                made = ctypes.create_string_buffer(40)
                prepare(Recipe(count, rate, betas, eps, 0.1, step % 2 == 0).pack(), made)
                assert made.raw[:36] == scalars(step, float(rate), betas, eps, 0.1, step % 2 == 0)[:36]
                assert int(count) == step
