"""The drill, long: `make test-long`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault_injection.__main__ import Drill, Machine, drill


@pytest.mark.long
@pytest.mark.timeout(0)
def test_a_run_with_two_hundred_faults_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    """Ranks killed and ranks that hang, in steps, collectives and saves, and launchers killed; half an hour."""
    table = drill(Drill(faults=200, seed=2, out=tmp_path), Machine(None, forked=True))
    assert len(table) == 200 and table["fault"].value_counts().min() >= 20
