"""The corpus and the order of the data."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.harness.conftest import Make
from train.data import token_files
from train.data.blocks import batch_indices
from train.data.config import Data
from train.data.corpus import find_corpus


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
    tokens = token_files.prepare(settings, token_files.load_tokenizer("byt5"))
    assert token_files.prepare(settings, token_files.load_tokenizer("byt5")) == tokens  # not made twice
    assert len(list((tmp_path / "cache").glob("tokens-*/about.json"))) == 1
    parts = [
        bytes((t - 3).astype(np.uint8)[t != 1].tobytes())
        for t in (b.tokens for b in token_files.open_blocks(tokens, 8))
    ]
    about = json.loads((tokens / "about.json").read_text())
    assert about["documents"] == {"train": 15, "validation": 5}
    assert sorted(parts[0].count(t.encode()) + parts[1].count(t.encode()) for t in set(texts)) == [1] * 19 + [2]
    assert not any(parts[0].count(t.encode()) and parts[1].count(t.encode()) for t in set(texts))


def test_a_change_in_the_corpus_makes_new_tokens(make: Make, corpus: Path, tmp_path: Path) -> None:
    settings = Data(data=str(corpus), data_cache=tmp_path, validation_fraction=0.2)
    first = token_files.prepare(settings, token_files.load_tokenizer("byt5"))
    extra = corpus / "extra.txt"
    extra.write_text("one more")
    try:
        assert token_files.prepare(settings, token_files.load_tokenizer("byt5")) != first
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
