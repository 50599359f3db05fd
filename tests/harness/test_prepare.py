"""Text to shards ahead of a run: the tokens that a run would have made, whatever interrupts it, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from filelock import FileLock

from tests.harness.conftest import Make
from tests.harness.runs import change, finish, losses, out_of
from tests.harness.texts import jsonl
from train import prepare as command
from train.checkpoint.resumable_run import pretrain
from train.common.errors import ConfigError, RetryError
from train.common.files import REPOSITORY
from train.data import prepare, shard_writer, token_files, tokenization
from train.data.config import Data, Prepare
from train.data.prepare import prepare as prepared

BYT5 = tokenization.load_tokenizer("byt5")
TEXTS = [f"document {number % 37} " * (1 + number % 9) for number in range(120)]
"""Some of them several times."""


def corpus(place: Path) -> Path:
    """Three files, with rows that are left out at their begins and ends."""
    rows: list[Any] = [*TEXTS[:50], "", {"text": None}]
    jsonl(place / "a.jsonl", rows)
    jsonl(place / "b.jsonl", [" ", {"text": ""}, *TEXTS[50:53]])
    jsonl(place / "c.jsonl", [{"text": None}, *TEXTS[53:], {"x": 1}])
    return place


def settings(place: Path, **more: Any) -> Prepare:
    given = {"data": str(place / "text"), "out": place / "out", "data_cache": place / "cache", "processes": 1}
    return Prepare(**{**given, "validation_fraction": 0.25, **more})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a few documents, and shards of a few parts."""
    monkeypatch.setattr(prepare, "PART", 500)
    monkeypatch.setattr(shard_writer, "SHARD", 900)


def by_the_run(place: Path, fraction: float = 0.25, **more: Any) -> dict[str, np.ndarray]:
    """The tokens that a run makes of the same text."""
    wanted = Data(data=str(place / "text"), data_cache=place / "cache", validation_fraction=fraction, **more)
    folder = token_files.prepare(wanted, BYT5)
    about = json.loads((folder / "about.json").read_text())
    return {part: np.fromfile(folder / f"{part}.bin", about["dtype"]) for part in ("train", "validation")}


def by_train_prepare(place: Path) -> dict[str, np.ndarray]:
    found = {}
    for part in ("train", "validation"):
        shards = sorted((place / "out").glob(f"{part}-*.bin"))
        found[part] = np.concatenate(
            [np.fromfile(shard, np.uint16)[512:] for shard in shards] or [np.empty(0, np.uint16)]
        )
    return found


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(ours[part], theirs[part]) for part in ("train", "validation"))


@pytest.mark.parametrize(
    ("processes", "fraction", "more"),
    [(1, 0.25, {}), (3, 0.25, {}), (2, 0.05, {}), (1, 0.0, {}), (1, 0.25, {"eos_id": 7})],
)
@pytest.mark.usefixtures("small")
def test_the_tokens_are_those_that_a_run_makes_on_any_number_of_processes(
    tmp_path: Path, processes: int, fraction: float, more: dict[str, Any]
) -> None:
    corpus(tmp_path / "text")
    said = prepared(settings(tmp_path, processes=processes, validation_fraction=fraction, **more))
    if fraction:
        assert same(by_train_prepare(tmp_path), by_the_run(tmp_path, fraction, **more))
    else:
        whole = by_the_run(tmp_path)
        assert len(by_train_prepare(tmp_path)["validation"]) == 0
        assert len(by_train_prepare(tmp_path)["train"]) == sum(map(len, whole.values()))
    about = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert len(about["shards"]) > 4 and f"in {len(about['shards'])} shards" in said
    assert (about["read"], about["dropped"]) == (120, {"empty": 2, "null": 2, "blank": 1, "without the field": 1})
    assert sorted(path.name[0] for path in (tmp_path / "out").iterdir()) == sorted(
        "p" + "".join(shard["name"][0] for shard in about["shards"])
    )
    assert prepared(settings(tmp_path, validation_fraction=fraction, **more)) == said  # not made twice


@pytest.mark.parametrize("moment", ["_make_part", "_threshold", "write_shards", "checksum", "guard", "rmtree"])
@pytest.mark.usefixtures("small")
def test_wherever_it_is_cut_the_same_command_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    corpus(tmp_path / "text")
    places = {"rmtree": shutil, "_threshold": shard_writer, "checksum": shard_writer}
    place: Any = places.get(moment, prepare)
    inner, calls = getattr(place, moment), [0]

    def cutting(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] % 5 == 0 if moment == "_make_part" else calls[0] == 1:  # what is made of a part stays
            raise KeyboardInterrupt
        return inner(*given, **named)

    monkeypatch.setattr(place, moment, cutting)
    cuts = 0
    while True:
        try:
            prepared(settings(tmp_path))
            break
        except KeyboardInterrupt:
            cuts += 1
    assert cuts >= 1 and (moment != "_make_part" or cuts >= 3)
    assert same(by_train_prepare(tmp_path), by_the_run(tmp_path))
    about = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert (about["read"], about["dropped"]) == (120, {"empty": 2, "null": 2, "blank": 1, "without the field": 1})
    assert not (tmp_path / "out" / ".prepare").exists()


@pytest.mark.usefixtures("small")
def test_what_has_been_tokenized_is_not_tokenized_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus(tmp_path / "text")
    inner, made = prepare._make_part, list[list[str]]()

    def cutting(part: Path, texts: list[str], *rest: Any) -> None:
        if len(made) == 3:
            made.append([])
            raise OSError(28, "No space left on device")
        made.append(texts)
        inner(part, texts, *rest)

    monkeypatch.setattr(prepare, "_make_part", cutting)
    with pytest.raises(RetryError, match=r"out is .*/out, which can't be written: No space left on device"):
        prepared(settings(tmp_path))
    prepared(settings(tmp_path))
    assert [text for texts in made for text in texts] == TEXTS


@pytest.mark.usefixtures("small")
def test_another_fraction_does_not_throw_away_what_is_tokenized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus(tmp_path / "text")
    with pytest.raises(ConfigError, match=r"which holds out 0 of \d+ documents"):
        prepared(settings(tmp_path, validation_fraction=1e-6))
    monkeypatch.setattr(prepare, "_make_part", None)
    prepared(settings(tmp_path))
    assert same(by_train_prepare(tmp_path), by_the_run(tmp_path))
    next((tmp_path / "out").glob("train-*.bin")).unlink()
    with pytest.raises(ConfigError, match=r"train-\d+.bin is missing"):
        prepared(settings(tmp_path))


def bpe(place: Path) -> Path:
    """A tokenizer that was saved after it had truncated and padded, which its file tells."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS, vocab_size=300, special_tokens=["<end>", "<pad>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>", pad_token="<pad>")
    tokenizer(["a text"], truncation=True, max_length=4, padding="max_length")
    tokenizer.save_pretrained(place)
    assert '"truncation": {' in (place / "tokenizer.json").read_text()
    return place


@pytest.mark.ranks
def test_with_a_tokenizer_that_truncates_nothing_is_cut_and_runs_go_on(make: Make, tmp_path: Path) -> None:
    name = str(bpe(tmp_path / "bpe"))
    place = corpus(tmp_path / "text")
    prepared(settings(tmp_path, tokenizer=name))
    found = by_train_prepare(tmp_path)
    text = "".join(tokenization.load_tokenizer(name).decode(np.concatenate([found["train"], found["validation"]])))
    assert sorted(text.split("<end>")) == sorted(["", *TEXTS])
    (tmp_path / "mix.yaml").write_text(
        "".join(
            f"- {{name: {each[0]}, path: {each[1]}, weight: 1}}\n"
            for each in (("a", "out"), ("b", place), ("c", "stdlib"))
        )
    )
    run = make("--data", str(tmp_path / "mix.yaml"), "--tokenizer", name, "--sequence-length", "8")
    pretrain(run)
    (run.out / "result.json").unlink()
    pretrain(run)  # the tokens have the name that they had


def test_the_default_corpus_and_whole_files_give_the_tokens_of_a_run_too(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "text" / f"{number:03}.txt").write_text(text + "</s>\r\n")
    prepared(settings(tmp_path, processes=2))
    assert same(by_train_prepare(tmp_path), by_the_run(tmp_path))


@pytest.mark.ranks
def test_a_run_on_them_has_the_losses_of_a_run_on_the_text(small_run: list[str], tmp_path: Path) -> None:
    data, cache = (small_run[small_run.index(flag) + 1] for flag in ("--data", "--data-cache"))
    wanted = Prepare(data=data, data_cache=Path(cache), validation_fraction=0.2, out=tmp_path / "shards", processes=1)
    prepared(wanted)
    on_text, on_shards = small_run, change(small_run, data=tmp_path / "shards", out=tmp_path / "other")
    for options in (on_text, on_shards):
        code, said = finish(options)
        assert code == 0, said
    assert losses(on_text) == losses(on_shards)
    results = [json.loads((out_of(options) / "result.json").read_text()) for options in (on_text, on_shards)]
    assert results[0]["validation_loss"] == results[1]["validation_loss"]
    shutil.copytree(tmp_path / "shards", tmp_path / "copied")  # with its times
    for file in (tmp_path / "shards").iterdir():
        os.utime(file)
    (out_of(on_shards) / "result.json").unlink()
    assert finish(on_shards)[0] == 0


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "fraction": (lambda p: None, {"validation_fraction": 1.0}, r"validation_fraction is 1.0; it must lie in \[0, 1\)"),
    "processes": (lambda p: None, {"processes": 0}, "processes is 0; it must be at least 1"),
    "no text": (lambda p: [f.write_text('{"text": ""}\n') for f in p.glob("text/*")], {}, "which holds no text"),
    "too few": (lambda p: None, {"validation_fraction": 1e-6}, "which holds out 0 of 37 documents|holds out 0 of"),
    "no json": (lambda p: (p / "text/b.jsonl").write_text("{}\n{"), {}, "b.jsonl row 2 is not JSON"),
    "strangers": (
        lambda p: ((p / "out").mkdir(), (p / "out/x").touch()),
        {},
        "out is .*, which holds x; give a new or",
    ),
    "a file": (lambda p: (p / "out").touch(), {}, "out is .*/out, which is a file; give a folder"),
    "within": (lambda p: None, {"out": "text/out"}, "out is .*, inside data, so its files would become part of"),
    "a mixture": (lambda p: None, {"data": "mix.yaml"}, "which is a mixture; prepare each of its sources"),
    "eos": (lambda p: None, {"eos_id": 9999}, "eos_id is 9999, and tokenizer 'byt5' has 384 tokens"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    spoil, more, sentence = WRONG[case]
    corpus(tmp_path / "text")
    spoil(tmp_path)
    if "out" in more:
        more = {**more, "out": tmp_path / more["out"]}
    with pytest.raises(ConfigError, match=sentence) as refused:
        prepared(settings(tmp_path, **more))
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("small")
def test_a_folder_is_not_filled_with_two_texts(tmp_path: Path) -> None:
    corpus(tmp_path / "text")
    (tmp_path / "out" / ".prepare").mkdir(parents=True)
    with (
        FileLock(tmp_path / "out" / ".prepare" / "lock"),
        pytest.raises(ConfigError, match=r"another train.prepare is"),
    ):
        prepared(settings(tmp_path))
    prepared(settings(tmp_path))
    with pytest.raises(ConfigError, match=r"out is .*, which holds other tokens; give another folder"):
        prepared(settings(tmp_path, validation_fraction=0.1))
    with pytest.raises(ConfigError, match=r"which holds tokens already"):
        prepared(settings(tmp_path, data=str(tmp_path / "out"), out=tmp_path / "again"))
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out" / ".prepare").mkdir(parents=True)
    (tmp_path / "out" / ".prepare" / "text").write_text("another")
    with pytest.raises(ConfigError, match=r"where other text \(or with other settings\) has been begun"):
        prepared(settings(tmp_path))


def test_a_run_tokenizes_no_large_text_by_itself_and_says_what_to_do(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = make("--data-cache", str(tmp_path / "cache"))
    monkeypatch.setattr(token_files, "LARGEST", 1000)
    with pytest.raises(ConfigError, match=r"python -m train.prepare --data .* --validation-fraction 0.2 --out FOLDER"):
        pretrain(run)
    sets = make("--validation", f"a b={run.data.data}", "--data-cache", str(tmp_path / "cache"))
    wanted = replace(sets.data, data=f"{tmp_path}/a b.txt", eos_id=3, validation_fraction=1.0)
    Path(wanted.data).write_text("x" * 2000)
    with pytest.raises(ConfigError, match=r"--data '.*/a b.txt' --tokenizer byt5 --eos-id 3 --validation-fraction 0.0"):
        token_files.prepare(wanted, BYT5)
    monkeypatch.undo()
    pretrain(run)
    monkeypatch.setattr(token_files, "LARGEST", 1000)
    (run.out / "result.json").unlink()
    pretrain(run)  # the tokens are there


def test_the_command_says_what_it_has_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus(tmp_path / "text")
    options = [
        "--data",
        str(tmp_path / "text"),
        "--out",
        str(tmp_path / "out"),
        "--data-cache",
        str(tmp_path / "cache"),
    ]
    assert command.main(options) == 0
    said = capsys.readouterr()
    assert "of 120 documents, in 2 shards. Train on it with --data" in said.out and "MB of text: 0/0" in said.err
    assert command.main([*options, "--validation-fraction", "0.5"]) == 2
    assert capsys.readouterr().err.startswith("error: out is ")


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["Ctrl-C", "SIGTERM", "SIGKILL"])
def test_a_command_that_is_ended_leaves_no_process_and_the_same_one_goes_on(tmp_path: Path, by: int) -> None:
    """Ctrl-C reaches all of its processes; the other two the first alone."""
    jsonl(tmp_path / "text" / "a.jsonl", [f"document {number} " * 50 for number in range(40000)])
    options = [
        "--data",
        str(tmp_path / "text"),
        "--out",
        str(tmp_path / "out"),
        "--data-cache",
        str(tmp_path / "cache"),
    ]
    line = [sys.executable, "-m", "train.prepare", *options, "--processes", "2"]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=REPOSITORY)
    one = psutil.Process(process.pid)
    until = time.monotonic() + 120
    while len(children := one.children(recursive=True)) < 3 or not any(tmp_path.glob("out/.prepare/.part-*/enc*")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, by) if by == signal.SIGINT else process.send_signal(by)
    said = process.communicate()[1]
    assert process.returncode == (-by if by == signal.SIGKILL else 130)
    assert by == signal.SIGKILL or (said.endswith("Stopped. The same command goes on.\n") and "Traceback" not in said)
    assert not psutil.wait_procs(children, timeout=30)[1]
    assert command.main([*options, "--processes", "1"]) == 0
    assert not (tmp_path / "out" / ".prepare").exists()
