"""Watchdog: aborts a run that makes no progress, and names the rank that is stuck or gone."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from train.common.errors import EXIT_RETRY, first_line

POLL_SECONDS = 2.0
ANSWER_SECONDS = 3 * POLL_SECONDS  # time that every rank has to show that it is alive
LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out", "timed out", "Broken pipe")


class Watchdog:
    """Ends this process when its run can't continue, with one sentence that names the rank at fault.

    Every rank reports progress (:meth:`beat`). A rank that has made none for a while, or whose collective failed, puts
    a note into the store where the ranks met. Every rank that still runs answers; a rank that doesn't is stopped, dead
    or cut off. Only the single read of the answers at the end grows with the number of ranks.
    """

    def __init__(self, rank: int, world: int, seconds: float) -> None:
        """Start to answer the other ranks. Call :meth:`begin` to watch this rank too.

        Args:
            rank: this rank.
            world: number of ranks.
            seconds: time without progress after which the run is aborted.
        """
        self.rank, self.world, self.seconds = rank, world, seconds
        self._beats, self._last = 0, time.monotonic()
        self._over = Event()
        if world == 1:
            return
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*where, is_master=False, timeout=timedelta(seconds=60), wait_for_workers=False)
        self._store = PrefixStore(f"watch-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self._store.set(f"host/{rank}", socket.gethostname())
        Thread(target=self._listen, daemon=True).start()

    def beat(self, step: bool = False) -> None:
        """Report progress. With ``step``, this rank begins a micro-batch, which all ranks do equally often."""
        self._beats += step
        self._last = time.monotonic()

    def begin(self) -> None:
        """Start to watch this rank: abort the run when :meth:`beat` isn't called for ``seconds``."""
        self.beat()
        if self.world > 1:
            Thread(target=self._time, daemon=True).start()

    def end(self) -> None:
        """Stop watching: the run is over."""
        self._over.set()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Run a block in which a failed collective ends the process with a message. Other errors propagate."""
        try:
            yield
        except Exception as error:
            if is_lost(error) and self.world > 1:
                self._give_up(f"a collective failed ({first_line(error):.120})")
            raise

    def _time(self) -> None:
        while not self._over.wait(min(POLL_SECONDS, self.seconds / 4)):
            if time.monotonic() - self._last > self.seconds:
                self._give_up(f"no progress for {self.seconds:.0f} s")

    def _listen(self) -> None:
        with suppress(RuntimeError):  # the store is gone; if that matters, there will be no progress either
            while not self._over.wait(POLL_SECONDS):
                if self._store.check(["trouble"]):
                    self._answer()

    def _give_up(self, what: str) -> None:
        """Report the trouble to all ranks and end this process. Returns only if the run is over already."""
        if self._over.is_set():
            return

        def alert() -> None:
            with suppress(RuntimeError):  # the store can't be reached; reported below
                self._store.set("trouble", what)
                self._answer()

        thread = Thread(target=alert, daemon=True)
        thread.start()
        thread.join(ANSWER_SECONDS + 5 * POLL_SECONDS)
        if os.environ.get("LOCAL_RANK") in ("0", "1"):  # the store may have died with rank 0 on this host
            _print_error(
                f"{what} on rank {self.rank} on {socket.gethostname()}, and {os.environ['MASTER_ADDR']}, where the "
                "ranks meet, can't be reached: that host or its launcher is gone, or the network is cut."
            )
        os._exit(EXIT_RETRY)

    def _answer(self) -> None:
        """Answer that this rank is alive and end this process. The lowest rank that answers names those that don't."""
        self._store.set(f"here/{self.rank}", str(self._beats))
        time.sleep(ANSWER_SECONDS)
        # Only the lowest rank that answers reads the answers of all.
        if not any(self._store.check([f"here/{rank}"]) for rank in range(self.rank)):
            what = self._store.get("trouble").decode()
            beats = {
                rank: int(self._store.get(f"here/{rank}"))
                for rank in range(self.world)
                if self._store.check([f"here/{rank}"])
            }
            gone = [rank for rank in range(self.world) if rank not in beats]
            if gone:
                who = (
                    f"{self._names(gone)} {'does' if len(gone) == 1 else 'do'} not answer (killed, stopped or cut off)"
                )
            else:
                slowest = [rank for rank in beats if beats[rank] == min(beats.values())]
                behind = len(slowest) < len(beats)
                who = f"all ranks answer; {self._names(slowest)} is behind" if behind else "all ranks answer"
            _print_error(f"{what}: {who}. Run the same command again to resume from the newest checkpoint.")
        else:
            time.sleep(POLL_SECONDS)  # a launcher ends all its ranks when the first has ended: let that one report
        time.sleep(POLL_SECONDS)  # the store may be in this process, and the others have to see that we were first
        os._exit(EXIT_RETRY)

    def _names(self, ranks: list[int]) -> str:
        named = [f"{rank} on {self._store.get(f'host/{rank}').decode()}" for rank in ranks[:8]]
        more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(named)}{more}"


def is_lost(error: BaseException) -> bool:
    """Return whether an error means that another rank could not be reached."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in LOST)
    )


def _print_error(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
