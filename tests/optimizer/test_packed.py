"""Packed moments: exact where they can be, unbiased where they can't, and any format from any other."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from balanced_adam import BalancedAdam, packed, unpacked
from balanced_adam.optimizer import _warned
from balanced_adam.packed import FORMATS, Format
from balanced_adam.state import FORMATS as STATES

SHORT = [FORMATS["packed16"], FORMATS["packed8"]]


def every_word(format: Format) -> Tensor:
    """Each word there is; of 32 bits a sample."""
    bits = format.w_bits + format.r_bits
    words = torch.randint(0, 2**32, (200_000,), generator=torch.Generator().manual_seed(0))
    words = torch.arange(2**bits) if bits < 32 else words
    return torch.from_numpy(
        words.numpy().astype(f"uint{bits}").view(f"uint{bits}" if bits == 8 else f"int{bits}")
    ).view(format.word)


def code(words: Tensor) -> Tensor:
    """The words as integers, whatever they are stored as; of bfloat16 some are NaN, which no comparison finds equal."""
    return words.view(torch.int16) if words.dtype == torch.bfloat16 else words


def moments(size: int, seed: int, largest: float = 0.5) -> tuple[Tensor, Tensor]:
    """m and v over the range that both short formats cover, |m| up to ``largest`` of √v."""
    generator = torch.Generator().manual_seed(seed)
    root = 2.0 ** (torch.rand(size, generator=generator) * 26 - 24)
    return root * (torch.rand(size, generator=generator) * 2 - 1) * largest, root * root


def numbers(count: int) -> tuple[Tensor, Tensor]:
    """All pairs of ``count`` evenly spaced numbers from 0 to 2^32 - 1, as dither has them."""
    step = 2**32 // count
    u_w, u_r = torch.meshgrid(*[torch.arange(count) * step + step // 2] * 2, indexing="ij")
    return u_w.flatten(), u_r.flatten()


def bits(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).view(np.uint32)


CONSTANTS = {  # of docs/packed-state.md: A, B, δ², ζ, bits of r without its sign, greatest levels
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


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
def test_words_that_go_out_to_fp32_and_come_back_are_the_same(format: Format) -> None:
    words = every_word(format)
    exp_avg, exp_avg_sq = packed.unpack(words)
    assert exp_avg.isfinite().all() and (exp_avg_sq >= 0.0).all()
    assert torch.equal(code(packed.pack(format, exp_avg, exp_avg_sq)), code(words))
    for dither in (0, 2**32 - 1, 0x9E3779B9):  # whatever would have rounded them
        dithers = torch.full(words.shape, dither)
        assert torch.equal(code(packed.pack(format, exp_avg, exp_avg_sq, (dithers, dithers))), code(words))


def test_packed32_is_within_a_few_thousandths_of_a_per_cent() -> None:
    exp_avg, exp_avg_sq = moments(100_000, seed=0, largest=0.99)
    m, v = packed.unpack(packed.pack(FORMATS["packed32"], exp_avg, exp_avg_sq))
    root = exp_avg_sq.sqrt()
    assert ((m - exp_avg).abs() <= root * 2.0**-13).all()  # half a level of r, times the root of 2
    assert ((v - exp_avg_sq).abs() <= exp_avg_sq * 2.0**-11).all()  # half a level of w


@pytest.mark.parametrize("format", SHORT, ids=lambda format: format.name)
def test_the_expectation_of_what_is_stored_is_what_was_to_be_stored(format: Format) -> None:
    count = 256
    dithers = numbers(count)
    # As far as no level is cut off: in packed8, w may go down to a sixteenth.
    largest = {"packed16": 1.0, "packed8": 0.17}[format.name]
    for exp_avg, exp_avg_sq in zip(*(t.tolist() for t in moments(60, seed=1, largest=largest)), strict=True):
        shape = dithers[0].shape
        m, v = packed.unpack(packed.pack(format, torch.full(shape, exp_avg), torch.full(shape, exp_avg_sq), dithers))
        # Midpoints of 256 intervals: off by at most half an interval of the distance between two levels, which is at most this.
        between_v, between_m = {"packed16": (1 / 8, 0.05), "packed8": (15.0, 1.0)}[format.name]
        assert len(v.unique()) <= 2
        assert abs(float(v.double().mean()) - exp_avg_sq) <= between_v / count * exp_avg_sq
        assert abs(float(m.double().mean()) - exp_avg) <= between_m / count * math.sqrt(exp_avg_sq)


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
def test_at_the_ends_of_the_range_values_are_cut_off_and_nothing_is_nan(format: Format) -> None:
    top = math.sqrt(format.w_floor * 2.0 ** (2**format.w_bits / 2 ** (23 - format.w_shift)))
    v = torch.tensor([0.0, 1e-45, format.w_floor / 64, top * top, 1e37, math.inf, math.nan, 1.0])
    m = torch.tensor([0.0, 1e-30, math.sqrt(format.w_floor) / 8, 1.0, 3e18, math.inf, math.nan, math.nan])
    for dither in (None, 0, 2**32 - 1):
        dithers = None if dither is None else (torch.full(v.shape, dither),) * 2
        got_m, got_v = packed.unpack(packed.pack(format, m, v, dithers))
        assert got_m.isfinite().all() and got_v.isfinite().all()
        assert got_v[0] == 0.0 and got_m[0] == 0.0
        assert (got_v.sqrt() <= top).all() and (got_m.abs() <= 2.2 * top).all()


def distance(numbers: Tensor) -> float:
    """Kolmogorov's, of numbers from 0 to 2^32 - 1 from the uniform distribution, times the root of their count."""
    values = numbers.double().sort().values / 2**32
    return float((values - (torch.arange(len(values)) + 0.5) / len(values)).abs().max()) * math.sqrt(len(values))


def test_the_hash_that_rounds_v_is_uniform_and_its_bits_are_independent_however_alike_its_inputs_are() -> None:
    generator = torch.Generator().manual_seed(0)
    size = 100_000
    normal, one = torch.randn(size, generator=generator), torch.ones(size)
    neighbours = (one.view(torch.int32) + torch.arange(size, dtype=torch.int32)).view(torch.float32)
    steps = torch.stack(
        [packed.dither(torch.tensor([0.5]), torch.tensor([1e-3]), t)[0] for t in range(1, 20_001)]
    ).flatten()
    cases = {
        "any": packed.dither(normal, normal.flip(0), 7)[0],
        "equal weights": packed.dither(one, 1e-4 * normal, 7)[0],
        "no gradient": packed.dither(normal, torch.zeros(size), 7)[0],
        "neighbouring weights": packed.dither(neighbours, one, 7)[0],
        "neighbouring gradients": packed.dither(one, neighbours, 7)[0],
        "steps": steps,
    }
    for name, values in cases.items():
        assert distance(values) < 1.95, name  # with chance 0.1 % for independent numbers
        if name == "neighbouring gradients":  # which are spread more evenly than independent numbers
            continue
        # From one element (or step) to the next.
        x = values.double() / 2**32 - 0.5
        assert abs(float((x[1:] * x[:-1]).mean()) * 12) < 3.3 / math.sqrt(len(x)), name
    following = packed.dither(normal, normal.flip(0), 8)[0].double() / 2**32 - 0.5
    now = cases["any"].double() / 2**32 - 0.5
    assert abs(float((now * following).mean()) * 12) < 3.3 / math.sqrt(size)


def test_the_rotation_that_rounds_m_is_spread_more_evenly_than_chance_would_over_steps_and_sizes() -> None:
    zero = torch.zeros(1)
    over_steps = torch.stack([packed.dither(zero, zero, t)[1] for t in range(1, 1001)]).flatten()
    weights = torch.cat([2.0 ** torch.arange(-40, 0), 1.6 * 2.0 ** torch.arange(-40, 0)])
    assert distance(over_steps) < 0.1 and distance(packed.dither(weights, weights, 1)[1]) < 0.5


def test_the_numbers_that_round_v_and_m_do_not_depend_on_each_other_nor_on_what_they_round() -> None:
    generator = torch.Generator().manual_seed(4)
    size = 200_000
    for dtype in (torch.float32, torch.bfloat16):
        weight, grad = ((0.02 * torch.randn(size, generator=generator)).to(dtype).float() for _ in range(2))
        of_w, of_r = (x.double() / 2**32 - 0.5 for x in packed.dither(weight, grad, 11))
        for name, other in {"r": of_r, "weight": weight, "gradient": grad, "|gradient|": grad.abs()}.items():
            assert abs(float(torch.corrcoef(torch.stack([of_w, other.double()]))[0, 1])) < 3.3 / math.sqrt(size), name
        for name, other in {"gradient": grad, "|gradient|": grad.abs()}.items():
            assert abs(float(torch.corrcoef(torch.stack([of_r, other.double()]))[0, 1])) < 3.3 / math.sqrt(size), name


@pytest.mark.parametrize("format", SHORT, ids=lambda format: format.name)
def test_weights_that_are_all_alike_swing_together_by_no_more_than_the_docs_say(format: Format) -> None:
    """A fresh norm's weights, or zeroed ones: in a step all round m by the same number, so that |m| as a whole goes up and down."""
    generator = torch.Generator().manual_seed(5)
    size, beta = 4000, 0.95
    weight, words = torch.ones(size), torch.zeros(size, dtype=format.word)
    m, v = torch.zeros(size), torch.zeros(size)
    swings = []
    for step in range(1, 241):
        grad = 1e-3 * torch.randn(size, generator=generator)
        settings: dict[str, Any] = {"step": step, "lr": 0.0, "betas": (beta, beta), "eps": 1e-8, "weight_decay": 0.0}
        weight, words = packed.update(weight, grad, words, **settings)
        m, v = m * beta + grad * (1 - beta), v * beta + grad * grad * (1 - beta)
        swings.append(float((packed.unpack(words)[0].abs() - m.abs()).double().mean() / m.abs().double().mean()))
    after = torch.tensor(swings[40:])
    alone, over_20 = float(after.std()), float(after.view(10, 20).mean(dim=1).std())
    # 2 and 0.7 %, 14 and 5 %; independent numbers would leave 4000^-1/2 of the noise of an element.
    limits = {"packed16": (0.025, 0.01), "packed8": (0.17, 0.06)}[format.name]
    assert alone < limits[0] and over_20 < limits[1], (alone, over_20)


@pytest.mark.parametrize("format", SHORT, ids=lambda format: format.name)
def test_averages_rounded_at_every_step_stay_where_the_true_ones_are_but_for_m_in_packed8(format: Format) -> None:
    generator = torch.Generator().manual_seed(2)
    size, beta = 4000, 0.95
    words, weight = torch.zeros(size, dtype=format.word), torch.randn(size, generator=generator)
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
    low, high = {"packed16": (0.995, 1.005), "packed8": (0.7, 0.8)}[format.name]
    assert low <= float(sums[0] / sums[1]) <= high
    assert float(sums[2] / sums[3]) == pytest.approx(1.0, abs=0.01)


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
        assert (param - before).abs().max() <= 1.0 + 1e-4  # of fp32 numbers around 100
        assert optimizer.update_size().greatest <= 1.0 + 1e-6


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(33, 5), (1,), (0,), (1000,)]
    return [
        nn.Parameter(torch.randn(s, generator=generator).to(d)) for s in shapes for d in (torch.float32, torch.bfloat16)
    ]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for param in params:
            param.grad = (0.01 * torch.randn(param.shape, generator=generator)).to(param.dtype)
        optimizer.step()


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
def test_the_elements_that_are_counted_are_those_whose_moment_is_cut_off(state: str) -> None:
    """m from 0 to 2.5 times √v; where it is cut, what is stored is the greatest level, and less than m."""
    format, size = FORMATS[state], 20_000
    exp_avg_sq = moments(size, seed=3)[1]
    exp_avg = exp_avg_sq.sqrt() * torch.linspace(0.0, 2.5, size)
    u_w, u_r = numbers(256)
    words = packed.pack(format, exp_avg, exp_avg_sq, (u_w[:size], u_r[:size]))
    cut = packed.beyond(words, exp_avg)
    stored, v = packed.unpack(words)
    top = (code(words).to(torch.int64) & format.r_top) == format.r_top
    assert 0.3 < float(cut.double().mean()) < 0.9 and not (cut & ~top).any()
    assert (stored[cut] < exp_avg[cut]).all()
    gap = {"packed32": 2.0**-13, "packed16": 1 / 16, "packed8": 1 / 4}[state]  # of the two greatest levels of r
    power = 2.0 ** ((v + format.w_floor).log2() / 2 + 0.5).floor()
    assert ((exp_avg - stored)[~cut] <= 1.001 * gap * power[~cut]).all()


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
    ("state", "format", "message"),
    [
        (
            {"step": torch.tensor(500.0), "state1": torch.ones(4), "absmax1": torch.ones(1)},
            "fp32",
            "has step, state1, absmax1; it must",
        ),
        (
            {"step": torch.tensor(5.0), "exp_avg": torch.ones(4)},
            "fp32",
            "has step, exp_avg; it must have step, and exp_avg and exp_avg_sq",
        ),
        ({"momentum_buffer": torch.ones(4)}, "fp32", "has momentum_buffer; it must have step"),
        ({"exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4)}, "fp32", "has exp_avg, exp_avg_sq; it must have step"),
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
    state: dict, format: str, message: str
) -> None:
    params = [nn.Parameter(torch.ones(4))]
    optimizer = BalancedAdam(params, state="packed16")
    train(optimizer, params, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    group = {**before["param_groups"][0], "state": format}
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


@pytest.mark.parametrize("state", FORMATS)
def test_words_that_a_loader_has_cast_by_value_are_refused(state: str) -> None:
    """torch's own Optimizer.load_state_dict does that, where the weights are bfloat16; and a copy into a tensor of another dtype."""
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
