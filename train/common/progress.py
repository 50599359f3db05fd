"""Progress with the estimated time left: a bar on a terminal, an occasional line in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

import rich.progress

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows progress on stderr. Use as a context manager."""

    def __init__(self, total: int, done: int, title: str, enabled: bool = True) -> None:
        """Start at ``done`` of ``total`` units. With ``enabled=False`` nothing is shown."""
        self.total, self.begin, self.title = total, done, title
        self.enabled = enabled
        self.complete = False
        self.bar: rich.progress.Progress | None = None
        self.started = self.spoken = time.monotonic()

    def __enter__(self) -> Progress:
        if self.enabled and sys.stderr.isatty():
            columns = (
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[note]}  time left"),
                rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
            )
            self.bar = rich.progress.Progress(*columns, console=rich.console.Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.begin, note="")
        return self

    def show(self, done: int, note: str = "") -> None:
        """Report that ``done`` units are done, with a short ``note`` such as the current loss."""
        if self.bar:
            self.bar.update(self.task, completed=done, note=note)
            return
        now = time.monotonic()
        last = done == self.total and not self.complete
        if self.enabled and (last or now - self.spoken >= SECONDS_BETWEEN_LINES):
            self.spoken, self.complete = now, done == self.total
            fresh = done - self.begin
            left = f"{(now - self.started) / fresh * (self.total - done):.0f} s left" if fresh else "starting"
            print(f"{self.title}: {done}/{self.total} {note}, {left}", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()
