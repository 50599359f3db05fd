"""Ends a run that can't go on: which rank is stuck or gone, so that no allocation burns in silence."""

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
ANSWER_SECONDS = 3 * POLL_SECONDS  # to show that one is there
LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out", "timed out", "Broken pipe")


class Watchdog:
    """Ends this process when its run can't go on, with one sentence that names the rank at fault.

    Every rank says that it moves (:meth:`beat`). One that hasn't for a while, or whose collective has failed, puts a note
    into the store where the ranks met. Every rank that still runs answers; who doesn't is stopped, dead or cut off.
    Nothing here grows with the number of ranks but the one look at the answers at the end.
    """

    def __init__(self, rank: int, world: int, seconds: float) -> None:
        """Begin to answer others; call :meth:`begin` to watch this rank too.

        Args:
            rank: this rank.
            world: number of ranks.
            seconds: without progress, after which the run is given up.
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
        """This rank makes progress; ``step``: it begins a micro-batch, which all ranks do equally often."""
        self._beats += step
        self._last = time.monotonic()

    def begin(self) -> None:
        """Give up when :meth:`beat` isn't called for ``seconds``."""
        self.beat()
        if self.world > 1:
            Thread(target=self._time, daemon=True).start()

    def end(self) -> None:
        """The run is over."""
        self._over.set()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """A block in which a failed collective ends the process with a sentence; other errors pass."""
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
        with suppress(RuntimeError):  # the store has gone: if that matters, there will be no progress either
            while not self._over.wait(POLL_SECONDS):
                if self._store.check(["trouble"]):
                    self._answer()

    def _give_up(self, what: str) -> None:
        """Does not return."""
        if self._over.is_set():
            return

        def tell() -> None:
            with suppress(RuntimeError):  # said below
                self._store.set("trouble", what)
                self._answer()

        teller = Thread(target=tell, daemon=True)
        teller.start()
        teller.join(ANSWER_SECONDS + 5 * POLL_SECONDS)
        if os.environ.get("LOCAL_RANK") in ("0", "1"):  # the store may have died with rank 0 on this host
            _say(
                f"{what} on rank {self.rank} on {socket.gethostname()}, and {os.environ['MASTER_ADDR']}, where the ranks meet, "
                "can't be reached: that host or its launcher is gone, or the network is cut."
            )
        os._exit(EXIT_RETRY)

    def _answer(self) -> None:
        """Say that we are here; the first rank that does names those who don't. Ends this process."""
        self._store.set(f"here/{self.rank}", str(self._beats))
        time.sleep(ANSWER_SECONDS)
        # Nobody but the first asks for all of them.
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
            _say(f"{what}: {who}. The same command goes on from the newest checkpoint.")
        else:
            time.sleep(POLL_SECONDS)  # a launcher ends all of its ranks when the first has ended: let that one speak
        time.sleep(POLL_SECONDS)  # the store may be ours, and the others have to see that we were first
        os._exit(EXIT_RETRY)

    def _names(self, ranks: list[int]) -> str:
        named = [f"{rank} on {self._store.get(f'host/{rank}').decode()}" for rank in ranks[:8]]
        more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(named)}{more}"


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another rank could not be reached."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in LOST)
    )


def _say(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
