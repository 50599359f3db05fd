"""Fixed-length blocks of tokens, and the choice of blocks for each batch.

The batch at step t is a pure function of (seed, t). It depends neither on the number of ranks nor on the split into
micro-batches. So a resumed run needs no loader state, and runs with other betas see the same batches.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch

Order = Literal["permutation", "feistel"]
"""How the blocks of an epoch are shuffled: by a permutation in memory, or by a function of the index."""
FEISTEL_FROM = 2**24
"""Blocks from which on a permutation would take long, and 8 bytes each on every rank."""
ROUNDS = 8


def mapped(file: Path, dtype: np.dtype | str, offset: int, length: int) -> np.ndarray:
    """Memory-map so many numbers of a file, for reading a few here and there.

    Without the kernel's read-ahead, which would read 128 KB around each.
    """
    with file.open("rb") as opened:
        content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    content.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(content, dtype, length, offset)


@dataclass(frozen=True)
class Blocks:
    """Consecutive blocks of ``length`` tokens in one long stream. A remainder that fills no block is dropped."""

    parts: tuple[np.ndarray, ...]
    """The arrays that make up the stream, one after the other; a block may lie in two of them."""
    length: int

    @cached_property
    def ends(self) -> np.ndarray:
        """Where each part ends in the stream."""
        return np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) // self.length if self.parts else 0

    def take(self, indices: np.ndarray) -> torch.Tensor:
        """Return the tokens of the blocks with these indices: int64, shape [len(indices), length]."""
        return torch.from_numpy(np.stack([self._block(int(index)) for index in indices]))

    def _block(self, index: int) -> np.ndarray:
        begin, end = index * self.length, (index + 1) * self.length
        first, last = np.searchsorted(self.ends, [begin, end - 1], side="right")
        pieces = []
        for part in range(int(first), int(last) + 1):
            offset = int(self.ends[part]) - len(self.parts[part])
            pieces.append(self.parts[part][max(begin - offset, 0) : end - offset])
        return np.concatenate(pieces).astype(np.int64)


def order_of(blocks: int) -> Order:
    """Return how a run that begins now shuffles so many blocks."""
    return "feistel" if blocks >= FEISTEL_FROM else "permutation"


def batch_indices(step: int, batch: int, blocks: int, seed: int, order: Order = "permutation") -> np.ndarray:
    """Return the indices of the blocks in the global batch of step ``step`` (counted from 0): shape [batch].

    Every epoch is a new permutation (random reshuffling), a function of (seed, epoch) alone. A batch may span two
    epochs.
    """
    where = np.arange(step * batch, (step + 1) * batch)
    result = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(where // blocks):
        here = where // blocks == epoch
        within = where[here] % blocks
        if order == "feistel":
            result[here] = _shuffled(within, blocks, seed, int(epoch))
        else:
            result[here] = _order(seed, int(epoch), blocks)[within]
    return result


def _shuffled(indices: np.ndarray, blocks: int, seed: int, epoch: int) -> np.ndarray:
    """Return where a permutation of ``blocks`` indices, which is nowhere in memory, takes these.

    A Feistel network permutes the numbers of 2k bits, the fewest that hold all indices. A number beyond them is
    permuted again, until it is one of them ("cycle walking", Black and Rogaway, 2002): four times at most on average.
    """
    bits = np.uint64(max(1, ((blocks - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(bits)) - 1)
    keys = np.random.default_rng([seed, epoch]).integers(0, 2**64, ROUNDS, np.uint64)
    result = indices.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right = result[outside] >> bits, result[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        result[outside] = (left << bits) | right
        outside = result >= blocks
    return result.astype(np.int64)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Return hashes of these uint64 (the finalizer of SplitMix64, Steele, Lea and Flood, 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, blocks: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(blocks)
