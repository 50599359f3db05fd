"""What the harness adds to a step: ``Trainer.train_step`` against a bare loop on the same engine.

``python -m tests.perf harness``
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from tests.perf.measure import WARM_UP, machine, ratio
from tests.ranks import spawn
from train.analysis.plots import markdown_table
from train.common.command_line import parse
from train.distributed.launch import join
from train.run import deepspeed_config
from train.run.config import Run
from train.run.engine import initialize
from train.run.metrics import Metrics

WORLD = 2
SHAPES = [
    ("tiny", "--batch 16 --sequence-length 128", 301),
    ("small", "--batch 16 --sequence-length 128", 41),
    ("small", "--batch 64 --sequence-length 128", 21),
]
"""Model, its batch, and the rounds. The longer the step, the less the harness adds, since what it does is the same."""


def run(job: tuple[str, str, int, str]) -> dict[str, list[float]]:
    """One rank: the two loops in turn, each with one step a round. Metrics are written, progress is not shown."""
    model, options, rounds, place = job
    settings = parse(Run, ["--out", place, "--model", model, *options.split()], "train.pretrain", None)
    ranks = join(settings.timeout)
    trainer = initialize(settings, ranks, deepspeed_config.resolve(settings, ranks.world, False))
    metrics = Metrics(settings.out, 0) if ranks.is_main else None
    seconds: dict[str, list[float]] = {"bare loop on the same engine": [], "train.pretrain": []}
    ranks.watchdog.begin()
    for number in range(WARM_UP + rounds):
        for name, times in seconds.items():
            torch.distributed.barrier()
            began = time.perf_counter()
            if name == "train.pretrain":
                line = trainer.train_step()
                if metrics:
                    metrics.write(**line)
            else:
                bare_step(trainer, number)
            torch.distributed.barrier()
            if number >= WARM_UP:
                times.append(time.perf_counter() - began)
    ranks.watchdog.end()
    return seconds


def bare_step(trainer: Any, number: int) -> float:
    """The least that trains: the next rows, forward, backward, step, and the loss as a number."""
    rank, world, micro = trainer.ranks.rank, trainer.ranks.world, trainer.micro
    first = (number * world + rank) * micro % (len(trainer.train) - micro)
    tokens = trainer.train.take(np.arange(first, first + micro))
    loss = trainer.engine(input_ids=tokens, labels=tokens).loss
    trainer.engine.backward(loss)
    trainer.engine.step()
    return float(loss)


def main() -> None:
    print(f"{machine()}\n")
    for model, options, rounds in SHAPES:
        with TemporaryDirectory() as place:
            (Path(place) / "run").mkdir()
            job = (model, options, rounds, f"{place}/run")
            found: dict[str, list[float]] = spawn(run, WORLD, job, seconds=1500, fresh=True)[0]
        bare = found["bare loop on the same engine"]
        rows = [
            {
                f"{model}, {options.replace('--', '')}": name,
                "step, ms": f"{statistics.median(times) * 1e3:.1f} [{min(times) * 1e3:.1f} .. {max(times) * 1e3:.1f}]",
                "ratio": ratio(times, bare),
            }
            for name, times in found.items()
        ]
        print(markdown_table(rows) + "\n", flush=True)
