"""The next batch is read while the current one is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """Loads items by their number in a thread, one ahead of the one that was asked for last."""

    def __init__(self, load: Callable[[int], Item]) -> None:
        self.load = load
        self.thread = ThreadPoolExecutor(1, "prefetch")
        self.ahead: tuple[int, Future[Item]] | None = None

    def get(self, number: int) -> Item:
        """Return item ``number``, and begin to load the one after it. What ``load`` raises is raised here."""
        waiting = self.ahead[1] if self.ahead and self.ahead[0] == number else self.thread.submit(self.load, number)
        item = waiting.result()
        self.ahead = number + 1, self.thread.submit(self.load, number + 1)
        return item
