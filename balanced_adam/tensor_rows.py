"""Sums over the rows of whole tensors, of which this process may hold a piece: in a flat partition of ZeRO's, or as
this rank's part of a DTensor.

A sum is the same number, to the last bit, however the tensor is cut: its terms are rounded to multiples of one power of
two, which is chosen from the greatest of them, and added as integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from balanced_adam import dtensor

Terms = Callable[[slice], Tensor]
"""Of a stretch of the flattened local tensor: what is to be summed, (k, elements), float64."""


class Piece(NamedTuple):
    """What this process holds of one tensor of at least two dimensions: a stretch of it, in row-major order."""

    rows: int
    """Of the whole tensor; at least 1."""
    numel: int
    """Of the whole tensor."""
    start: int
    """Where the stretch begins in the tensor."""
    offset: int
    """Where it begins in the local tensor."""
    length: int
    """0 where another process has all of it."""

    @property
    def here(self) -> slice:
        """The stretch in the local tensor."""
        return slice(self.offset, self.offset + self.length)

    def of_rows(self, values: Tensor) -> Tensor:
        """A number for each row, or one for the whole tensor -> one for each element of the stretch."""
        size = self.numel // len(values)
        return values[torch.arange(self.start, self.start + self.length, device=values.device) // size]

    def by_row(self, terms: Terms) -> tuple[Tensor, slice]:
        """The terms as (k, rows, elements of a row), with zeros for those elsewhere, and which rows these are."""
        size = self.numel // self.rows
        lead = self.start % size
        padded = torch.nn.functional.pad(terms(self.here), (lead, -(lead + self.length) % size))
        first = self.start // size
        by_row = padded.unflatten(1, (-1, size))
        return by_row, slice(first, first + by_row.shape[1])


class Layout(NamedTuple):
    """All tensors of at least two dimensions in a local tensor, in an order that all ranks share."""

    pieces: list[Piece]
    group: Any = None
    """The process group that holds the other pieces; None if there are none."""

    def row_sums(self, terms: Terms, count: int, device: torch.device) -> list[Tensor]:
        """The sums of ``count`` kinds of terms over each row of each tensor: (count, rows), float64, on every rank.

        Two collectives, however many tensors there are. NaN where a term of the row is not finite.
        """
        if not self.pieces:
            return []
        greatest = torch.zeros(count, sum(piece.rows for piece in self.pieces), dtype=torch.float64, device=device)
        for piece, target in zip(self.pieces, self._split(greatest), strict=True):
            if piece.length:
                values, rows = piece.by_row(terms)
                target[:, rows] = values.abs().amax(2).nan_to_num(math.inf, math.inf)
        self._all_reduce(greatest, torch.distributed.ReduceOp.MAX)
        totals = torch.zeros_like(greatest, dtype=torch.int64)
        finite = greatest.isfinite()
        exponents = torch.frexp(greatest.where(finite, 1.0)).exponent.to(torch.int64)
        units = []
        for piece, target, exponent in zip(self.pieces, self._split(totals), self._split(exponents), strict=True):
            # A row's terms are below 2^exponent, and so many that their sum is below 2^61 units.
            bits = 61 - (piece.numel // piece.rows).bit_length()
            units.append(bits - exponent)
            if piece.length:
                values, rows = piece.by_row(terms)
                scaled = values * _two_to(units[-1][:, rows]).unsqueeze(2)
                target[:, rows] = scaled.nan_to_num(0.0, 0.0, 0.0).round().to(torch.int64).sum(2)
        self._all_reduce(totals, torch.distributed.ReduceOp.SUM)
        sums = totals.double() * _two_to(-torch.cat(units, 1))
        return self._split(sums.masked_fill(~finite, math.nan))

    def _split(self, values: Tensor) -> list[Tensor]:
        return list(values.split([piece.rows for piece in self.pieces], 1))

    def _all_reduce(self, values: Tensor, op: Any) -> None:
        if self.group is None:
            return
        kinds = [device.type for device in self.group._device_types]
        shared = values if values.device.type in kinds else values.to(kinds[0])  # NCCL, and offload to the CPU
        torch.distributed.all_reduce(shared, op, group=self.group)
        values.copy_(shared)


def _two_to(exponent: Tensor) -> Tensor:
    """2^exponent, float64; exponents are integers."""
    return ((exponent.clamp(-1000, 1000) + 1023) << 52).view(torch.float64)


def layout(param: Tensor) -> Layout:
    """Of a parameter that is whole, or a DTensor that is cut along its first dimension.

    Raises:
        ValueError: if it is cut otherwise.
    """
    if param.dim() < 2 or param.numel() == 0:
        return Layout([])
    if not dtensor.is_dtensor(param):
        return Layout([Piece(len(param), param.numel(), 0, 0, param.numel())])
    mesh, placements = cast(Any, param).device_mesh, cast(Any, param).placements
    cut = [number for number, placement in enumerate(placements) if not placement.is_replicate()]
    if not cut:
        return Layout([Piece(len(param), param.numel(), 0, 0, param.numel())])
    if len(cut) > 1 or type(placements[cut[0]]).__name__ != "Shard" or placements[cut[0]].dim != 0:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} is a DTensor placed as {placements}; whole rows are needed: it "
            "must be cut along dimension 0, and over one dimension of the mesh."
        )
    size = param.numel() // len(param)
    # torch.chunk's parts: all but the last ones are of one size.
    first = -(-len(param) // mesh.size(cut[0])) * mesh.get_local_rank(cut[0])
    part = dtensor.local(param)
    return Layout(
        [Piece(len(param), param.numel(), min(first, len(param)) * size, 0, part.numel())], mesh.get_group(cut[0])
    )
