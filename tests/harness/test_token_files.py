"""The tokens of a corpus: made once, known by its content, and trained on only while they are whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.harness.texts import MORE, TEXTS, jsonl, tokens_of
from train.common.errors import ConfigError
from train.common.files import checksum
from train.data import corpus as corpus_module
from train.data import token_files, tokenization
from train.data.config import Data
from train.data.corpus import find_corpus
from train.data.token_files import _name_of_format_3


def age(folder: Path, seconds: int = 100) -> None:
    """As if all its files had been written so long ago; of a file that is newer than two seconds no sum is kept."""
    for file in folder.rglob("*"):
        os.utime(file, (file.stat().st_mtime - seconds,) * 2)


def files_read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose sums are taken from here on."""
    read: list[Path] = []

    def recording(path: Path) -> tuple[int, str]:
        read.append(path)
        return checksum(path)

    monkeypatch.setattr(corpus_module, "checksum", recording)
    return read


def test_a_corpus_is_known_by_its_content_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path / "one" / "a.jsonl", TEXTS)
    jsonl(tmp_path / "one" / "b.jsonl", MORE)
    age(tmp_path / "one")
    tokens_of(tmp_path / "one", tmp_path / "cache")
    age(tmp_path / "cache")
    first, _ = tokens_of(tmp_path / "one", tmp_path / "cache")
    read = files_read(monkeypatch)
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
    read = files_read(monkeypatch)
    for time in (10**9, 10**9 + 7, 10**9, 10**9 + 7):  # two hosts in turn
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
    """Results are published on these tokens: files by name and size, byt5 as it is, in format 3, as 0d6eb9e had it."""
    import sys
    import sysconfig
    from hashlib import blake2b

    root = Path(sysconfig.get_path("stdlib"))
    none_of = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    files = [f for f in sorted(root.rglob("*.py")) if not none_of & set(f.relative_to(root).parts)]
    tokenizer = tokenization.load_tokenizer("byt5")
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
    folder = token_files.prepare(Data(data_cache=tmp_path / "cache"), tokenization.load_tokenizer("byt5"))
    joined = "".join(map(chr, np.concatenate([part.parts[0] for part in token_files.open_blocks(folder, 2)]).tolist()))
    for text in texts:
        plain_text = text.decode("utf-8", "replace").replace("\r\n", "\n")
        ids = tokenization.load_tokenizer("byt5")([plain_text], add_special_tokens=False)["input_ids"][0]
        assert "".join(map(chr, [*ids, 1])) in joined
    assert ids


def test_a_run_that_began_on_the_tokens_of_an_earlier_version_goes_on_with_them(tmp_path: Path) -> None:
    place, cache = tmp_path / "one", tmp_path / "cache"
    jsonl(place / "a.jsonl", TEXTS)
    tokenizer, settings = (
        tokenization.load_tokenizer("byt5"),
        Data(data=str(place), data_cache=cache, validation_fraction=0.1),
    )
    now = token_files.prepare(settings, tokenizer)
    old = cache / _name_of_format_3(settings, tokenizer)
    shutil.copytree(now, old)
    assert token_files.prepare(settings, tokenizer, old.name) == old
    # Tokens of other text: the run refuses them.
    assert token_files.prepare(settings, tokenizer, "tokens-0123456789abcdef") == now
    shutil.rmtree(old)
    with pytest.raises(ConfigError, match="an earlier version made and which are gone"):
        token_files.prepare(settings, tokenizer, old.name)
    os.utime(place / "a.jsonl")
    assert token_files.prepare(settings, tokenizer, old.name) == now
