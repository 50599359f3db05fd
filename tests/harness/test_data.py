"""The corpus and the order of the data."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.cluster.runs import losses
from tests.harness.conftest import Make
from tests.harness.runs import cut
from train.checkpoint.resumable_run import pretrain
from train.common.schemas import Order
from train.data import blocks, token_files, tokenization
from train.data.blocks import shuffled
from train.data.config import Data
from train.data.corpus import find_corpus
from train.data.prefetch import Prefetch


def batch_indices(step: int, batch: int, blocks: int, seed: int, order: Order = "permutation") -> np.ndarray:
    """The blocks of the global batch of a step."""
    return shuffled(np.arange(step * batch, (step + 1) * batch), blocks, seed, order)


def test_an_epoch_visits_every_block_once_and_the_next_one_in_another_order() -> None:
    batches = [batch_indices(step, 4, 10, seed=3) for step in range(5)]  # 20 = two epochs of 10
    order = np.concatenate(batches)
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert list(order[:10]) != list(order[10:])


def test_the_batch_is_a_function_of_seed_and_step_alone() -> None:
    forward = [batch_indices(step, 8, 100, 0).tolist() for step in range(30)]
    backward = [batch_indices(step, 8, 100, 0).tolist() for step in reversed(range(30))]
    assert forward == backward[::-1]
    assert forward[0] != batch_indices(0, 8, 100, 1).tolist()
    # twice the batch is the same sequence, so that a run's data doesn't depend on how it is cut
    assert batch_indices(3, 16, 100, 0).tolist() == forward[6] + forward[7]


@pytest.mark.parametrize("count", [*range(1, 20), 63, 64, 65, 255, 256, 257, 1000, 4097, 2**16 + 1])
def test_a_shuffle_that_is_nowhere_in_memory_is_a_permutation(count: int) -> None:
    for seed in range(3):
        order = batch_indices(0, 2 * count, count, seed, "feistel")
        assert sorted(order[:count]) == sorted(order[count:]) == list(range(count))
    if count > 60:
        assert len({tuple(batch_indices(0, 8, count, seed, "feistel")) for seed in range(20)}) == 20


def test_its_indices_are_spread_evenly_and_neighbours_have_nothing_to_do_with_each_other() -> None:
    epochs = np.concatenate([batch_indices(epoch * 50, 1, 50, 0, "feistel") for epoch in range(5000)])
    counts = np.bincount(epochs, minlength=50)
    assert ((counts - 100) ** 2 / 100).sum() < 85  # chi-square of 49 degrees: one in a thousand is above
    order = batch_indices(0, 100_000, 100_000, 3, "feistel")
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.01


def test_a_billion_blocks_take_no_memory_and_the_batch_is_a_function_of_seed_and_step() -> None:
    tracemalloc.start()
    batches = [batch_indices(step, 256, 10**9, 0, "feistel") for step in (10**6, 3)]
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert all(batch.min() >= 0 and batch.max() < 10**9 and len(set(batch.tolist())) == 256 for batch in batches)
    halves = [batch_indices(step, 128, 10**9, 0, "feistel") for step in (6, 7)]
    assert batches[1].tolist() == np.concatenate(halves).tolist()


def test_large_corpora_are_shuffled_so_and_a_run_keeps_the_order_that_it_began_with(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert blocks.order_of(2**24 - 1) == "permutation" and blocks.order_of(2**24) == "feistel"
    earlier = make("--out", str(tmp_path / "earlier"), "--steps", "6", "--schedule", "wsd")
    pretrain(earlier)
    file = earlier.out / "run.json"
    content = json.loads(file.read_text())
    assert content.pop("order") == "permutation"  # which runs of before do not have
    file.write_text(json.dumps(content))
    uncut = losses(earlier.out)
    monkeypatch.setattr(blocks, "FEISTEL_FROM", 2)
    cut(earlier.out)
    pretrain(earlier)
    assert losses(earlier.out) == uncut
    new = make("--out", str(tmp_path / "new"), "--steps", "6", "--schedule", "wsd")
    pretrain(new)
    assert json.loads((new.out / "run.json").read_text())["order"] == "feistel"
    assert losses(new.out)[1:] != uncut[1:]
    uncut = losses(new.out)
    cut(new.out)
    monkeypatch.undo()
    pretrain(new)
    assert losses(new.out) == uncut


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json.gz", "parquet"])
def test_every_kind_of_file_gives_the_same_tokens_and_no_document_is_in_both_parts(tmp_path: Path, kind: str) -> None:
    import pandas as pd

    texts = [f"document {i} " * 20 for i in range(20)] + ["document 3 " * 20]  # one copy
    folder = tmp_path / "corpus"
    folder.mkdir()
    if kind == "txt":
        for i, text in enumerate(texts):
            (folder / f"{i:02}.txt").write_text(text)
    elif kind == "parquet":
        pd.DataFrame({"text": texts}).to_parquet(folder / "all.parquet")
    else:
        pd.DataFrame({"text": texts}).to_json(folder / f"all.{kind}", orient="records", lines=True)
    settings = Data(data=str(folder), data_cache=tmp_path / "cache", validation_fraction=0.25)
    tokens = token_files.prepare(settings, tokenization.load_tokenizer("byt5"))
    assert token_files.prepare(settings, tokenization.load_tokenizer("byt5")) == tokens  # not made twice
    assert len(list((tmp_path / "cache").glob("tokens-*/about.json"))) == 1
    parts = [
        bytes((t - 3).astype(np.uint8)[t != 1].tobytes())
        for t in (b.parts[0] for b in token_files.open_blocks(tokens, 8))
    ]
    about = json.loads((tokens / "about.json").read_text())
    assert about["documents"] == {"train": 15, "validation": 5}
    assert sorted(parts[0].count(t.encode()) + parts[1].count(t.encode()) for t in set(texts)) == [1] * 19 + [2]
    assert not any(parts[0].count(t.encode()) and parts[1].count(t.encode()) for t in set(texts))


def test_a_change_in_the_corpus_makes_new_tokens(make: Make, corpus: Path, tmp_path: Path) -> None:
    settings = Data(data=str(corpus), data_cache=tmp_path, validation_fraction=0.2)
    first = token_files.prepare(settings, tokenization.load_tokenizer("byt5"))
    extra = corpus / "extra.txt"
    extra.write_text("one more")
    try:
        assert token_files.prepare(settings, tokenization.load_tokenizer("byt5")) != first
    finally:
        extra.unlink()


def test_the_default_corpus_is_the_standard_library(tmp_path: Path) -> None:
    source = find_corpus(Data(data_cache=tmp_path))
    assert any(file.name == "argparse.py" for file in source.files)
    assert not any("site-packages" in file.parts for file in source.files)


def test_tokenizers_that_differ_in_anything_do_not_share_tokens(make: Make) -> None:
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "word": 1, "</s>": 2}
    folders = set()
    for normalizer in (normalizers.Lowercase(), normalizers.NFC()):
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.normalizer = normalizer
        for end in ("</s>", "word"):
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, unk_token="<unk>")
            folders.add(token_files.prepare(make().data, tokenizer))
    assert len(folders) == 4


def test_items_are_loaded_once_one_ahead_and_in_whatever_order_they_are_asked_for() -> None:
    loaded: list[int] = []

    def load(number: int) -> int:
        loaded.append(number)
        if number == 4:
            raise ValueError("no four")
        return 10 * number

    ahead = Prefetch(load)
    assert [ahead.get(number) for number in (0, 1, 2, 7, 3)] == [0, 10, 20, 70, 30]
    with pytest.raises(ValueError, match="no four"):
        ahead.get(4)
    assert ahead.get(5) == 50
    ahead.thread.shutdown()
    assert loaded == [0, 1, 2, 3, 7, 8, 3, 4, 5, 6]
