"""What reading the next batch ahead saves; ``python -m tests.perf.prefetch``.

Steps of one rank, with the batch read ahead or when it is needed, in turns: from a file on this machine, and from one
that answers late, as on a network.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch

from tests.perf.measure import machine
from train.analysis.plots import markdown_table
from train.data.prefetch import Prefetch
from train.distributed.launch import prepare_environment
from train.probe.single_rank import single_rank_run

TOKENS, LENGTH, BATCH, ROUNDS, STEPS = 10**8, 1024, 4, 10, 6
LATE = (0.0, 0.05)
"""Seconds."""


def main() -> None:
    print(f"{machine()}\n")
    prepare_environment()
    rows = []
    with TemporaryDirectory() as place:
        file = Path(place) / "tokens.bin"
        np.random.default_rng(0).integers(3, 259, TOKENS, np.uint16).tofile(file)
        options = f"--data {file} --data-cache {place}/cache --model tiny --batch {BATCH} --warmup 1"
        options += f" --sequence-length {LENGTH}"
        with single_rank_run("tests.perf.prefetch", Path(place), 10**4, tuple(options.split())) as trainer:
            for late in LATE:

                def load(step: int, late: float = late) -> torch.Tensor:
                    time.sleep(late)
                    return trainer.batch_of(step)

                ways = {"when needed": lambda: SimpleNamespace(get=load), "read ahead": lambda: Prefetch(load)}
                seconds: dict[str, list[float]] = {way: [] for way in ways}
                reading = []
                for _ in range(ROUNDS):
                    for way, begin in ways.items():
                        setattr(trainer, "batches", begin())  # noqa: B010
                        for number in range(STEPS):
                            began = time.perf_counter()
                            trainer.train_step()
                            seconds[way] += [time.perf_counter() - began] if number > 1 else []
                    began = time.perf_counter()
                    load(trainer.step + 1000)
                    reading.append(time.perf_counter() - began)
                times = {"reading alone": reading, **seconds}
                rows.append(
                    {
                        "a read answers": f"{1e3 * late:.0f} ms late" if late else "at once",
                        **{f"{name}, ms": f"{1e3 * statistics.median(each):.1f}" for name, each in times.items()},
                    }
                )
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
