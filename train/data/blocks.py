"""Fixed-length blocks of tokens, and the order in which they are drawn: a pure function of the seed."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch

from train.common.schemas import Order

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
        return torch.from_numpy(self.rows(indices))

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Return the same as an array. No thread of torch's takes part, so this may run beside a step."""
        return np.stack([self._block(int(index)) for index in indices])

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


def shuffled(draws: np.ndarray, blocks: int, seed: int, order: Order = "permutation") -> np.ndarray:
    """Return the indices of the blocks that a run draws as its n-th, for each n of ``draws`` (counted from 0).

    Every epoch is a new permutation (random reshuffling), a function of (seed, epoch) alone.

    Args:
        draws: int64, of any shape.
        blocks: how many there are.
        seed: of the run.
        order: how an epoch is shuffled.

    Returns:
        int64, of the same shape.
    """
    result = np.empty(draws.shape, dtype=np.int64)
    for epoch in np.unique(draws // blocks):
        here = draws // blocks == epoch
        within = draws[here] % blocks
        if order == "feistel":
            result[here] = _permuted(within, blocks, seed, int(epoch))
        else:
            result[here] = _order(seed, int(epoch), blocks)[within]
    return result


def _permuted(indices: np.ndarray, blocks: int, seed: int, epoch: int) -> np.ndarray:
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
