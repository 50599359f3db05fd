"""What reading the next batch ahead saves; ``python -m tests.perf.prefetch``.

Steps of one rank on a file of random tokens, with the batch read ahead or when it is needed, in turns. Before each step
the file is dropped from the page cache, so that its tokens come from the disk, as in a corpus larger than memory.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np

from tests.perf.measure import machine
from train.analysis.plots import markdown_table
from train.data.prefetch import Prefetch
from train.probe.single_rank import single_rank_run

TOKENS, LENGTH, ROUNDS, STEPS = 10**9, 1024, 8, 4
BATCHES = (4, 16)


def forget(file: Path) -> None:
    """Drop a file from the page cache."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    print(f"{machine()}\n")
    rows = []
    with TemporaryDirectory(dir=Path("~/.cache").expanduser()) as place:
        file = Path(place) / "tokens.bin"
        random = np.random.default_rng(0)
        with file.open("wb") as opened:
            for _ in range(TOKENS // 10**7):
                random.integers(3, 259, 10**7, np.uint16).tofile(opened)
        for batch in BATCHES:
            options = f"--data {file} --data-cache {place}/cache --model tiny --batch {batch} --warmup 1"
            options += f" --sequence-length {LENGTH}"
            with single_rank_run("tests.perf.prefetch", Path(place), 10**4, tuple(options.split())) as trainer:
                ways = {
                    "read ahead": lambda: Prefetch(trainer.batch_of),
                    "when needed": lambda: SimpleNamespace(get=trainer.batch_of),
                }
                seconds: dict[str, list[float]] = {way: [] for way in ways}
                reading = []
                for _ in range(ROUNDS):
                    for way, begin in ways.items():
                        setattr(trainer, "batches", begin())  # noqa: B010
                        for number in range(STEPS):
                            forget(file)
                            began = time.perf_counter()
                            trainer.train_step()
                            seconds[way] += [time.perf_counter() - began] if number else []
                    forget(file)
                    began = time.perf_counter()
                    trainer.batch_of(trainer.step + 1000)
                    reading.append(time.perf_counter() - began)
            times = {**seconds, "reading alone": reading}
            rows.append(
                {
                    "sequences a step": f"{batch}",
                    **{f"{name}, ms": f"{1e3 * statistics.median(each):.1f}" for name, each in times.items()},
                }
            )
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
