"""Edits of plain data: of what files and state dicts hold."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

WEIRD: list[Any] = [None, True, False, 0, -1, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "x", "1e-3"]
WEIRD += ["\0", "../..", "/etc", "ü\ud800", "<script>", [], [1], [[]], {}, {"a": 1}]
KEYS = ("step", "loss", "validation_loss", "lr", "name", "arm", "seconds", "parameters", "x y", "\ud800")


def places(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in nested dicts and lists."""
    yield place
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(value, (*place, key))


def edited(draw: random.Random, document: Any) -> Any:
    """The document with one value changed, removed, added or doubled."""
    document = copy.deepcopy(document)
    place = draw.choice(list(places(document)))
    if not place:
        return draw.choice(WEIRD)
    node = document
    for key in place[:-1]:
        node = node[key]
    how = draw.choice(["change", "change", "change", "remove", "add", "double"])
    if how == "change":
        node[place[-1]] = draw.choice(WEIRD)
    elif how == "remove":
        del node[place[-1]]
    elif isinstance(node, list):
        node.append(copy.deepcopy(node[place[-1]]) if how == "double" else draw.choice(WEIRD))
    else:
        node[draw.choice(KEYS)] = draw.choice(WEIRD)
    return document
