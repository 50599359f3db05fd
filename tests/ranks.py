"""Starts the ranks of tests: forked from a server that has imported everything, which takes a tenth of a fresh start.

A forked rank has the environment that a launcher would give it, and its own process group, threads and random numbers.
What it shares with the others, as fresh ones don't, is the seed of Python's hashes. ``fresh`` ranks are started by
torchrun: where there are GPUs, since CUDA can't be forked, and in benchmarks.
"""

from __future__ import annotations

import atexit
import os
import pickle
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Client, Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, NoReturn
from weakref import WeakSet

import numpy as np
import torch
from filelock import FileLock

from tests import forkserver, session
from train.common.files import REPOSITORY
from train.distributed.launch import free_port
from train.sweep.launch import RANK_VARIABLES

LIMIT = 900.0
"""Seconds that ranks may take, ten times what any test needs on a usual machine: for what hangs, not what is slow."""


class Program(NamedTuple):
    """What each rank runs: ``python -m module arguments``."""

    module: str
    arguments: list[str]
    environment: dict[str, str]
    log: Path
    """What all ranks write goes there."""
    world: int | None
    """Number of ranks; None for plain python, without a launcher."""
    folder: Path = REPOSITORY
    """The current directory."""
    grace: float = 30.0
    """Seconds that the other ranks have to end after one has failed; by default torchrun's."""


class Started:
    """A program that runs."""

    def __init__(self, pid: int, log: Path, poll: Callable[[], int | None]) -> None:
        """``poll``: the exit code, negative for a signal; None while it runs."""
        self.pid, self.log, self.poll = pid, log, poll
        _STARTED.add(self)

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self.poll()

    def said(self) -> str:
        """What all ranks have written up to now."""
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = LIMIT) -> int:
        """The exit code, once it has ended.

        Raises:
            TimeoutError: if it hasn't within ``seconds``; then it is killed.
        """
        until = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                self.end()
                raise TimeoutError(f"it has not ended within {seconds:.0f} s:\n{self.said()[-6000:]}")
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        """To the launcher, or to the one rank that has none; to nobody if it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """The launcher, or the one rank, alone."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def end(self) -> None:
        """Kill all of it."""
        while True:  # a forked program may not have its session yet
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            if self.poll() is not None:
                return
            time.sleep(0.01)


_STARTED: WeakSet[Started] = WeakSet()


@atexit.register
def end_all() -> None:
    """Kill whatever still runs."""
    for each in list(_STARTED):
        each.end()


def start(program: Program, *, fresh: bool = False) -> Started:
    """Start the ranks of a program, in a session of their own."""
    if fresh or torch.cuda.is_available():
        launcher = []
        if program.world is not None:
            launcher = ["torch.distributed.run", "--nproc-per-node", str(program.world)]
            launcher += ["--master-port", str(free_port()), "-m"]
        return popen([sys.executable, "-m", *launcher, program.module, *program.arguments], program)
    client = Client(str(_server()), "AF_UNIX")
    client.send((_begin, program))
    return Started(client.recv(), program.log, _exit_code_from(client))


def popen(line: list[str], program: Program) -> Started:
    """Start a command line instead of the program's module."""
    with program.log.open("ab") as log:
        process = subprocess.Popen(
            line,
            cwd=program.folder,
            env=program.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Started(process.pid, program.log, process.poll)


class Forking(subprocess.Popen):
    """``subprocess.Popen`` that forks what it can: plain python and torchrun, when they start a module of train/."""

    def __new__(cls, line: Any, **more: Any) -> Any:
        words = [str(word) for word in line] if isinstance(line, list) else []
        if words[1:3] == ["-m", "torch.distributed.run"] and words[3::2][:2] == ["--nproc-per-node", "--master-port"]:
            world, words = int(words[4]), words[6:]
        else:
            world = None
        if words[1:2] != ["-m"] or not words[2].startswith("train."):
            return super().__new__(cls)
        log = next((file for file in (more.get("stdout"), more.get("stderr")) if hasattr(file, "fileno")), None)
        path = Path(f"/proc/{os.getpid()}/fd/{log.fileno()}") if log else Path(os.devnull)
        if path.resolve().exists():  # else it has no name any more, and can be reached as long as it is open
            path = path.resolve()
        settings = dict(os.environ if more.get("env") is None else more["env"])
        return start(Program(words[2], words[3:], settings, path, world, Path(more.get("cwd") or Path.cwd())))


def _exit_code_from(client: Connection) -> Callable[[], int | None]:
    code: int | None = None

    def poll() -> int | None:
        nonlocal code
        if code is None and client.poll():
            try:
                code = client.recv()
            except EOFError:
                code = 255  # the fork server has gone, and its children with it
            client.close()
        return code

    return poll


def _server() -> Path:
    """The socket of the session's fork server, which is started by whoever needs it first."""
    socket = session.folder() / "forkserver"
    with FileLock(f"{socket}.lock"):
        if not socket.exists():
            # What libraries read while they are imported; the last keeps pyarrow's allocator from starting a thread.
            allocator = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
            settings = environment(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", **allocator)
            log = socket.with_suffix(".log")
            line = [sys.executable, "-m", "tests.forkserver", str(socket)]
            server = popen(line, Program("", [], settings, log, None))
            _STARTED.discard(server)  # it ends with the session's folder
            while not socket.exists():
                if server.poll() is not None:
                    raise RuntimeError(f"the fork server could not start:\n{server.said()}")
                time.sleep(0.05)
    return socket


def environment(**more: str) -> dict[str, str]:
    """This process's, without what a launcher around it may have said."""
    kept = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    path = os.pathsep.join(filter(None, (str(REPOSITORY), kept.get("PYTHONPATH"))))
    return {**kept, "PYTHONPATH": path, **more}


# ---- In children of the fork server.


def end_with(function: Callable[..., None], *arguments: Any) -> NoReturn:
    """End this process as Python would after this call, but without the finalization, which is the parent's."""
    code = 1
    try:
        function(*arguments)
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _begin(program: Program) -> None:
    """Be plain python, or the launcher of several ranks, which are forked from here."""
    os.setsid()
    with program.log.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    forkserver.check(os.getppid())
    if program.world is None:
        _run(program, {})
        return
    world = str(program.world)
    common = {  # as torchrun has them: tests/test_ranks.py
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), world),
        **{"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "ROLE_NAME": "default"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
        **{"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"},
        **{"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"},
        "OMP_NUM_THREADS": program.environment.get("OMP_NUM_THREADS", "1"),
    }
    ranks: dict[int, int] = {}
    for rank in range(program.world):
        numbers = dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(rank))
        if (child := os.fork()) == 0:
            end_with(_run, program, common | numbers)
        ranks[child] = rank
    # Where the ranks meet: with the launcher, as torchrun's. It has threads, so it comes after the forks.
    port = int(common["MASTER_PORT"])
    meeting = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, is_master=True, wait_for_workers=False
    )
    code = _launch(ranks, program.grace)
    del meeting
    sys.exit(code)


def _run(program: Program, numbers: dict[str, str]) -> None:
    """``python -m module arguments``, with a rank's numbers in the environment. What it starts is forked, too."""
    os.environ.clear()
    os.environ.update(program.environment | numbers)
    os.chdir(program.folder)
    sys.path[0] = str(program.folder)
    sys.argv = [program.module, *program.arguments]
    import deepspeed.ops

    # Else the first engine on CPU compiles an op that DeepSpeed's inference alone uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.seed()  # a process begins with random ones; Python's own come anew after a fork
    np.random.seed()
    subprocess.Popen = Forking  # type: ignore[misc, assignment]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    runpy.run_module(program.module, run_name="__main__", alter_sys=True)


def _launch(ranks: dict[int, int], grace: float) -> int:
    """Wait for all ranks; the exit code. After a failure the others are asked to end, and killed after the grace."""
    code, until = 0, float("inf")

    def send(number: int) -> None:
        for child in ranks:
            os.kill(child, number)

    def asked(number: int, _: object) -> None:
        nonlocal code, until
        code, until = code or 128 + number, min(until, time.monotonic() + grace)
        send(number)

    signal.signal(signal.SIGTERM, asked)
    while ranks:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            rank, ended = ranks.pop(child), os.waitstatus_to_exitcode(status)
            if ended and not code:
                print(f"rank {rank} ended with {ended}", file=sys.stderr, flush=True)
                code, until = ended if ended > 0 else 128 - ended, time.monotonic() + grace
                send(signal.SIGTERM)
        elif time.monotonic() > until:
            send(signal.SIGKILL)
        time.sleep(0 if child else 0.01)
    return code


# ---- Jobs: a function on each rank, in one process group.


def device(world: int) -> str:
    """``cuda`` where every rank has a GPU of its own, or two ranks share one; otherwise ``cpu``."""
    gpus = torch.cuda.device_count()
    return "cuda" if gpus >= world or (gpus == 1 and world == 2) else "cpu"


def backend(world: int) -> str:
    """NCCL, which refuses two ranks on one GPU, or gloo."""
    return "nccl" if torch.cuda.device_count() >= world else "gloo"


def spawn(
    job: Callable[[Any], Any], world: int, argument: Any, seconds: float = LIMIT, *, fresh: bool = False
) -> list[Any]:
    """What ``job(argument)`` returned on each of ``world`` ranks. A job is a module-level function; it is sent by name.

    Raises:
        RuntimeError: if a rank failed or the time is over, with the end of the ranks' output.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job").write_bytes(pickle.dumps((job, argument)))
        settings = environment(
            LOCAL_SIZE=str(world),
            OMP_NUM_THREADS="1",
            # Nothing is compiled, and nothing outside the folder is written.
            TORCH_EXTENSIONS_DIR=os.environ.get("TORCH_EXTENSIONS_DIR", f"{folder}/extensions"),
            DS_ACCELERATOR=device(world),
            TRANSFORMERS_VERBOSITY="error",
        )
        program = Program("tests.job", [str(folder)], settings, folder / "log", world, folder, grace=0.0)
        started = start(program, fresh=fresh)
        if started.wait(seconds):
            raise RuntimeError(
                f"{job.__name__} on {world} ranks ended with {started.poll()}:\n{started.said()[-6000:]}"
            )
        return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(world)]
