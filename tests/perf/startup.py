"""How long a start takes with 1e9 sequences that have been looked at before; ``python -m tests.perf.startup``.

The shards are sparse files, 256 GB of zeros that take no disk. Their sums and ids are put where a first start would
have put them. Then a fresh process finds the shards, maps them, and takes batches from all over them.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from train.data import corpus, token_files, token_shards, tokenization
from train.data.blocks import order_of, shuffled
from train.data.config import Data

SEQUENCES, LENGTH, SHARDS, BATCHES, BATCH = 10**9, 128, 100, 100, 256


def settings(place: Path) -> Data:
    return Data(data=str(place / "data"), data_cache=place / "cache", sequence_length=LENGTH, validation_fraction=1e-6)


def make(place: Path) -> None:
    """The shards, and what a first start would have left."""
    (place / "data").mkdir()
    for number in range(SHARDS):
        with (place / "data" / f"{number:03}.bin").open("wb") as file:
            file.truncate(2 * SEQUENCES * LENGTH // SHARDS)
        os.utime(file.name, (0, 0))
    setattr(corpus, "checksum", lambda path: (path.stat().st_size, f"{int(path.stem):064x}"))  # noqa: B010
    setattr(token_shards, "_greatest", lambda shard: 0)  # noqa: B010
    token_files.prepare(settings(place), tokenization.load_tokenizer("byt5"))


def start(place: Path) -> None:
    """Print the seconds and the memory of a start, and the milliseconds of a batch."""
    tokenizer = tokenization.load_tokenizer("byt5")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    wanted = settings(place)
    train, _ = token_files.open_tokens(token_files.prepare(wanted, tokenizer), wanted, len(tokenizer))
    order = order_of(len(train))
    train.take(shuffled(np.arange(BATCH), len(train), 0, order))
    begun = time.perf_counter()
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    for step in range(BATCHES):
        train.take(shuffled(step * BATCH + np.arange(BATCH), len(train), 0, order))
    each = (time.perf_counter() - begun) / BATCHES
    print(
        f"{len(train)} sequences in {SHARDS} shards ({order}): {begun - began:.2f} s and {memory:.0f} MiB "
        f"to the first batch of {BATCH}, {1e3 * each:.1f} ms for each after it (numpy {np.__version__})"
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        start(Path(sys.argv[1]))
    else:
        with TemporaryDirectory() as folder:
            make(Path(folder))
            subprocess.run([sys.executable, "-m", "tests.perf.startup", folder], check=True)
