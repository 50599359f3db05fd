"""Command lines and launchers' variables, with one option right, wrong or misspelt.

A wrong one goes through the command's ``main``, as a user's does; a right one goes as far as costs nothing.
"""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from tests.fuzz.ds_configs import misspelt
from tests.fuzz.outcome import Outcome, attempt
from train.common.command_line import parse
from train.common.errors import ConfigError
from train.distributed import environment
from train.run import deepspeed_config
from train.run.config import Preflight, Run

NO_NUMBER = ["x", "", "1,5", "0x10", "None!", "--"]
NO_COUNT = [*NO_NUMBER, "1.5", "-1", "1e3", "nan", "٣x"]
Options = dict[str, tuple[list[str], list[str]]]
"""Right values and wrong ones of each option, separated by spaces where there are several."""
RUN: Options = {
    "--lr": (["1e-3", "0.5"], [*NO_NUMBER, "-1", "0", "nan", "inf", "1e400"]),
    "--betas": (
        ["0.95", "0.9 0.9", "refresh:2", "half_life:3", "from:0.9:to:0.95"],
        ["1", "-0.1", "nan", "0.9 0.999", "x", "refresh:x", "refresh:0", "half_life:-1", "from:0.9", "from:0.9:to:1"],
    ),
    "--eps": (["0", "1e-8"], [*NO_NUMBER, "-1", "nan", "inf"]),
    "--weight-decay": (["0", "0.1"], [*NO_NUMBER, "-1", "inf"]),
    "--optimizer": (
        ["adam", "adamd", "adamprox", "adamp", "l1", "l1.5", "l3", "l6", "amsgrad", "adamnc", "torch:NAdam"],
        [
            "adamw",
            "",
            "AdamD",
            "l2",
            "l4",
            "torch:",
            "torch:SGD",
            "torch:nadam",
            "nadam",
            ":",
            "deepspeed:",
            "torch:x.y",
        ],
    ),
    "--state": (["fp32", "packed16"], ["packed12", "", "FP32", "16"]),
    "--clip": (["0", "1.5"], [*NO_NUMBER, "-1", "nan"]),
    "--steps": (["2", "100"], [*NO_COUNT, "0"]),
    "--schedule": (["cosine", "linear", "wsd"], ["square", "", "COSINE"]),
    "--warmup": (["0", "1"], [*NO_COUNT, "6", "100"]),
    "--final-lr": (["0", "1", "0.1"], [*NO_NUMBER, "-0.1", "2", "nan"]),
    "--batch": (["4", "16", "3"], [*NO_COUNT, "0"]),
    "--micro-batch": (["1", "4", "None"], [*NO_COUNT, "0", "3", "8"]),
    "--precision": (["auto", "fp32", "bf16"], ["fp64", "", "BF16"]),
    "--save-every": (["0", "3"], NO_COUNT),
    "--keep": (["1", "5"], [*NO_COUNT, "0"]),
    "--keep-every": (["0", "200"], [*NO_COUNT, "6"]),  # multiples of save_every, by default 100
    "--validate-every": (["0", "2"], NO_COUNT),
    "--validation-batches": (["0", "8"], NO_COUNT),
    "--validation-fraction": (["0.1", "0.5"], [*NO_NUMBER, "0", "1", "-1", "nan"]),
    "--sequence-length": (["2", "64"], [*NO_COUNT, "0", "1"]),
    "--seed": (["0", str(2**63 - 1)], [*NO_COUNT, str(2**63), str(10**30)]),
    "--stop-after-nonfinite": (["1", "9"], [*NO_COUNT, "0"]),
    "--timeout": (["5", "600"], [*NO_NUMBER, "0", "4.9", "nan", "inf", "1e9"]),
    "--wandb": ([""], ["a-project"]),  # the package is not installed
    "--ds-config": ([], ["nowhere.json", "", ".", "/", "README.md", "a\0b", "x" * 300]),
    "--out": ([], ["", "/dev/null", "/dev/null/run", "x" * 300, "a\0b", "README.md"]),
    "--data": ([], ["", "/nowhere", "hub:", "/dev/null", "a\0b", "x" * 300]),
    "--eos-id": (["1", "383", "None"], NO_COUNT),
    "--validation": ([], ["a", "=b", "a=", "a/b=c"]),
    "--loss": (["auto", "full", "chunked"], ["FULL", "", "tiled"]),
    "--decay": (["None"], [*NO_COUNT, "0", "3"]),  # of wsd only
    "--tokens": ([], [*NO_NUMBER, "0", "-1", "nan", "inf"]),  # steps are given, too
    "--config": ([], ["/nowhere", "", "README.md", "a\0b", "x" * 300]),
    "--attention": (["auto", "eager", "sdpa"], []),
    "--init-from": ([], ["/nowhere", "", "README.md", "a\0b", "x" * 300]),
    "--branch-from": ([], ["/nowhere", "", "README.md", "a\0b", "x" * 300]),
    "--token-dtype": (["auto", "uint16", "uint32"], ["int8", "", "UINT16", "16"]),
    "--tokenizer": ([], ["/nowhere", "", "a\0b", "x" * 300]),
    "--model": ([], ["/nowhere", "", "a\0b", "7x", "x" * 300]),
    "--data-cache": ([], ["/dev/null", "/dev/null/x", "a\0b", "x" * 300]),
}
COMPARE: Options = {
    "--arms": (
        [
            "0.95 0.9,0.999",
            "0.95:packed16",
            "refresh:5 0.9",
            "0.9 adamd:0.9 adamprox:0.9,0.99",
            "adamd:refresh:5:packed8",
            "l1:0.95:packed16 amsgrad:0.9,0.999",
            "torch:NAdam:0.9,0.999 adamp:horizon:9",
        ],
        [
            "1",
            "x",
            "0.9,x",
            "0.9,",
            "0.95:packed12",
            "0.95 .95",
            "0.9,0.95:packed8",
            ":fp32",
            "nan",
            "-0.1",
            "a:b:c",
            "adamw:0.9",
            "adamd",
            "adam:0.9 0.9",
            "l2:0.9",
            "torch:SGD:0.9",
            "torch:0.9",
            "torch:AdamW:0.9:packed8",
            "amsgrad:0.9:packed16",
        ],
    ),
    "--grid": (["0.9 0.99"], ["1", "x", "-1", "nan", "0.9 0.9"]),
    "--seeds": (["0 1", "7"], [*NO_COUNT, "1 1", str(2**63)]),
    "--lr": (["1e-3 1e-2"], ["0", "-1", "x", "nan", "inf", "1e-3 1e-3"]),
    "--lr-from": ([], ["/nowhere", "README.md", "a\0b"]),
    "--steps": (["20"], [*NO_COUNT, "0"]),
    "--tokens": (["20480"], [*NO_COUNT, "0", "5"]),
    "--batch": (["4"], [*NO_COUNT, "0"]),
    "--ranks": (["1", "2"], [*NO_COUNT, "0"]),
    "--launcher": (["torchrun", "deepspeed"], ["mpirun", "", "python"]),
    "--manifest": ([], ["/nowhere.json", "README.md", "/dev/null", "a\0b", "."]),
    "--max-runs": ([], ["x", "0", "-1", "1.5"]),
    "--max-hours": ([], ["x", "0", "-1", "nan", "inf"]),
    "--out": ([], ["", "/dev/null", "/dev/null/x", "x" * 300, "a\0b", "README.md"]),
    "--": (
        ["--clip 0.5"],
        ["--clip -1", "--betas 0.9", "--optimizer adamd", "--stepz 3", "--warmup 9999", "--out x", "--seed 3"],
    ),
}
PILOT: Options = {
    "--steps": ([], [*NO_COUNT, "0", "2"]),
    "--probes": ([], [*NO_COUNT, "0", "1"]),
    "--checkpoints": ([], [*NO_COUNT, "0", "2", "1000"]),
    "--planned-steps": ([], [*NO_COUNT, "0", "1"]),
    "--out": ([], ["/dev/null", "/dev/null/x", "a\0b", "x" * 300, "README.md"]),
    "--": ([], ["--clip -1", "--stepz 3", "--data /nowhere", "--model nope"]),
}
RESPONSE: Options = {
    "--task": ([], ["text", ""]),
    "--betas": ([], ["1", "x", "0.9,x", "refresh:5", "0.95:packed16"]),
    "--at": ([], [*NO_COUNT, "0", "100"]),
    "--window": ([], [*NO_COUNT, "0", "10", "1000"]),
    "--elements": ([], [*NO_COUNT, "0"]),
    "--checkpoint": ([], ["/nowhere", "README.md", "a\0b"]),
    "--out": ([], ["/dev/null", "/dev/null/x", "a\0b", "x" * 300, "README.md"]),
    "--": ([], ["--clip -1", "--stepz 3", "--data /nowhere"]),
}
EXPORT: Options = {
    "": ([], ["/nowhere x", "README.md x", "a\0b x", ". x", "x", "a b c"]),
    "--dtype": ([], ["fp64 /nowhere x", "BF16 /nowhere x", " /nowhere x"]),
}
HOSTS: Options = {
    "--hosts": (["a b", "10.0.0.1", "node-1.x"], ["", "a a", "a,b", "a b;c", "näme"]),
    "--ranks-per-host": (["1", "8"], [*NO_COUNT, "0"]),
    "--port": (["1024", "29500"], [*NO_COUNT, "0", "80", "65536"]),
}


@dataclass(frozen=True)
class Command:
    """A command, the options that it needs, and those to draw from."""

    module: str
    options: Options
    base: str = ""
    accept: Callable[[list[str]], object] | None = None
    """What a right command line goes through; by default the command itself."""


def check(arguments: list[str]) -> None:
    """As train.pretrain, up to the ranks."""
    run = parse(Run, arguments, "train.pretrain", None)
    run.check()
    deepspeed_config.resolve(run, 1, False)


TEXT = "--data {corpus} --data-cache {folder}/cache"
SMALL = f"--out {{folder}}/run --steps 6 --warmup 1 --batch 4 --sequence-length 32 --validation-fraction 0.2 {TEXT}"
NOTHING: tuple[list[str], list[str]] = ([], ["/nowhere", "README.md", "a\0b", "/dev/null"])
COMMANDS = [
    Command("pretrain", RUN, SMALL, check),
    Command("pretrain", RUN, SMALL, check),  # it has the most options
    Command("compare", COMPARE, "--out {folder}/compare --plan-only"),
    Command(
        "preflight",
        {**RUN, "--ranks": (["1", "4"], [*NO_COUNT, "0", "3"])},
        f"{SMALL} --ranks 2",
        lambda given: parse(Preflight, given, "train.preflight", None).check(),
    ),
    Command("choose_beta", PILOT),
    Command("response", RESPONSE),
    Command("accelerate_config", HOSTS, "--hosts h"),
    Command("report", {"": NOTHING}),
    Command("regret", {"": NOTHING, "--rules": ([], ["x", "refresh:x", "from:0.9:to:0.95", "1"])}),
    Command("export", EXPORT),
    Command("plane", {"": NOTHING, "--out": ([], ["a\0b", "x" * 300])}),
]
"""requeue answers a batch script, by other codes; tests/harness sees to it."""
VARIABLES: dict[str, tuple[list[str], list[str]]] = {
    "RANK": (["0"], ["x", "", "-1", "1.5", "1", " 0", "1_0"]),
    "LOCAL_RANK": (["0"], ["x", "", "-1", "7"]),
    "WORLD_SIZE": (["1"], ["x", "", "0", "-1", "1e3"]),
    "LOCAL_WORLD_SIZE": (["1", ""], ["x", "0", "-1"]),
    "MASTER_PORT": (["29500"], ["x", "", "0", "65536", "-1", "80.5"]),
    "MASTER_ADDR": (["127.0.0.1"], [""]),
    "SLURM_PROCID": (["0"], ["x", "", "-1", "5"]),
    "SLURM_LOCALID": (["0"], ["x", "", "-1"]),
    "SLURM_STEP_NUM_TASKS": (["2"], ["x", "", "0", "-1"]),
    "SLURM_STEP_TASKS_PER_NODE": (["2", "1(x2)"], ["x", "", "2(x", "2;3", "(x2)"]),
}
LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SRUN = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}


class Refused(Exception):
    """A command ended with code 2; what it printed to stderr."""


def run_main(module: str, arguments: list[str]) -> None:
    """Run a command in this process.

    Raises:
        Refused: with the sentence of its single line ``error: ...``.
        AssertionError: on another exit code, or other output beside it.
    """
    said = StringIO()
    with redirect_stderr(said), redirect_stdout(StringIO()):
        try:
            code = importlib.import_module(f"train.{module}").main(arguments)
        except SystemExit as stop:
            code = stop.code
    if code in (0, None):
        return
    lines = [line for line in said.getvalue().splitlines() if line and "WARNING" not in line]  # of DeepSpeed's import
    assert code == 2 and lines and lines[-1].startswith("error: "), f"code {code}: {said.getvalue()[-500:]}"
    assert len(lines) == 1, f"more than a sentence: {said.getvalue()[-500:]}"
    raise Refused(lines[0].removeprefix("error: "))


def outcome(seed: int, folder: Path, corpus: Path) -> Outcome:
    """Of one drawn command line, or of one drawn variable. ``folder`` is empty."""
    draw = random.Random(seed)
    if draw.random() < 0.15:
        return _of_variable(draw, folder, corpus)
    command = draw.choice(COMMANDS)
    base = command.base.format(folder=folder, corpus=corpus).split()
    option = draw.choice(sorted(command.options))
    right, wrong = command.options[option]
    how = draw.random()
    if how < 0.15 and len(option) > 2:
        name = misspelt(draw, option[2:])
        given = [*base, f"--{name}", *draw.choice(right or wrong).split(" ")]
        return attempt(repr(given), lambda: run_main(command.module, given), (Refused,), True, name)
    is_wrong = bool(wrong) and (how < 0.7 or not right)
    value = draw.choice(wrong if is_wrong else right)
    given = [*(base if option == "--" else _without(base, option)), *([option] if option else []), *value.split(" ")]
    if is_wrong or command.accept is None:
        do: Callable[[], object] = lambda: run_main(command.module, given)  # noqa: E731
    else:
        accept = command.accept
        do = lambda: accept(given)  # noqa: E731
    names = {"": "", "--": value.split(" ")[0], "--betas": "beta", "--seeds": "seed"}.get(option, option).lstrip("-")
    return attempt(f"train.{command.module} {given!r}", do, (Refused, ConfigError), is_wrong, names)


def _without(arguments: list[str], option: str) -> list[str]:
    if option not in arguments:
        return arguments
    place = arguments.index(option)
    return arguments[:place] + arguments[place + 2 :]


def _of_variable(draw: random.Random, folder: Path, corpus: Path) -> Outcome:
    name = draw.choice(sorted(VARIABLES))
    right, wrong = VARIABLES[name]
    is_wrong = draw.random() < 0.8
    value = draw.choice(wrong if is_wrong else right)
    srun = name.startswith("SLURM")
    variables = {**(SRUN if srun else LAUNCHED), name: value}
    kept = {key: each for key, each in os.environ.items() if key not in LAUNCHED.keys() | SRUN.keys()}
    arguments = SMALL.format(folder=folder, corpus=corpus).split()

    def do() -> None:
        if is_wrong:
            with patch.dict(os.environ, {**kept, **variables}, clear=True):
                run_main("pretrain", arguments)
        else:
            environment.check(environment.Srun if srun else environment.Launched, variables)

    return attempt(f"{name}={value!r}", do, (Refused, ConfigError), is_wrong, name)
