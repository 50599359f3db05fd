"""A folder that train.prepare has made, in a run: known again, or refused in one sentence."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.harness.test_prepare import BYT5, TEXTS, corpus, settings
from train.common.errors import ConfigError
from train.data import token_files
from train.data.config import Data
from train.data.prepare import prepare as prepared


def touched(place: Path, change: Any) -> None:
    """Change a shard, and let it look as old as it was."""
    file = next(place.glob("out/train-*.bin"))
    before = file.stat()
    change(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


SPOILED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "shard gone": (lambda p: next(p.glob("out/train-*")).unlink(), {}, r"train-00000.bin is missing; copy it again"),
    "shard cut": (
        lambda p: touched(p, lambda f: f.write_bytes(f.read_bytes()[:-2])),
        {},
        r"train-00000.bin has \d+ bytes and should have \d+",
    ),
    "shard changed": (lambda p: touched(p, flipped), {}, r"train-00000.bin has changed since it was prepared"),
    "file changed": (
        lambda p: (p / "out/prepared.json").write_text((p / "out/prepared.json").read_text().replace("uint16", "u")),
        {},
        r"prepared.json can't be read",
    ),
    "other end": (lambda p: None, {"eos_id": 9}, r"where documents end with 1, and eos_id is 9; make them agree"),
    "nothing held out": (
        lambda p: None,
        {"validation_fraction": 0.0, "validation": ("a=stdlib",)},
        r"of which \d+ tokens were held out when it was prepared, and here nothing of it should be",
    ),
    "a level above": (lambda p: None, {"data": "."}, r"which holds out/prepared.json; give the folder of that file"),
    "unfinished": (
        lambda p: ((p / "out/prepared.json").unlink(), (p / "out/.prepare").mkdir()),
        {},
        r"which train.prepare has not finished; start the same train.prepare again",
    ),
}


def test_documents_end_in_a_run_where_they_ended_when_the_text_was_prepared(tmp_path: Path) -> None:
    corpus(tmp_path / "text")
    prepared(settings(tmp_path, eos_id=9))
    wanted: dict[str, Any] = {"data": str(tmp_path / "out"), "data_cache": tmp_path / "cache"}
    token_files.prepare(Data(**wanted), BYT5)
    token_files.prepare(Data(**wanted, eos_id=9, document_mask=True), BYT5)
    with pytest.raises(ConfigError, match=r"where documents end with 9, and eos_id is 1; make them agree"):
        token_files.prepare(Data(**wanted, document_mask=True), BYT5)


@pytest.mark.parametrize("case", SPOILED)
def test_a_folder_that_is_not_as_it_was_made_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    spoil, more, sentence = SPOILED[case]
    corpus(tmp_path / "text")
    prepared(settings(tmp_path))
    shutil.rmtree(tmp_path / "text")
    shutil.rmtree(tmp_path / "cache")
    spoil(tmp_path)
    data = str(tmp_path) if "data" in more else str(tmp_path / "out")
    cache = tmp_path / "out" / ".cache" if "data" in more else tmp_path / "cache"
    with pytest.raises(ConfigError, match=sentence) as refused:
        token_files.prepare(Data(**{**more, "data": data, "data_cache": cache}), BYT5)
    assert "\n" not in str(refused.value)


def test_a_change_that_keeps_size_and_time_is_found_when_all_is_verified(tmp_path: Path) -> None:
    corpus(tmp_path / "text")
    prepared(settings(tmp_path))
    file = next(tmp_path.glob("out/train-*.bin"))
    before = file.stat()
    flipped(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    wanted: dict[str, Any] = {"data": str(tmp_path / "out"), "data_cache": tmp_path / "cache"}
    token_files.prepare(Data(**wanted), BYT5)  # what --verify-data is for
    with pytest.raises(ConfigError, match="has changed since it was prepared"):
        token_files.prepare(Data(**wanted, verify_data=True), BYT5)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    corpus(tmp_path / "text")
    prepared(settings(tmp_path))
    with pytest.raises(ConfigError, match=r"prepared with the tokenizer 'byt5', and tokenizer is 'byt5', which is ano"):
        token_files.prepare(
            Data(data=str(tmp_path / "out"), data_cache=tmp_path / "cache"), ByT5Tokenizer(extra_ids=10)
        )


def test_a_prepared_folder_is_a_validation_set_if_nothing_of_it_was_held_out(tmp_path: Path) -> None:
    corpus(tmp_path / "text")
    whole = Data(data=str(tmp_path / "out"), data_cache=tmp_path / "cache", validation_fraction=1.0, sequence_length=8)
    prepared(settings(tmp_path))
    with pytest.raises(ConfigError, match=r"and here all of it should be; prepare it with --validation-fraction 0"):
        token_files.prepare(whole, BYT5)
    shutil.rmtree(tmp_path / "out")
    prepared(settings(tmp_path, validation_fraction=0.0))
    train, held_out = token_files.open_tokens(token_files.prepare(whole, BYT5), whole, len(BYT5))
    assert len(train) == 0 and len(held_out) == sum(len(text) + 1 for text in TEXTS) // 8
    with pytest.raises(ConfigError, match=r"of which nothing was held out when it was prepared; give a --validation"):
        token_files.prepare(Data(data=str(tmp_path / "out"), data_cache=tmp_path / "cache"), BYT5)
