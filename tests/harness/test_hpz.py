"""Weights that each host holds once more (ZeRO++'s hpZ): the same run, checkpoints among them."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.harness.runs import change, cut, finish, losses, out_of
from tests.ranks import spawn
from train.checkpoint.resumable_run import pretrain
from train.common.command_line import parse
from train.common.files import REPOSITORY
from train.run.config import Run

pytestmark = pytest.mark.ranks


def test_four_ranks_on_two_hosts_resume_with_it_without_it_and_on_two_ranks(
    small_run: list[str], tmp_path: Path
) -> None:
    plain = change(small_run, ds_config=REPOSITORY / "ds_configs" / "zero3.json")
    config = json.loads((REPOSITORY / "ds_configs" / "zero3-hpz.json").read_text())
    config["zero_optimization"]["zero_hpz_partition_size"] = 2
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or no weight of this model is partitioned
    file = tmp_path / "hpz.json"
    file.write_text(json.dumps(config))
    hpz = change(plain, ds_config=file, out=tmp_path / "hpz", validate_every=2)
    for options in (plain, hpz):
        code, said = finish(options, 4)
        assert code == 0, said
    whole = losses(plain)
    assert losses(hpz) == whole
    cut(out_of(hpz))
    without = change(plain, validate_every=2)
    for name, options, ranks in (("with", hpz, 4), ("without", without, 4), ("two", hpz, 2)):
        shutil.copytree(out_of(hpz), tmp_path / name)
        resumed = change(options, out=tmp_path / name)
        code, said = finish(resumed, ranks)
        assert code == 0, said
        assert losses(resumed) == (whole if ranks == 4 else pytest.approx(whole, rel=2e-5))


def on_uneven_hosts(options: list[str]) -> None:
    """Job: a run on two ranks of one host, and one of each of two others."""
    os.environ["LOCAL_SIZE"] = "2" if int(os.environ["RANK"]) < 2 else "1"
    pretrain(parse(Run, options, "train.pretrain", None))


def test_where_hosts_have_other_numbers_of_ranks_that_of_the_first_counts(small_run: list[str]) -> None:
    config = REPOSITORY / "ds_configs" / "zero3-hpz.json"
    spawn(on_uneven_hosts, 4, change(small_run, ds_config=config, timeout=30))
    given = json.loads((out_of(small_run) / "ds_config.json").read_text())
    assert given["zero_optimization"]["zero_hpz_partition_size"] == 2
