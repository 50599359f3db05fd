"""Through a DeepSpeed engine, weights and moments are those of one process running the plain rule, to the last bit.

All of DeepSpeed's arithmetic is exact on these gradients, so nothing is left to bound: each difference is 0 ulp.
"""

import pytest
import torch

from tests.parity.cases import STEPS, Case, advance, matrix, outcomes, start
from tests.parity.compare import EXACT, ulps
from tests.parity.control import TENSORS, MissingGrad, train
from tests.parity.model import WITHOUT_GRADIENT, WORLDS
from tests.parity.relatives import Control
from tests.ranks import spawn

pytestmark = pytest.mark.ranks


CELLS = [pytest.param(world, case, id=f"{case}-{world}_ranks") for world in WORLDS for case in matrix(world)]


@pytest.mark.parametrize(("world", "case"), CELLS)
def test_bit_identical_to_the_control(world: int, case: Case) -> None:
    assert outcomes(world)[case] == EXACT


def own_weights(cases: list[Case]) -> list[dict[str, torch.Tensor]]:
    """Job: the model's weights after all steps. DeepSpeed finds no others with round_robin_gradients."""
    found = []
    for case in cases:
        engine = start(case)
        advance(engine, 0, STEPS)
        found.append({name: p.detach().clone() for name, p in engine.module.named_parameters() if p.requires_grad})
        engine.destroy()
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_parameters_in_round_robin_order_are_the_controls_too(world: int) -> None:
    cases = [
        Case(stage, "fp32", path=path, variant=variant, round_robin=True)
        for stage in (1, 2)
        for variant, path in (("adam", "one_pass"), ("adamp", "torch"))
    ]
    for rank in spawn(own_weights, world, cases):
        for case, found in zip(cases, rank, strict=True):
            control = train(STEPS, case.absent(), variant=case.variant)["weights"]
            assert all(torch.equal(found[name].cpu(), value) for name, value in control.items()), str(case)


def test_each_case_of_adamp_occurs() -> None:
    control = Control("adamp")
    train.__wrapped__(STEPS, MissingGrad.ZERO, variant="adamp", relative=control)
    assert {*control.cases} == {
        (name, case) for name in ("matrix", "last") for case in ("channels", "layer", "neither")
    }


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
