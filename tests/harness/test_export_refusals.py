"""train.export on what is wrong: one sentence, nothing left behind, and the run's folder as it was."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file

from tests.fuzz.edits import edited
from tests.harness.exports import (
    ONE_RANK,
    UNTIED,
    ZERO_2,
    copied,
    exported,
    newest,
    resave,
    rewrite,
    trained,
    with_own_model,
)
from tests.harness.runs import start
from train import export as command
from train.checkpoint.export import export
from train.checkpoint.manifest import MANIFEST
from train.common.errors import ConfigError
from train.common.schemas import guard

pytestmark = pytest.mark.ranks


def bytes_in(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in sorted(folder.rglob("*")) if file.is_file()
    }


def test_the_run_is_only_read(tmp_path: Path) -> None:
    run = copied(ZERO_2, tmp_path)
    before = bytes_in(run)
    export(run, tmp_path / "hf", "fp32")
    file = newest(run) / "mp_rank_00_model_states.pt"
    after = bytes_in(run)
    assert after == before and str(file) in after


def gone(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def not_begun(run: Path) -> None:
    (run / "run.json").unlink()


def incomplete(run: Path) -> None:
    for checkpoint in (run / "checkpoints").glob("step-*"):
        (checkpoint / MANIFEST).unlink()


def flip(run: Path) -> None:
    file = newest(run) / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def of_another_run(run: Path) -> None:
    rewrite(newest(run) / MANIFEST, lambda about: about["run"].update(seed=7))


def of_other_text(run: Path) -> None:
    rewrite(newest(run) / MANIFEST, lambda about: about.update(tokens="tokens-x"))


def without_tokenizer(run: Path) -> None:
    for file, key in ((run / "run.json", "identity"), (newest(run) / MANIFEST, "run")):
        rewrite(file, lambda about: about[key]["data"].update(tokenizer="/nowhere/bpe"))  # noqa: B023


def other_model(name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        for file, key in ((run / "run.json", "identity"), (newest(run) / MANIFEST, "run")):
            rewrite(file, lambda about: about[key]["model"].update(model=name))  # noqa: B023

    return change


def says_nothing(run: Path) -> None:
    rewrite(run / "run.json", lambda about: about["identity"].update(data={}))
    rewrite(newest(run) / MANIFEST, lambda about: [about.pop(name) for name in ("run", "tokens")])


def master(value: float) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        def edit(content: dict[str, Any]) -> None:
            content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].data[1234] = value

        resave(newest(run) / "zero_pp_rank_1_mp_rank_00_optim_states.pt", edit)

    return change


def without_groups(run: Path) -> None:
    resave(
        newest(run) / "zero_pp_rank_1_mp_rank_00_optim_states.pt",
        lambda content: content["optimizer_state_dict"].clear(),
    )


REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (gone, "which has no complete checkpoint"),
    (incomplete, "which has no complete checkpoint"),
    (not_begun, "which is neither the folder of a run nor a checkpoint in one: there is no .*run.json"),
    (flip, "is damaged \\(zero_pp_rank_1_mp_rank_00_optim_states.pt has changed since it was written"),
    (of_another_run, "is a checkpoint of a run with seed = 7, not 0"),
    (of_other_text, "is a checkpoint of a run on other text"),
    (without_tokenizer, "tokenizer is '/nowhere/bpe', which can't be loaded: there is no such folder"),
    (other_model("/nowhere/model"), "model is '/nowhere/model', which is not a preset .* can't be loaded"),
    (other_model("small"), "model is 'small', which has changed since the run began: .* has the shape"),
    (says_nothing, "run.json can't be read: it has no identity.data.tokenizer"),
    (master(float("nan")), "has the weight model.layers.0.mlp.down_proj.weight, which holds numbers that are not fin"),
    (master(float("-inf")), "has the weight model.layers.0.mlp.down_proj.weight, which holds numbers that are not fin"),
    (master(0.5), "has the weight model.layers.0.mlp.down_proj.weight, which is one in the model and another"),
    (without_groups, "can't be loaded"),
]


@pytest.mark.parametrize(("change", "sentence"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_wrong_with_a_run_is_refused_in_one_sentence_and_nothing_is_left(
    change: Callable[[Path], None], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(ZERO_2, tmp_path)
    change(run)
    before = bytes_in(run)
    assert command.main([str(run), str(tmp_path / "hf")]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and said.count("Traceback") == 0
    with pytest.raises(ConfigError, match=sentence):
        export(run, tmp_path / "hf", "fp32")
    assert bytes_in(run) == before and [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tie_word_embeddings": True}, "model.embed_tokens.weight and lm_head.weight are one weight, and in the che"),
        (
            {"hidden_size": 64},
            r"model.embed_tokens.weight has the shape \(400, 64\), and in the checkpoint \(400, 32\)",
        ),
        ({"num_hidden_layers": 3}, r"model.layers.2.* has the shape .*, and in the checkpoint it is missing"),
        ({"num_hidden_layers": 1}, "it has no model.layers.1.*, which the checkpoint holds"),
        ({"model_type": "gpt2"}, "it has no model.*, which the checkpoint holds"),
        ({"attn_implementation": "x"}, "which transformers can't build any more"),
    ],
    ids=str,
)
def test_a_configuration_that_has_changed_is_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    run = with_own_model(UNTIED, "untied", tmp_path)
    rewrite(tmp_path / "model" / "config.json", lambda config: config.update(change))
    with pytest.raises(ConfigError, match=f"which has changed since the run began: {sentence}|{sentence}: "):
        export(run, tmp_path / "hf", "fp32")


@pytest.mark.parametrize("stage", [2, 3])
def test_a_model_that_was_tied_and_is_no_longer_is_refused(stage: int, tmp_path: Path) -> None:
    run = with_own_model((stage, 2, "--model", "+gpt2"), "gpt2", tmp_path)
    rewrite(tmp_path / "model" / "config.json", lambda config: config.update(tie_word_embeddings=False))
    with pytest.raises(ConfigError, match=r"lm_head.weight (is a weight of its own, and|has the shape .* is missing)"):
        export(run, tmp_path / "hf", "fp32")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("checkpoints", "which is neither the folder of a run nor a checkpoint in one"),
        ("checkpoints/step-0000003", "it does not exist; complete are: step-0000004"),
        ("checkpoints/step-0000002", "mp_rank_00_model_states.pt is missing .*; complete are: step-0000004"),
        ("checkpoints/step-0000004-universal", "give the one without -universal"),
        ("run.json", "which is neither the folder of a run nor a checkpoint in one"),
    ],
)
def test_a_path_that_is_no_complete_checkpoint_is_refused(name: str, sentence: str, tmp_path: Path) -> None:
    run = copied(ZERO_2, tmp_path)
    (run / "checkpoints" / "step-0000002" / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(ConfigError, match=sentence):
        export(run / name, tmp_path / "hf", "fp32")


def test_numbers_beyond_the_range_of_sixteen_bits_are_refused(tmp_path: Path) -> None:
    run = copied(ONE_RANK, tmp_path)

    def edit(content: dict[str, Any]) -> None:
        content["module"]["model.norm.weight"][3] = 1e5

    resave(newest(run) / "mp_rank_00_model_states.pt", edit)
    with pytest.raises(ConfigError, match=r"dtype is float16, and weight model.norm.weight has numbers beyond its"):
        export(run, tmp_path / "fp16", "fp16")
    assert exported(run, tmp_path / "bf16", "bf16")["model.norm.weight"][3] == torch.tensor(1e5).bfloat16()


def test_a_folder_that_holds_something_and_a_full_disk_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = trained(*ONE_RANK), tmp_path / "hf"
    out.mkdir()
    (out / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"which holds notes.txt; give a new or an empty folder"):
        export(run, out, "fp32")
    with pytest.raises(ConfigError, match="lies in a file"):
        export(run, out / "notes.txt", "fp32")
    (out / "notes.txt").unlink()
    usage = shutil.disk_usage(out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(ConfigError, match=r"has 0.001 GB free, and the export needs 0.0018 GB"):
        export(run, out, "fp32")
    monkeypatch.undo()
    export(run, out, "fp32")  # an empty folder is taken
    assert [path.name for path in tmp_path.iterdir()] == ["hf"] and (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (KeyboardInterrupt(), "^$"),
        (OSError(28, "No space left on device"), "which can't be written: No space left on device"),
        (SafetensorError("I/O error: No space left on device"), "which can't be written: I/O error: No space left"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_export_that_fails_half_way_leaves_nothing_and_can_be_repeated(
    error: BaseException, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, written = trained(*ZERO_2), []

    def write(*arguments: Any) -> None:
        written.append(arguments)
        if len(written) == 3:
            raise error
        save_file(*arguments)

    monkeypatch.setattr("train.checkpoint.export.save_file", write)
    with pytest.raises((KeyboardInterrupt, ConfigError), match=sentence):
        export(run, tmp_path / "hf", "fp32", 100_000)
    assert len(written) == 3 and not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert exported(run, tmp_path / "hf")


def test_an_export_that_is_killed_leaves_no_half_of_a_folder_and_can_be_repeated(tmp_path: Path) -> None:
    out, left = tmp_path / "hf", tmp_path / ".hf.exporting"
    process = start([str(trained(*ZERO_2)), str(out)], None, "train.export")
    while not left.exists() and process.poll() is None:
        pass
    process.end()
    assert not out.exists() or (out / "model.safetensors").exists()
    shutil.rmtree(out, ignore_errors=True)
    (left / "whole").mkdir(parents=True, exist_ok=True)
    (left / "whole" / "model-00001-of-00009.safetensors").touch()  # whenever it was killed, this may be there
    assert exported(trained(*ZERO_2), out)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_two_exports_to_one_folder_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / ".hf.exporting").mkdir()
    with FileLock(tmp_path / ".hf.exporting" / ".lock"), pytest.raises(ConfigError, match="another export is writing"):
        export(trained(*ONE_RANK), tmp_path / "hf", "fp32")
    assert exported(trained(*ONE_RANK), tmp_path / "hf")


@pytest.mark.parametrize("seed", range(30))
def test_an_edited_file_of_json_is_read_or_refused(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    run = copied(ONE_RANK, tmp_path)
    file = draw.choice([run / "run.json", newest(run) / MANIFEST])
    content = edited(draw, json.loads(file.read_text()))
    file.write_text(json.dumps(guard(content) if isinstance(content, dict) and "sum" in content else content))
    with patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):  # where an edited name would be looked for
        try:
            assert exported(run, tmp_path / "hf")
        except ConfigError as error:
            assert "\n" not in str(error)
    assert not (tmp_path / ".hf.exporting").exists()
