"""A fire drill: a run on two hosts is killed or hangs again and again, and ends with the bits of an undisturbed one.

``python -m tests.fault_injection --faults 50 --seed 0``. As root each rank has a host of its own
(tests/cluster/hosts.py), whose plug can be pulled; otherwise both ranks share this machine, and no host crashes.
Everything done is in drill.jsonl.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pandas as pd
import psutil
import tyro

from tests.cluster.hosts import Cluster, why_not
from tests.cluster.runs import losses, same
from tests.corpus import write_corpus
from tests.ranks import LIMIT, Program, Started
from tests.ranks import environment as clean_environment
from tests.ranks import start as start_program
from train.checkpoint.manifest import newest_step
from train.common.files import REPOSITORY
from train.distributed.launch import free_port
from train.run import run_dir

FAULTY_RANK = "tests.fault_injection.faulty_rank"
# Where a rank is killed, or hangs: how often it may have been there before in this attempt, and whether rank 0 alone
# comes there.
MOMENTS = {
    "tokenizing": (1, True),
    "forward": (60, False),
    "backward": (60, False),
    "all-reduce": (150, False),
    "step": (60, False),
    "metrics": (60, True),
    "verifying": (2, False),
    "loading": (1, False),
    "saving": (6, False),
    "finishing": (4, True),
    "rotation": (4, True),
    "removing": (8, True),
    "result": (2, True),
}
HANGS = ("forward", "backward", "all-reduce", "step", "metrics", "saving", "finishing")
"""Where a rank may hang: in a step, in a collective, in a save."""
STEPS_PER_FAULT, SAVE_EVERY, TIMEOUT = 60, 15, 20
KILL_WAIT = 15.0
"""Seconds between a launcher's failure and the end of ranks that are stopped."""


@dataclass(frozen=True, kw_only=True)
class Drill:
    """How long, and where."""

    faults: int = 50
    """How many times something is killed or hangs."""
    seed: int = 0
    """Decides what is killed, and when."""
    out: Path | None = None
    """A folder for the run, its undisturbed twin and the log. Default: a new one in /tmp."""


class Machine:
    """Starts a run of two ranks, on two hosts or on this machine, and kills parts of it.

    Args:
        cluster: the hosts; None for this machine.
        forked: fork the ranks from a process that has imported everything, in place of torchrun: a start takes two
            seconds, not twenty.
    """

    def __init__(self, cluster: Cluster | None, *, forked: bool = False) -> None:
        self.cluster, self.forked = cluster, forked
        self.launchers: list[subprocess.Popen[bytes] | Started] = []
        self.log = Path(os.devnull)
        self.failed: float | None = None

    def start(self, out: Path, options: list[str], fault: str = "") -> None:
        """Start it. ``fault``: see tests/fault_injection/faulty_rank.py."""
        hosts = 2 if self.cluster else 1
        head, port = ("node1", random.randrange(20000, 30000)) if self.cluster else ("127.0.0.1", free_port())
        log = self.log = out.with_suffix(".log")
        self.failed = None
        environment = {"FAULT": fault, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        if self.forked:
            arguments = ["--out", str(out), *options]
            program = Program(FAULTY_RANK, arguments, clean_environment(**environment), log, 2, grace=5.0)
            self.launchers = [start_program(program)]
            return
        self.launchers = []
        for number in range(hosts):
            line = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={hosts}", f"--node-rank={number}"]
            # Else a launcher waits ten minutes for one that was killed before they met; srun ends it at once.
            line += [
                "--rdzv-conf=timeout=60",
                f"--nproc-per-node={2 // hosts}",
                f"--master-addr={head}",
                f"--master-port={port}",
            ]
            line += ["-m", FAULTY_RANK, "--out", str(out), *options]
            if self.cluster:
                self.launchers.append(
                    self.cluster.nodes[number].start(*line, log=log, GLOO_SOCKET_IFNAME="eth0", **environment)
                )
            else:
                with log.open("ab") as file:
                    more = {**os.environ, **environment}
                    self.launchers.append(subprocess.Popen(line, stdout=file, stderr=file, env=more, cwd=REPOSITORY))

    def running(self) -> bool:
        """Whether any launcher is. When one has failed, ranks that are stopped are killed on the other hosts.

        ``srun --kill-on-bad-exit`` would do that, torchrun doesn't: the launcher of such a rank waits for ever. What is
        not stopped has to end by itself.
        """
        codes = [launcher.poll() for launcher in self.launchers]
        if self.failed is None and any(codes):
            self.failed = time.monotonic()
        if self.failed is not None and time.monotonic() > self.failed + KILL_WAIT:
            for each in self._processes():
                with suppress(psutil.NoSuchProcess):
                    if each.status() == psutil.STATUS_STOPPED:
                        each.kill()
        return None in codes

    def watch(self, watch: Stopwatch, until: Callable[[], bool] = lambda: False) -> None:
        """Wait until the run ends, or ``until`` holds.

        Raises:
            TimeoutError: if neither comes within ``LIMIT`` seconds. It says what each process is doing; then all of
                them are killed.
        """
        latest = time.monotonic() + LIMIT
        while self.running() and not until():
            watch.look()
            time.sleep(0.05)
            if time.monotonic() > latest:
                raise TimeoutError(f"the run neither ends nor goes on, {LIMIT:.0f} s after its start:\n{self._dump()}")

    def _processes(self) -> list[psutil.Process]:
        """The launchers that are left, and all that they have started."""
        found = []
        for launcher in self.launchers:
            if launcher.poll() is not None:
                continue
            with suppress(psutil.NoSuchProcess):
                top = psutil.Process(launcher.pid)
                found += [top, *top.children(recursive=True)]
        return found

    def _dump(self) -> str:
        """State and system calls of each process of the run, and the end of its log; then kill them all."""
        lines, processes = [], self._processes()
        for each in processes:
            with suppress(psutil.NoSuchProcess, OSError):
                lines.append(f"{each.pid} {each.status()} {' '.join(each.cmdline())[:200]}")
                for thread in sorted(Path(f"/proc/{each.pid}/task").iterdir()):
                    doing = [(thread / name).read_text().strip() for name in ("comm", "wchan", "syscall")]
                    lines.append(f"  {thread.name} {' '.join(doing)}")
                if FAULTY_RANK in each.cmdline():
                    each.send_signal(signal.SIGUSR2)  # it prints its stacks, unless it is stopped
        time.sleep(2.0)
        for each in processes:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        return "\n".join([*lines, self.log.read_text(errors="replace")[-8000:]])

    def kill_launcher(self, number: int) -> None:
        """kill -9 of one launcher, not of its ranks."""
        if self.forked:
            self.launchers[0].kill()
            return
        process = psutil.Process(self.launchers[number % len(self.launchers)].pid)
        for child in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                if "torch.distributed.run" in child.cmdline() and "nsenter" not in child.cmdline()[0]:
                    child.kill()

    def crash(self, number: int) -> None:
        """Pull the plug of a host."""
        assert self.cluster
        self.cluster.crash(self.cluster.nodes[number])

    def wait(self, seconds: float) -> list[int]:
        """The exit codes of the launchers, when no process of the run is left."""
        until = time.monotonic() + seconds
        while self.running() or self._has_ranks():
            if time.monotonic() > until:
                raise TimeoutError(f"the run is not over after {seconds:.0f} s:\n{self._dump()}")
            time.sleep(0.1)
        return [launcher.wait() for launcher in self.launchers]

    def _has_ranks(self) -> bool:
        if self.forked:  # they are the launcher's session
            with suppress(ProcessLookupError):
                os.killpg(self.launchers[0].pid, 0)
                return True
            return False
        return any(FAULTY_RANK in " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))

    def repair(self) -> None:
        """Boot whatever is down."""
        for node in self.cluster.nodes if self.cluster else []:
            if node.holder is None:
                assert self.cluster
                self.cluster.revive(node)


class Stopwatch:
    """Seconds that each fault has cost: from the last step before it to the first one beyond, in whichever attempt."""

    def __init__(self, run: Path) -> None:
        self.file, self.log = run / "metrics.jsonl", run.with_name("drill.jsonl")
        self.pending: list[tuple[dict[str, Any], int, float]] = []

    @property
    def lines(self) -> int:
        """How many lines metrics.jsonl has now."""
        return self.file.read_bytes().count(b"\n") if self.file.exists() else 0

    def start(self, fault: dict[str, Any], began: float) -> None:
        """After an attempt that ``began`` then has ended with this fault."""
        with self.log.open("a") as log:
            log.write(json.dumps(fault) + "\n")
        since = max(began, self.file.stat().st_mtime) if self.file.exists() else began
        self.pending.append((fault, self.lines, since))

    def look(self) -> None:
        """Note which faults are made up for by now, in drill.jsonl too."""
        lines, now = self.lines, time.time()
        for fault, reached, since in self.pending:
            if lines > reached:
                fault["seconds lost"] = round(now - since, 1)
                with self.log.open("a") as log:
                    log.write(json.dumps({"made up for": fault}) + "\n")
        self.pending = [each for each in self.pending if "seconds lost" not in each[0]]


@contextmanager
def machine() -> Iterator[Machine]:
    if why_not() is not None:
        print(f"No hosts of their own for the ranks: {why_not()}", flush=True)
        yield Machine(None)
        return
    cluster = Cluster(Path("/tmp/balanced_adam_drill"), slurm=False)
    try:
        yield Machine(cluster)
    finally:
        cluster.close()


def drill(settings: Drill, on: Machine) -> pd.DataFrame:
    """What was done, and the seconds that each fault has cost.

    Raises:
        AssertionError: if the run doesn't end with the bits of the undisturbed one.
    """
    out = settings.out or Path(mkdtemp(prefix="drill-"))
    out.mkdir(parents=True, exist_ok=True)
    draw = random.Random(settings.seed)
    steps = STEPS_PER_FAULT * settings.faults
    text = f"--steps {steps} --warmup 5 --batch 4 --sequence-length 32 --validation-fraction 0.2 --validate-every 0"
    options = [*text.split(), "--save-every", str(SAVE_EVERY), "--timeout", str(TIMEOUT)]
    options += ["--data", str(write_corpus(out / "corpus"))]
    twin, run = out / "undisturbed", out / "run"
    on.start(twin, [*options, "--data-cache", str(out / "cache-of-twin")])
    assert on.wait(1800) == [0] * len(on.launchers), (out / "undisturbed.log").read_text()[-3000:]
    options += ["--data-cache", str(out / "cache")]
    done: list[dict[str, Any]] = []
    attempts, watch = 0, Stopwatch(run)
    while len(done) < settings.faults and run_dir.result(run) is None:
        attempts += 1
        assert attempts <= 3 * settings.faults, "most attempts end before their fault"
        began = time.time()
        fault = attempt(on, draw, run, options, watch)
        if fault:
            done.append(fault)
            watch.start(fault, began)
            print(f"{len(done)}/{settings.faults} {fault}", flush=True)
    on.start(run, options)
    on.watch(watch)
    assert on.wait(1800) == [0] * len(on.launchers), (out / "run.log").read_text()[-3000:]
    assert same(run, twin), "the bits are not those of the undisturbed run"
    assert len(losses(run)) == steps
    print(
        f"{len(done)} faults in {attempts} attempts, {steps} steps: the bits of the undisturbed run. {out}", flush=True
    )
    return pd.DataFrame(done)


def attempt(on: Machine, draw: random.Random, run: Path, options: list[str], watch: Stopwatch) -> dict[str, Any] | None:
    """One start of the run, and what was done to it; None if it ended before that."""
    kinds = ["rank"] * 6 + ["hung rank"] * 2 + ["launcher"] * 2 + ["host"] * 2 * bool(on.cluster)
    kind, rank = draw.choice(kinds), draw.randrange(2)
    moment = draw.choice(HANGS if kind == "hung rank" else list(MOMENTS))
    most, first_alone = MOMENTS[moment]
    count = draw.randint(1, most)
    seconds, steps = draw.uniform(0.0, 8.0), draw.randint(0, 60)
    before = watch.lines
    if kind in ("rank", "hung rank"):
        rank = 0 if first_alone else rank
        if moment == "tokenizing":
            shutil.rmtree(options[options.index("--data-cache") + 1], ignore_errors=True)
        on.start(run, options, f"{rank} {moment} {count} {'kill' if kind == 'rank' else 'stop'}")
        at = f"{moment} no. {count}"
        on.watch(watch, lambda: watch.lines >= before + 2 * STEPS_PER_FAULT)
        if on.running():  # it never came to that moment so often
            kind, at = "launcher", "any time"
            on.kill_launcher(rank)
    else:
        on.start(run, options)
        # Half of the time while it starts, half of the time while it trains.
        until = time.monotonic() + (seconds if draw.random() < 0.5 else 60.0)
        on.watch(watch, lambda: time.monotonic() > until or watch.lines > before + steps)
        at = "any time"
        (on.kill_launcher if kind == "launcher" else on.crash)(rank)
    codes = on.wait(600)
    watch.look()
    on.repair()
    if 0 in codes and run_dir.result(run):
        return None
    assert all(codes), f"a launcher of a run that was killed ended with 0: {codes}"
    step = newest_step(run / "checkpoints")
    return {"fault": kind, "rank or host": rank, "at": at, "saved step": step}


def main() -> None:
    """Run it and print what was survived."""
    with machine() as on:
        table = drill(tyro.cli(Drill, description=__doc__), on)
    table["at"] = table["at"].str.replace(r" no\. \d+", "", regex=True)
    lost = table.groupby(["fault", "at"])["seconds lost"].agg(["size", "median", "max"])
    print(
        lost.rename(columns={"size": "times", "median": "seconds lost", "max": "at most"})
        .reset_index()
        .to_string(index=False)
    )
    print(f"seconds lost in all: {table['seconds lost'].sum():.0f}, in a fault {table['seconds lost'].median():.1f}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main()
