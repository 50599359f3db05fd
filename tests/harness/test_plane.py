"""The beta plane: on losses whose make-up is known, and against scipy."""

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from train import plane, report
from train.analysis import beta_grid

BETAS = (0.8, 0.9, 0.95)


def plane_of(seeds: int, of_a_seed: float, of_a_run: float, tie: float = 0.0) -> pd.DataFrame:
    """loss = 2 + 0.1 (beta1 - 0.8) + (a cost off the diagonal) + (the seed's own) + (noise), at two learning rates."""
    random = np.random.default_rng(0)
    shifts = random.normal(0.0, of_a_seed, seeds)
    rows = []
    for beta1, beta2, seed, lr in product(BETAS, BETAS, range(seeds), (1e-3, 2e-3)):
        arm = f"{beta1}" if beta1 == beta2 else f"{beta1},{beta2}"
        loss = (
            2.0
            + 0.1 * (beta1 - 0.8)
            + tie * (beta1 != beta2)
            + shifts[seed]
            + random.normal(0.0, of_a_run)
            + (lr - 1e-3) * 100
        )
        rows.append({"arm": arm, "lr": lr, "seed": seed, "validation_loss": loss})
    return pd.DataFrame(rows).assign(omega_10=1.0, omega_50=1.0, omega_200=1.0)


def best_of(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["lr"] == 1e-3]


def test_pairs_are_read_from_arms_and_packed_ones_and_rules_left_out() -> None:
    table = pd.DataFrame({"arm": ["0.9", "0.9,0.999", "0.9:packed8", "refresh:100", "1e-05", "1e", "e,5"]})
    found = beta_grid.cells_of(table)
    assert found[["beta1", "beta2"]].values.tolist() == [[0.9, 0.9], [0.9, 0.999], [1e-5, 1e-5]]


def test_a_few_arms_are_no_plane() -> None:
    table = best_of(plane_of(2, 0.1, 0.1))
    assert beta_grid.is_grid(table)
    assert not beta_grid.is_grid(table[table["arm"].isin(["0.8", "0.9", "0.9,0.95"])])


def test_the_noise_of_a_run_and_of_a_pair_are_told_apart() -> None:
    found = beta_grid.noise(beta_grid.cells_of(best_of(plane_of(400, of_a_seed=0.05, of_a_run=0.01))))
    assert found.of_a_run == pytest.approx(math.hypot(0.05, 0.01), rel=0.1)
    assert found.of_a_pair == pytest.approx(0.01 * math.sqrt(2), rel=0.05)
    wild = plane_of(40, of_a_seed=0.05, of_a_run=0.01)
    wild["validation_loss"] += (wild["arm"] == "0.95,0.8") * np.random.default_rng(2).normal(0.0, 1.0, len(wild))
    assert beta_grid.noise(beta_grid.cells_of(best_of(wild))).of_a_pair == pytest.approx(0.01 * math.sqrt(2), rel=0.2)


def test_so_many_seeds_show_a_tenth_of_a_per_cent_in_four_of_five_trials() -> None:
    seeds = beta_grid.seeds_for(0.002, 0.002 * math.sqrt(2))
    assert seeds is not None
    random = np.random.default_rng(1)
    for count, enough in ((seeds, True), (seeds - 1, False)):
        differences = random.normal(0.002, 0.002 * math.sqrt(2), (20_000, count))
        assert (np.mean(stats.ttest_1samp(differences, 0.0, axis=1).pvalue < 0.05) >= 0.795) == enough
    assert (
        beta_grid.seeds_for(0.05, 1e-4) == 2
        and beta_grid.seeds_for(1e-6, 1.0) is None
        and beta_grid.seeds_for(0.1, math.nan) is None
    )


def test_contrasts_are_paired_tests_and_holms_over_all_of_them() -> None:
    cells = beta_grid.cells_of(best_of(plane_of(5, 0.05, 0.002, tie=0.05)))
    found = beta_grid.contrasts(cells)
    (best,) = (c for c in found if c.why == "best tied against best untied")
    assert best.ours == (0.8, 0.8) and best.theirs in ((0.8, 0.9), (0.8, 0.95))
    usual = [c.ours for c in found if c.why == "tied against the usual pair"]
    assert usual == [(0.8, 0.8), (0.95, 0.95)]
    alone = {(c.ours, c.theirs): c for c in found if c.why == "the tie alone"}
    # Each comparison once: (0.8, 0.8) against the best untied of its row has been asked already.
    assert len(alone) == 5 and all(ours[0] == theirs[0] for ours, theirs in alone)
    assert [(c.ours, c.theirs) for c in found if c.why == "beta1 alone"] == [
        ((0.9, 0.95), (0.8, 0.95)), ((0.95, 0.8), (0.9, 0.8))
    ]  # fmt: skip
    losses = cells.pivot(index="seed", columns="arm", values="validation_loss")
    test = stats.ttest_rel(losses["0.95"], losses["0.95,0.8"])
    tie, interval = alone[(0.95, 0.95), (0.95, 0.8)], test.confidence_interval(0.95)
    assert (tie.difference, tie.low, tie.high) == pytest.approx(
        ((losses["0.95"] - losses["0.95,0.8"]).mean(), interval.low, interval.high), rel=1e-12
    )
    assert tie.pairs == 5 and tie.high < 0.0 and test.pvalue <= tie.p <= len(found) * test.pvalue


def test_more_seeds_on_the_diagonal_decide_nothing_by_their_own_luck() -> None:
    table = best_of(plane_of(5, of_a_seed=0.5, of_a_run=1e-4))
    design = table[(table["seed"] < 3) | ~table["arm"].str.contains(",")]
    cells = beta_grid.cells_of(design)
    assert beta_grid.means(cells).idxmin()[0] == 0.8 and beta_grid.means(cells).notna().all()
    assert beta_grid.noise(cells).of_a_pair == pytest.approx(1e-4 * math.sqrt(2), rel=0.3)
    assert {c.pairs for c in beta_grid.contrasts(cells)} == {3}
    alone = design.copy()  # at a seed that the untied cells don't have
    alone.loc[(alone["arm"] == "0.8") & (alone["seed"] == 4), "validation_loss"] = math.nan
    assert math.isnan(beta_grid.means(beta_grid.cells_of(alone))[0.8, 0.8]) and beta_grid.contrasts(
        beta_grid.cells_of(alone)
    )[0].ours == (0.9, 0.9)


def table_of_a_sign(cost: float) -> pd.DataFrame:
    """The plane, and a tied beta of 0 whose loss differs by so much from that of (0.8, 0.8)."""
    table = plane_of(3, 0.01, 0.001)
    sign = table[table["arm"] == "0.8"].assign(arm="0.0")
    return pd.concat([table, sign.assign(validation_loss=sign["validation_loss"] + cost)])


def test_the_comparisons_say_how_many_they_are_and_which_optimum_is_at_an_edge() -> None:
    text = beta_grid.markdown(plane_of(3, 0.01, 0.001), best_of(plane_of(3, 0.01, 0.001)))
    count = len(beta_grid.contrasts(beta_grid.cells_of(best_of(plane_of(3, 0.01, 0.001)))))
    t = stats.t.isf(0.025 / count, 2)
    assert (
        f"corrected for {count} comparisons" in text
        and f"with 3 pairs the first of them has to be {t:.1f} standard" in text
    )
    assert (
        "- The best tied beta is 0.8, at the edge of those that were run" in text
        and "of 6 untied cells more so than of 3" in text
    )
    alone = table_of_a_sign(0.5)  # a beta on the diagonal alone makes no row and no column
    text = beta_grid.markdown(alone, best_of(alone))
    assert "The best tied beta is" not in text and "The best beta1 is 0.8, at the edge" in text
    least = table_of_a_sign(-0.5)
    assert "The best tied beta is" not in beta_grid.markdown(least, best_of(least))  # below 0 there is nothing
    inner = plane_of(3, 0.0, 0.0).assign(validation_loss=lambda t: t["validation_loss"] - 0.5 * (t["arm"] == "0.9"))
    assert "The best tied beta is" not in beta_grid.markdown(inner, best_of(inner))


@pytest.mark.parametrize("spoiled", ["one seed", "first runs", "all tied diverged", "all diverged"])
def test_whatever_is_there_can_be_reported(spoiled: str) -> None:
    table = plane_of(2, 0.01, 0.001)
    if spoiled == "one seed":
        table = table[table["seed"] == 0]
    elif spoiled == "first runs":
        table = table[:3]
    else:
        chosen = table["arm"].str.contains(",") if spoiled == "all tied diverged" else table["arm"] == ""
        table["validation_loss"] = table["validation_loss"].where(chosen)
    text = beta_grid.markdown(table, best_of(table))
    assert text.startswith("| | cell |")
    beta_grid.heat_map(beta_grid.cells_of(best_of(table)), set())


def test_a_diverged_run_leaves_its_cell_out_of_the_best_and_is_told_in_the_map() -> None:
    table = plane_of(3, 0.01, 0.001)
    spoiled = (table["arm"] == "0.8") & (table["seed"] == 1)
    table.loc[spoiled, "validation_loss"] = math.nan
    cells = beta_grid.cells_of(best_of(table))
    best = beta_grid.contrasts(cells)[0]
    assert best.why == "best tied against best untied" and best.ours == (0.9, 0.9)
    assert "- (0.8, 0.8) has diverged in 1 of 3 runs, and is in no comparison." in beta_grid.markdown(
        table, best_of(table)
    )
    assert math.isfinite(beta_grid.noise(cells).of_a_pair)
    texts = [text.get_text() for text in beta_grid.heat_map(cells, set()).axes[0].texts]
    assert texts.count("1 diverged") == 1 and len(texts) == 9


def test_cells_at_the_edge_of_their_learning_rates_are_named_and_the_map_has_every_cell() -> None:
    table = plane_of(2, 0.01, 0.001)
    middle = table[table["lr"] == 1e-3].assign(lr=5e-4, validation_loss=3.0)
    wider = pd.concat([table, middle[middle["arm"] != "0.9"]])
    cells = beta_grid.cells_of(best_of(wider))
    assert beta_grid.edges(wider) == {(0.9, 0.9)}
    at_one_lr = pd.concat([wider[wider["arm"] != "0.8"], best_of(wider[wider["arm"] == "0.8"])])
    assert beta_grid.edges(at_one_lr) == {(0.9, 0.9), (0.8, 0.8)}
    assert beta_grid.edges(best_of(wider)) == set()
    figure = beta_grid.heat_map(cells, {(0.9, 0.9)})
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert len(texts) == 9 and sum(text.endswith("*") for text in texts) == 1
    assert len(figure.axes[0].patches) == 3
    text = beta_grid.markdown(wider, best_of(wider))
    assert "not to be trusted: (0.9, 0.9)." in text and "| (0.9, 0.9)* |" in text and "| (0.8, 0.8) |" in text


def test_a_report_of_a_plane_has_its_map_and_its_contrasts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On results as runs write them."""
    runs = []
    for number, row in best_of(plane_of(2, 0.01, 0.001)).reset_index().iterrows():
        run = {"name": f"run-{number}", "arm": row["arm"], "lr": row["lr"], "seed": int(row["seed"])}
        place = tmp_path / run["name"]
        place.mkdir()
        result = {
            "status": "finished",
            "step": 2,
            "validation_loss": row["validation_loss"],
            "seconds": 1.0,
            "parameters": 4,
        }
        lines = [{"step": step, "loss": 3.0 / step, "step_seconds": 0.5, "update_rms": 0.2} for step in (1, 2)]
        (place / "result.json").write_text(json.dumps(result))
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (place / "run.json").write_text(json.dumps({"identity": {"schedule": {"steps": 2}}, "tokens": "t"}))
        runs.append(run)
    plan = {
        "runs": runs,
        "command": ["train.compare"],
        "steps": 2,
        "ranks": 1,
        "machine": "m",
        "packages": {},
        "python": "3",
    }
    (tmp_path / "manifest.json").write_text(json.dumps(plan))
    report.main([str(tmp_path)])
    said = capsys.readouterr().out
    assert "| tied against the usual pair | (0.8, 0.8) | (0.9, 0.95) | 2 |" in said
    assert "<svg" in (tmp_path / "plane.svg").read_text()
    kept = pd.read_csv(tmp_path / "report.csv")
    assert (kept["training_loss"] == 1.5).all() and (kept["omega_10"] == 0.0).all()
    spoiled = {"status": "diverged", "step": 1, "validation_loss": None, "seconds": 1.0, "parameters": 4}
    (tmp_path / runs[0]["name"] / "result.json").write_text(json.dumps(spoiled))
    report.main([str(tmp_path)])
    kept = pd.read_csv(tmp_path / "report.csv")
    assert kept[["training_loss", "omega_10"]].isna().sum().tolist() == [1, 1]
    (tmp_path / runs[0]["name"] / "result.json").write_text(json.dumps({**spoiled, "validation_blocks": 64}))
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])
    assert "differs from the others in more than arm, lr and seed: validation_blocks." in capsys.readouterr().err
    assert "validation loss over the betas" in (tmp_path / "report.html").read_text()


def test_kept_tables_are_put_together_and_give_the_same_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = plane_of(3, 0.01, 0.001)
    files = [tmp_path / f"{seed}.csv" for seed in range(3)]
    for seed, file in enumerate(files):
        table[table["seed"] == seed].to_csv(file, index=False)
    assert plane.main([*map(str, files), "--out", str(tmp_path / "plane.svg")]) == 0
    assert beta_grid.markdown(table, best_of(table)).strip() in capsys.readouterr().out
    assert (tmp_path / "plane.svg").read_text().count("validation loss") == 1


def test_a_table_without_omega_has_no_line_about_it_and_a_missing_folder_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plane_of(2, 0.01, 0.001)[["arm", "lr", "seed", "validation_loss"]].to_csv(tmp_path / "a.csv", index=False)
    line = [str(tmp_path / "a.csv"), "--out", str(tmp_path / "new" / "plane.svg")]
    assert plane.main(line) == 0 and "(omega" not in capsys.readouterr().out
    assert (tmp_path / "new" / "plane.svg").exists()
    assert plane.main([*line[:2], str(tmp_path / "a.csv" / "plane.svg")]) == 2
    assert "which can't be a path: Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "can't be read: No such file or directory; give a report.csv of train.report."),
        ("arm,lr,seed,validation_loss\n0.9,1e-3,0,2.0\n0.9,1e-3,0,2.0\n", "1 runs twice"),
        ("arm,lr,seed,validation_loss\n0.9,1e-3,0,2.0\n", "too few pairs of betas"),
        ("a,b\n1,2\n", "is not a table of runs ("),
        (
            "arm,lr,seed,validation_loss\n",
            "is not a table of runs: it has a row without arm, lr or seed, or none at all.",
        ),
        ("arm,lr,seed,validation_loss\n,1e-3,0,2.0\n", "it has a row without arm, lr or seed"),
        ("arm,lr,seed,validation_loss\n0.9,1e-3,0,low\n", "is not a table of runs (Unable to parse"),
        ("arm,lr,seed,validation_loss,step\n0.9,1e-3,0,2.0,5\n0.8,1e-3,0,2.0,6\n", "step is 5, 6."),
        ("arm,lr,seed,validation_loss,step\n0.9,1e-3,0,2.0,five\n", "is not a table of runs (Unable to parse"),
        (
            "arm,lr,seed,validation_loss,validation_blocks\n0.9,1e-3,0,2.0,64\n0.8,1e-3,0,2.0,\n",
            "validation_blocks is 64, nan.",
        ),
    ],
)
def test_a_table_that_is_none_is_refused_in_one_sentence(
    content: str | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "table.csv"
    if content:
        file.write_text(content)
    assert plane.main([str(file)]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
