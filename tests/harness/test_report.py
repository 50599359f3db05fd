"""The statistics of the report against scipy's paired test and by hand."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from train import report
from train.analysis.lr_selection import at_edge, best_lr
from train.analysis.report_page import curves, difference_curves, paired_differences
from train.analysis.results import caveats, relation, renewals, summarize


def runs(losses: dict[str, list[float]], lr: float = 1e-3) -> pd.DataFrame:
    rows = [
        {"name": f"{arm}-{seed}", "arm": arm, "lr": lr, "seed": seed, "validation_loss": loss}
        for arm, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_intervals_are_those_of_scipys_paired_t_test_and_p_values_are_holms() -> None:
    random = np.random.default_rng(0)
    base = random.normal(2.0, 0.1, 5)
    arms = {"0.95": base, "a": base + random.normal(0.05, 0.01, 5), "b": base + random.normal(0.01, 0.02, 5)}
    summary = summarize(runs({k: list(v) for k, v in arms.items()}), "0.95").set_index("arm")
    raw = {}
    for arm in ("a", "b"):
        test = stats.ttest_rel(arms[arm], arms["0.95"])
        low, high = test.confidence_interval(0.95)
        assert summary.loc[arm, ["low", "high"]].tolist() == pytest.approx([low, high])
        raw[arm] = test.pvalue
    small, large = sorted(raw, key=lambda arm: raw[arm])
    assert summary.loc[small, "p_holm"] == pytest.approx(min(1, 2 * raw[small]))
    assert summary.loc[large, "p_holm"] == pytest.approx(max(raw[large], min(1, 2 * raw[small])))
    assert summary.loc["a", "verdict"].startswith("(a) is worse than (0.95) by 0.0")


def test_a_clear_gain_is_better_noise_is_not_distinguishable_and_one_seed_proves_nothing() -> None:
    table = runs({"0.95": [2.0, 2.1, 2.2], "gain": [1.9, 2.0, 2.101], "noise": [2.1, 2.0, 2.2]})
    verdicts = summarize(table, "0.95").set_index("arm")["verdict"]
    assert "better" in verdicts["gain"] and "not distinguishable from (0.95) at n = 3" in verdicts["noise"]
    one = runs({"0.95": [2.0], "x": [1.0]})
    assert "one seed proves nothing" in summarize(one, "0.95")["verdict"][1]
    assert any("one seed proves nothing" in note for note in caveats(one))


def test_a_divergence_is_counted_and_its_seed_has_no_pair() -> None:
    summary = summarize(runs({"0.95": [2.0, 2.1, 2.2], "x": [2.5, math.nan, 2.6]}), "0.95").set_index("arm")
    assert summary.loc["x", "diverged"] == 1 and summary.loc["x", "pairs"] == 2 and summary.loc["x", "runs"] == 3
    better = summarize(runs({"0.95": [2.0, 2.1, 2.2], "x": [1.5, math.nan, 1.701]}), "0.95")["verdict"][1]
    assert better.endswith("at n = 2. This leaves out what has diverged: 1 of 3 runs of (x).")
    worse = summarize(runs({"0.95": [1.5, math.nan, 1.701], "x": [2.0, 2.1, 2.2]}), "0.95")["verdict"][1]
    assert worse.endswith("at n = 2. This leaves out what has diverged: 1 of 3 runs of (0.95).")


@pytest.mark.parametrize(
    ("arm", "baseline", "differ"),
    [
        ("0.9,0.95", "0.9", "the tie alone"),
        ("0.9", "0.9,0.999", "the tie alone"),
        ("0.95", "0.9", "the memory alone"),
        ("0.95", "0.9,0.95", "the memory and the tie"),
        ("0.9,0.999", "0.9,0.95", "beta2 alone"),
        ("0.95,0.99", "0.9,0.999", "the memory and beta2"),
        ("0.9:packed16", "0.9", "the optimizer or the format of its state alone"),
        ("adamd:0.9,0.95", "0.9", "the tie and the optimizer or the format of its state"),
        ("torch:NAdam:0.9,0.999", "torch:NAdam:0.9", "the tie alone"),
        ("refresh:10", "0.9", ""),
        ("0.9", "from:0.9:to:0.99", ""),
        ("0.9", "0.9", ""),
    ],
)
def test_a_pair_says_in_what_it_differs(arm: str, baseline: str, differ: str) -> None:
    assert relation(arm, baseline) == (f" They differ in {differ}." if differ else "")
    summary = summarize(runs({baseline: [2.0, 2.1, 2.2], arm: [1.9, 2.0, 2.101]}), baseline)
    if arm != baseline:
        assert summary["verdict"].tolist()[0] == f"({baseline}) is the baseline."
        assert summary["verdict"].tolist()[1].endswith(f"at n = 3.{relation(arm, baseline)}")


def test_a_report_says_how_often_a_run_renews_its_first_moment() -> None:
    sentence = renewals(["0.9", "0.9,0.95", "0.95", "refresh:5"], 200)
    assert "how often 200 steps renew the first moment, is 20 at beta1 = 0.9, 10 at beta1 = 0.95; with" in sentence
    assert renewals(["refresh:5"], 200) == ""


def test_an_arm_has_one_colour_in_every_plot() -> None:
    generator = np.random.default_rng(0)
    table = runs({"0.9": [2.0, 2.1], "0.9,0.95": [1.9, 2.0], "0.95": [1.8, 2.2]})
    metrics = {name: pd.DataFrame({"step": range(1, 41), "loss": generator.normal(size=40)}) for name in table["name"]}
    colors = {"0.9": "#aa0000", "0.9,0.95": "#00bb00", "0.95": "#0000cc"}
    for drawn in (curves(table, metrics, "loss", colors), difference_curves(table, metrics, "0.9", colors)):
        legend = drawn[drawn.index('id="legend_1"') :]
        for arm, color in colors.items():
            before = legend[: legend.index(f"({arm})")]
            assert before.rindex(f"stroke: {color}") == max(before.rfind(f"stroke: {each}") for each in colors.values())


def test_each_arm_is_shown_at_its_best_learning_rate_and_an_edge_is_flagged() -> None:
    table = pd.concat(
        [runs({"0.95": [2.0, 2.0], "x": [3.0, 3.0]}, 1e-3), runs({"0.95": [2.5, 2.5], "x": [1.0, math.nan]}, 2e-3)]
    )
    best = best_lr(table).groupby("arm")["lr"].first()
    assert best.to_dict() == {"0.95": 1e-3, "x": 1e-3}  # a divergence loses to any loss
    assert sum("at the edge" in note for note in caveats(table)) == 2


def test_an_arm_that_has_always_diverged_is_not_at_an_edge() -> None:
    table = pd.concat([runs({"0.95": [2.0], "x": [math.nan]}, lr) for lr in (1e-3, 2e-3)])
    assert at_edge(table) == ["0.95"]


def test_without_arguments_it_reports_the_folder_of_make_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        report.main([])
    assert capsys.readouterr().err.startswith("error: runs/compare holds no manifest.json")


def test_a_run_that_has_not_ended_is_not_counted_as_diverged() -> None:
    table = runs({"0.95": [2.0, 2.1, 2.2], "x": [2.5, math.nan, 2.6]})
    summary = summarize(table[table["name"] != "x-2"], "0.95").set_index("arm")
    assert summary.loc["x", ["runs", "diverged", "pairs"]].tolist() == [2, 1, 1]


def test_differences_over_steps_are_rolling_means_with_students_interval_over_seeds() -> None:
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(size=(2, 3, 60))  # (arm, seed, step): means over three steps
    found = paired_differences([pd.Series(x) for x in ours], [pd.Series(x) for x in theirs])
    assert found["middle"].isna().tolist() == [True] * 2 + [False] * 58
    for step in (2, 30, 59):
        means = (ours - theirs)[:, step - 2 : step + 1].mean(axis=1)
        expected = stats.ttest_1samp(means, 0.0)
        interval = expected.confidence_interval(0.95)
        np.testing.assert_allclose(found.loc[step], [means.mean(), interval.low, interval.high], rtol=1e-12)
    alone = paired_differences([pd.Series(ours[0])], [pd.Series(theirs[0])])
    assert alone["middle"].notna().sum() == 58 and alone["low"].isna().all()
    cut = paired_differences([pd.Series(x) for x in (*ours[:2], ours[2][:30])], [pd.Series(x) for x in theirs])
    pd.testing.assert_frame_equal(cut, found[:30])  # where one of them diverged, nothing is shown
