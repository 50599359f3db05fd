"""A corpus that can't be read, or that changes meanwhile, is refused with the name of the file."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.harness.texts import MORE, TEXTS, jsonl, tokens_of, zstd
from train.common.errors import ConfigError
from train.data.config import Data
from train.data.corpus import Corpus
from train.data.readers import Read


@pytest.mark.parametrize("name", [".", "cache", "a/b"])
def test_a_cache_within_the_corpus_would_become_a_part_of_it(tmp_path: Path, name: str) -> None:
    jsonl(tmp_path / "one" / "a.jsonl", TEXTS)
    with pytest.raises(ConfigError, match="inside data, so its files would become part of the corpus"):
        tokens_of(tmp_path / "one", tmp_path / "one" / name)
    tokens_of(tmp_path / "one", tmp_path / "one" / ".cache")


def test_a_corpus_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path / "one" / "a.jsonl", TEXTS)
    original = Corpus.documents

    def documents(self: Corpus, settings: Data, read: Read) -> Any:
        yield from original(self, settings, read)
        jsonl(tmp_path / "one" / "a.jsonl", [*TEXTS[:-1], "doc NUMBER 19 " * 5])

    monkeypatch.setattr(Corpus, "documents", documents)
    with pytest.raises(ConfigError, match="which has changed while it was read"):
        tokens_of(tmp_path / "one", tmp_path / "cache")


def two_columns(file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_arrays([pa.array(TEXTS), pa.array(MORE)], names=["text", "text"]), file)


def in_its_place(write: Callable[[Path], Any]) -> Callable[[Path], None]:
    """What this writes, without the good file beside it."""

    def make(place: Path) -> None:
        write(place)
        (place / "a.jsonl").unlink()

    return make


LATIN = "caf\u00e9 ".encode("latin-1")
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "Latin-1": (lambda p: (p / "b.txt").write_bytes(b"one\n" + LATIN), "b.txt is not UTF-8 at row 2 (byte 0xe9)"),
    "Latin-1 in JSON": (
        lambda p: jsonl(p / "b.jsonl", [*MORE, b'{"text": "' + LATIN + b'"}']),
        "b.jsonl is not UTF-8 at row 21 (byte 0xe9)",
    ),
    "two columns": (
        in_its_place(lambda p: two_columns(p / "b.parquet")),
        "b.parquet has 2 columns of that name",
    ),
    "no mark": (lambda p: (p / "b.txt").write_bytes("text".encode("utf-16-le")), "b.txt holds 4 NUL bytes"),
    "cut line": (lambda p: jsonl(p / "b.jsonl", [*MORE, b'{"text": "cut of']), "b.jsonl row 21 is not JSON"),
    "nested": (lambda p: jsonl(p / "b.jsonl", [*MORE, b"[" * 100_000]), "b.jsonl row 21 is not JSON"),
    "no object": (lambda p: jsonl(p / "b.jsonl", [*MORE, b'"text"']), "b.jsonl row 21 is 'text'; it must be an object"),
    "no text": (lambda p: jsonl(p / "b.jsonl", [*MORE, {"text": 7}]), "holds 7 in"),
    "no column": (
        lambda p: jsonl(p / "b.jsonl", [{"content": "x", "id": 1}]),
        "b.jsonl has the columns content, id",
    ),
    "no parquet column": (
        in_its_place(lambda p: pd.DataFrame({"content": MORE}).to_parquet(p / "b.parquet")),
        "b.parquet has the columns content",
    ),
    "no parquet": (
        in_its_place(lambda p: (p / "b.parquet").write_bytes(b"PAR1")),
        "b.parquet is not a readable Parquet file",
    ),
    "no gzip": (lambda p: (p / "b.jsonl.gz").write_bytes(b"PK"), "b.jsonl.gz can't be read"),
    "cut gzip": (
        lambda p: (p / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 99)[:-9]),
        "b.jsonl.gz can't be read",
    ),
    "no xz": (lambda p: (p / "b.jsonl.xz").write_bytes(b"PK"), "b.jsonl.xz can't be read"),
    "no zstd": (lambda p: (p / "b.jsonl.zst").write_bytes(b"PK"), "b.jsonl.zst can't be read"),
    "cut zstd": (lambda p: (p / "b.jsonl.zst").write_bytes(zstd(b'{"text": "x"}\n' * 99)[:-4]), "zst can't be read"),
    "zstd and more": (lambda p: (p / "b.jsonl.zst").write_bytes(zstd(b'{"text": "x"}\n') + b"more"), "can't be read"),
    "lz4": (lambda p: (p / "b.jsonl.lz4").write_bytes(b"("), "holds b.jsonl.lz4, compressed in a way that is not"),
    "link to nowhere": (lambda p: (p / "b.jsonl").symlink_to("/nowhere"), "holds b.jsonl, which is not a file"),
    "pipe": (lambda p: os.mkfifo(p / "b.jsonl"), "holds b.jsonl, which is not a file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_cannot_be_read_is_refused_by_name_and_row(tmp_path: Path, case: str) -> None:
    place = tmp_path / "corpus"
    make, sentence = WRONG[case]
    jsonl(place / "a.jsonl", TEXTS)
    if case in ("Latin-1", "no mark"):
        (place / "a.jsonl").rename(place / "a.txt")
    make(place)
    with pytest.raises(ConfigError) as refused:
        tokens_of(place, tmp_path / "cache")
    assert sentence in str(refused.value) and "\n" not in str(refused.value)
    assert not list((tmp_path / "cache").glob("tokens-*[!k]"))  # but for its lock
