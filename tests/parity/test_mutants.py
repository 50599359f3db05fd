"""The net catches fish: the comparison of ``test_exact`` finds optimizers made wrong, in the quantity they spoil."""

import pytest

from tests.parity.cases import Case, mutant_cases, of_the_wrong
from tests.parity.compare import EXACT
from tests.parity.mutants import MUTANTS, OF_RELATIVES

pytestmark = pytest.mark.ranks

SPOILT = {
    "late_bias_correction_on_rank_1": {"weights"},
    "moments_lost_at_step_5": {"weights", "exp_avg", "exp_avg_sq"},
    "decay_applied_twice": {"weights"},
    "shard_of_rank_1_shifted": {"weights", "exp_avg", "exp_avg_sq"},
    "settings_of_the_first_group": {"weights", "exp_avg_sq"},  # beta1 is the same
    "eps_ignored": {"weights"},
    "adamp-without_collective": {"weights"},
    "adamp-rows_of_the_shard": {"weights"},
    "l3-torch_pow": {"weights", "exp_avg_sq"},
}


@pytest.mark.parametrize("case", list(mutant_cases()), ids=lambda case: f"{case.mutant}-stage{case.stage}")
def test_a_wrong_optimizer_is_found(case: Case) -> None:
    found = of_the_wrong()[case]
    assert found != EXACT
    assert {key for key, ulp in found.items() if ulp and key != "model"} == SPOILT[str(case.mutant)]


def test_every_mutant_is_tried() -> None:
    assert set(SPOILT) == {*MUTANTS, *OF_RELATIVES}
