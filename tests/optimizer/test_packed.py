"""Packed words: those of the formulas in the docs, exact where they can be, unbiased where they can't."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from balanced_adam import packed
from balanced_adam.packed import FORMATS, Format
from tests.optimizer.words import SHORT, code, moments, numbers


def every_word(fmt: Format) -> Tensor:
    """Each word there is; of 32 bits a sample."""
    bits = fmt.w_bits + fmt.r_bits
    words = torch.randint(0, 2**32, (200_000,), generator=torch.Generator().manual_seed(0))
    words = torch.arange(2**bits) if bits < 32 else words
    return torch.from_numpy(
        words.numpy().astype(f"uint{bits}").view(f"uint{bits}" if bits == 8 else f"int{bits}")
    ).view(fmt.word)


def bits(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).view(np.uint32)


CONSTANTS = {  # as in docs/packed-state.md: A, B, δ², ζ, bits of r without its sign, greatest levels
    "packed32": (13, 10, 2.0**-80, 1 / 2, 14, 2**17 - 1, 2**14 - 1),
    "packed16": (20, 19, 2.0**-54, 13 / 128, 6, 511, 63),
    "packed8": (25, 22, 2.0**-54, 3 / 32, 3, 15, 7),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_words_are_those_of_the_formulas_in_the_docs(name: str) -> None:
    a, b, floor, zeta, r_bits, w_top, r_top = CONSTANTS[name]
    random, size, step = np.random.default_rng(0), 100_000, 7
    weight, gradient = (random.normal(size=size).astype(np.float32) for _ in range(2))
    root = 2.0 ** random.uniform(-32, 6, size)
    v, m = (root * root).astype(np.float32), (root * random.uniform(-1.2, 1.2, size)).astype(np.float32)
    with np.errstate(over="ignore"):
        start = np.uint32(step) * np.uint32(0x9E3779B9)
        mixed = (bits(abs(weight)) * np.uint32(0x85EBCA6B) + start) ^ bits(abs(gradient))
        u_w = (mixed ^ (mixed >> 15)) * np.uint32(0x7FEB352D)
        u_r = (bits(abs(weight)) & np.uint32(0x7FC00000)) * np.uint32(633) + start
    w = v + np.float32(floor)
    above, base = (bits(x).astype(np.int64) for x in (w, np.full(1, floor)))
    above = above - base
    if name == "packed32":
        level = (above + (1 << (a - 1))) >> a
    elif name == "packed16":
        level = (above + (u_w >> np.uint32(32 - a))) >> a
    else:
        level = np.minimum(above >> a, 14)
        low = (base + (level << a)).astype(np.uint32).view(np.float32)
        level = level + (
            w > low * (np.float32(1) + (u_w >> np.uint32(9)).astype(np.float32) * np.float32(15 * 2.0**-23))
        )
    level = np.minimum(level, w_top)
    stored = (base + (level << a)).astype(np.uint32)
    s = (((stored >> 1) & np.uint32(0x7F800000)) + np.uint32(0x20000000)).view(np.float32)
    above = bits(abs(m) / s + np.float32(zeta)).astype(np.int64) - int(bits(np.full(1, zeta))[0])
    size_of_r = np.minimum((above + ((1 << (b - 1)) if name == "packed32" else u_r >> np.uint32(32 - b))) >> b, r_top)
    levels = (level << (r_bits + 1)) | ((m < 0).astype(np.int64) << r_bits) | size_of_r
    dither = packed.dither(torch.from_numpy(weight), torch.from_numpy(gradient), step)
    words = packed.pack(FORMATS[name], torch.from_numpy(m), torch.from_numpy(v), dither)
    width = 8 * words.element_size()
    assert (code(words).to(torch.int64).numpy() & (2**width - 1) == levels).all()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_words_that_go_out_to_fp32_and_come_back_are_the_same(fmt: Format) -> None:
    words = every_word(fmt)
    exp_avg, exp_avg_sq = packed.unpack(words)
    assert exp_avg.isfinite().all() and (exp_avg_sq >= 0.0).all()
    assert torch.equal(code(packed.pack(fmt, exp_avg, exp_avg_sq)), code(words))
    for dither in (0, 2**32 - 1, 0x9E3779B9):  # whatever would have rounded them
        dithers = torch.full(words.shape, dither)
        assert torch.equal(code(packed.pack(fmt, exp_avg, exp_avg_sq, (dithers, dithers))), code(words))


def test_packed32_is_within_a_few_thousandths_of_a_per_cent() -> None:
    exp_avg, exp_avg_sq = moments(100_000, seed=0, largest=0.99)
    m, v = packed.unpack(packed.pack(FORMATS["packed32"], exp_avg, exp_avg_sq))
    root = exp_avg_sq.sqrt()
    assert ((m - exp_avg).abs() <= root * 2.0**-13).all()  # half a level of r, times the root of 2
    assert ((v - exp_avg_sq).abs() <= exp_avg_sq * 2.0**-11).all()  # half a level of w


@pytest.mark.parametrize("fmt", SHORT, ids=lambda fmt: fmt.name)
def test_the_expectation_of_what_is_stored_is_what_was_to_be_stored(fmt: Format) -> None:
    count = 256
    dithers = numbers(count)
    # As far as no level is cut off: in packed8, w may go down to a sixteenth.
    largest = {"packed16": 1.0, "packed8": 0.17}[fmt.name]
    for exp_avg, exp_avg_sq in zip(*(t.tolist() for t in moments(60, seed=1, largest=largest)), strict=True):
        shape = dithers[0].shape
        m, v = packed.unpack(packed.pack(fmt, torch.full(shape, exp_avg), torch.full(shape, exp_avg_sq), dithers))
        # Midpoints of 256 intervals: off by at most half an interval of the distance between two levels, at most this.
        between_v, between_m = {"packed16": (1 / 8, 0.05), "packed8": (15.0, 1.0)}[fmt.name]
        assert len(v.unique()) <= 2
        assert abs(float(v.double().mean()) - exp_avg_sq) <= between_v / count * exp_avg_sq
        assert abs(float(m.double().mean()) - exp_avg) <= between_m / count * math.sqrt(exp_avg_sq)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_at_the_ends_of_the_range_values_are_cut_off_and_nothing_is_nan(fmt: Format) -> None:
    top = math.sqrt(fmt.w_floor * 2.0 ** (2**fmt.w_bits / 2 ** (23 - fmt.w_shift)))
    v = torch.tensor([0.0, 1e-45, fmt.w_floor / 64, top * top, 1e37, math.inf, math.nan, 1.0])
    m = torch.tensor([0.0, 1e-30, math.sqrt(fmt.w_floor) / 8, 1.0, 3e18, math.inf, math.nan, math.nan])
    for dither in (None, 0, 2**32 - 1):
        dithers = None if dither is None else (torch.full(v.shape, dither),) * 2
        got_m, got_v = packed.unpack(packed.pack(fmt, m, v, dithers))
        assert got_m.isfinite().all() and got_v.isfinite().all()
        assert got_v[0] == 0.0 and got_m[0] == 0.0
        assert (got_v.sqrt() <= top).all() and (got_m.abs() <= 2.2 * top).all()


@pytest.mark.parametrize("fmt", SHORT, ids=lambda fmt: fmt.name)
def test_averages_rounded_at_every_step_stay_where_the_true_ones_are_but_for_m_in_packed8(fmt: Format) -> None:
    generator = torch.Generator().manual_seed(2)
    size, beta = 4000, 0.95
    words, weight = torch.zeros(size, dtype=fmt.word), torch.randn(size, generator=generator)
    m, v = torch.zeros(size), torch.zeros(size)
    sums = torch.zeros(4, dtype=torch.float64)
    for step in range(1, 201):
        grad = 1e-3 * (torch.randn(size, generator=generator) + 0.3)
        weight, words = packed.update(
            weight, grad, words, step=step, lr=1e-3, betas=(beta, beta), eps=1e-8, weight_decay=0.0
        )
        m, v = m * beta + grad * (1 - beta), v * beta + grad * grad * (1 - beta)
        if step > 100:
            ours = packed.unpack(words)
            sums += torch.stack([ours[0].double().sum(), m.double().sum(), ours[1].double().sum(), v.double().sum()])
    # Two octaves lie between levels of packed8's d: where it goes down to a quarter, r would exceed its greatest level.
    low, high = {"packed16": (0.995, 1.005), "packed8": (0.7, 0.8)}[fmt.name]
    assert low <= float(sums[0] / sums[1]) <= high
    assert float(sums[2] / sums[3]) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("state", FORMATS)
def test_the_elements_that_are_counted_are_those_whose_moment_is_cut_off(state: str) -> None:
    """m from 0 to 2.5 times √v; where it is cut, what is stored is the greatest level, and less than m."""
    fmt, size = FORMATS[state], 20_000
    exp_avg_sq = moments(size, seed=3)[1]
    exp_avg = exp_avg_sq.sqrt() * torch.linspace(0.0, 2.5, size)
    u_w, u_r = numbers(256)
    words = packed.pack(fmt, exp_avg, exp_avg_sq, (u_w[:size], u_r[:size]))
    cut = packed.beyond(words, exp_avg)
    stored, v = packed.unpack(words)
    top = (code(words).to(torch.int64) & fmt.r_top) == fmt.r_top
    assert 0.3 < float(cut.double().mean()) < 0.9 and not (cut & ~top).any()
    assert (stored[cut] < exp_avg[cut]).all()
    gap = {"packed32": 2.0**-13, "packed16": 1 / 16, "packed8": 1 / 4}[state]  # between the two greatest levels of r
    power = 2.0 ** ((v + fmt.w_floor).log2() / 2 + 0.5).floor()
    assert ((exp_avg - stored)[~cut] <= 1.001 * gap * power[~cut]).all()
