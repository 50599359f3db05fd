"""Before a run: are all hosts fit for it? ``LAUNCHER -m train.preflight ...`` takes what train.pretrain takes.

Every rank takes part; what is wrong is said in one sentence that names the host, before the first step is paid for.
Plain ``python -m train.preflight --ranks N ...`` checks settings, data and model alone, for N ranks.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from balanced_adam import kernels
from train import checkpoints, data, deepspeed_config, folder, model
from train.ranks import Ranks, leave, prepare_environment, start
from train.settings import REPOSITORY, RankError, Run, SettingsError, first_line, parse
from train.watch import is_lost

TIMEOUT = 60.0  # seconds for the ranks to meet, and for any collective here
SEEN_WITHIN = 10.0  # seconds in which one host has to see another's file
SKEW = 5.0  # seconds that the clocks may be apart: file times and logs are compared across hosts
ELEMENTS = 2**22  # float32 numbers in the all-reduce: 16 MiB

Hosts = list[str]
"""Host name of each rank."""


@dataclass(frozen=True, kw_only=True)
class Preflight(Run):
    """What train.pretrain will get, and on how many ranks."""

    ranks: int | None = None
    """Check settings, data and model alone, for a run on so many ranks."""


def preflight(run: Preflight) -> str:
    """Check everything; what was found, for the user.

    Raises:
        SettingsError: on all ranks, with one sentence for each thing that is wrong.
    """
    began = time.monotonic()
    run.check()
    gpus = torch.cuda.is_available()
    ranks = start(TIMEOUT)
    with ranks.watch.guard():
        with ranks.together():
            ds_config = deepspeed_config.resolve(run, run.ranks or ranks.world, gpus)
            if ranks.first:
                folder.check(run)
            tokenizer = data.load_tokenizer(run.data.tokenizer)
            config = model.configuration(run.model, len(tokenizer), run.data.sequence_length)
        # One rank on each host: where the text has never been read, that may take long.
        read: list[str] = []
        job = (lambda: read.append(data.fingerprint(run.data, tokenizer))) if ranks.local_rank == 0 else None
        ranks.wait_for(job)
        of_hosts = {host: text for host, text in ranks.gather((platform.node(), read[0] if read else "")) if text}
        text = of_hosts.get(platform.node(), "")
        if run.ranks is not None:
            return f"preflight: settings, text and model are right for {run.ranks} ranks."
        facts = {
            "Python and packages": {"python": sys.version.split()[0], **folder.environment()["packages"]},
            "code of train/ and balanced_adam/": _digest(REPOSITORY),
            "settings": hashlib.sha256(json.dumps([run.identity(), ds_config], sort_keys=True).encode()).hexdigest(),
            "text and tokenizer": text,
            "kernels": kernels.why_not(ranks.device) or "found",
            "GPUs": _gpu_name(ranks.device),
        }
        hosts = ranks.gather(platform.node())
        wrong = [*_different(hosts, ranks.gather(facts))]
        with torch.device("meta"):
            parameters = model.parameter_count(model.empty(config))
        speed, wrong_sum = _all_reduce(ranks)
        checks: list[Callable[[], str]] = [
            lambda: wrong_sum,
            lambda: _folders(ranks, run),
            lambda: _disk(run, parameters) if ranks.first else "",
            lambda: _gpu(ranks.device),
        ]
        for check in checks:
            wrong += [f"{hosts[rank]}: {said}" for rank, said in enumerate(ranks.gather(_said(check))) if said]
        skew = _clocks(ranks, hosts, wrong)
        with ranks.together():
            if ranks.first:
                shutil.rmtree(run.out / ".preflight", ignore_errors=True)
                if wrong:
                    raise SettingsError("; ".join(dict.fromkeys(wrong)) + ".")
        ranks.watch.end()
    what = f"{ranks.world} {'ranks' if ranks.world > 1 else 'rank'} on {len(set(hosts))} host{'s' * (len(set(hosts)) > 1)}, {parameters / 1e6:.1f} M parameters"
    network = f"all-reduce {speed / 1e9:.2f} GB/s, clocks within {skew:.3f} s; " if ranks.world > 1 else ""
    return f"preflight: {what}; {network}nothing wrong found in {time.monotonic() - began:.0f} s."


def _different(hosts: Hosts, facts: list[dict[str, Any]]) -> Iterator[str]:
    """A sentence for each fact that isn't the same on all ranks, naming the hosts that differ from most."""
    for name in facts[0]:
        told = [fact[name] for fact in facts]
        keys = told[0] if isinstance(told[0], dict) else [""]
        for key in keys:
            values = [str(value[key] if key else value) for value in told]
            usual = Counter(values).most_common(1)[0][0]
            for value in dict.fromkeys(values):
                odd = sorted({host for host, other in zip(hosts, values, strict=True) if other == value})
                if value != usual:
                    first = hosts[values.index(usual)]
                    yield f"{', '.join(odd)}: {name} differ from {first}'s ({key + ' ' if key else ''}{value:.16} and {usual:.16})"


def _digest(root: Path) -> str:
    """Of all sources that a rank runs."""
    digest = hashlib.sha256()
    for part in ("balanced_adam", "train"):
        for file in sorted((root / part).rglob("*")):
            if file.suffix in (".py", ".h", ".cpp", ".cu"):
                digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _folders(ranks: Ranks, run: Run) -> str:
    """Whether this rank can write where it must, and sees what rank 0 wrote into the run's folder, and rank 0 what it wrote."""
    token = ranks.from_first(f"{time.time_ns()}")
    meeting, cache = run.out / ".preflight" / token, run.data.data_cache.expanduser()
    said = ""
    for my_turn in (ranks.first, not ranks.first):  # rank 0 first, which makes the folder
        for place in (meeting, cache) if my_turn else ():
            try:
                place.mkdir(parents=True, exist_ok=True)
                file = place / f"{token}-{ranks.rank}"
                file.write_text(token)
                if place == cache:
                    file.unlink()
            except OSError as error:
                said = said or f"{place} can't be written to ({error.strerror})"
        dist.barrier()
    expected = range(ranks.world) if ranks.first else [0]
    until = time.monotonic() + SEEN_WITHIN
    unseen = [*expected]
    while unseen and time.monotonic() < until:
        unseen = [rank for rank in unseen if not (meeting / f"{token}-{rank}").is_file()]
        time.sleep(0.05 if unseen else 0.0)
    names = ", ".join(map(str, unseen[:4]))
    unshared = f"{run.out} is not shared: what rank {names} wrote there is not to be seen" if unseen else ""
    return " and ".join(filter(None, (said, unshared)))


def _said(check: Callable[[], str]) -> str:
    """What a check says, or the error that it runs into, such as that of a broken GPU."""
    try:
        return check()
    except (OSError, RuntimeError) as error:
        if is_lost(error):
            raise
        return first_line(error)


def _disk(run: Run, parameters: int) -> str:
    """Room for as many checkpoints as are kept and the one on the way."""
    there = sum(f.stat().st_size for f in (run.out / "checkpoints").rglob("*") if f.is_file())
    needed = (run.checkpoints.keep + 1) * checkpoints.BYTES_PER_PARAMETER * parameters - there
    with suppress(OSError):
        free = shutil.disk_usage(run.out).free
        if free < needed:
            return f"the disk of {run.out} has {free / 1e9:.1f} GB free, and the checkpoints need {needed / 1e9:.1f} GB more"
    return ""


def _all_reduce(ranks: Ranks) -> tuple[float, str]:
    """Bus bandwidth in bytes per second, best of three (2 (n-1)/n times the bytes, over the time), and what is wrong."""
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


def _clocks(ranks: Ranks, hosts: Hosts, wrong: list[str]) -> float:
    """Seconds that the clocks are apart at most."""
    dist.barrier()
    clocks = ranks.gather(time.time())
    middle = sorted(clocks)[len(clocks) // 2]
    far = {host for host, clock in zip(hosts, clocks, strict=True) if abs(clock - middle) > SKEW}
    wrong += [f"{host}: its clock is more than {SKEW:.0f} s away from the others'" for host in sorted(far)]
    return max(clocks) - min(clocks)


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "none"


def _gpu(device: torch.device) -> str:
    """Whether this rank's GPU computes rightly and is free."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    if free < 0.9 * total:
        return f"{device} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free; another process is on it"
    square = (torch.arange(2048 * 2048, device=device).view(2048, 2048) % 7).float()
    exact = torch.equal((square @ square).cpu(), square.cpu() @ square.cpu())  # sums of small integers are exact
    return "" if exact else f"{device} multiplies matrices wrongly"


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code: 0, or 2 if something is wrong."""
    try:
        prepare_environment()
        found = preflight(
            parse(Preflight, sys.argv[1:] if arguments is None else arguments, "train.preflight", __doc__)
        )
        if dist.get_rank() == 0:
            print(found, flush=True)
    except SettingsError as error:
        if not dist.is_initialized() or dist.get_rank() == 0 or isinstance(error, RankError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    leave(main())
