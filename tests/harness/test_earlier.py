"""A run that an earlier version began goes on."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.corpus import write_corpus
from tests.harness.runs import change, finish, losses
from train.common.command_line import parse
from train.data import tokenization
from train.data.config import Data
from train.data.token_files import _digest, _name_of_format_3
from train.run.config import Run

FILES = Path(__file__).parent / "files"


def last_state(out: Path) -> dict[str, Any]:
    """The state of the first group, on the first rank."""
    file = out / "checkpoints" / "step-0000012" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(file, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]["state"][0]
    return dict(content)


@pytest.mark.ranks
def test_a_run_that_0d6eb9e_began_goes_on_with_the_bits_that_it_had_there(tmp_path: Path) -> None:
    """files/run_0d6eb9e.tar.xz: two ranks, ZeRO-1, packed16 with words as int16, a moving beta, after 8 of 12 steps.

    It also holds the losses of 0d6eb9e's own uncut run. Where this machine has the bits of those before the cut, it
    must have those after it too.
    """
    with tarfile.open(FILES / "run_0d6eb9e.tar.xz") as packed:
        packed.extractall(tmp_path, filter="data")
    corpus, cache, model = write_corpus(tmp_path / "corpus"), tmp_path / "cache", tmp_path / "model"
    model.mkdir()
    (tmp_path / "config.json").rename(model / "config.json")
    # What depends on the place: paths, and the name of the tokens, which was made of paths and times.
    settings = Data(data=str(corpus), sequence_length=32, validation_fraction=0.2, data_cache=cache)
    name = _name_of_format_3(settings, tokenization.load_tokenizer("byt5"))
    cache.mkdir()
    (tmp_path / "tokens").rename(cache / name)
    written = tmp_path / "run" / "run.json"
    # Where 0d6eb9e made them, it gave them this name, of this description.
    source = json.loads((cache / name / "about.json").read_text())["source"]
    recorded = json.loads(written.read_text())["tokens"]
    assert f"tokens-{_digest(3, source, settings, tokenization.load_tokenizer('byt5'))}" == recorded
    about = json.loads(written.read_text())
    about["identity"]["model"]["model"], about["identity"]["data"]["data"] = str(model), str(corpus)
    written.write_text(json.dumps({**about, "tokens": name}))

    text = (
        "--steps 12 --warmup 1 --batch 4 --sequence-length 32 --validation-fraction 0.2 "
        "--save-every 4 --validate-every 0"
    )
    options = [*text.split(), "--betas", "from:0.8:to:0.95", "--state", "packed16", "--model", str(model)]
    options += ["--data", str(corpus), "--data-cache", str(cache), "--out", str(tmp_path / "run")]
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    code, said = finish(options)
    assert code == 0 and "Resuming from" in said and "step-0000008" in said, said
    expected = [
        json.loads(line)["loss"] for line in (tmp_path / "expected.jsonl").read_text().splitlines() if '"lr"' in line
    ]
    assert losses(options) == pytest.approx(expected, rel=1e-4)
    assert json.loads(written.read_text())["tokens"] == name
    assert [path.name for path in cache.glob("tokens-*")] == [name], "nothing was tokenized anew"
    state = last_state(tmp_path / "run")
    assert state["packed"].dtype == torch.bfloat16 and state["step"] == 12

    # On one rank it goes through DeepSpeed's universal format, where the groups alone tell anything of the betas.
    alone = change(options, out=tmp_path / "alone")
    code, said = finish(alone, None)
    assert code == 0 and "step-0000008-universal" in said, said
    assert losses(alone) == pytest.approx(expected, rel=1e-4)
    assert state["log_beta_excess"] < -0.1
    assert last_state(tmp_path / "alone")["log_beta_excess"] == pytest.approx(state["log_beta_excess"], rel=1e-12)

    anew = change(options, out=tmp_path / "anew")
    assert finish(anew)[0] == 0
    if losses(anew)[:8] == expected[:8]:
        assert losses(options) == expected == losses(anew)
    shutil.rmtree(cache)


def test_an_option_that_0d6eb9e_did_not_have_is_no_part_of_a_run_at_its_default() -> None:
    identity = parse(Run, ["--out", "x"], "train.pretrain", None).identity()
    with tarfile.open(FILES / "run_0d6eb9e.tar.xz") as packed:
        file = packed.extractfile("./run/run.json")
        assert file is not None
        before = json.load(file)["identity"]
    del before["optimizer"]["state"]  # which is packed16 there
    assert {part: sorted(identity[part]) for part in identity if isinstance(identity[part], dict)} == {
        part: sorted(before[part]) for part in before if isinstance(before[part], dict)
    }
    assert identity.keys() == before.keys()
