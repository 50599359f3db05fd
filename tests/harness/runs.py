"""Runs of train.pretrain as users start them, or forked, and what they leave in their folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from tests import session
from tests.ranks import Program, Started, environment, popen
from tests.ranks import start as start_program
from train.run.metrics import read_metrics
from train.sweep.launch import launch_command


def out_of(options: list[str]) -> Path:
    """The run's folder."""
    return Path(options[options.index("--out") + 1])


def start(
    options: list[str],
    ranks: int | None = 2,
    module: str = "train.pretrain",
    launcher: str | None = None,
    own_threads: bool = False,
    **more: str,
) -> Started:
    """Start a run.

    Args:
        options: of the command line.
        ranks: how many; None for plain python.
        module: what each of them runs.
        launcher: a real one, by the command line that train.compare uses; by default the ranks are forked.
        own_threads: the run decides on the number of threads, as under a real launcher; else it is one, for the tests'
            sake.
        more: variables for the environment.
    """
    with NamedTemporaryFile(prefix="log-", delete=False, dir=_logs()) as file:
        log = Path(file.name)
    settings = environment(DS_ACCELERATOR="cpu", **more)
    if launcher or own_threads:
        settings.pop("OMP_NUM_THREADS", None)
    grace = float(more.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))
    program = Program(module, options, settings, log, ranks, grace=grace)
    if launcher is None:
        return start_program(program)
    out = out_of(options)
    run = {"name": out.name, "arguments": [o for o in options if o not in ("--out", str(out))]}
    line = launch_command({"launcher": launcher, "ranks": ranks or 1}, run, out.parent)
    return popen([module if word == "train.pretrain" else word for word in line], program)


def finish(
    options: list[str],
    ranks: int | None = 2,
    module: str = "train.pretrain",
    launcher: str | None = None,
    own_threads: bool = False,
    **more: str,
) -> tuple[int, str]:
    """The exit code of a run, and what its ranks have said."""
    started = start(options, ranks, module, launcher, own_threads, **more)
    return started.wait(), started.said()


def losses(options: list[str]) -> list[float]:
    """The training losses, step by step."""
    return [line["loss"] for line in read_metrics(out_of(options)) if "loss" in line]


def cut(out: Path) -> None:
    """Leave a run that has ended as it was at its last checkpoint but one."""
    shutil.rmtree(max((out / "checkpoints").glob("step-*")))
    (out / "result.json").unlink()


def change(options: list[str], **values: Any) -> list[str]:
    """The options with some replaced or added."""
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if flag in options:
            options = [*options[: options.index(flag)], *options[options.index(flag) + 2 :]]
        options = [*options, flag, str(value)]
    return options


def _logs() -> Path:
    logs = session.folder() / "logs"
    logs.mkdir(exist_ok=True)
    return logs
