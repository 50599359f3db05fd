"""One spawn of several ranks: each runs the same job in one process group, under a time-out.

``spawn(job, world, argument)`` starts ``python -m tests.parity.worker`` once per rank and returns what each rank's job
returned. A job is a module-level function of one argument; it is sent by name.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from train.ranks import free_port, leave
from train.settings import REPOSITORY

SECONDS = 240.0  # below pytest's own time-out, so that the ranks' own errors are seen


def device(world: int) -> str:
    """``cuda`` where every rank has a GPU of its own, or two ranks share one; otherwise ``cpu``."""
    gpus = torch.cuda.device_count()
    return "cuda" if gpus >= world or (gpus == 1 and world == 2) else "cpu"


def backend(world: int) -> str:
    """NCCL, which refuses two ranks on one GPU, or gloo."""
    return "nccl" if torch.cuda.device_count() >= world else "gloo"


def environment(world: int, folder: str) -> dict[str, str]:
    """The environment that all ranks share: nothing is compiled, and nothing outside the folder is written."""
    extra = {
        "WORLD_SIZE": str(world),
        "LOCAL_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", f"{folder}/extensions"),
        "DS_ACCELERATOR": device(world),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
        "TRANSFORMERS_VERBOSITY": "error",
    }
    return {**os.environ, **extra}


def spawn(job: Callable[[Any], Any], world: int, argument: Any, seconds: float = SECONDS) -> list[Any]:
    """What ``job(argument)`` returned on each of ``world`` ranks.

    Raises:
        RuntimeError: if a rank failed or the time is over, with the end of the ranks' output.
    """
    with TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "job").write_bytes(pickle.dumps((job.__module__, job.__name__, argument)))
        common = environment(world, folder)
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(world):
                with (base / f"log{rank}").open("wb") as log:
                    command = [sys.executable, "-m", "tests.parity.worker", folder]
                    numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    ranks.append(
                        subprocess.Popen(command, env=common | numbers, cwd=base, stdout=log, stderr=subprocess.STDOUT)
                    )
            deadline = time.monotonic() + seconds
            # A rank that fails leaves the others waiting in a collective: the first failure ends the job.
            while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if any(process.returncode for process in ranks):
            logs = "\n".join(f"rank {r}: {(base / f'log{r}').read_text()[-3000:]}" for r in range(world))
            codes = [process.returncode for process in ranks]
            raise RuntimeError(f"{job.__name__} on {world} ranks ended with {codes} (-9: killed)\n{logs}")
        return [torch.load(base / f"result{rank}", weights_only=False) for rank in range(world)]


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """``functools.cache`` that remembers failures too, so that the next test doesn't wait for the same spawn again."""

    @cache
    def outcome(*arguments: Any) -> tuple[Any, Exception | None]:
        try:
            return function(*arguments), None
        except Exception as error:
            return None, error

    @wraps(function)
    def wrapper(*arguments: Any) -> Any:
        value, error = outcome(*arguments)
        if error is not None:
            raise error
        return value

    return wrapper


def main(folder: str) -> None:
    """Be one rank."""
    import deepspeed
    import deepspeed.ops

    # Otherwise init_distributed compiles it, for an operation (inference_all_reduce) that training never uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    if device(world) == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    deepspeed.init_distributed(backend(world), verbose=False)
    module, name, argument = pickle.loads((Path(folder) / "job").read_bytes())
    result = getattr(import_module(module), name)(argument)
    torch.save(result, Path(folder) / f"result{os.environ['RANK']}")
    torch.distributed.barrier()
    leave(0)


if __name__ == "__main__":
    main(sys.argv[1])
