"""Through a DeepSpeed engine, weights and moments are those of one process running the plain rule, to the last bit.

All of DeepSpeed's arithmetic is exact on these gradients, so nothing is left to bound: each difference is 0 ulp.
"""

import pytest
import torch

from tests.parity.cases import STEPS, Case, matrix, outcomes
from tests.parity.compare import EXACT, ulps
from tests.parity.control import TENSORS, MissingGrad, train
from tests.parity.model import WITHOUT_GRADIENT, WORLDS

pytestmark = pytest.mark.ranks


CELLS = [pytest.param(world, case, id=f"{case}-{world}_ranks") for world in WORLDS for case in matrix(world)]


@pytest.mark.parametrize(("world", "case"), CELLS)
def test_bit_identical_to_the_control(world: int, case: Case) -> None:
    assert outcomes(world)[case] == EXACT


def test_the_two_fates_of_an_absent_gradient_can_be_told_apart() -> None:
    zero, stale = train(STEPS, MissingGrad.ZERO), train(STEPS, MissingGrad.STALE)
    different = {name for name in zero["weights"] if any(ulps(zero[k][name], stale[k][name]) for k in TENSORS)}
    assert different == set(WITHOUT_GRADIENT)


def test_neighbouring_floats_are_one_ulp_apart_also_across_zero() -> None:
    tiny = torch.finfo(torch.float32).smallest_normal
    values = torch.tensor([1.0, -1.0, 0.0, tiny])
    assert ulps(values, values.nextafter(torch.tensor(2.0))) == 1
    assert ulps(torch.tensor([0.0]), torch.tensor([-0.0])) == 0
    denormal = torch.tensor([0.0]).nextafter(torch.tensor(1.0))
    assert ulps(denormal, -denormal) == 2
    assert ulps(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
