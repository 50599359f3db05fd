"""Tokens that were made elsewhere: every format is the same stream of tokens, and what is wrong is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness.conftest import Make
from tests.harness.runs import change, finish, losses, out_of
from tests.harness.texts import jsonl
from train import preflight
from train.checkpoint.resumable_run import pretrain
from train.common.errors import ConfigError
from train.data import token_files, tokenization
from train.data.blocks import Blocks
from train.data.config import Data

TOKENS = np.random.default_rng(0).integers(3, 259, 5000)
CUTS = (0, 1, 700, 701, 3333, 5000)
"""Where shards begin and end: one of a single token, and most in the middle of a block."""
BYT5 = tokenization.load_tokenizer("byt5")


def header(tokens: np.ndarray, magic: int, version: int) -> bytes:
    return np.array([magic, version, len(tokens)] + [0] * 253, "<i4").tobytes()


def llm_c(file: Path, tokens: np.ndarray) -> None:
    file.with_suffix(".bin").write_bytes(header(tokens, 20240520, 1) + tokens.astype("<u2").tobytes())


def llm_c_llama(file: Path, tokens: np.ndarray) -> None:
    file.with_suffix(".bin").write_bytes(header(tokens, 20240801, 7) + tokens.astype("<u4").tobytes())


def megatron(file: Path, tokens: np.ndarray, dtype: str = "<i4", code: int = 4, gap: int = 0) -> None:
    lengths = [len(tokens) // 3, 0, len(tokens) - len(tokens) // 3]
    pointers = [sum(lengths[:k]) * np.dtype(dtype).itemsize + gap * (k == 2) for k in range(3)]
    file.with_suffix(".bin").write_bytes(tokens.astype(dtype).tobytes() + b"\0" * gap)
    file.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, code, 3, 4)
        + np.array(lengths, "<i4").tobytes()
        + np.array(pointers, "<i8").tobytes()
        + np.arange(4, dtype="<i8").tobytes()
    )


def megatron_16(file: Path, tokens: np.ndarray) -> None:
    megatron(file, tokens, "<u2", 8)


def numpy(file: Path, tokens: np.ndarray) -> None:
    np.save(file.with_suffix(".npy"), tokens.astype(np.int32))


def raw(file: Path, tokens: np.ndarray) -> None:
    file.with_suffix(".bin").write_bytes(tokens.astype("<u2").tobytes())


def raw_32(file: Path, tokens: np.ndarray) -> None:
    file.with_suffix(".bin").write_bytes(tokens.astype("<u4").tobytes())


def dolma(file: Path, tokens: np.ndarray) -> None:
    file.with_suffix(".npy").write_bytes(tokens.astype("<u2").tobytes())


def datatrove(file: Path, tokens: np.ndarray) -> None:
    file.with_suffix(".ds").write_bytes(tokens.astype("<u2").tobytes())


FORMATS: dict[str, tuple[Callable[[Path, np.ndarray], None], dict[str, Any]]] = {
    "llm.c": (llm_c, {}),
    "llm.c, Llama 3": (llm_c_llama, {}),
    "Megatron": (megatron, {}),
    "Megatron, uint16": (megatron_16, {}),
    "numpy": (numpy, {}),
    "raw": (raw, {}),
    "dolma": (dolma, {}),
    "datatrove": (datatrove, {}),
    "raw, uint32": (raw_32, {"token_dtype": "uint32"}),
}


def shards(place: Path, write: Callable[[Path, np.ndarray], None], cuts: tuple[int, ...] = CUTS) -> Path:
    place.mkdir(parents=True)
    for number, (begin, end) in enumerate(pairwise(cuts)):
        write(place / f"shard_{number:03}", TOKENS[begin:end])
    return place


def opened(place: Path, cache: Path, **more: Any) -> tuple[Blocks, Blocks]:
    settings = Data(data=str(place), data_cache=cache, sequence_length=64, validation_fraction=0.25, **more)
    return token_files.open_tokens(token_files.prepare(settings, BYT5), settings, len(BYT5))


@pytest.mark.parametrize("cuts", [CUTS, (0, 5000)], ids=["several", "one"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_blocks_however_it_is_cut(name: str, cuts: tuple[int, ...], tmp_path: Path) -> None:
    write, more = FORMATS[name]
    train, validation = opened(shards(tmp_path / "data", write, cuts), tmp_path / "cache", **more)
    assert (len(train), len(validation)) == (3750 // 64, 1250 // 64)
    every = train.take(np.arange(len(train))).numpy()
    assert np.array_equal(every.ravel(), TOKENS[: len(every) * 64])
    assert np.array_equal(train.take(np.array([7, 0, 7])).numpy(), every[[7, 0, 7]])
    assert np.array_equal(validation.take(np.arange(2)).numpy().ravel(), TOKENS[3750 : 3750 + 128])
    folders = list((tmp_path / "cache").glob("shards-*[!k]"))
    assert [f.name for f in folders[0].iterdir()] == ["about.json"]  # nothing is copied


def test_shards_are_looked_at_once_and_known_by_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.data import token_shards

    place = shards(tmp_path / "data", llm_c)
    looked: list[str] = []
    greatest = token_shards._greatest

    def recording(shard: token_shards.Shard) -> int:
        looked.append(shard.file.name)
        return greatest(shard)

    monkeypatch.setattr(token_shards, "_greatest", recording)
    opened(place, tmp_path / "cache")
    assert len(looked) == 5
    opened(place, tmp_path / "cache")
    place.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "shard_004.bin").rename(tmp_path / "elsewhere" / "the_last.bin")
    opened(tmp_path / "elsewhere", tmp_path / "cache")
    assert len(looked) == 5
    llm_c(tmp_path / "elsewhere" / "shard_002", TOKENS[701:702])
    opened(tmp_path / "elsewhere", tmp_path / "cache")
    assert len(looked) == 10


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (
        lambda p: (p / "a.bin").write_bytes(header(TOKENS, 20240520, 1) + b"12"),
        "header tells of 11024",
    ),
    "too long": (lambda p: (p / "a.bin").write_bytes(header(TOKENS[:1], 20240520, 1) + b"123456"), "cut short, or dam"),
    "no tokens": (lambda p: (p / "a.bin").write_bytes(header(TOKENS[:0], 20240520, 1)), "a.bin holds no tokens"),
    "empty": (lambda p: (p / "a.bin").write_bytes(b""), "a.bin holds no tokens"),
    "odd": (lambda p: (p / "a.bin").write_bytes(b"123"), "3 bytes and no header, which is no number of uint16"),
    "uint32": (lambda p: raw_32(p / "a", TOKENS), "this looks like uint32"),
    "beyond": (lambda p: raw(p / "a", TOKENS + 500), "holds the token 758, and tokenizer 'byt5' has 384"),
    "negative": (lambda p: np.save(p / "a.npy", -TOKENS), "holds the token -258; tokens are numbers from 0"),
    "floats": (lambda p: np.save(p / "a.npy", TOKENS / 2), "it must be integers in one dimension"),
    "two dimensions": (lambda p: np.save(p / "a.npy", TOKENS.reshape(50, 100)), "shape \\(50, 100\\)"),
    "objects": (lambda p: np.save(p / "a.npy", np.array([{}])), "a.npy is not a .npy file"),
    "cut npy": (lambda p: (p / "a.npy").write_bytes(b"\x93NUMPY" * 3), "a.npy is not a .npy file"),
    "no npy": (lambda p: (p / "a.npy").write_bytes(b"x" * 99), "99 bytes and no header, which is no number of uint16"),
    "gap": (lambda p: megatron(p / "a", TOKENS, gap=4), "sequences that do not follow one another"),
    "floats of Megatron's": (lambda p: megatron(p / "a", TOKENS, "<f4", 7), "the dtype 7, which holds no tokens"),
    "lone index": (lambda p: lone_index(p), "holds b.idx without its .bin"),
    "index": (lambda p: indexed(p / "a", b"x" * 50), "is not an index of Megatron's"),
    "cut index": (lambda p: indexed(p / "a", b"MMIDIDX\0\0" + b"\1" * 20), "a.idx is cut short"),
    "index with few sequences": (lambda p: indexed(p / "a", b"MMIDIDX\0\0" + b"\1" * 99), "a.idx is cut short"),
}


def lone_index(place: Path) -> None:
    megatron(place / "a", TOKENS)
    megatron(place / "b", TOKENS)
    (place / "b.bin").unlink()


def indexed(file: Path, index: bytes) -> None:
    raw(file, TOKENS)
    file.with_suffix(".idx").write_bytes(index)


@pytest.mark.parametrize("case", WRONG)
def test_a_shard_that_is_none_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    make, sentence = WRONG[case]
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    for _ in range(2):  # also after it has been looked at
        with pytest.raises(ConfigError, match=sentence) as refused:
            opened(tmp_path / "data", tmp_path / "cache")
        assert "\n" not in str(refused.value)


def test_preflight_finds_a_token_that_the_tokenizer_does_not_have(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make("--data", str(shards(tmp_path / "data", raw)))
    options = ["--ranks", "2", "--out", str(tmp_path / "out"), "--data-cache", str(run.data.data_cache)]
    assert preflight.main([*options, "--data", str(tmp_path / "data")]) == 0
    raw(tmp_path / "data" / "shard_001", TOKENS[1:700] + 500)
    assert preflight.main([*options, "--data", str(tmp_path / "data")]) == 2
    assert "and tokenizer 'byt5' has 384; give the --tokenizer that made it" in capsys.readouterr().err


def test_beside_text_such_files_are_left_out_as_ever(tmp_path: Path) -> None:
    place = shards(tmp_path / "data", raw)
    jsonl(place / "a.jsonl", [f"text number {i}" for i in range(20)])
    settings = Data(data=str(place), data_cache=tmp_path / "cache", validation_fraction=0.2)
    folder = token_files.prepare(settings, BYT5)
    assert folder.name.startswith("tokens-") and "5 files of another kind" in token_files.summary(folder, settings)


def test_what_is_read_and_left_out_is_said(tmp_path: Path) -> None:
    place = shards(tmp_path / "data", megatron)
    (place / "README").write_text("x")
    settings = Data(data=str(place), data_cache=tmp_path / "cache", validation_fraction=0.2)
    said = token_files.summary(token_files.prepare(settings, BYT5), settings)
    assert said == (
        "data: 5 token shards, 4000 tokens to train on and the last 1000 held out. "
        "Left out: 1 files of another kind (such as README)."
    )


@pytest.mark.ranks
def test_runs_on_any_format_have_the_same_losses_and_a_cut_one_goes_on(small_run: list[str], tmp_path: Path) -> None:
    found: dict[str, list[float]] = {}
    for name, (write, more) in FORMATS.items():
        place = shards(tmp_path / name.replace(" ", "-"), write, CUTS if len(name) % 2 else (0, 5000))
        options = change(small_run, data=place, out=tmp_path / f"run-{len(found)}", **more)
        code, said = finish(options, 2 if name in ("llm.c", "raw") else None)
        assert code == 0, said
        assert "token shards, 4000 tokens to train on" in said
        found[name] = losses(options)
    one, two = found["numpy"], found["llm.c"]
    assert all(each in (one, two) for each in found.values()) and one == pytest.approx(two, rel=2e-5)
    identity = json.loads((out_of(options) / "run.json").read_text())["identity"]
    assert identity["data"]["token_dtype"] == "uint32"


def test_a_run_does_not_go_on_with_other_tokens(make: Make, tmp_path: Path) -> None:
    place = shards(tmp_path / "data", llm_c)
    run = make("--data", str(place))
    assert "token_dtype" not in run.identity()["data"]
    pretrain(run)
    (run.out / "result.json").unlink()
    llm_c(place / "shard_001", TOKENS[2:701])
    with pytest.raises(ConfigError, match=r"data is .* which has changed since the run"):
        pretrain(run)
