"""Several sources by weight, and sets to validate on beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.harness.conftest import Make
from tests.harness.runs import change, cut, finish, losses, out_of
from tests.harness.test_token_shards import TOKENS, llm_c, shards
from tests.harness.texts import jsonl
from train.analysis.report_page import write_report
from train.checkpoint.resumable_run import pretrain
from train.common.command_line import parse
from train.common.errors import ConfigError
from train.common.files import read_lines
from train.data import mixture
from train.data.blocks import Blocks, shuffled
from train.data.config import Data
from train.data.mixture import PERIOD, Mixture, shares_of
from train.data.sources import Sources
from train.probe.single_rank import single_rank_run
from train.run.config import Run


def of(weights: list[float], counts: list[int]) -> Mixture:
    """Sources of so many sequences of two tokens; each token says which source and which sequence it is of."""
    sources = tuple(Blocks((np.repeat(1000 * number + np.arange(count), 2),), 2) for number, count in enumerate(counts))
    names = tuple("abcdefgh"[: len(counts)])
    return Mixture(names, sources, shares_of(weights), mixture.order_of_all(sources))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1], [PERIOD]), ([0.7, 0.3], [70000, 30000]), ([1, 1, 1], [33334, 33333, 33333]), ([1e-5, 1], [1, 99999])],
)
def test_shares_are_the_weights_rounded_to_add_up(weights: list[float], expected: list[int]) -> None:
    assert list(shares_of(weights)) == expected
    assert list(shares_of([7 * weight for weight in weights])) == expected


def test_every_stretch_of_a_run_has_the_sources_by_their_weights() -> None:
    mixed = of([0.5, 0.3, 0.1999, 0.0001], [50, 30, 200, 3])
    drawn = np.searchsorted(mixed.starts, mixed.batch(0, 2 * PERIOD + 500, 0), side="right") - 1
    for number, share in enumerate(mixed.shares):
        away = np.cumsum(drawn == number) - np.arange(1, len(drawn) + 1) * share / PERIOD
        assert np.abs(away).max() <= len(mixed.shares)
    for count in (1, 777, PERIOD, 2 * PERIOD + 77):
        assert mixed.drawn(count, 0) == dict(zip("abcd", np.bincount(drawn[:count], minlength=4).tolist(), strict=True))


def test_each_source_is_run_through_by_epochs_of_its_own() -> None:
    mixed = of([0.6, 0.4], [50, 7])
    drawn = mixed.batch(0, 3000, seed=1)
    for start, count in ((0, 50), (50, 7)):
        mine = drawn[(drawn >= start) & (drawn < start + count)] - start
        for epoch in range(len(mine) // count):
            assert sorted(mine[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_the_batch_is_a_function_of_seed_and_step_alone_also_across_periods() -> None:
    mixed = of([0.6, 0.3, 0.1], [50, 7, 1000])
    far = PERIOD // 8
    whole = mixed.batch(0, 2 * PERIOD, 5)
    for step in (0, 3, far - 1, far, 2 * far - 1, 7):
        assert np.array_equal(mixed.batch(step, 8, 5), whole[8 * step : 8 * step + 8])
    assert not np.array_equal(mixed.batch(0, 100, 6), whole[:100])
    rows = mixed.take(whole[:100]).numpy()
    number = np.searchsorted(mixed.starts, whole[:100], side="right") - 1
    assert np.array_equal(rows, np.repeat((1000 * number + whole[:100] - mixed.starts[number])[:, None], 2, 1))


def test_two_sources_of_one_size_have_orders_of_their_own() -> None:
    drawn = of([1, 1], [5000, 5000]).batch(0, 1000, 0)
    assert len(set(drawn[drawn < 5000].tolist()) & set((drawn[drawn >= 5000] - 5000).tolist())) < 100


def test_weights_whose_sum_is_beyond_all_floats_are_shares_too() -> None:
    assert shares_of([1e308] * 4) == (25000,) * 4


def test_one_source_alone_is_as_without_a_mixture() -> None:
    mixed = of([0.3], [50])
    assert np.array_equal(mixed.batch(3, 16, 9), shuffled(np.arange(48, 64), 50, 9))


def test_independent_draws_follow_the_weights() -> None:
    drawn = of([0.9, 0.1], [10, 1000]).sample(np.random.default_rng(0), 5000)
    assert 4400 < int((drawn < 10).sum()) < 4600 and len(set(drawn[drawn >= 10])) > 300


def write(place: Path, *sources: Any) -> Path:
    place.write_text(json.dumps([*sources]))  # JSON is YAML
    return place


GOOD = {"name": "a", "path": "stdlib", "weight": 1}
WRONG: dict[str, tuple[list[Any] | str, str]] = {
    "empty": ([], "sources: List should have at least 1 item"),
    "no list": ("name: a", "sources: Input should be a valid list; it must be a list of sources"),
    "no yaml": ("[", "which is no mixture: while parsing"),
    "nothing": ("", "sources: Input should be a valid list"),
    "no weight": ([{"name": "a", "path": "x"}], "it has no sources.0.weight"),
    "weight zero": ([{**GOOD, "weight": 0}], "sources.0.weight: Input should be greater than 0"),
    "infinite": ("- {name: a, path: x, weight: .inf}", "sources.0.weight: Input should be a finite number"),
    "not a number": ("- {name: a, path: x, weight: .nan}", "sources.0.weight: Input should be"),
    "text as weight": ([{**GOOD, "weight": "much"}], "sources.0.weight: Input should be a valid number"),
    "truth as weight": ("- {name: a, path: x, weight: yes}", "sources.0.weight: Input should be a valid number"),
    "typo": ([{**GOOD, "wieght": 1}], "sources.0.wieght: Extra inputs are not permitted"),
    "name": ([{**GOOD, "name": "a/b"}], "sources.0.name: String should match"),
    "twice": ([GOOD, GOOD], "which has the source a twice"),
    "too small": ([GOOD, {**GOOD, "name": "b", "weight": 1e-7}], "b has the weight 1e-07, less than one in 100000"),
    "a date": ("- {2026-01-01: x, name: a, path: x, weight: 1}", "it must be a list of sources"),
    "deep": ("[" * 3000, "it must be a list of sources"),
    "a key twice": ("- {name: a, path: x, weight: 1, weight: 5}", "it has weight twice"),
    "long path": ([{**GOOD, "path": "x" * 5000}], "a: data is "),
    "NUL": ([{**GOOD, "path": "a\0b"}], "a: data is "),
    "nested": ([{**GOOD, "path": "x.yaml"}], "the path of a is a mixture itself"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mixture_that_is_none_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    content, sentence = WRONG[case]
    file = tmp_path / "mix.yaml"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match=r"data is '") as refused:
        Sources.of(Data(data=str(file)))
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("validation", "sentence"),
    [
        (("a",), "validation is 'a'; it must be NAME=PATH"),
        (("a b=c",), "validation is 'a b=c'; it must be NAME=PATH"),
        (("a=",), "validation is 'a='; it must be NAME=PATH"),
        (("a=b", "a=c"), "validation has a twice"),
        (("a=b.yaml",), "validation is a=b.yaml, which is a mixture"),
        (("code=x",), "validation has code, which is a source of"),
    ],
)
def test_a_validation_set_that_is_none_is_refused_in_one_sentence(
    validation: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "mix.yaml", {**GOOD, "name": "code"})
    settings = Data(data=str(file), validation=validation)
    with pytest.raises(ConfigError) as refused:
        settings.check()
        Sources.of(settings)
    assert sentence in str(refused.value)


def test_nothing_is_held_out_only_where_there_is_another_set() -> None:
    with pytest.raises(ConfigError, match=r"must lie between 0 and 1 \(or be 0, with a --validation set\)"):
        Data(validation_fraction=0.0).check()
    Data(validation_fraction=0.0, validation=("a=b",)).check()
    with pytest.raises(ConfigError, match=r"validation_fraction is 1.0; it must lie between 0 and 1\."):
        Data(validation_fraction=1.0, validation=("a=b",)).check()


def two_sources(place: Path, corpus: Path) -> Path:
    """A mixture of a folder of text and of shards, with paths beside its file."""
    place.mkdir()
    shutil.copytree(corpus, place / "text")
    shards(place / "shards", llm_c)
    return write(
        place / "mix.yaml",
        {"name": "text", "path": "text", "weight": 2},
        {"name": "shards", "path": "shards", "weight": 1.0},
    )


@pytest.mark.ranks
def test_a_run_on_a_mixture_is_cut_and_goes_on_with_other_ranks_and_reports_each_source(
    small_run: list[str], corpus: Path, tmp_path: Path
) -> None:
    mix = two_sources(tmp_path / "mix", corpus)
    jsonl(tmp_path / "more.jsonl", [f"other text number {number} " * 20 for number in range(40)])
    options = change(small_run, data=mix, batch=6, validation=f"more={tmp_path / 'more.jsonl'}")
    uncut = change(options, out=tmp_path / "uncut")
    assert finish(uncut)[0] == 0
    code, said = finish(options)
    assert code == 0 and "mixture: text 66.667 % (" in said and "shards: data: 5 token shards, 4000 tokens" in said, (
        said
    )
    cut(out_of(options))
    (tmp_path / "mix").rename(tmp_path / "elsewhere")
    options = change(options, data=tmp_path / "elsewhere" / "mix.yaml")
    code, said = finish(options, 3)
    assert code == 0, said
    assert losses(options)[:3] == losses(uncut)[:3] and losses(options) == pytest.approx(losses(uncut), rel=2e-5)

    lines = read_lines(out_of(options) / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["tokens/text"] + line["tokens/shards"] for line in steps] == [192 * step for step in range(1, 7)]
    assert steps[-1]["tokens/text"] == pytest.approx(768, abs=64)
    result = json.loads((out_of(options) / "result.json").read_text())
    named = [result[f"validation_loss/{name}"] for name in ("text", "shards", "more")]
    assert result["validation_loss"] == pytest.approx((2 * named[0] + named[1]) / 3, rel=1e-12)
    assert len(set(named)) == 3 and result["tokens/text"] == steps[-1]["tokens/text"]
    about = json.loads((out_of(options) / "run.json").read_text())
    assert about["tokens"].startswith("mixture-") and about["order"] == "feistel"
    assert about["identity"]["data"]["validation"] == ["more"]

    weights = json.loads((tmp_path / "elsewhere" / "mix.yaml").read_text())
    write(tmp_path / "elsewhere" / "mix.yaml", {**weights[0], "weight": 3}, weights[1])
    (out_of(options) / "result.json").unlink()
    code, said = finish(options, 2)
    assert code == 2 and "which has changed since the run in" in said, said


@pytest.mark.ranks
def test_the_report_has_a_column_for_each_set_and_the_tokens_by_source(
    make: Make, corpus: Path, tmp_path: Path
) -> None:
    mix = two_sources(tmp_path / "mix", corpus)
    run = make("--data", str(mix), "--out", str(tmp_path / "all" / "one"))
    pretrain(run)
    planned = {"name": "one", "arm": "0.95", "lr": 1e-3, "seed": 0}
    plan = {"runs": [planned], "steps": 6, "ranks": 1, "packages": {}, "command": [], "machine": "m", "python": "3"}
    (tmp_path / "all" / "manifest.json").write_text(json.dumps(plan))
    write_report(tmp_path / "all")
    text = (tmp_path / "all" / "report.md").read_text()
    assert "| validation loss | shards | text | difference |" in text.replace("| text | shards |", "| shards | text |")
    assert "Tokens by source in a whole run: " in text and "text 0.000" in text
    page = (tmp_path / "all" / "report.html").read_text()
    assert "<th>text</th>" in page and "validation loss on shards" in page
    assert "validation_loss/text" in (tmp_path / "all" / "report.csv").read_text().splitlines()[0]


@pytest.mark.parametrize("fraction", [0.2, 0.0])
def test_named_sets_are_validated_on_whole_and_the_first_counts_where_nothing_is_held_out(
    make: Make, tmp_path: Path, fraction: float
) -> None:
    """The losses are those of the model on each block alone."""
    data = make().data
    shards(tmp_path / "a", llm_c)
    jsonl(tmp_path / "b.jsonl", [f"other text number {number} " * 20 for number in range(40)])
    options = f"--data {data.data} --data-cache {data.data_cache} --batch 4 --sequence-length 32 --warmup 1"
    options += f" --validation-fraction {fraction} --validation a={tmp_path / 'a'} b={tmp_path / 'b.jsonl'}"
    options += " --validation-batches 0"
    with single_rank_run("test", tmp_path, 30, tuple(options.split())) as trainer:
        validated = trainer.validate()
        sets = {held_out.name: held_out.blocks for held_out in trainer.validation}
        assert list(sets) == (["", "a", "b"] if fraction else ["a", "b"])
        assert np.array_equal(sets["a"].take(np.arange(156)).numpy().ravel(), TOKENS[: 156 * 32])
        expected = {}
        for name, blocks in sets.items():
            rows = blocks.take(np.arange(len(blocks) // 4 * 4) * len(blocks) // (len(blocks) // 4 * 4))
            with torch.no_grad():
                each = [float(trainer.engine.module(input_ids=row[None], labels=row[None]).loss) for row in rows]
            expected[f"validation_loss/{name}" if name else "validation_loss"] = sum(each) / len(each)
        if not fraction:
            expected["validation_loss"] = expected["validation_loss/a"]
            assert trainer.train.sources[0].ends[-1] == sum(
                len(path.read_bytes()) + 1 for path in Path(data.data).iterdir()
            )
        assert validated == {name: pytest.approx(loss, rel=1e-5) for name, loss in expected.items()}


@pytest.mark.ranks
def test_a_set_smaller_than_a_batch_is_validated_on_whole_on_any_ranks(small_run: list[str], tmp_path: Path) -> None:
    jsonl(tmp_path / "few.jsonl", ["a few words, more than two sequences of thirty-two bytes: " + "x" * 40])
    found: list[dict[str, Any]] = []
    for ranks, more in ((None, []), (2, []), (3, []), (2, ["--document-mask"])):
        options = change(
            small_run, validation=f"few={tmp_path / 'few.jsonl'}", batch=12, out=tmp_path / f"{len(found)}"
        )
        code, said = finish([*options, *more], ranks)
        assert code == 0, said
        found.append(json.loads((out_of(options) / "result.json").read_text()))
    losses_on_few = [result["validation_loss/few"] for result in found]
    assert losses_on_few == pytest.approx([losses_on_few[0]] * 4, rel=1e-4)
    assert all(result["validation_blocks"] % 12 == 3 for result in found)


def test_a_set_without_a_sequence_is_refused_by_its_name(make: Make, tmp_path: Path) -> None:
    jsonl(tmp_path / "few.jsonl", ["a few words"])
    run = make("--validation", f"few={tmp_path / 'few.jsonl'}")
    with pytest.raises(ConfigError, match=r"whose validation text \(few\) is less than one sequence of 32 tokens"):
        pretrain(run)


def test_a_set_that_is_trained_on_is_refused(make: Make, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "copy")
    for place in (corpus, tmp_path / "copy", next(corpus.iterdir())):
        with pytest.raises(ConfigError, match=r"validation has same, whose .*txt is trained on as well; leave it"):
            pretrain(make("--validation", f"same={place}"))
    with pytest.raises(ConfigError, match=r"same: data is 'nowhere', which does not exist"):
        pretrain(make("--validation", "same=nowhere"))


def test_an_option_of_several_values_is_not_given_twice() -> None:
    with pytest.raises(ConfigError, match=r"--validation is given twice; give all its values after one --validation"):
        parse(Run, ["--out", "x", "--validation", "a=b", "--validation", "c=d"], "train.pretrain", None)
    assert parse(Run, ["--out", "x", "--lr", "1", "--lr", "2"], "train.pretrain", None).optimizer.lr == 2.0
