"""train.pretrain, to which something happens on one rank at one moment. ``LAUNCHER -m tests.fault_injection.faulty_rank
...``

FAULT="RANK MOMENT COUNT WHAT": on that rank, the COUNT-th time (from 1) that it comes to MOMENT, WHAT is done.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from train import pretrain
from train.checkpoint import convert, load, manifest, resumable_run, save
from train.data import token_files
from train.distributed.launch import exit_process, prepare_environment
from train.run.metrics import Metrics
from train.run.trainer import Trainer

MOMENTS: dict[str, tuple[Any, str]] = {
    "tokenizing": (token_files, "_tokenize"),
    "forward": (Trainer, "loss"),
    "all-reduce": (dist, "all_reduce"),
    "metrics": (Metrics, "write"),
    "saving": (save._Recorder, "save"),
    "finishing": (manifest, "finish"),
    "rotation": (save, "_rotate"),
    "removing": (shutil, "rmtree"),
    "verifying": (load, "verified"),
    "conversion": (convert, "_convert"),
    "loading": (resumable_run, "restore_checkpoint"),
    "result": (resumable_run, "write_json"),
}
"""What a rank comes to before it does it. "step" and "backward" are the engine's, which come with DeepSpeed."""


def inject(name: str) -> None:
    """What is done to this process, or to its folder."""
    if name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif name == "vanish":
        shutil.rmtree(Path(sys.argv[sys.argv.index("--out") + 1]))
    else:
        raise ValueError(name)


def at(place: Any, method: str, count: int, do: Callable[[], None]) -> None:
    """Have ``do`` done before the ``count``-th call."""
    original, calls = getattr(place, method), [0]

    def disturbed(*arguments: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            do()
        return original(*arguments, **more)

    setattr(place, method, disturbed)


def poison(engine: type, count: int) -> None:
    """From the ``count``-th backward pass on (to the last, if negative), the gradients of this rank are NaN."""
    original, calls = engine.backward, [0]  # type: ignore[attr-defined]

    def backward(self: Any, loss: Any, *arguments: Any, **more: Any) -> Any:
        calls[0] += 1
        bad = calls[0] == count or (count < 0 and calls[0] >= -count)
        return original(self, loss * float("nan") if bad else loss, *arguments, **more)

    engine.backward = backward  # type: ignore[attr-defined]


def arrange(rank: int, moment: str, count: int, what: str) -> None:
    """Prepare it."""
    if int(os.environ.get("RANK", "0")) != rank:
        return
    prepare_environment()
    from deepspeed import DeepSpeedEngine

    if what == "nan":
        poison(DeepSpeedEngine, count)
    else:
        place, method = {**MOMENTS, "step": (DeepSpeedEngine, "step"), "backward": (DeepSpeedEngine, "backward")}[
            moment
        ]
        at(place, method, count, lambda: inject(what))


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR2)
    if told := os.environ.get("FAULT"):
        rank, moment, count, what = told.split()
        arrange(int(rank), moment, int(count), what)
    exit_process(pretrain.main())
