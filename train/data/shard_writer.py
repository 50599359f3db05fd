"""The second half of :mod:`train.data.prepare`: parts that are tokenized become shards, and some documents held out."""

from __future__ import annotations

import os
import shutil
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np

from train.common.errors import require
from train.common.files import checksum, load_file, sync
from train.common.progress import Progress
from train.common.schemas import PreparedPart
from train.data.token_shards import HEADER, header

SHARD = 10**8
"""Tokens after which a shard ends, at the end of a document."""
LONGEST = 2**31 - 1 - SHARD
"""Tokens of a document at most, since the header of a shard counts in int32."""
BUCKETS = 256
"""Parts of the range of hashes that are looked at one after the other."""
PARTS: dict[Any, str] = {"train": "to train on", "validation": "held out"}


def _threshold(parts: list[Path], fraction: float) -> tuple[int, int, int]:
    """Return the greatest hash that is held out (-1 for none), and how many different documents are, of how many.

    Raises:
        ConfigError: if the documents are too few to hold any out.
    """
    sorted_hashes = [np.load(part / "hashes.npy", mmap_mode="r") for part in parts]
    edges = np.arange(1, BUCKETS, dtype=np.uint64) * np.uint64(2**64 // BUCKETS)
    cuts = [[0, *np.searchsorted(each, edges), len(each)] for each in sorted_hashes]

    def bucket(number: int) -> np.ndarray:
        pieces = [each[cut[number] : cut[number + 1]] for each, cut in zip(sorted_hashes, cuts, strict=True)]
        return np.unique(np.concatenate(pieces))

    counts = np.cumsum([len(bucket(number)) for number in range(BUCKETS)])
    count = int(counts[-1])
    held_out = round(fraction * count)
    require(
        0 < held_out < count or fraction == 0.0,
        f"validation_fraction is {fraction}, which holds out {held_out} of {count} documents; "
        "both parts need at least one.",
    )
    if not held_out:
        return -1, 0, count
    number = int(np.searchsorted(counts, held_out))
    before = int(counts[number - 1]) if number else 0
    return int(bucket(number)[held_out - before - 1]), held_out, count


def write_shards(parts: list[Path], out: Path, dtype: np.dtype, fraction: float) -> dict[str, Any]:
    """Write the shards, and return what prepared.json says of them.

    Args:
        parts: the folders of tokenized text, in order; in the folder that holds them the shards are made.
        out: where they go then.
        dtype: of the tokens.
        fraction: of the different documents that is held out: those with the smallest hashes.

    Raises:
        ConfigError: if the documents are too few to hold any out, or a part is damaged.
    """
    threshold, held_out, count = _threshold(parts, fraction)
    tmp = parts[0].parent / "shards"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    written = {part: _Shards(tmp, part, dtype) for part in PARTS}
    whole = sum(load_file(PreparedPart, part / "about.json").tokens for part in parts)
    with Progress(whole // 10**6, 0, "M tokens written", enabled=True) as progress:
        for part in parts:
            about = load_file(PreparedPart, part / "about.json")
            lengths, hashes = np.load(part / "documents.npy")
            size = (part / "tokens.bin").stat().st_size // dtype.itemsize
            tokens = np.memmap(part / "tokens.bin", dtype, "r", shape=(size,)) if size else np.empty(0, dtype)
            require(
                len(hashes) == about.documents and len(tokens) == about.tokens == int(lengths.sum()),
                f"{part} is damaged; remove {part.parent}, and start again.",
            )
            held = hashes <= threshold if threshold >= 0 else np.zeros(len(hashes), bool)
            ends = np.cumsum(lengths.astype(np.int64))
            # Documents in a row that go to the same part are written at once.
            turns = np.flatnonzero(np.diff(held)) + 1
            for first, last in zip([0, *turns], [*turns, len(held)], strict=True):
                begin = int(ends[first - 1]) if first else 0
                written["validation" if held[first] else "train"].write(tokens, begin, ends[first:last])
            progress.show(sum(each.total for each in written.values()) // 10**6)
    shards = list(chain.from_iterable(each.close() for each in written.values()))
    for shard in shards:
        (tmp / shard["name"]).rename(out / shard["name"])
    sync(out)
    return {
        "dtype": dtype.name,
        "tokens": {part: each.total for part, each in written.items()},
        "documents": {"train": count - held_out, "validation": held_out},
        "shards": shards,
    }


class _Shards:
    """Writes tokens to train-00000.bin and so on, or to validation-00000.bin."""

    def __init__(self, folder: Path, part: str, dtype: np.dtype) -> None:
        self.folder, self.part, self.dtype = folder, part, dtype
        self.total = self.within = 0
        self.files: list[dict[str, Any]] = []
        self.file: IO[bytes] | None = None

    def write(self, tokens: np.ndarray, begin: int, ends: np.ndarray) -> None:
        """Write the documents of ``tokens`` that begin at ``begin`` and end at ``ends``; a shard ends with one."""
        while begin < ends[-1]:
            if self.file is None:
                self.file, self.within = (self.folder / self._name()).open("wb"), 0
                self.file.write(bytes(HEADER))
            room = np.searchsorted(ends, begin + SHARD - self.within)  # the document that fills the shard is its last
            end = int(ends[min(int(room), len(ends) - 1)])
            tokens[begin:end].tofile(self.file)
            self.within, self.total, begin = self.within + end - begin, self.total + end - begin, end
            if self.within >= SHARD:
                self._end()

    def close(self) -> list[dict[str, Any]]:
        """End the last shard, and return what prepared.json says of all: sums are of what is read back."""
        if self.file is not None:
            self._end()
        for about in self.files:
            path = self.folder / about["name"]
            about["sha256"], about["modified"] = checksum(path)[1], path.stat().st_mtime_ns
        return self.files

    def _name(self) -> str:
        return f"{self.part}-{len(self.files):05}.bin"

    def _end(self) -> None:
        assert self.file is not None
        self.file.seek(0)
        self.file.write(header(self.dtype.name, self.within))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.files.append({"name": self._name(), "tokens": self.within})
        self.file = None
