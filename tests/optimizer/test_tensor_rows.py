"""Sums over rows of tensors that are cut anywhere; and the relatives on DTensors, which are."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from balanced_adam.tensor_rows import Layout, Piece
from tests import session
from tests.optimizer.kinds import KINDS
from tests.ranks import spawn


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_sums_over_rows_have_the_same_bits_however_a_tensor_is_cut(data: st.DataObject) -> None:
    rows, size = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    values = torch.randn(2, rows * size, generator=generator, dtype=torch.float64)
    values *= (torch.randn(2, rows * size, generator=generator, dtype=torch.float64) * 8).exp()
    cuts = sorted({0, rows * size, *data.draw(st.lists(st.integers(0, rows * size), max_size=3))})
    whole = Layout([Piece(rows, rows * size, 0, 0, rows * size)])
    (once,) = whole.row_sums(lambda here: values[:, here], 2, values.device)
    exact = torch.tensor(
        [[math.fsum(row) for row in each.view(rows, size).tolist()] for each in values], dtype=torch.float64
    )
    greatest = values.abs().view(2, rows, size).amax(2)
    assert bool(((once - exact).abs() <= greatest * 2.0**-50).all())
    # Each process has a piece; in place of collectives, the pieces are asked one after the other.
    pieces = [Layout([Piece(rows, rows * size, a, 3, b - a)]) for a, b in pairwise(cuts)]
    gathered: list[list[Tensor]] = [[], []]

    class Rehearsal(Layout):
        def _all_reduce(self, mine: Tensor, op: Any) -> None:
            call = int(mine.dtype == torch.int64)
            gathered[call].append(mine.clone())
            others = torch.stack(gathered[call])
            mine.copy_(others.sum(0) if call else others.amax(0))

    def terms(start: int) -> Any:
        return lambda here: values[:, here.start - 3 + start : here.stop - 3 + start]

    for _ in range(2):  # in the second round all have seen the greatest of all
        gathered[1].clear()
        for layout, start in zip(pieces, cuts, strict=False):
            (sums,) = Rehearsal(*layout).row_sums(terms(start), 2, values.device)
    assert torch.equal(sums, once)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_sums_to_nan_and_leaves_the_others(bad: float) -> None:
    values = torch.ones(1, 6, dtype=torch.float64)
    values[0, 4] = bad
    (sums,) = Layout([Piece(3, 6, 0, 0, 6)]).row_sums(lambda here: values[:, here], 1, values.device)
    assert sums[0, :2].tolist() == [2.0, 2.0] and sums[0, 2].isnan()


# ---- DTensors


def on_ranks(layout: str) -> Any:
    """Job: weights and state of each of these optimizers after all steps; a refusal as its sentence."""
    from tests.optimizer.layouts import STEPS, Weights, everything, optimizer_of, sharded, take

    results: dict[str, Any] = {}
    for name, state in (
        ("adamp", "fp32"),
        ("adamp", "packed16"),
        ("l3", "packed16"),
        ("l1", "fp32"),
        ("amsgrad", "fp32"),
    ):
        kind, own = KINDS[name]
        model = sharded(Weights(), layout)
        try:
            optimizer = optimizer_of(model, state, kind, **own)
        except ValueError as error:
            results[f"{name}-{state}"] = str(error)
            continue
        take(model, optimizer, range(STEPS))
        results[f"{name}-{state}"] = everything(model, optimizer)
    return results


@session.shared
def dtensors(world: int) -> list[list[Any]]:
    from tests.optimizer.layouts import LAYOUTS, several

    return spawn(several, world, [(on_ranks, name) for name in LAYOUTS if world_of(name) == world])


def world_of(layout: str) -> int:
    from tests.optimizer.layouts import LAYOUTS

    return torch.Size(LAYOUTS[layout][0]).numel()


@pytest.mark.ranks
@pytest.mark.parametrize("layout", ["fully_shard 2", "fully_shard 3", "hybrid", "tensor parallel", "replicate"])
def test_dtensors_have_the_bits_of_one_process_or_are_refused(layout: str) -> None:
    pytest.importorskip("torch", "2.6", reason="before torch 2.6 FSDP2 and DTensor have no public names")
    from tests.optimizer import layouts

    place = [name for name in layouts.LAYOUTS if world_of(name) == world_of(layout)].index(layout)
    for rank in dtensors(world_of(layout)):
        for case, found in rank[place].items():
            name, state = case.split("-")
            if layout == "tensor parallel" and name == "adamp":
                assert "must be cut along dimension 0, and over one dimension of the mesh" in found
                continue
            kind, own = KINDS[name]
            model = layouts.Weights()
            optimizer = layouts.optimizer_of(model, state, kind, **own)
            layouts.take(model, optimizer, range(layouts.STEPS))
            layouts.assert_same(found, layouts.everything(model, optimizer))
