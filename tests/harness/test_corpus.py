"""Every file as users have them is read right, or said to be left out."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness.texts import MORE, TEXTS, jsonl, tokens_of, zstd
from train.data import token_files
from train.data.config import Data
from train.data.corpus import TWICE, find_corpus
from train.data.readers import Read


def plain(place: Path) -> dict[str, int]:
    jsonl(place / "a.jsonl", TEXTS)
    return {}


def holes(place: Path) -> dict[str, int]:
    rows = [None] * 500 + [{"text": ""}] * 400 + [{"text": " \n "}] * 100 + [{"content": "other"}] * 50
    jsonl(
        place / "a.jsonl", [*TEXTS, *({"text": None} if row is None else row for row in rows), b'{"text": "\\ud800"}']
    )
    return {"null": 500, "empty": 400, "blank": 100, "without the field": 50, "not Unicode": 1}


def blank_lines(place: Path) -> dict[str, int]:
    jsonl(place / "a.jsonl", [*TEXTS[:9], b"", b"  ", b"\r", *TEXTS[9:]])
    return {}


def line_ends_of_windows(place: Path) -> dict[str, int]:
    (place / "a.jsonl").write_bytes(b"".join(json.dumps({"text": t}).encode() + b"\r\n" for t in TEXTS))
    return {}


def an_array(place: Path) -> dict[str, int]:
    (place / "a.json").write_text(json.dumps([{"text": t, "n": [1]} for t in TEXTS], indent=2))
    return {}


def over_several_lines(place: Path) -> dict[str, int]:
    (place / "a.json").write_text("\n".join(json.dumps({"text": t, "n": {"a": [1]}}, indent=2) for t in TEXTS[:10]))
    (place / "b.jsonl").write_text(" ".join(json.dumps({"text": t}) for t in TEXTS[10:]))
    return {}


def line_ends_in_text(place: Path) -> dict[str, int]:
    for i, text in enumerate(TEXTS):
        (place / f"{i:02}.txt").write_bytes(text.encode() + (b"\r\n", b"\n", b"\r")[i % 3])
    return {}


def a_link_upwards(place: Path) -> dict[str, int]:
    jsonl(place / "a.jsonl", TEXTS)
    jsonl(place.parent / "beside.jsonl", MORE)
    (place / "up").symlink_to("..")
    return {}


def other_columns_elsewhere(place: Path) -> dict[str, int]:
    jsonl(place / "a.jsonl", [{"text": t, "meta": {"url": "u"}} for t in TEXTS[:10]])
    jsonl(place / "b.jsonl", [{"text": t, "meta": "plain", "id": i} for i, t in enumerate(TEXTS[10:])])
    return {}


def utf_16(place: Path) -> dict[str, int]:
    for i, text in enumerate(TEXTS):
        encoding = ("utf-16", "utf-8-sig", "utf-32", "utf-8")[i % 4]
        (place / f"{i:02}.txt").write_text(text, encoding=encoding)
    return {}


def json_with_a_mark(place: Path) -> dict[str, int]:
    lines = "\n".join(json.dumps({"text": t + "\u2028"}, ensure_ascii=False) for t in TEXTS)
    (place / "a.jsonl").write_text(lines, encoding="utf-8-sig")
    (place / "b.jsonl").write_text(lines.replace("doc number", "third number"), encoding="utf-16")
    return {}


def compressed(place: Path) -> dict[str, int]:
    openers: dict[str, Callable[..., Any]] = {
        "a.jsonl.gz": gzip.open,
        "b.json.bz2": bz2.open,
        "c.jsonl.XZ": lzma.open,
        "d.gz": gzip.open,
    }
    for i, (name, opener) in enumerate(openers.items()):
        jsonl(place / name, TEXTS[5 * i : 5 * i + 5], opener)
    return {}


def of_several_zstandard_frames(place: Path) -> dict[str, int]:
    rows = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    (place / "a.jsonl.zst").write_bytes(zstd(b"".join(rows[:5])) + zstd(b"".join(rows[5:9])))
    (place / "b.ZSTD").write_bytes(zstd(b"".join(rows[9:])))
    return {}


def compressed_text(place: Path) -> dict[str, int]:
    for i, text in enumerate(TEXTS):
        with gzip.open(place / f"{i:02}.txt.gz", "wt") as file:
            file.write(text)
    return {}


def upper_case(place: Path) -> dict[str, int]:
    jsonl(place / "A.JSONL", TEXTS[:10])
    jsonl(place / "b.Jsonl", TEXTS[10:])
    return {}


def a_linked_folder(place: Path) -> dict[str, int]:
    jsonl(place.parent / "elsewhere" / "b.jsonl", TEXTS[10:])
    jsonl(place / "a.jsonl", TEXTS[:10])
    (place / "part2").symlink_to(place.parent / "elsewhere")
    (place / "part2" / "round").symlink_to(place)  # for ever, for who follows it
    return {}


def the_same_twice(place: Path) -> dict[str, int]:
    jsonl(place / "a.jsonl", TEXTS)
    (place / "b.jsonl").symlink_to(place / "a.jsonl")
    return {}


def hidden(place: Path) -> dict[str, int]:
    jsonl(place / "a.jsonl", TEXTS)
    for name in (".cache/x.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", ".b.jsonl"):
        jsonl(place / name, MORE)
    return {}


def of_other_kinds(place: Path) -> dict[str, int]:
    jsonl(place / "a.jsonl", TEXTS)
    for name in ("_SUCCESS", "picture.png", "part.tar.gz", "words.zip"):
        (place / name).write_bytes(b"\0")
    return {}


def empty_row_groups(place: Path) -> dict[str, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"n": list(range(20)), "text": TEXTS})
    with pq.ParquetWriter(place / "a.parquet", table.schema) as writer:
        for part in (table.slice(0, 0), table, table.slice(0, 0)):
            writer.write_table(part)
    pq.write_table(table.slice(0, 0), place / "b.parquet")
    return {}


def special_tokens(place: Path) -> dict[str, int]:
    jsonl(place / "a.jsonl", [text + "</s><pad><unk><extra_id_0> tail" for text in TEXTS])
    return {}


RIGHT = [
    plain,
    holes,
    blank_lines,
    line_ends_of_windows,
    an_array,
    other_columns_elsewhere,
    utf_16,
    json_with_a_mark,
    compressed,
    compressed_text,
    of_several_zstandard_frames,
    upper_case,
    a_linked_folder,
    the_same_twice,
    hidden,
    of_other_kinds,
    empty_row_groups,
    special_tokens,
    over_several_lines,
    line_ends_in_text,
    a_link_upwards,
]
LEFT_OUT = {
    "the_same_twice": {TWICE: ["b.jsonl"]},
    "a_link_upwards": {TWICE: ["up/"]},
    "a_linked_folder": {TWICE: ["part2/round/"]},
    "hidden": {"hidden": [".cache/", ".ipynb_checkpoints/", ".b.jsonl"]},
    "of_other_kinds": {"of another kind": ["_SUCCESS", "part.tar.gz", "picture.png", "words.zip"]},
}


@pytest.mark.parametrize("case", RIGHT, ids=lambda case: case.__name__)
def test_each_text_is_one_document_and_the_rest_is_said(tmp_path: Path, case: Callable[[Path], dict[str, int]]) -> None:
    place = tmp_path / "corpus"
    place.mkdir()
    dropped = case(place)
    folder, documents = tokens_of(place, tmp_path / "cache")
    expected = list(TEXTS)
    if case is line_ends_in_text:
        expected = [text + "\n" for text in TEXTS]
    if case is special_tokens:
        expected = [text + "</s><pad><unk><extra_id_0> tail" for text in TEXTS]
    if case is json_with_a_mark:
        expected = [text + "\u2028" for text in TEXTS] + [
            t.replace("doc number", "third number") + "\u2028" for t in TEXTS
        ]
    assert sorted(documents) == sorted(expected)
    about = token_files.read_about(folder)
    assert about.dropped == dropped
    left_out = {reason: sorted(names) for reason, names in about.left_out.items()}
    assert left_out == {reason: sorted(names) for reason, names in LEFT_OUT.get(case.__name__, {}).items()}
    said = token_files.summary(folder, Data(data=str(place), data_cache=tmp_path / "cache"))
    assert f"{len(set(expected))} documents" in said and f"({sum(len(t.encode()) for t in expected)} bytes)" in said
    for reason, count in dropped.items():
        assert f"{count} {reason} (such as {place}" in said
    for names in left_out.values():
        assert f"{len(names)} files " in said


def test_what_looks_like_the_end_of_a_document_is_text_for_fast_tokenizers_too(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    texts = [f"{text}<eos> and on" for text in TEXTS]
    jsonl(tmp_path / "one" / "a.jsonl", texts)
    settings = Data(data=str(tmp_path / "one"), data_cache=tmp_path / "cache", validation_fraction=0.1)
    ids = np.concatenate(
        [part.parts[0] for part in token_files.open_blocks(token_files.prepare(settings, tokenizer), 1)]
    )
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.eos_token_id))[:-1]
    assert len(documents) == 20
    found = [tokenizer.decode(d[d != tokenizer.eos_token_id], clean_up_tokenization_spaces=False) for d in documents]
    assert sorted(found) == sorted(texts)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_a_file_is_called_it_alone_is_read(tmp_path: Path, seed: int) -> None:
    """Names of all characters that file systems have; those that shells and libraries take for patterns more often."""
    draw = random.Random(seed)
    for number in range(12):
        place = tmp_path / str(number)
        expected = []
        for i in range(6):
            signs = draw.choices("[]*?{}!~$%#&;'\" \\,=+:@\u00fc\u6587\n\tab1-", k=draw.randint(1, 9))
            name = "".join(signs).lstrip("~") or "x"
            folder = place / draw.choice(["", "a", "[b]", "c*", "d?"])
            file = folder / f"{name}.jsonl"
            if file.exists():
                continue
            rows = [f"text {seed} {number} {i} {row}" for row in range(4)]
            jsonl(file, rows)
            expected += rows
        _, documents = tokens_of(place, tmp_path / "cache")
        assert sorted(documents) == sorted(expected), (seed, number)
        only = sorted(file for file in place.rglob("*.jsonl"))[0]
        wanted = [json.loads(line)["text"] for line in only.read_text().splitlines()]
        settings = Data(data=str(only), data_cache=tmp_path / "cache", validation_fraction=0.3)
        read = list(find_corpus(settings).documents(settings, Read()))
        assert read == wanted, (seed, number, only)


def test_names_that_are_no_utf_8_are_read_and_written(tmp_path: Path) -> None:
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/corp\xe9"))
    jsonl(place / os.fsdecode(b"caf\xe9.jsonl"), [*TEXTS, {"text": None}])
    (place / os.fsdecode(b"left\xe9.csv")).write_text("x")
    for _ in range(2):
        folder, documents = tokens_of(place, tmp_path / "cache")
    assert sorted(documents) == sorted(TEXTS)
    said = token_files.summary(folder, Data(data=str(place), data_cache=tmp_path / "cache"))
    assert "1 null (such as" in said and "left\\xe9.csv" in said and said.encode()
