"""A run's files, damaged or of another run: what is whole is used, what isn't is named, nothing is lost."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import session
from tests.corpus import write_corpus
from train import pretrain
from train.checkpoint import load, manifest, resumable_run
from train.checkpoint.load import find_checkpoint
from train.checkpoint.save import _rotate
from train.common.command_line import parse
from train.common.errors import ConfigError, RetryError
from train.common.schemas import guard
from train.distributed.launch import join
from train.distributed.ranks import Ranks
from train.run.config import Run
from train.run.metrics import Metrics, _tell_once, last_step, read_metrics

JUNK: list[Any] = [None, True, -1, 0, 1.5, 2**63, "", "x", "\0", [], {}, [[]], {"a": None}, ["x"], [-1, "x"], "../x"]


def options(out: Path) -> list[str]:
    """The command line of a run of six steps with checkpoints after three and six."""
    place = session.folder() / "files"
    place.mkdir(exist_ok=True)
    text = (
        "--steps 6 --warmup 1 --batch 4 --sequence-length 32 --validation-fraction 0.2 "
        "--save-every 3 --validate-every 0"
    )
    return [*text.split(), "--data", str(place / "corpus"), "--data-cache", str(place / "cache"), "--out", str(out)]


def settings(out: Path, *more: str) -> Run:
    """That run, and more options."""
    return parse(Run, [*options(out), *more], "train.pretrain", None)


@session.shared
def trained(seed: int = 0) -> Path:
    """The folder of a run that has ended."""
    out = session.folder() / "files" / f"run-{seed}"
    run = settings(out, "--seed", str(seed))
    write_corpus(Path(run.data.data))
    resumable_run.pretrain(run)
    return out


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that was cut after its last checkpoint."""
    shutil.copytree(trained(), tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    return settings(tmp_path / "run")


@pytest.fixture
def alone() -> Ranks:
    """The only rank."""
    return join(60.0)


def last(run: Run) -> Path:
    """Its newest checkpoint."""
    return max((run.out / "checkpoints").glob("step-*"))


# ---- complete.json


def places(content: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value within."""
    found = [here] if here else []
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        found += places(value, (*here, key))
    return found


def changed(content: Any, way: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value there, or without it, where the value is KeyError."""
    content = copy.deepcopy(content)
    place = content
    for key in way[:-1]:
        place = place[key]
    if value is KeyError:
        del place[way[-1]]
    else:
        place[way[-1]] = value
    return content


@pytest.mark.parametrize("guarded", [True, False], ids=["", "of an earlier version"])
def test_whatever_stands_in_complete_json_the_checkpoint_before_is_used_and_one_sentence_says_why(
    run: Run, alone: Ranks, capsys: pytest.CaptureFixture[str], guarded: bool
) -> None:
    file = last(run) / "complete.json"
    whole = json.loads(file.read_text())
    draw = random.Random(0)
    ways = places(whole)
    if (
        not guarded
    ):  # without a sum of its own another number of weights, or another run, can't be told from the right one
        del whole["sum"]
        dtype = (("layout", "dtype"), ("layout", "accumulation"))
        ways = [way for way in places(whole) if way[0] not in ("run", "tokens", "parameters") and way not in dtype]
    contents = [changed(whole, way, draw.choice([*JUNK, KeyError])) for way in ways for _ in range(3)]
    contents = [content for content in contents if "sum" in content or not guarded]
    contents += [changed(whole, ("layout",), None), changed(whole, ("files",), {}), changed(whole, ("run",), [])]
    contents += [changed(whole, ("files", name), [0, "0" * 64]) for name in ("/dev/zero", "/dev/tty", "..", "a/../b")]
    texts = [json.dumps(content).encode() for content in contents if json.dumps(content) != json.dumps(whole)]
    texts += [b"[" * 100_000, b'{"step":' * 50_000, b"\xff" + json.dumps(whole).encode(), b"", b"null", b"3", b'"x"']
    assert len(texts) > 40
    for text in texts:
        file.write_bytes(text)
        found = find_checkpoint(alone, file.parent.parent, run.identity())
        said = capsys.readouterr().out
        assert found and found.step == 3, text[:200]
        assert said.count("passed over") == 1 and said.count("\n") == 1, (text[:200], said)
    file.write_text(json.dumps(whole))
    found = find_checkpoint(alone, file.parent.parent, run.identity())
    assert found and found.step == 6


@pytest.mark.parametrize("what", ["pipe", "folder", "device", "link to nowhere"])
@pytest.mark.parametrize("name", ["complete.json", "mp_rank_00_model_states.pt"])
def test_what_is_no_file_is_not_waited_for(run: Run, alone: Ranks, what: str, name: str) -> None:
    file = last(run) / name
    file.unlink()
    if what == "pipe":
        os.mkfifo(file)
    elif what == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if what == "device" else "/nowhere")
    found = find_checkpoint(alone, file.parent.parent)
    assert found and found.step == 3


def test_a_checkpoint_with_a_file_that_has_no_sum_is_not_whole(run: Run, alone: Ranks) -> None:
    file = last(run) / "complete.json"
    whole = {key: value for key, value in json.loads(file.read_text()).items() if key != "sum"}
    for name in whole["files"]:
        file.write_text(json.dumps(changed(whole, ("files", name), KeyError)))
        found = find_checkpoint(alone, file.parent.parent)
        assert found and found.step == 3, name
        (last(run) / name).rename(last(run) / "elsewhere")  # nor one that lacks the file too
        found = find_checkpoint(alone, file.parent.parent)
        assert found and found.step == 3, name
        (last(run) / "elsewhere").rename(last(run) / name)


# ---- Of which run


def test_a_checkpoint_of_another_run_is_refused_and_stays(run: Run, alone: Ranks) -> None:
    shutil.copytree(trained(1) / "checkpoints" / last(run).name, last(run), dirs_exist_ok=True)
    with pytest.raises(ConfigError, match=r"step-0000006 is a checkpoint of a run with seed = 1, not 0; move it"):
        resumable_run.pretrain(run)
    assert last(run).name == "step-0000006"
    shutil.rmtree(last(run))
    resumable_run.pretrain(run)
    assert bits(run.out) == bits(trained())


def test_a_checkpoint_of_a_run_on_other_text_is_refused(run: Run) -> None:
    file = last(run) / "complete.json"
    file.write_text(json.dumps(guard({**json.loads(file.read_text()), "tokens": "tokens-0123456789abcdef"})))
    with pytest.raises(ConfigError, match=r"is a checkpoint of a run on other text \(tokens-0123456789abcdef, not"):
        resumable_run.pretrain(run)


def test_the_same_bytes_in_another_place_and_of_another_time_resume(run: Run, tmp_path: Path) -> None:
    shutil.rmtree(last(run))
    shutil.copytree(run.data.data, tmp_path / "staged anew", copy_function=shutil.copyfile)
    resumable_run.pretrain(
        settings(run.out, "--data", str(tmp_path / "staged anew"), "--data-cache", str(tmp_path / "cache"))
    )
    assert bits(run.out) == bits(trained())
    (run.out / "result.json").unlink()
    (tmp_path / "staged anew" / "00.txt").write_text("other words " * 200)
    with pytest.raises(ConfigError, match=r"data is .*, which has changed since the run"):
        resumable_run.pretrain(
            settings(run.out, "--data", str(tmp_path / "staged anew"), "--data-cache", str(tmp_path / "cache"))
        )


def test_a_checkpoint_that_does_not_say_which_run_it_is_of_still_loads(run: Run) -> None:
    """As those of earlier versions."""
    shutil.rmtree(last(run))
    file = last(run) / "complete.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in about.items() if key not in ("run", "tokens", "sum")}))
    resumable_run.pretrain(run)
    assert bits(run.out) == bits(trained())


def bits(out: Path) -> dict[str, Any]:
    """The weights of the last checkpoint, and all losses."""
    files = json.loads((max((out / "checkpoints").glob("step-*")) / "complete.json").read_text())["files"]
    weights = torch.load(max((out / "checkpoints").glob("step-*")) / "mp_rank_00_model_states.pt", weights_only=False)[
        "module"
    ]
    lines = [(line["step"], line["loss"]) for line in read_metrics(out) if "loss" in line]
    return {
        "files": sorted(files),
        "losses": lines,
        "weights": {k: v.numpy().tobytes() for k, v in weights.items()},
    }


# ---- What can't be read now


def failing(times: int, number: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A reader that fails so often before it reads."""
    left = [times]

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def read(path: Path, *more: Any) -> Any:
            if "step-0000006" in str(path) and left[0]:
                left[0] -= 1
                raise OSError(number, os.strerror(number), str(path))
            return original(path, *more)

        return read

    return wrap


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT, errno.EMFILE])
@pytest.mark.parametrize("reader", ["checksum", "_manifest", pytest.param("size_of", id="_size")])
@pytest.mark.parametrize("times", [1, 99])
def test_what_cannot_be_read_now_is_neither_damaged_nor_passed_over(
    run: Run, alone: Ranks, monkeypatch: pytest.MonkeyPatch, number: int, reader: str, times: int
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    before = sorted(path.name for path in last(run).iterdir())
    with monkeypatch.context() as patch:
        failing_reader = failing(times, number)(getattr(manifest, reader))
        for module in (load, manifest):
            patch.setattr(module, reader, failing_reader, raising=False)
        if times == 1 and reader == "checksum":  # tried again
            found = find_checkpoint(alone, run.out / "checkpoints")
        else:
            with pytest.raises(RetryError, match=rf"can't be read now \({os.strerror(number)}\); nothing was changed"):
                find_checkpoint(alone, run.out / "checkpoints")
            found = None
        # Nor is it removed, or an older one kept in its place, when a newer one is saved.
        if times > 1 and reader != "checksum":
            _rotate(run.out / "checkpoints", 7, (1, 0))
    assert sorted(path.name for path in last(run).iterdir()) == before
    found = found or find_checkpoint(alone, run.out / "checkpoints")
    assert found and found.step == 6


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_folder_of_checkpoints_that_cannot_be_listed_is_not_an_empty_one(
    run: Run, monkeypatch: pytest.MonkeyPatch, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """With it the run would begin anew, and empty metrics.jsonl."""
    metrics = (run.out / "metrics.jsonl").read_bytes()
    original = Path.iterdir

    def iterdir(path: Path) -> Any:
        if path.name == "checkpoints":
            raise OSError(number, os.strerror(number), str(path))
        return original(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert pretrain.main(options(run.out)) == 75
    assert "can't be read now" in capsys.readouterr().err
    assert (run.out / "metrics.jsonl").read_bytes() == metrics


def test_checkpoints_on_a_disk_that_is_not_mounted_are_not_none(run: Run) -> None:
    (run.out / "checkpoints").rename(run.out.with_name("elsewhere"))
    (run.out / "checkpoints").symlink_to("/nowhere/checkpoints")
    with pytest.raises(RetryError, match="can't be read now"):
        resumable_run.pretrain(run)


# ---- metrics.jsonl


DAMAGE = {
    "no UTF-8": b'{"step": 2, "loss": \xff\xfe}',
    "a NUL": b"\0\0\0\0",
    "a step in words": b'{"step": "2", "loss": 1.0}',
    "a loss in words": b'{"step": 2, "loss": "1.0"}',
    "a list": b"[2, 1.0]",
    "no step": b'{"loss": 1.0}',
    "a negative step": b'{"step": -2, "loss": 1.0}',
    "nested": b"[" * 100_000,
    "cut": b'{"step": 2, "lo',
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("place", ["first", "inside", "last", "cut at the end"])
def test_a_damaged_line_of_metrics_is_told_and_kept_and_the_run_goes_on(
    run: Run, capsys: pytest.CaptureFixture[str], damage: str, place: str
) -> None:
    file = run.out / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    at = {"first": 0, "inside": 3}.get(place, len(lines))
    end = b"" if place == "cut at the end" else b"\n"
    file.write_bytes(b"".join([*lines[:at], DAMAGE[damage] + end, *lines[at:]]))
    _tell_once.cache_clear()
    kept = read_metrics(run.out)
    assert kept == [json.loads(line) for line in lines]
    said = capsys.readouterr().err
    told = place != "cut at the end"
    assert said.count("\n") == told and (f"metrics.jsonl line {at + 1} is damaged" in said) == told
    metrics = Metrics(run.out, 6)
    metrics.write(step=7, loss=1.0, step_seconds=None)
    assert [line["step"] for line in read_metrics(run.out)] == [line["step"] for line in kept] + [7]
    aside = run.out / "metrics.damaged.jsonl"
    assert (aside.read_bytes() if aside.exists() else b"") == (DAMAGE[damage] + b"\n" if told else b"")


@pytest.mark.parametrize("end", ["", '{"step": 4', "\0\0\n", '{"step": -1}\n', "x" * 100 + "\n"])
def test_the_last_step_is_read_from_the_end_of_the_metrics(tmp_path: Path, end: str) -> None:
    assert last_step(tmp_path) == 0
    lines = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 5000))
    (tmp_path / "metrics.jsonl").write_text(lines + end)
    assert last_step(tmp_path) == 4999
    (tmp_path / "metrics.jsonl").write_text(end)
    assert last_step(tmp_path) == 0


def test_a_run_with_damaged_metrics_resumes(run: Run) -> None:
    file = run.out / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], b"\xff\n", b'{"step": "x"}\n', *lines[1:]]))
    shutil.rmtree(last(run))
    resumable_run.pretrain(run)
    assert bits(run.out) == bits(trained())


# ---- run.json, result.json

WRONG_JSON = [
    b"",
    b"null",
    b"[]",
    b"{",
    b"\xff{}",
    b"[" * 100_000,
    b'{"identity": 3}',
    b'{"status": "finished", "step": 6, "validation_loss": null}',
    b'{"status": "ended", "step": 6, "validation_loss": 1.0}',
    b'{"status": "finished", "step": -1, "validation_loss": 1.0}',
]


@pytest.mark.parametrize("name", ["run.json", "result.json"])
@pytest.mark.parametrize("text", WRONG_JSON, ids=lambda text: repr(text)[:40])
def test_a_damaged_file_of_a_run_is_named_and_nothing_changes(run: Run, name: str, text: bytes) -> None:
    (run.out / name).write_bytes(text)
    before = {
        path: path.read_bytes() for path in run.out.rglob("*") if path.is_file() and path.name != "attempts.jsonl"
    }
    with pytest.raises(ConfigError, match=rf"{name} can't be read: .*; restore it, or remove it") as refused:
        resumable_run.pretrain(run)
    assert "\n" not in str(refused.value)
    assert all(path.read_bytes() == content for path, content in before.items())
