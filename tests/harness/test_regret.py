"""Rules for beta against measured losses: interpolation, paired intervals, and what has no answer."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from train import regret
from train.settings import SettingsError

BETAS = (0.8, 0.9, 0.95, 0.975)


def losses(noise: float = 0.0, seeds: int = 5) -> pd.DataFrame:
    """2 + log2(horizon / 10)^2 / 10, so that the best beta is 0.9; seeds differ by a constant, and by noise."""
    random = np.random.default_rng(0)
    table = {
        beta: [2 + np.log2(0.1 / (1 - beta)) ** 2 / 10 + s / 100 + noise * random.normal() for s in range(seeds)]
        for beta in BETAS
    }
    return pd.DataFrame(table, index=range(seeds))


@pytest.mark.parametrize("beta", BETAS)
def test_a_beta_that_was_run_costs_what_its_runs_say(beta: float) -> None:
    found, noisy = regret.cost(losses(noise=0.01), beta), losses(noise=0.01)
    difference = noisy[beta] - noisy[0.9]
    assert found.percent == pytest.approx(difference.mean() / noisy[0.9].mean() * 100) and not found.beyond
    if beta != 0.9:
        low, high = stats.ttest_1samp(difference, 0.0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx(tuple(100 * x / noisy[0.9].mean() for x in (low, high)))


def test_between_two_betas_the_loss_is_a_straight_line_over_the_logarithm_of_the_horizon() -> None:
    middle = 1 - 0.1 / math.sqrt(2)  # half way from a horizon of 10 to one of 20
    assert regret.at(losses(), middle).tolist() == pytest.approx(((losses()[0.9] + losses()[0.95]) / 2).tolist())


@pytest.mark.parametrize(("beta", "nearest"), [(0.5, 0.8), (0.0, 0.8), (0.999, 0.975)])
def test_beyond_what_was_run_the_nearest_loss_counts_and_this_is_said(beta: float, nearest: float) -> None:
    found = regret.cost(losses(noise=0.01), beta)
    assert found.beyond and "(beyond what was run)" in str(found)
    assert found.percent == regret.cost(losses(noise=0.01), nearest).percent


def test_a_diverged_run_spoils_its_own_beta_alone() -> None:
    holed = losses(noise=0.01)
    holed.loc[2, 0.8] = math.nan
    assert regret.best(holed) == 0.9
    assert regret.at(holed, 0.9).notna().all() and regret.at(holed, 0.85).isna().sum() == 1


def test_a_rule_that_comes_to_no_beta_has_none(tmp_path: Path) -> None:
    assert str(regret.cost(losses(), regret.chosen("refresh:1000", tmp_path, 400, 1024))) == "none"
    assert regret.chosen("refresh:40", tmp_path, 400, 1024) == pytest.approx(0.9)
    assert math.isnan(regret.chosen("pilot", tmp_path, 400, 1024))
    (tmp_path / "pilot.json").write_text(json.dumps({"beta": 0.9, "steps": 400, "tokens_per_step": 1024}))
    assert str(regret.cost(losses(), regret.chosen("pilot", tmp_path, 400, 1024))) == "0.9: +0.0"
    with pytest.raises(SettingsError, match="is for 400 steps of 1024 tokens, and the runs there are 400 of 2048"):
        regret.chosen("pilot", tmp_path, 400, 2048)


@pytest.mark.parametrize("rule", ["0.95x", "refresh:many", "1.0", "half_life_tokens:-1", "from:0.9:to:0.99"])
def test_a_bad_rule_is_refused_before_runs_are_read(rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert regret.main(["runs/none", "--rules", rule]) == 2
    assert capsys.readouterr().err.startswith(f"error: rules has '{rule}'")


def test_the_diagonal_is_taken_at_each_betas_best_learning_rate() -> None:
    rows = [
        {"arm": arm, "lr": lr, "seed": seed, "validation_loss": 2.0 + seed / 10 + abs(lr - best) * 100}
        for arm, best in (("0.8", 2e-3), ("0.9", 1e-3), ("0.95", 1e-3), ("0.9,0.95", 1e-3), ("0.9:packed8", 1e-3))
        for lr in (1e-3, 2e-3)
        for seed in (0, 1)
    ]
    found = regret.diagonal(pd.DataFrame(rows))
    assert found.columns.tolist() == [0.8, 0.9, 0.95] and found.loc[1].tolist() == [2.1, 2.1, 2.1]
