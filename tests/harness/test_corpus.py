"""What a corpus is: every file as users have them is read right, said to be left out, or refused with its name."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from train.common.errors import ConfigError
from train.data import corpus as corpus_module
from train.data import token_files
from train.data.config import Data
from train.data.corpus import TWICE, Corpus, find_corpus
from train.data.readers import Read
from train.data.token_files import _name_of_format_3

TEXTS = [f"doc number {i} " * 5 for i in range(20)]
MORE = [f"second number {i} " * 5 for i in range(20)]


def jsonl(path: Path, rows: list[Any], opener: Callable[..., Any] = open) -> None:
    """One object a line; a string is a row's text, and bytes are a line as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wb") as file:
        for row in rows:
            line = (
                row if isinstance(row, bytes) else json.dumps({"text": row} if isinstance(row, str) else row).encode()
            )
            file.write(line + b"\n")


def tokens_of(place: Path, cache: Path, **settings: Any) -> tuple[Path, list[str]]:
    """The folder of the tokens, and the documents in it: what lies between two ends."""
    wanted = Data(data=str(place), data_cache=cache, validation_fraction=0.1, **settings)
    folder = token_files.prepare(wanted, token_files.load_tokenizer("byt5"))
    ids = np.concatenate([part.tokens for part in token_files.open_blocks(folder, 2)])
    assert ((ids == 1) | (ids >= 3)).all()
    documents = np.split(ids, np.flatnonzero(ids == 1) + 1)[:-1]
    return folder, [bytes((d[:-1] - 3).astype(np.uint8)).decode() for d in documents]


def age(folder: Path, seconds: int = 100) -> None:
    """As if all its files had been written so long ago; of a file that is newer than two seconds no sum is kept."""
    for file in folder.rglob("*"):
        os.utime(file, (file.stat().st_mtime - seconds,) * 2)


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
    openers: dict[str, Callable[..., Any]] = {"a.jsonl.gz": gzip.open, "b.json.bz2": bz2.open, "c.jsonl.XZ": lzma.open, "d.gz": gzip.open}  # fmt: skip
    for i, (name, opener) in enumerate(openers.items()):
        jsonl(place / name, TEXTS[5 * i : 5 * i + 5], opener)
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


RIGHT = [plain, holes, blank_lines, line_ends_of_windows, an_array, other_columns_elsewhere, utf_16, json_with_a_mark, compressed, compressed_text, upper_case, a_linked_folder, the_same_twice, hidden, of_other_kinds, empty_row_groups, special_tokens, over_several_lines, line_ends_in_text, a_link_upwards]  # fmt: skip
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
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet))  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    texts = [f"{text}<eos> and on" for text in TEXTS]
    jsonl(tmp_path / "one" / "a.jsonl", texts)
    settings = Data(data=str(tmp_path / "one"), data_cache=tmp_path / "cache", validation_fraction=0.1)
    ids = np.concatenate([part.tokens for part in token_files.open_blocks(token_files.prepare(settings, tokenizer), 1)])
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.eos_token_id))[:-1]
    assert len(documents) == 20
    found = [tokenizer.decode(d[d != tokenizer.eos_token_id], clean_up_tokenization_spaces=False) for d in documents]
    assert sorted(found) == sorted(texts)


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


LATIN = "caf\u00e9 ".encode("latin-1")
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "Latin-1": (lambda p: (p / "b.txt").write_bytes(b"one\n" + LATIN), "b.txt is not UTF-8 at row 2 (byte 0xe9)"),
    "Latin-1 in JSON": (
        lambda p: jsonl(p / "b.jsonl", [*MORE, b'{"text": "' + LATIN + b'"}']),
        "b.jsonl is not UTF-8 at row 21 (byte 0xe9)",
    ),
    "two columns": (
        lambda p: (two_columns(p / "b.parquet"), (p / "a.jsonl").unlink()),
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
        lambda p: (pd.DataFrame({"content": MORE}).to_parquet(p / "b.parquet"), (p / "a.jsonl").unlink()),
        "b.parquet has the columns content",
    ),
    "no parquet": (
        lambda p: ((p / "b.parquet").write_bytes(b"PAR1"), (p / "a.jsonl").unlink()),
        "b.parquet is not a readable Parquet file",
    ),
    "no gzip": (lambda p: (p / "b.jsonl.gz").write_bytes(b"PK"), "b.jsonl.gz can't be read"),
    "cut gzip": (
        lambda p: (p / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 99)[:-9]),
        "b.jsonl.gz can't be read",
    ),
    "no xz": (lambda p: (p / "b.jsonl.xz").write_bytes(b"PK"), "b.jsonl.xz can't be read"),
    "zstd": (lambda p: (p / "b.jsonl.zst").write_bytes(b"("), "holds b.jsonl.zst, compressed in a way that is not"),
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


def test_a_corpus_is_known_by_its_content_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path / "one" / "a.jsonl", TEXTS)
    jsonl(tmp_path / "one" / "b.jsonl", MORE)
    age(tmp_path / "one")
    tokens_of(tmp_path / "one", tmp_path / "cache")
    age(tmp_path / "cache")
    first, _ = tokens_of(tmp_path / "one", tmp_path / "cache")
    read: list[Path] = []

    def checksum(path: Path) -> tuple[int, str]:
        read.append(path)
        return original(path)

    original = corpus_module.checksum
    monkeypatch.setattr(corpus_module, "checksum", checksum)
    assert tokens_of(tmp_path / "one", tmp_path / "cache")[0] == first
    assert not read  # neither text nor tokens
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    age(tmp_path / "two", 200)
    assert tokens_of(tmp_path / "two", tmp_path / "cache")[0] == first
    os.utime(tmp_path / "one" / "a.jsonl", (10**9, 10**9))
    assert tokens_of(tmp_path / "one", tmp_path / "cache")[0] == first
    assert len(read) == 3
    # A change that neither size nor time shows is found where that is asked for.
    file = tmp_path / "one" / "a.jsonl"
    about = file.stat()
    file.write_bytes(file.read_bytes().replace(b"doc", b"DOC"))
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert tokens_of(tmp_path / "one", tmp_path / "cache")[0] == first
    assert tokens_of(tmp_path / "one", tmp_path / "cache", verify_data=True)[0] != first


def test_a_name_stands_for_several_files_where_hosts_have_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "one" / "a.jsonl", TEXTS)
    read: list[Path] = []
    original = corpus_module.checksum
    monkeypatch.setattr(corpus_module, "checksum", lambda path: (read.append(path), original(path))[1])
    for time in (10**9, 10**9 + 7, 10**9, 10**9 + 7):  # of two hosts in turn
        os.utime(tmp_path / "one" / "a.jsonl", (time, time))
        find_corpus(Data(data=str(tmp_path / "one"), data_cache=tmp_path / "cache"))
    assert len(read) == 2


def test_a_file_that_is_written_to_twice_within_a_tick_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "one" / "a.jsonl"
    jsonl(file, TEXTS)
    stamp = file.stat()
    first, _ = tokens_of(tmp_path / "one", tmp_path / "cache")
    file.write_bytes(file.read_bytes().replace(b"doc", b"DOC"))
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert tokens_of(tmp_path / "one", tmp_path / "cache")[0] != first


def test_names_that_are_no_utf_8_are_read_and_written(tmp_path: Path) -> None:
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/corp\xe9"))
    jsonl(place / os.fsdecode(b"caf\xe9.jsonl"), [*TEXTS, {"text": None}])
    (place / os.fsdecode(b"left\xe9.csv")).write_text("x")
    for _ in range(2):
        folder, documents = tokens_of(place, tmp_path / "cache")
    assert sorted(documents) == sorted(TEXTS)
    said = token_files.summary(folder, Data(data=str(place), data_cache=tmp_path / "cache"))
    assert "1 null (such as" in said and "left\\xe9.csv" in said and said.encode()


@pytest.mark.parametrize("damage", ["", "[]", "{", "null", '{"a": 1}', "[" * 100_000, "\0", "digit"])
def test_sums_that_are_damaged_are_taken_again(tmp_path: Path, damage: str) -> None:
    jsonl(tmp_path / "one" / "a.jsonl", TEXTS)
    age(tmp_path / "one")
    first, _ = tokens_of(tmp_path / "one", tmp_path / "cache")
    for file in (tmp_path / "cache").glob("sums-*.json"):
        digit = file.read_text().replace("0", "1") if damage == "digit" else damage
        file.write_text(digit)
    assert tokens_of(tmp_path / "one", tmp_path / "cache")[0] == first


@pytest.mark.parametrize("part", ["train", "validation"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_tokens_that_have_changed_are_not_trained_on(tmp_path: Path, part: str, how: str) -> None:
    jsonl(tmp_path / "one" / "a.jsonl", TEXTS)
    folder, _ = tokens_of(tmp_path / "one", tmp_path / "cache")
    file = folder / f"{part}.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    if how != "gone":
        file.write_bytes(content if how == "flip" else content[:-2])
    with pytest.raises(ConfigError, match=rf"{part}.bin has changed since it was written"):
        tokens_of(tmp_path / "one", tmp_path / "cache")


ABOUT = {
    "fewer tokens": lambda about: about["tokens"].update(train=3),
    "another dtype": lambda about: about.update(dtype="uint32"),
    "other sums": lambda about: about["sha256"].update(train="0" * 64),
    "fewer documents": lambda about: about["documents"].update(train=3),
    "nothing dropped": lambda about: about.update(dropped={"null": 1}),
    "no part": lambda about: about["tokens"].pop("train"),
    "text": lambda about: about["tokens"].update(train="3"),
}


@pytest.mark.parametrize("guarded", [True, False], ids=["", "of an earlier version"])
@pytest.mark.parametrize("change", ABOUT)
def test_a_changed_about_json_is_found(tmp_path: Path, change: str, guarded: bool) -> None:
    """One of an earlier version has no sum of its own; what its files show is found there too."""
    jsonl(tmp_path / "one" / "a.jsonl", TEXTS)
    folder, _ = tokens_of(tmp_path / "one", tmp_path / "cache")
    about = json.loads((folder / "about.json").read_text())
    if not guarded:
        del about["sum"]
        (folder / "about.json").write_text(json.dumps(about))
        tokens_of(tmp_path / "one", tmp_path / "cache")
    ABOUT[change](about)
    (folder / "about.json").write_text(json.dumps(about))
    if guarded or change not in ("fewer documents", "nothing dropped"):
        with pytest.raises(ConfigError, match=r"which is damaged|has changed since"):
            tokens_of(tmp_path / "one", tmp_path / "cache")
    else:  # what only the sum would tell
        tokens_of(tmp_path / "one", tmp_path / "cache")


def test_the_standard_library_has_the_name_that_it_had(tmp_path: Path) -> None:
    """Results are published on these tokens: files by name and size, and byt5 as it is, in format 3, as 0d6eb9e had it."""
    import sys
    import sysconfig
    from hashlib import blake2b

    root = Path(sysconfig.get_path("stdlib"))
    none_of = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    files = [f for f in sorted(root.rglob("*.py")) if not none_of & set(f.relative_to(root).parts)]
    tokenizer = token_files.load_tokenizer("byt5")
    wanted = {
        "format": 3,
        "source": ["stdlib", sys.version, [[str(f.relative_to(root)), f.stat().st_size] for f in files]],
        "text_field": "text",
        "tokenizer": ["ByT5Tokenizer", sorted(tokenizer.get_vocab().items()), 1, str(tokenizer.special_tokens_map)],
        "validation_fraction": 0.05,
    }
    expected = blake2b(json.dumps(wanted, sort_keys=True).encode(), digest_size=8).hexdigest()
    assert token_files.fingerprint(Data(data_cache=tmp_path), tokenizer) == expected


def test_the_standard_library_is_read_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no user's corpus may hold: bytes that are no UTF-8, a byte order mark, what looks like a special token."""
    texts = [b"\xef\xbb\xbfone </s> two\r\n", b"caf\xe9 \0", *(f"number {i}".encode() for i in range(38))]
    for i, text in enumerate(texts):
        (tmp_path / "lib").mkdir(exist_ok=True)
        (tmp_path / "lib" / f"{i:02}.py").write_bytes(text)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "lib"))
    folder = token_files.prepare(Data(data_cache=tmp_path / "cache"), token_files.load_tokenizer("byt5"))
    joined = "".join(map(chr, np.concatenate([part.tokens for part in token_files.open_blocks(folder, 2)]).tolist()))
    for text in texts:
        plain_text = text.decode("utf-8", "replace").replace("\r\n", "\n")
        ids = token_files.load_tokenizer("byt5")([plain_text], add_special_tokens=False)["input_ids"][0]
        assert "".join(map(chr, [*ids, 1])) in joined
    assert ids


def test_a_run_that_began_on_the_tokens_of_an_earlier_version_goes_on_with_them(tmp_path: Path) -> None:
    place, cache = tmp_path / "one", tmp_path / "cache"
    jsonl(place / "a.jsonl", TEXTS)
    tokenizer, settings = (
        token_files.load_tokenizer("byt5"),
        Data(data=str(place), data_cache=cache, validation_fraction=0.1),
    )
    now = token_files.prepare(settings, tokenizer)
    old = cache / _name_of_format_3(settings, tokenizer)
    shutil.copytree(now, old)
    assert token_files.prepare(settings, tokenizer, old.name) == old
    assert (
        token_files.prepare(settings, tokenizer, "tokens-0123456789abcdef") == now
    )  # of other text: the run refuses it
    shutil.rmtree(old)
    with pytest.raises(ConfigError, match="an earlier version made and which are gone"):
        token_files.prepare(settings, tokenizer, old.name)
    os.utime(place / "a.jsonl")
    assert token_files.prepare(settings, tokenizer, old.name) == now
