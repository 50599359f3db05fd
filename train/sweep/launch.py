"""Start one run of a comparison under its launcher, and terminate it with all its ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from train.common.files import REPOSITORY
from train.distributed.launch import free_port

# A surrounding launcher may have set these; the launchers started here set them anew.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch_command(plan: dict[str, Any], run: dict[str, Any], out: Path) -> list[str]:
    """Return the command line that starts one run."""
    program = ["train.pretrain", "--out", str(out / run["name"]), *run["arguments"]]
    ranks, port = str(plan["ranks"]), str(free_port())
    launch = [sys.executable, "-m"]
    if plan["launcher"] == "deepspeed":
        launch += ["deepspeed.launcher.runner", "--num_gpus", ranks, "--master_port", port, "--module"]
    elif plan["launcher"] == "torchrun":
        launch += ["torch.distributed.run", "--nproc-per-node", ranks, "--master-port", port, "-m"]
    elif plan["launcher"] == "accelerate":
        config = str(REPOSITORY / "ds_configs" / "accelerate.yaml")
        launch += ["accelerate.commands.launch", "--config_file", config, "--num_processes", ranks]
        launch += ["--main_process_port", port, "--module"]
    return launch + program


@contextmanager
def started(line: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a run in a session of its own, and yield its process. The run is terminated at the end of the block."""
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    with log.open("ab") as file:
        process = subprocess.Popen(
            line,
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C reaches only this process, which then terminates the ranks
        )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[Any], patience: float = 10.0) -> None:
    """Terminate a launcher and all its descendants; kill those left after ``patience`` seconds.

    Does nothing if the launcher has ended.
    """
    if process.poll() is not None:
        return
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    tree[0].terminate()
    for left in psutil.wait_procs(tree, patience)[1]:
        with suppress(psutil.NoSuchProcess):
            left.kill()
    process.wait()
