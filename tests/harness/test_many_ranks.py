"""Sixteen ranks of a very small model: what the harness does in a step does not grow with the number of ranks."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist

from tests.corpus import write_corpus
from tests.ranks import spawn
from train.checkpoint.load import find_checkpoint
from train.checkpoint.resumable_run import saver
from train.common.command_line import parse
from train.common.progress import Progress
from train.distributed.launch import join
from train.distributed.ranks import Ranks
from train.run import deepspeed_config
from train.run.config import Run
from train.run.engine import initialize
from train.run.metrics import Metrics

STEPS = 4


class Cost(NamedTuple):
    """What the harness itself needs on one rank for a step without a checkpoint: collectives and files."""

    calls: Counter[str]
    numbers: int
    files: set[str]


def job(place: str) -> Cost:
    """A run, and what its last step but one cost beside the engine's own work."""
    # The model has one layer, 16 wide: the processes are what is many.
    from transformers import GPT2Config

    config = Path(place) / "gpt2"
    if os.environ["RANK"] == "0":
        GPT2Config(vocab_size=384, n_positions=32, n_embd=16, n_layer=1, n_head=1).save_pretrained(config)
    dist.barrier()
    world = int(os.environ["WORLD_SIZE"])
    text = f"--steps {STEPS} --warmup 1 --batch {world} --sequence-length 32 --validation-fraction 0.2 --save-every 0"
    options = [*text.split(), "--data", f"{place}/corpus", "--data-cache", f"{place}/cache", "--model", str(config)]
    run = parse(Run, [*options, "--out", f"{place}/run", "--validate-every", "0"], "train.pretrain", None)
    ranks = join(run.timeout)
    ds_config = deepspeed_config.resolve(run, world, False)
    assert find_checkpoint(ranks, run.out / "checkpoints") is None
    trainer = initialize(run, ranks, ds_config)
    if ranks.is_main:
        run.out.mkdir()
    metrics = Metrics(run.out, 0) if ranks.is_main else None
    calls: Counter[str] = Counter()
    numbers = [0]

    def counted(name: str) -> Any:
        original = getattr(Ranks, name)

        def call(self: Ranks, value: Any, *more: Any) -> Any:
            calls[name] += 1
            numbers[0] += sum(map(len, (value, *more))) if name == "sum_and_max" else 1
            return original(self, value, *more)

        return call

    for _ in range(2):
        trainer.train_step()
    names = ("sum_and_max", "gather", "broadcast")
    originals = {name: getattr(Ranks, name) for name in names}
    before = {str(path) for path in Path(place).rglob("*")}
    for name in names:
        setattr(Ranks, name, counted(name))
    line = trainer.train_step()
    if metrics:
        metrics.write(**line)
    for name, original in originals.items():
        setattr(Ranks, name, original)
    dist.barrier()
    files = {str(path) for path in Path(place).rglob("*")} - before
    with Progress(STEPS, 3, "run", enabled=False) as progress:
        assert trainer.fit(metrics, progress, saver(trainer))["status"] == "finished"
    ranks.watchdog.end()
    return Cost(calls, numbers[0], files)


@pytest.mark.long
@pytest.mark.ranks
def test_a_step_costs_the_same_collectives_and_no_file_on_2_and_on_16_ranks(tmp_path: Path) -> None:
    costs = {}
    for world in (2, 16):
        place = tmp_path / str(world)
        place.mkdir()
        write_corpus(place / "corpus")
        ranks = spawn(job, world, str(place))
        assert len(set(map(str, ranks))) == 1  # no rank does more than another
        costs[world] = ranks[0]
        assert len(list((place / "run" / "checkpoints").glob("step-*/zero_pp_rank_*"))) == world
    assert costs[16] == costs[2]
    assert costs[2].files == set()
    # train_step: sums of 3 numbers, maxima of 2.
    assert costs[2].calls == {"sum_and_max": 1} and costs[2].numbers == 5
