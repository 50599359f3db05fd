"""The ranks of a run: this process's place among them, collectives on plain values, and collective errors."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from train.common.errors import ConfigError, RetryError, first_line
from train.distributed.watchdog import Watchdog, is_lost

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of the run."""

    rank: int
    local_rank: int
    world: int
    device: torch.device
    watchdog: Watchdog

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files and prints messages."""
        return self.rank == 0

    @contextmanager
    def collective_errors(self) -> Iterator[None]:
        """Run a block that may fail on some ranks only. If it fails on any rank, it fails on all.

        An error that is neither a ConfigError nor an OSError is a bug in this program. The rank where it occurred
        raises it unchanged.

        Raises:
            ConfigError: on every rank, if any rank failed. The message is that of the lowest rank that failed; unless
                that is rank 0, it names the rank and its host. It is a RetryError if the original error was one.
        """
        mine, again = "", False
        fault: Exception | None = None
        try:
            yield
        except ConfigError as error:
            mine, again = str(error), isinstance(error, RetryError)
        except OSError as error:
            mine = f"{error.filename or 'a file'}: {error.strerror or error}."
        except Exception as error:
            if is_lost(error):
                raise
            mine, fault = f"{type(error).__name__}: {first_line(error)}", error
        everybody = self.gather((socket.gethostname(), mine, again))
        if fault is not None:
            raise fault
        for rank, (host, sentence, again) in enumerate(everybody):
            if sentence:
                kind = RetryError if again else ConfigError
                raise kind(sentence if rank == 0 else f"rank {rank} on {host}: {sentence}")

    def wait_for(self, work: Callable[[], Any] | None) -> None:
        """Run ``work``, which may take long, on the ranks that have some, while no rank's collectives time out.

        Raises:
            ConfigError: on every rank, if the work failed on any.
        """
        errors: list[Exception] = []

        def job() -> None:
            try:
                if work:
                    work()
            except Exception as error:
                errors.append(error)

        thread = Thread(target=job, daemon=True)  # so that Ctrl-C does not wait for it
        thread.start()
        while self.sum([float(thread.is_alive())])[0]:
            self.heartbeat()
            time.sleep(0.2)
        with self.collective_errors():
            if errors:
                raise errors[0]

    def heartbeat(self, step: bool = False) -> None:
        """Report that this rank makes progress; see :meth:`Watchdog.beat`."""
        self.watchdog.beat(step)

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, in rank order, on every rank."""
        everybody: list[Any] = [None] * self.world
        dist.all_gather_object(everybody, value)
        return everybody

    def broadcast(self, value: Value) -> Value:
        """Return rank 0's value on every rank."""
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def sum(self, values: list[float]) -> list[float]:
        """Sum each number over all ranks, in float64."""
        return self.sum_and_max(values, [])[0]

    def sum_and_max(self, sums: list[float], largest: list[float]) -> tuple[list[float], list[float]]:
        """Sum some numbers over all ranks and take the maximum of others, in float64. Both reductions overlap."""
        both = [torch.tensor(values, dtype=torch.float64, device=self.device) for values in (sums, largest)]
        ops = (dist.ReduceOp.SUM, dist.ReduceOp.MAX)
        works = [dist.all_reduce(t, op, async_op=True) for t, op in zip(both, ops, strict=True) if t.numel()]
        for work in works:
            work.wait()
        return both[0].tolist(), both[1].tolist()
