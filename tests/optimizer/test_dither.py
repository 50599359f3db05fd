"""The numbers that round packed moments: uniform, independent where they must be, and even over steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from balanced_adam import packed
from balanced_adam.packed import Format
from tests.optimizer.words import SHORT


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


@pytest.mark.parametrize("fmt", SHORT, ids=lambda fmt: fmt.name)
def test_weights_that_are_all_alike_swing_together_by_no_more_than_the_docs_say(fmt: Format) -> None:
    """A fresh norm's weights, or zeroed ones: in a step all round m by the same number, and |m| as a whole swings."""
    generator = torch.Generator().manual_seed(5)
    size, beta = 4000, 0.95
    weight, words = torch.ones(size), torch.zeros(size, dtype=fmt.word)
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
    limits = {"packed16": (0.025, 0.01), "packed8": (0.17, 0.06)}[fmt.name]
    assert alone < limits[0] and over_20 < limits[1], (alone, over_20)
