"""The training-dynamics metric, by hand and by counting."""

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest

from train.analysis import training_dynamics


def test_omega_is_the_mean_move_of_the_average_after_the_first_tenth() -> None:
    sizes = np.random.default_rng(0).uniform(0.1, 0.3, 40)
    average, moves = sizes[4] * 3.0, []
    for size in sizes[5:] * 3.0:
        before, average = average, average + 2 / 11 * (size - average)
        moves.append(abs(average - before))
    lines = pd.DataFrame({"step": range(1, 41), "update_rms": sizes})
    assert training_dynamics.omega(lines, 9, 10) == pytest.approx(np.mean(moves), rel=1e-12)
    validations = pd.DataFrame({"step": [10, 20], "update_rms": [math.nan] * 2})  # lines of another kind are no steps
    assert training_dynamics.omega(pd.concat([lines, validations]), 9, 10) == pytest.approx(np.mean(moves), rel=1e-12)
    assert math.isnan(training_dynamics.omega(lines[:1], 9, 10))


def test_tied_runs_are_counted_where_they_are_the_evenest_of_their_row() -> None:
    betas = (0.8, 0.9, 0.95)
    rows = [
        {"beta1": b1, "beta2": b2, "lr": 1e-3, "seed": seed, "omega_10": 1.0 if b1 == b2 and seed < 3 else 2.0 + b2}
        for b1, b2, seed in product(betas, betas, range(4))
    ]
    found = training_dynamics.selection(pd.DataFrame(rows), 10)
    # In the fourth seed the smallest beta2 is the evenest, which for beta1 = 0.8 is the tied one.
    assert found[:5] == (10, 10, 12, 3, 3)
    assert found.p == pytest.approx(1 / 27, rel=1e-9)  # three votes of one in three each


def test_a_cell_that_has_always_diverged_takes_no_others_vote() -> None:
    betas = (0.8, 0.9, 0.95)
    rows = [
        {"beta1": b1, "beta2": b2, "lr": 1e-3, "seed": 0, "omega_10": math.nan if b2 == 0.8 else 1.0 + (b1 != b2)}
        for b1, b2 in product(betas[1:], betas)
    ]
    found = training_dynamics.selection(pd.DataFrame(rows), 10)
    assert found[:5] == (10, 2, 2, 2, 2) and found.p == pytest.approx(1 / 4)


def test_without_a_tied_run_and_another_there_is_nothing_to_count() -> None:
    table = pd.DataFrame({"beta1": [0.9, 0.8], "beta2": [0.95, 0.8], "lr": 1e-3, "seed": 0, "omega_10": 1.0})
    found = training_dynamics.selection(table, 10)
    assert found.rows == 0 and math.isnan(found.p)
