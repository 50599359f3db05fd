"""Rules for beta against measured losses: interpolation, paired intervals, and what has no answer."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from train import regret
from train.analysis import beta_rules
from train.common.errors import ConfigError

BETAS = (0.8, 0.9, 0.95, 0.975)
RUNS = {"steps": 400, "tokens_per_step": 1024, "parameters": 50}


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
    found, noisy = beta_rules.cost(losses(noise=0.01), beta), losses(noise=0.01)
    difference = noisy[beta] - noisy[0.9]
    assert found.percent == pytest.approx(difference.mean() / noisy[0.9].mean() * 100) and not found.beyond
    if beta != 0.9:
        low, high = stats.ttest_1samp(difference, 0.0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx(tuple(100 * x / noisy[0.9].mean() for x in (low, high)))


def test_between_two_betas_the_loss_is_a_straight_line_over_the_logarithm_of_the_horizon() -> None:
    middle = 1 - 0.1 / math.sqrt(2)  # half way from a horizon of 10 to one of 20
    assert beta_rules.at(losses(), middle).tolist() == pytest.approx(((losses()[0.9] + losses()[0.95]) / 2).tolist())


@pytest.mark.parametrize(("beta", "nearest"), [(0.5, 0.8), (0.0, 0.8), (0.999, 0.975)])
def test_beyond_what_was_run_the_nearest_loss_counts_and_this_is_said(beta: float, nearest: float) -> None:
    found = beta_rules.cost(losses(noise=0.01), beta)
    assert found.beyond and "(beyond what was run)" in str(found)
    assert found.percent == beta_rules.cost(losses(noise=0.01), nearest).percent


def test_a_diverged_run_spoils_its_own_beta_alone() -> None:
    holed = losses(noise=0.01)
    holed.loc[2, 0.8] = math.nan
    assert beta_rules.best(holed) == 0.9
    assert beta_rules.at(holed, 0.9).notna().all() and beta_rules.at(holed, 0.85).isna().sum() == 1


def test_a_rule_that_comes_to_no_beta_has_none(tmp_path: Path) -> None:
    file = tmp_path / "pilot.json"
    assert str(beta_rules.cost(losses(), beta_rules.chosen("refresh:1000", file, RUNS))) == "none"
    assert beta_rules.chosen("refresh:40", file, RUNS) == pytest.approx(0.9)
    assert math.isnan(beta_rules.chosen("pilot", file, RUNS))
    file.write_text(json.dumps({"beta": 0.9, **RUNS}))
    assert str(beta_rules.cost(losses(), beta_rules.chosen("pilot", file, RUNS))) == "0.9: +0.00"
    file.write_text(json.dumps({"beta": None, **RUNS}))
    assert math.isnan(beta_rules.chosen("pilot", file, RUNS))


@pytest.mark.parametrize("other", RUNS)
def test_a_pilot_for_other_runs_is_refused(other: str, tmp_path: Path) -> None:
    (tmp_path / "pilot.json").write_text(json.dumps({"beta": 0.9, **RUNS, other: 7}))
    with pytest.raises(ConfigError, match=f"pilot.json is for runs with {other} = 7, and these have {RUNS[other]}."):
        beta_rules.chosen("pilot", tmp_path / "pilot.json", RUNS)


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
    found = beta_rules.diagonal(pd.DataFrame(rows))
    assert found.columns.tolist() == [0.8, 0.9, 0.95] and found.loc[1].tolist() == [2.1, 2.1, 2.1]


def table(seeds: dict[str, int]) -> pd.DataFrame:
    """As train.report keeps it: 2 + 1e-3 seed + |horizon - 10| / 100, for so many seeds of each arm."""
    rows = [
        {
            "arm": arm,
            "lr": 1e-3,
            "seed": seed,
            "validation_loss": 2.0 + seed / 1e3 + abs(1 / (1 - float(arm)) - 10) / 100,
        }
        for arm, count in seeds.items()
        for seed in range(count)
    ]
    return pd.DataFrame(rows).assign(step=400, tokens=400 * 1024, parameters=50)


def test_a_seed_that_has_not_ended_everywhere_counts_for_no_beta_and_a_diverged_one_for_all() -> None:
    unfinished = table({"0.8": 3, "0.9": 2, "0.95": 3})
    found = beta_rules.diagonal(unfinished)
    assert found.index.tolist() == [0, 1] and found.notna().all(axis=None) and beta_rules.best(found) == 0.9
    diverged = table({"0.8": 3, "0.9": 3, "0.95": 3})
    diverged.loc[(diverged["arm"] == "0.9") & (diverged["seed"] == 2), "validation_loss"] = math.nan
    found = beta_rules.diagonal(diverged)
    assert found.index.tolist() == [0, 1, 2] and beta_rules.best(found) == 0.8
    assert str(beta_rules.cost(found, 0.9)) == "0.9: diverged (1 runs)" and str(beta_rules.cost(found, 0.85)).endswith(
        "(1 runs)"
    )
    always = table({"0.8": 3, "0.9": 3, "0.95": 3, "0.99": 3})
    always["validation_loss"] = always["validation_loss"].where(always["arm"] != "0.99")
    assert str(beta_rules.cost(beta_rules.diagonal(always), 0.99)) == "0.99: diverged (3 runs)"
    with pytest.raises(ConfigError, match="there are 0 tied betas with a finished run at a seed that all of them have"):
        beta_rules.diagonal(table({"0.8": 1, "0.9": 1, "0.95": 1}).assign(seed=[0, 1, 2]))


@pytest.mark.parametrize("kept", [True, False])
def test_folders_and_kept_tables_give_the_same_row(
    kept: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, pilot = ("a.csv", "a.pilot.json") if kept else ("report.csv", "pilot.json")
    table({"0.8": 3, "0.9": 3, "0.95": 3}).to_csv(tmp_path / file, index=False)
    (tmp_path / pilot).write_text(json.dumps({"beta": 0.95, **RUNS}))
    place = tmp_path / file if kept else tmp_path
    assert regret.main([str(place), "--rules", "0.95", "refresh:40", "refresh:1000", "refresh:4", "pilot"]) == 0
    row = capsys.readouterr().out.splitlines()[2]
    assert row.startswith(f"| {'a' if kept else tmp_path}: 50 weights, 400 steps of 1024 tokens | 3 | 0.9: 2.0010 | ")
    cost = 10 / 2.001
    assert row.split(" | ")[3:] == [
        f"0.95: +{cost:.2f}",
        "0.9: +0.00",
        "none",
        f"0.99: +{cost:.2f} (beyond what was run)",
        f"0.95: +{cost:.2f} |",
    ]


@pytest.mark.parametrize(("place", "advice"), [("", "python -m train.report"), ("none.csv", "give another.")])
def test_a_table_that_is_not_there_is_asked_for(
    place: str, advice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert regret.main([str(tmp_path / place)]) == 2
    assert f" is missing; {advice}" in capsys.readouterr().err


def test_a_best_beta_at_the_edge_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table({"0.9": 2, "0.95": 2, "0.975": 2}).to_csv(tmp_path / "a.csv", index=False)
    assert regret.main([str(tmp_path / "a.csv"), "--rules", "0.95"]) == 0
    assert "| 0.9: 2.0005 (at the edge of those that were run) |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (["arm", "lr"], "is not a table of runs"),
        (["arm", "lr", "seed", "validation_loss"], "lacks numbers above 0 in the columns step, tokens, parameters"),
    ],
)
def test_a_table_that_tells_too_little_is_refused(
    columns: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table({"0.8": 2, "0.9": 2, "0.95": 2})[columns].to_csv(tmp_path / "a.csv", index=False)
    assert regret.main([str(tmp_path / "a.csv")]) == 2
    assert sentence in capsys.readouterr().err


def test_a_seed_that_lacks_a_beta_is_left_out_and_this_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table({"0.8": 2, "0.9": 5, "0.95": 5}).to_csv(tmp_path / "a.csv", index=False)
    assert regret.main([str(tmp_path / "a.csv"), "--rules", "0.95"]) == 0
    assert "| 2 (3 more lack a beta) | 0.9: 2.0005 |" in capsys.readouterr().out
