"""The ranks of a run: who this process is, and how all of them fail together, in one sentence."""

from __future__ import annotations

import atexit
import logging
import os
import platform
import random
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from train.settings import SettingsError, TryAgain, first_line, require
from train.watch import Lost, Watch, end_with_parent, is_lost

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of the run."""

    rank: int
    local_rank: int
    world: int
    device: torch.device
    watch: Watch

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes the files and speaks to the user."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block that may fail on some ranks only; then no rank goes on.

        Raises:
            SettingsError: on every rank, if an error came up on any; the first one's sentence, with the rank and host
                where it isn't everybody's; TryAgain if it is one. An error that is neither SettingsError nor OSError is a fault of this program,
                and goes on as it is where it came up.
        """
        mine, again = "", False
        fault: Exception | None = None
        try:
            yield
        except SettingsError as error:
            mine, again = str(error), isinstance(error, TryAgain)
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
                kind = TryAgain if again else SettingsError
                raise kind(sentence if rank == 0 else f"rank {rank} on {host}: {sentence}")

    def wait_for(self, work: Callable[[], Any] | None) -> None:
        """Run what may take long on the ranks that have it, while nobody's collectives time out.

        Raises:
            SettingsError: on every rank, if it failed on any.
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
            self.alive()
            time.sleep(0.2)
        with self.together():
            if errors:
                raise errors[0]

    def alive(self, step: bool = False) -> None:
        """This rank makes progress; see :meth:`Watch.beat`."""
        self.watch.beat(step)

    def gather(self, value: Value) -> list[Value]:
        """What each rank has, on all of them."""
        everybody: list[Any] = [None] * self.world
        dist.all_gather_object(everybody, value)
        return everybody

    def from_first(self, value: Value) -> Value:
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


def prepare_environment() -> None:
    """Fill in what launchers leave open, before DeepSpeed is imported.

    Plain ``python`` is a world of one; ``srun`` describes its ranks in SLURM_* variables.

    Raises:
        SettingsError: if srun started several ranks and nobody said where they meet, or a launcher told only half.
    """
    env = os.environ
    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")
    # srun sets SLURM_STEP_*; a batch script that calls plain python has the other SLURM variables too.
    if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        ranks = env["SLURM_STEP_NUM_TASKS"]
        require(
            "MASTER_ADDR" in env and "MASTER_PORT" in env,
            f"srun started {ranks} ranks, but MASTER_ADDR and MASTER_PORT are not set; export them in the batch script.",
        )
        env.update(RANK=env["SLURM_PROCID"], LOCAL_RANK=env["SLURM_LOCALID"], WORLD_SIZE=ranks)
        env.setdefault("LOCAL_WORLD_SIZE", _tasks_on_this_host(env, ranks))
    missing = [name for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    require(
        "RANK" not in env or not missing,
        f"RANK is {env.get('RANK')} in the environment, but {', '.join(missing)} is not set; unset RANK, or use a launcher.",
    )
    if "RANK" in env:
        end_with_parent()
    if "RANK" not in env:
        env.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
        )
    # DeepSpeed asks LOCAL_SIZE how many "devices" a CPU host has; the other launchers say LOCAL_WORLD_SIZE.
    local = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or env["WORLD_SIZE"]
    env.setdefault("LOCAL_SIZE", local)
    if "OMP_NUM_THREADS" not in env and not torch.cuda.is_available():
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(local)))


def _tasks_on_this_host(env: Mapping[str, str], ranks: str) -> str:
    """From SLURM_STEP_TASKS_PER_NODE, such as "4(x2),3": 4 on two hosts and 3 on a third."""
    counts: list[str] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", ranks).split(","):
        count, _, times = part.partition("(x")
        counts += [count] * int(times.rstrip(")") or 1)
    return counts[int(env.get("SLURM_NODEID", "0"))]


def free_port() -> int:
    """A TCP port that is free on this machine, and will hardly be taken before the ranks meet there.

    Any port that the system would give may be the next outgoing connection's a moment later; these lie below its range,
    and are drawn at random, so that jobs that begin together on one node get different ones.

    Raises:
        SettingsError: if none can be found.
    """
    draw = random.SystemRandom()  # of the operating system, so that no seed makes two runs choose alike
    end = _first_of_connections()
    for _ in range(1000):
        with socket.socket() as probe, suppress(OSError):
            port = draw.randrange(10000, end)
            probe.bind(("", port))
            return port
    raise SettingsError(
        f"none of a thousand TCP ports from 10000 to {end - 1} is free on {platform.node()}; free some."
    )


def _first_of_connections() -> int:
    """The first of the ports that outgoing connections get."""
    try:
        return max(11000, int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]))
    except OSError:
        return 32768


def start(timeout: float) -> Ranks:
    """Join the process group (NCCL on GPUs, gloo on CPU) and say who we are.

    Args:
        timeout: seconds without progress after which the run is given up.

    Raises:
        Lost: if the ranks don't meet within that time.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.utils.logger.setLevel(logging.WARNING)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # DeepSpeed would compile an op (20 to 80 s, once) that only its inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ["LOCAL_RANK"])
    index = local_rank if accelerator.device_count() > 1 else 0  # srun --gpus-per-task shows each rank one GPU
    accelerator.set_device(index)
    try:
        deepspeed.init_distributed(
            accelerator.communication_backend_name(),
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout + 60),  # so that the Watch speaks first
        )
    except dist.DistError:
        env = os.environ
        raise Lost(
            f"rank {env['RANK']} on {socket.gethostname()} did not meet the others at {env['MASTER_ADDR']}:{env['MASTER_PORT']} within "
            f"{timeout:.0f} s; another host is gone or can't be reached, or GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME is to be set."
        ) from None
    device = torch.device(accelerator.device_name(index))
    rank, world = dist.get_rank(), dist.get_world_size()
    return Ranks(rank, local_rank, world, device, Watch(rank, world, timeout))


def leave(code: int) -> NoReturn:
    """Leave the process group and end this process with ``code``, without the finalization of Python.

    A thread of gloo may still hold the last reference to a tensor of a finished collective. If it drops it while Python is
    finalizing, C++ aborts: a run that had trained and saved everything ended with SIGABRT, once in about twenty at ZeRO-3.
    """
    if dist.is_initialized() and code == 0:  # else the others may be in a collective, and NCCL would wait for them
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
