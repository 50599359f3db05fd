"""What a run trains on: the sequences of one or several sources, drawn by weight.

The batch at step t is a pure function of (seed, t), of the weights and of the sources' sizes. It depends neither on
the number of ranks nor on the split into micro-batches. So a resumed run needs no loader state, and runs with other
betas see the same batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from train.common.schemas import Order
from train.data.blocks import Blocks, order_of, shuffled

PERIOD = 100_000
"""Sequences after which each source has been drawn exactly by its share. Also one over the least share."""


@dataclass(frozen=True)
class Mixture:
    """Sequences of several sources. One number stands for each: they are counted through, source by source."""

    names: tuple[str, ...]
    """Of the sources; one without a name where there is no mixture."""
    sources: tuple[Blocks, ...]
    shares: tuple[int, ...]
    """How many of :data:`PERIOD` sequences are drawn from each source; at least 1."""
    order: Order
    """How the sequences of each source are shuffled; see :func:`order_of_all`."""

    @property
    def length(self) -> int:
        """Tokens in one sequence."""
        return self.sources[0].length

    def __len__(self) -> int:
        """Return the number of different sequences."""
        return sum(map(len, self.sources))

    @property
    def starts(self) -> np.ndarray:
        """The number of each source's first sequence."""
        return np.cumsum([0, *map(len, self.sources)])[:-1]

    def batch(self, step: int, batch: int, seed: int) -> np.ndarray:
        """Return which sequences are in the global batch of step ``step`` (counted from 0): int64, shape [batch].

        Each source is run through by its own epochs (:func:`train.data.blocks.shuffled`).
        """
        draws = np.arange(step * batch, (step + 1) * batch)
        if len(self.sources) == 1:
            return shuffled(draws, len(self), seed, self.order)
        result = np.empty(batch, dtype=np.int64)
        for period in np.unique(draws // PERIOD):
            here = draws // PERIOD == period
            source, before = (column[draws[here] % PERIOD] for column in _draws(self.shares, seed, int(period)))
            chosen = np.empty(len(source), dtype=np.int64)
            for number in np.unique(source):
                mine = source == number
                nth = period * self.shares[number] + before[mine]
                chosen[mine] = self.starts[number] + shuffled(
                    nth, len(self.sources[number]), _seed_of(seed, int(number)), self.order
                )
            result[here] = chosen
        return result

    def take(self, indices: np.ndarray) -> torch.Tensor:
        """Return the tokens of these sequences: int64, shape [len(indices), length]."""
        result = np.empty((len(indices), self.length), dtype=np.int64)
        source = np.searchsorted(self.starts, indices, side="right") - 1
        for number in np.unique(source):
            mine = source == number
            result[mine] = self.sources[number].rows(indices[mine] - self.starts[number])
        return torch.from_numpy(result)

    def sample(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Draw ``count`` sequences independently, each source by its share: int64, shape [count]."""
        if len(self.sources) == 1:
            return generator.integers(len(self), size=count)
        source = generator.choice(len(self.sources), size=count, p=np.array(self.shares) / PERIOD)
        sizes = np.array(list(map(len, self.sources)))
        return self.starts[source] + generator.integers(sizes[source])

    def drawn(self, sequences: int, seed: int) -> dict[str, int]:
        """Return how many of a run's first ``sequences`` sequences come from each source, by its name."""
        periods, rest = divmod(sequences, PERIOD)
        source, _ = _draws(self.shares, seed, periods)
        more = np.bincount(source[:rest], minlength=len(self.shares))
        counts = (periods * share + int(extra) for share, extra in zip(self.shares, more, strict=True))
        return dict(zip(self.names, counts, strict=True))


def order_of_all(sources: tuple[Blocks, ...]) -> Order:
    """Return how a run that begins now shuffles these. In a mixture no source has a permutation in memory."""
    return order_of(len(sources[0])) if len(sources) == 1 else "feistel"


def shares_of(weights: list[float]) -> tuple[int, ...]:
    """Return how many of :data:`PERIOD` sequences each weight stands for, rounded to add up; 0 for too few."""
    relative = np.array(weights) / max(weights)  # whose sum is finite
    exact = relative / relative.sum() * PERIOD
    shares = np.floor(exact).astype(np.int64)
    most_cut = np.argsort(shares - exact, kind="stable")[: PERIOD - int(shares.sum())]
    shares[most_cut] += 1
    return tuple(map(int, shares))


@lru_cache(maxsize=1024)
def _seed_of(seed: int, source: int) -> int:
    """Return the seed by which a source is shuffled, so that two of the same size have orders of their own."""
    return int(np.random.SeedSequence([seed, source]).generate_state(1, np.uint64)[0])


@lru_cache(maxsize=2)
def _draws(shares: tuple[int, ...], seed: int, period: int) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each draw of a period, its source, and how many draws of the period before it had the same.

    Each source's draws are spread evenly, one at a random place in each of as many equal parts of the period. So every
    stretch has the sources by their shares, but for one or two sequences.
    """
    generator = np.random.default_rng([seed, period, len(shares)])
    places = np.concatenate([(np.arange(share) + generator.random(share)) / share for share in shares])
    source = np.repeat(np.arange(len(shares), dtype=np.int16), shares)[np.argsort(places, kind="stable")]
    by_source = np.argsort(source, kind="stable")
    before = np.empty(PERIOD, dtype=np.int32)
    before[by_source] = np.concatenate([np.arange(share, dtype=np.int32) for share in shares])
    return source, before
