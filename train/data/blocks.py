"""Fixed-length blocks of tokens, and the choice of blocks for each batch.

The batch at step t is a pure function of (seed, t). It depends neither on the number of ranks nor on the split into
micro-batches. So a resumed run needs no loader state, and runs with other betas see the same batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch


@dataclass(frozen=True)
class Blocks:
    """Consecutive blocks of ``length`` tokens in one long array. A remainder that fills no block is dropped."""

    tokens: np.ndarray
    length: int

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def take(self, indices: np.ndarray) -> torch.Tensor:
        """Return the tokens of the blocks with these indices: int64, shape [len(indices), length]."""
        blocks = self.tokens[: len(self) * self.length].reshape(-1, self.length)
        return torch.from_numpy(blocks[indices].astype(np.int64))


def batch_indices(step: int, batch: int, blocks: int, seed: int) -> np.ndarray:
    """Return the indices of the blocks in the global batch of step ``step`` (counted from 0): shape [batch].

    Every epoch is a new permutation (random reshuffling), a function of (seed, epoch) alone. A batch may span two
    epochs.
    """
    where = np.arange(step * batch, (step + 1) * batch)
    result = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(where // blocks):
        here = where // blocks == epoch
        result[here] = _order(seed, int(epoch), blocks)[where[here] % blocks]
    return result


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, blocks: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(blocks)
