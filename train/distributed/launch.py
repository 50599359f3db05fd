"""Join the process group from the environment that a launcher has set, and leave it at exit."""

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
from threading import Timer
from typing import NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from train.common.errors import ConfigError, PeerLostError, require
from train.common.processes import end_with_parent
from train.distributed import environment
from train.distributed.ranks import Ranks
from train.distributed.watchdog import Watchdog

EXIT_SECONDS = 60.0


def prepare_environment() -> None:
    """Complete the environment variables that launchers leave unset. Call this before DeepSpeed is imported.

    Plain ``python`` is a world of one rank. ``srun`` describes its ranks in SLURM_* variables.

    Raises:
        ConfigError: if srun started several ranks without MASTER_ADDR and MASTER_PORT, or RANK is set and the variables
            that go with it are not, or one of them is not what it must be.
    """
    env = os.environ
    if "RANK" not in env:
        environment.check(environment.Srun, env)
    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")
    # srun sets SLURM_STEP_*; a batch script that calls plain python has the other SLURM variables too.
    if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        ranks = env["SLURM_STEP_NUM_TASKS"]
        require(
            "MASTER_ADDR" in env and "MASTER_PORT" in env,
            f"srun started {ranks} ranks, but MASTER_ADDR and MASTER_PORT are not set; "
            "export them in the batch script.",
        )
        env.update(RANK=env["SLURM_PROCID"], LOCAL_RANK=env["SLURM_LOCALID"], WORLD_SIZE=ranks)
        env.setdefault("LOCAL_WORLD_SIZE", _tasks_on_this_host(env, ranks))
    missing = [name for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    require(
        "RANK" not in env or not missing,
        f"RANK is {env.get('RANK')} in the environment, but {', '.join(missing)} is not set; "
        "unset RANK, or use a launcher.",
    )
    if "RANK" in env:
        environment.check(environment.Launched, env)
        end_with_parent()
    else:
        env.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
        )
    if "LOCAL_SIZE" in env:  # of the deepspeed launcher
        env.setdefault("LOCAL_WORLD_SIZE", env["LOCAL_SIZE"])
    # DeepSpeed reads the number of "devices" of a CPU host from LOCAL_SIZE; other launchers set LOCAL_WORLD_SIZE.
    local = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or env["WORLD_SIZE"]
    env.setdefault("LOCAL_SIZE", local)
    if "OMP_NUM_THREADS" not in env and not torch.cuda.is_available():
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(local)))


def _tasks_on_this_host(env: Mapping[str, str], ranks: str) -> str:
    """Parse SLURM_STEP_TASKS_PER_NODE for this host. "4(x2),3" means 4 tasks on each of two hosts and 3 on a third."""
    counts: list[str] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", ranks).split(","):
        count, _, times = part.partition("(x")
        counts += [count] * int(times.rstrip(")") or 1)
    node = int(env.get("SLURM_NODEID", "0"))
    require(node < len(counts), f"SLURM_NODEID is {node}, and SLURM_STEP_TASKS_PER_NODE names {len(counts)} hosts.")
    return counts[node]


def free_port() -> int:
    """Return a TCP port that is free on this machine and likely to stay free until the ranks meet there.

    The port lies below the range of ephemeral ports, since the next outgoing connection may take any of those. It is
    drawn at random, so that jobs that start together on one node get different ports.

    Raises:
        ConfigError: if none of a thousand ports is free.
    """
    draw = random.SystemRandom()  # the operating system's, so that two runs with the same seed choose differently
    end = _first_of_connections()
    for _ in range(1000):
        with socket.socket() as probe, suppress(OSError):
            port = draw.randrange(10000, end)
            probe.bind(("", port))
            return port
    raise ConfigError(f"none of a thousand TCP ports from 10000 to {end - 1} is free on {platform.node()}; free some.")


def _first_of_connections() -> int:
    """Return the first port of the range that outgoing connections use."""
    try:
        return max(11000, int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]))
    except OSError:
        return 32768


def join(timeout: float) -> Ranks:
    """Join the process group (NCCL on GPUs, gloo on CPU) and return this process's place in it.

    Args:
        timeout: seconds without progress after which the run is aborted.

    Raises:
        PeerLostError: if the ranks don't meet within that time.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.utils.logger.setLevel(logging.WARNING)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # DeepSpeed would compile an op that only its inference uses, which takes 20 to 80 s the first time.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ["LOCAL_RANK"])
    index = local_rank if accelerator.device_count() > 1 else 0  # srun --gpus-per-task shows each rank one GPU
    accelerator.set_device(index)
    backend = accelerator.communication_backend_name()
    try:
        if store := loopback_store(timeout):
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            # With the longer time, the Watchdog reports first.
            dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=timeout + 60),
                device_id=torch.device("cuda", index) if accelerator.device_name() == "cuda" else None,
            )
        deepspeed.init_distributed(
            backend,
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout + 60),
        )
    except dist.DistError:
        env = os.environ
        raise PeerLostError(
            f"rank {env['RANK']} on {socket.gethostname()} did not meet the others at "
            f"{env['MASTER_ADDR']}:{env['MASTER_PORT']} within {timeout:.0f} s; another host is gone or can't be "
            "reached, or GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME is to be set."
        ) from None
    device = torch.device(accelerator.device_name(index))
    rank, world = dist.get_rank(), dist.get_world_size()
    return Ranks(rank, local_rank, world, device, Watchdog(rank, world, timeout))


def loopback_store(timeout: float) -> TCPStore | None:
    """Return the store at which the ranks of a single host meet, listening on its loopback interface.

    torch's own listens on all interfaces, whatever MASTER_ADDR is. It is left to torch where ranks may be on other
    hosts, which may know the first by another name than localhost; where torchrun's agent has made it already; and
    where they have met.

    Args:
        timeout: seconds for the ranks to meet.

    Raises:
        PeerLostError: on rank 0, if the port is taken.
        torch.distributed.DistError: if the ranks don't meet within that time.
    """
    env = os.environ
    host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    if host not in ("127.0.0.1", "localhost") or env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    if dist.is_initialized() or int(env["WORLD_SIZE"]) > int(env.get("LOCAL_WORLD_SIZE") or 1):
        return None
    first, listener = int(env["RANK"]) == 0, None
    if first:
        try:
            listener = socket.create_server((host, port), backlog=2048).detach()  # the store closes it
        except OSError as error:
            raise PeerLostError(
                f"rank 0 can't listen at {host}:{port}, where the ranks are to meet: {error.strerror}."
            ) from None
    return TCPStore(
        host,
        port,
        int(env["WORLD_SIZE"]),
        is_master=first,
        timeout=timedelta(seconds=timeout + 60),
        master_listen_fd=listener,
    )


def exit_process(code: int) -> NoReturn:
    """Leave the process group and exit with ``code``, without finalizing the Python interpreter.

    A gloo thread may still hold the last reference to a tensor of a finished collective. If it drops the reference
    while Python is finalizing, C++ aborts: about one in twenty ZeRO-3 runs ended with SIGABRT after everything was
    saved. What is left to do takes a second. A rank that is not out after ``EXIT_SECONDS`` (one in eight was not, with
    torch 2.4) would keep its hosts for ever: it goes without.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    last = Timer(EXIT_SECONDS, os._exit, [code])
    last.daemon = True
    last.start()
    if dist.is_initialized() and code == 0:  # otherwise the others may be in a collective, and NCCL would wait for them
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
