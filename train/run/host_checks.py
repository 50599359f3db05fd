"""Checks of hosts, network and shared folders, made before the first step."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train.common.errors import first_line
from train.distributed.ranks import Ranks
from train.distributed.watchdog import is_lost
from train.run.config import Run
from train.run.optimizers import checkpoint_bytes

SEEN_WITHIN = 10.0  # seconds within which one host has to see another's file
SKEW = 5.0  # greatest clock difference in seconds: file times and logs are compared across hosts
ELEMENTS = 2**22  # float32 numbers in the all-reduce: 16 MiB
Hosts = list[str]
"""Host name of each rank, in rank order."""


def differences(hosts: Hosts, facts: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a sentence for each fact that is not the same on all ranks, naming the hosts that differ from the majority.

    Args:
        hosts: host name of each rank.
        facts: each rank's facts, by name; a fact is a value or a dict of values.
    """
    for name in facts[0]:
        by_rank = [fact[name] for fact in facts]
        keys = by_rank[0] if isinstance(by_rank[0], dict) else [""]
        for key in keys:
            values = [str(value[key] if key else value) for value in by_rank]
            usual = Counter(values).most_common(1)[0][0]
            for value in dict.fromkeys(values):
                odd = sorted({host for host, other in zip(hosts, values, strict=True) if other == value})
                if value != usual:
                    first = hosts[values.index(usual)]
                    which = f"{key} " if key else ""
                    yield f"{', '.join(odd)}: {name} differ from {first}'s ({which}{value:.16} and {usual:.16})"


def digest_of_sources(root: Path) -> str:
    """Return the SHA-256 of all source files that a rank runs, as hex digits."""
    digest = hashlib.sha256()
    for part in ("balanced_adam", "train"):
        for file in sorted((root / part).rglob("*")):
            if file.suffix in (".py", ".h", ".cpp", ".cu"):
                digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def check_folders(ranks: Ranks, run: Run) -> str:
    """Check that this rank can write to its folders, and that the run's folder is shared.

    Rank 0 has to see the files of all other ranks, and each of them the file of rank 0.

    Returns:
        What is wrong; empty if nothing is.
    """
    token = ranks.broadcast(f"{time.time_ns()}")
    meeting, cache = run.out / ".preflight" / token, run.data.data_cache.expanduser()
    unwritable = ""
    for my_turn in (ranks.is_main, not ranks.is_main):  # rank 0 goes first and makes the folder
        for place in (meeting, cache) if my_turn else ():
            try:
                place.mkdir(parents=True, exist_ok=True)
                file = place / f"{token}-{ranks.rank}"
                file.write_text(token)
                if place == cache:
                    file.unlink()
            except OSError as error:
                unwritable = unwritable or f"{place} can't be written to ({error.strerror})"
        dist.barrier()
    expected = range(ranks.world) if ranks.is_main else [0]
    until = time.monotonic() + SEEN_WITHIN
    unseen = [*expected]
    while unseen and time.monotonic() < until:
        unseen = [rank for rank in unseen if not (meeting / f"{token}-{rank}").is_file()]
        time.sleep(0.05 if unseen else 0.0)
    names = ", ".join(map(str, unseen[:4]))
    unshared = f"{run.out} is not shared: what rank {names} wrote there is not visible" if unseen else ""
    return " and ".join(filter(None, (unwritable, unshared)))


def complaint(check: Callable[[], str]) -> str:
    """Return a check's result, or the message of the error it raises, such as that of a broken GPU."""
    try:
        return check()
    except (OSError, RuntimeError) as error:
        if is_lost(error):
            raise
        return first_line(error)


def check_disk(run: Run, parameters: int) -> str:
    """Check that the disk has room for the checkpoints that are kept and the one being written.

    Returns:
        What is wrong; empty if nothing is.
    """
    there = sum(f.stat().st_size for f in (run.out / "checkpoints").rglob("*") if f.is_file())
    needed = (run.checkpoints.keep + 1) * checkpoint_bytes(run.optimizer.optimizer) * parameters - there
    with suppress(OSError):
        free = shutil.disk_usage(run.out).free
        if free < needed:
            return (
                f"the disk of {run.out} has {free / 1e9:.1f} GB free, "
                f"and the checkpoints need {needed / 1e9:.1f} GB more"
            )
    return ""


def measure_all_reduce(ranks: Ranks) -> tuple[float, str]:
    """Measure an all-reduce and check its sums.

    Returns:
        The bus bandwidth in bytes per second, 2 (n - 1) / n times the bytes over the time, best of three; and what is
        wrong, empty if nothing is.
    """
    fastest, exact = float("inf"), True
    for _ in range(3):
        numbers = torch.full((ELEMENTS,), float(ranks.rank + 1), device=ranks.device)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(numbers)
        exact &= bool((numbers == ranks.world * (ranks.world + 1) // 2).all())  # waits for the GPU, too
        fastest = min(fastest, time.perf_counter() - began)
    wrong = "" if exact else f"an all-reduce of known numbers gave wrong sums on rank {ranks.rank}"
    return 2 * (ranks.world - 1) / ranks.world * 4 * ELEMENTS / fastest, wrong


def check_clocks(ranks: Ranks, hosts: Hosts, wrong: list[str]) -> float:
    """Return the greatest difference of the ranks' clocks in seconds, and add a message to ``wrong`` per bad host."""
    dist.barrier()
    clocks = ranks.gather(time.time())
    middle = sorted(clocks)[len(clocks) // 2]
    far = {host for host, clock in zip(hosts, clocks, strict=True) if abs(clock - middle) > SKEW}
    wrong += [f"{host}: its clock is more than {SKEW:.0f} s away from the others'" for host in sorted(far)]
    return max(clocks) - min(clocks)


def gpu_name(device: torch.device) -> str:
    """Return the GPU's model name, or "none" on CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "none"


def check_gpu(device: torch.device) -> str:
    """Check that this rank's GPU computes correctly and is free.

    Returns:
        What is wrong; empty if nothing is, or there is no GPU.
    """
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    if free < 0.9 * total:
        return f"{device} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free; another process is on it"
    square = (torch.arange(2048 * 2048, device=device).view(2048, 2048) % 7).float()
    exact = torch.equal((square @ square).cpu(), square.cpu() @ square.cpu())  # sums of small integers are exact
    return "" if exact else f"{device} multiplies matrices wrongly"
