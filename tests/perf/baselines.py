"""Other optimizers with a small state, and other packed formats, on the runs of a comparison.

``python -m tests.perf.baselines --help``. Each takes BalancedAdam's place in train.pretrain, at ZeRO stage 0; weights,
batches, schedule, clipping and validation are the same, so that ``python -m train.report`` may put its runs beside
those of a comparison. A run that is cut begins anew.
"""

from __future__ import annotations

import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import tyro
from torch import Tensor

from balanced_adam import UpdateSize, packed, rule
from tests.perf import formats
from tests.perf.ratio_state import RatioState
from train import pretrain
from train.analysis.report_page import write_report
from train.common.command_line import parse
from train.common.errors import ConfigError, require
from train.common.files import REPOSITORY, environment_facts, write_json
from train.sweep import execute
from train.sweep.options import Comparison
from train.sweep.plan import manifest

Groups = list[dict[str, Any]]


class Rival(Protocol):
    """What of torch.optim.Optimizer is used."""

    param_groups: Groups

    def step(self) -> Any: ...


class Rounded(ABC):
    """The same rule, with moments that are stored in some other way after each step."""

    bounded = False

    def __init__(self, groups: Groups) -> None:
        self.param_groups, self.steps = groups, 0
        self.state: dict[Tensor, Any] = {}

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        for group in self.param_groups:
            hyper = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            for param in group["params"]:
                if param.grad is None:  # dropped, since it wasn't finite
                    continue
                zeros = torch.zeros_like(param)
                m, v = self.read(self.state[param]) if param in self.state else (zeros, zeros)
                new, m, v = rule.update(param, param.grad, m, v, step=self.steps, bounded=self.bounded, **hyper)
                self.state[param] = self.write(m, v, param, param.grad)
                param.copy_(new)

    @abstractmethod
    def read(self, stored: Any) -> tuple[Tensor, Tensor]:
        """The moments, in float32."""

    @abstractmethod
    def write(self, m: Tensor, v: Tensor, param: Tensor, grad: Tensor) -> Any:
        """What is stored of them; ``param`` is that before the step."""


class BFloat16Moments(Rounded):
    """Both moments rounded to the nearest bfloat16: 4 bytes a weight."""

    def read(self, stored: Any) -> tuple[Tensor, Tensor]:
        return stored[0].float(), stored[1].float()

    def write(self, m: Tensor, v: Tensor, param: Tensor, grad: Tensor) -> Any:
        return m.bfloat16(), v.bfloat16()


class AnotherFormat(Rounded):
    """A packed state as the package might have had it (tests/perf/formats.py)."""

    bounded = True

    def __init__(self, groups: Groups, fmt: packed.Format, numbers: formats.Numbers) -> None:
        super().__init__(groups)
        self.format, self.numbers = fmt, numbers

    def read(self, stored: Any) -> tuple[Tensor, Tensor]:
        return packed.unpack(stored, self.format)

    def write(self, m: Tensor, v: Tensor, param: Tensor, grad: Tensor) -> Any:
        return packed.pack(self.format, m, v, self.numbers(param, grad, self.steps))


class TRAdam(Rounded):
    """arXiv 2609.35392: FP8 and 4 bits (tests/perf/ratio_state.py)."""

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups)
        self.beta = float(groups[0]["betas"][0])

    def read(self, stored: Any) -> tuple[Tensor, Tensor]:
        return stored.moments(self.beta)

    def write(self, m: Tensor, v: Tensor, param: Tensor, grad: Tensor) -> Any:
        return RatioState.of(m, v, self.beta)


class RestartedMean:
    """Both moments are plain means of the gradients since a restart (docs/theory.md).

    There are two such pairs, each restarted every T steps, T/2 apart; the older one moves the weights. So the means
    reach back over T/2 to T steps; T is such that the average of their mean ages is that of the betas.
    """

    def __init__(self, groups: Groups) -> None:
        self.param_groups, self.steps = groups, 0
        beta = float(groups[0]["betas"][0])
        self.period = max(2, 2 * round(4 / 3 * beta / (1.0 - beta)))
        self.state: dict[Tensor, list[tuple[Tensor, Tensor]]] = {}

    @torch.no_grad()
    def step(self) -> None:
        half = self.period // 2
        ages = [1 + (self.steps - start) % self.period for start in (0, half)]  # gradients in each, with this one
        if self.steps < half:
            ages[1] = 0
        self.steps += 1
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:  # dropped, since it wasn't finite
                    continue
                zeros = torch.zeros_like(param)
                pairs = self.state.get(param, [(zeros, zeros)] * 2)
                self.state[param] = [
                    tuple(old + (new - old) / age for old, new in zip(pair, (param.grad, param.grad**2), strict=True))
                    if age
                    else pair
                    for pair, age in zip(pairs, ages, strict=True)
                ]
                m, v = self.state[param][ages.index(max(ages))]
                param.mul_(1.0 - group["lr"] * group["weight_decay"])
                param.sub_(group["lr"] * m / (v.clamp(min=0.0).sqrt() + group["eps"]))


def bitsandbytes(groups: Groups) -> Rival:
    """AdamW8bit: int8 by a table, an absolute maximum for each 256 elements; tensors below 4096 elements in fp32."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups)


def torchao(groups: Groups) -> Rival:
    """AdamW8bit: as that of bitsandbytes, compiled by torch."""
    from torchao.optim import AdamW8bit

    return AdamW8bit(groups)


def torchao4(groups: Groups) -> Rival:
    """AdamW4bit: 4 bits, an absolute maximum for each 128 elements."""
    from torchao.optim import AdamW4bit

    return AdamW4bit(groups)


BASELINES: dict[str, Callable[[Groups], Rival]] = {
    "bf16": BFloat16Moments,
    "bitsandbytes8": bitsandbytes,
    "torchao8": torchao,
    "torchao4": torchao4,
    "tr-adam": TRAdam,
    "restarted": RestartedMean,
    **{name: partial(AnotherFormat, fmt=fmt, numbers=numbers) for name, fmt, numbers in formats.TRAINED},
}


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Which of them, and the runs; as in train.compare."""

    out: Path = Path("runs/baselines")
    baselines: tuple[str, ...] = ("bf16", "bitsandbytes8", "torchao8", "torchao4")
    """bitsandbytes and torchao must have been installed (pip install --no-deps)."""
    betas: tuple[str, ...] = ("0.95",)
    lr: tuple[float, ...] = (1e-3,)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 200
    batch: int = 16
    sequence_length: int = 128
    rest: Annotated[tuple[str, ...], tyro.conf.Positional] = ()


def plan(settings: Baselines) -> dict[str, Any]:
    """A comparison's plan with every run once for each baseline."""
    require(
        not set(settings.baselines) - set(BASELINES),
        f"baselines is {settings.baselines}; there are {', '.join(BASELINES)}.",
    )
    require(not any(":" in betas for betas in settings.betas), f"betas is {settings.betas}; give numbers alone.")
    shared = {
        field.name: getattr(settings, field.name)
        for field in fields(settings)
        if field.name not in ("baselines", "betas")
    }
    found = manifest(Comparison(arms=settings.betas, launcher="python", ranks=1, **shared))
    stage_0 = ["--ds-config", str(REPOSITORY / "ds_configs" / "zero0.json"), "--save-every", "0"]
    found["runs"] = [
        {
            **run,
            "arm": f"{run['arm']}:{baseline}",
            "name": run["name"].replace("_lr", f"-{baseline}_lr"),
            "arguments": [*run["arguments"], *stage_0],
            "baseline": baseline,
        }
        for run in found["runs"]
        for baseline in settings.baselines
    ]
    return found


def train(baseline: str, arguments: list[str]) -> int:
    """train.pretrain, whose engine's optimizer has the baseline take its steps."""
    import deepspeed

    initialize = deepspeed.initialize

    def with_baseline(*positional: Any, **named: Any) -> Any:
        engine, *rest = initialize(*positional, **named)
        optimizer = (
            engine.optimizer
        )  # at stage 0 in fp32, BalancedAdam itself, whose groups the schedule and DeepSpeed know
        groups = [{k: g[k] for k in ("params", "lr", "betas", "eps", "weight_decay")} for g in optimizer.param_groups]
        other = BASELINES[baseline](groups)

        def step(*_: Any, **__: Any) -> None:
            for mine, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
                if isinstance(theirs["lr"], Tensor):
                    theirs["lr"].fill_(mine["lr"])
                else:
                    theirs["lr"] = mine["lr"]
            other.step()

        optimizer.step = step
        optimizer.update_size = lambda: UpdateSize(math.nan, math.nan, 1)  # nobody measures the baseline's
        return engine, *rest

    deepspeed.initialize = with_baseline
    return pretrain.main(arguments)


def main(arguments: list[str]) -> None:
    if arguments and arguments[0] in BASELINES:
        sys.exit(train(arguments[0], arguments[1:]))
    try:
        settings = parse(Baselines, arguments, "tests.perf.baselines", __doc__)
        chosen = plan(settings)

        def command(_: dict[str, Any], run: dict[str, Any], out: Path) -> list[str]:
            place = ["--out", str(out / run["name"])]
            return [sys.executable, "-m", "tests.perf.baselines", run["baseline"], *place, *run["arguments"]]

        execute.launch_command = command  # type: ignore[assignment, attr-defined]
        file = settings.out / "manifest.json"
        require(
            not file.exists() or json.loads(file.read_text())["runs"] == json.loads(json.dumps(chosen["runs"])),
            f"out is {settings.out}, which holds another comparison; give another folder.",
        )
        settings.out.mkdir(parents=True, exist_ok=True)
        write_json(file, {**chosen, **environment_facts()})
        execute.execute(chosen, settings.out.resolve())
        write_report(settings.out)
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
