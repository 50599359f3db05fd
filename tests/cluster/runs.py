"""What a run has left in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.checkpoint.load import only_known_classes
from train.run.metrics import read_metrics


def losses(out: Path) -> list[float]:
    """One for each step; none may be there twice, and none be missing."""
    lines = [line for line in read_metrics(out) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def state(out: Path) -> list[Tensor]:
    """Weights, moments and step counts of all ranks, from the last checkpoint."""
    newest = max((out / "checkpoints").glob("step-???????"))
    with only_known_classes():
        files = [torch.load(file, map_location="cpu") for file in sorted(newest.glob("*optim_states.pt"))]
        return [tensor for file in files for tensor in _tensors(file)]


def same(one: Path, other: Path) -> bool:
    """Whether two runs have ended with the same bits, and had the same losses."""
    ours, theirs = state(one), state(other)
    assert len(ours) == len(theirs) > 3
    return losses(one) == losses(other) and all(map(torch.equal, ours, theirs))


def events(out: Path) -> list[dict[str, Any]]:
    """What attempts.jsonl says."""
    return [json.loads(line) for line in (out / "attempts.jsonl").read_text().splitlines()]


def _tensors(node: Any) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, dict):
        for key in sorted(node, key=str):
            yield from _tensors(node[key])
    elif isinstance(node, list | tuple):
        for item in node:
            yield from _tensors(item)
