"""From what a launcher has set in the environment to a process group, and out of it again."""

from __future__ import annotations

import atexit
import logging
import os
import platform
import random
import socket
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from train.common.errors import ConfigError, PeerLostError, require
from train.distributed.preemption import end_with_parent
from train.distributed.ranks import Ranks
from train.distributed.watchdog import Watchdog


def prepare_environment() -> None:
    """Fill in what launchers leave open, before DeepSpeed is imported.

    Plain ``python`` is a world of one; ``srun`` describes its ranks in SLURM_* variables.

    Raises:
        ConfigError: if srun started several ranks and nobody said where they meet, or a launcher told only half.
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
        ConfigError: if none can be found.
    """
    draw = random.SystemRandom()  # of the operating system, so that no seed makes two runs choose alike
    end = _first_of_connections()
    for _ in range(1000):
        with socket.socket() as probe, suppress(OSError):
            port = draw.randrange(10000, end)
            probe.bind(("", port))
            return port
    raise ConfigError(f"none of a thousand TCP ports from 10000 to {end - 1} is free on {platform.node()}; free some.")


def _first_of_connections() -> int:
    """The first of the ports that outgoing connections get."""
    try:
        return max(11000, int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]))
    except OSError:
        return 32768


def join(timeout: float) -> Ranks:
    """Join the process group (NCCL on GPUs, gloo on CPU) and say who we are.

    Args:
        timeout: seconds without progress after which the run is given up.

    Raises:
        PeerLostError: if the ranks don't meet within that time.
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
            timeout=timedelta(seconds=timeout + 60),  # so that the Watchdog speaks first
        )
    except dist.DistError:
        env = os.environ
        raise PeerLostError(
            f"rank {env['RANK']} on {socket.gethostname()} did not meet the others at {env['MASTER_ADDR']}:{env['MASTER_PORT']} within "
            f"{timeout:.0f} s; another host is gone or can't be reached, or GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME is to be set."
        ) from None
    device = torch.device(accelerator.device_name(index))
    rank, world = dist.get_rank(), dist.get_world_size()
    return Ranks(rank, local_rank, world, device, Watchdog(rank, world, timeout))


def exit_process(code: int) -> NoReturn:
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
