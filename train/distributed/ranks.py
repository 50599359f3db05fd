"""The ranks of a run: who this process is, and how all of them fail together, in one sentence."""

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
        """Whether this is rank 0, which writes the files and speaks to the user."""
        return self.rank == 0

    @contextmanager
    def collective_errors(self) -> Iterator[None]:
        """Run a block that may fail on some ranks only; then no rank goes on.

        Raises:
            ConfigError: on every rank, if an error came up on any; the first one's sentence, with the rank and host
                where it isn't everybody's; RetryError if it is one. An error that is neither ConfigError nor OSError is a fault of this program,
                and goes on as it is where it came up.
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
        """Run what may take long on the ranks that have it, while nobody's collectives time out.

        Raises:
            ConfigError: on every rank, if it failed on any.
        """
        errors: list[Exception] = []

        def job() -> None:
            try:
                if work:
                    work()
            except Exception as error:
                errors.append(error)

        thread = Thread(target=job, daemon=True)  # so that a Ctrl-C need not wait for it
        thread.start()
        while self.sum([float(thread.is_alive())])[0]:
            self.heartbeat()
            time.sleep(0.2)
        with self.collective_errors():
            if errors:
                raise errors[0]

    def heartbeat(self, step: bool = False) -> None:
        """This rank makes progress; see :meth:`Watchdog.beat`."""
        self.watchdog.beat(step)

    def gather(self, value: Value) -> list[Value]:
        """What each rank has, on all of them."""
        everybody: list[Any] = [None] * self.world
        dist.all_gather_object(everybody, value)
        return everybody

    def broadcast(self, value: Value) -> Value:
        """What rank 0 has."""
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def sum(self, values: list[float]) -> list[float]:
        """The sums of some numbers over all ranks, in float64."""
        return self.sum_and_max(values, [])[0]

    def sum_and_max(self, sums: list[float], largest: list[float]) -> tuple[list[float], list[float]]:
        """The sums of some numbers over all ranks, and the largest of others, in float64; both are under way at once."""
        both = [torch.tensor(values, dtype=torch.float64, device=self.device) for values in (sums, largest)]
        ops = (dist.ReduceOp.SUM, dist.ReduceOp.MAX)
        works = [dist.all_reduce(t, op, async_op=True) for t, op in zip(both, ops, strict=True) if t.numel()]
        for work in works:
            work.wait()
        return both[0].tolist(), both[1].tolist()
