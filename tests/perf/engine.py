"""A DeepSpeed engine's whole step on two ranks in bf16, with clipping; ``python -m tests.perf engine``."""

from __future__ import annotations

import re
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from balanced_adam.packed import FORMATS
from tests.perf.measure import WARM_UP, machine, ratio
from tests.ranks import spawn
from train.analysis.plots import markdown_table

WORLD, ROUNDS = 2, 9
TENSORS, SIZE = 40, 1_000_000
MEGABYTE = 2**20
CLIP = 0.01  # below the norm, so that every step multiplies the gradient

COMMON: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.1}
ADAM = {"type": "Adam", "params": {**COMMON, "betas": [0.95, 0.95]}}
TORCH_ADAM = {"type": "Adam", "params": {**COMMON, "betas": [0.95, 0.95], "torch_adam": True}}


def balanced(**more: bool | str) -> dict[str, Any]:
    return {"type": "BalancedAdam", "params": {**COMMON, "betas": 0.95, **more}}


class Contender(NamedTuple):
    name: str
    optimizer: dict[str, Any]
    offload: bool = False


ONE_PASS = Contender("BalancedAdam, one pass", balanced())
UNFUSED = Contender("BalancedAdam, DeepSpeed's passes", balanced(fused_zero=False))
PACKED = [Contender(f"BalancedAdam, one pass, {state}", balanced(state=state)) for state in FORMATS]
CONTENDERS = [
    ONE_PASS,
    *PACKED,
    UNFUSED,
    Contender("DeepSpeed Adam", ADAM),
    Contender("DeepSpeed Adam, torch_adam", TORCH_ADAM),
]
OFFLOADED = [
    ONE_PASS._replace(offload=True),
    *(contender._replace(offload=True) for contender in PACKED),
    UNFUSED._replace(offload=True),
    Contender("DeepSpeed Adam (DeepSpeedCPUAdam)", ADAM, True),
]


class Model(nn.Module):
    """loss = sum of parameter * input: the gradient is the input, and forward and backward cost as little as can be."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        # Odd sizes: no tensor begins where a vector would like it to.
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(SIZE + 7 * k, generator=generator) * 0.02) for k in range(TENSORS)
        )

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return sum((p * x).sum().float() for p, x in zip(self.weights, inputs, strict=True))


class Run(NamedTuple):
    """One contender's seconds and bytes, one number per round."""

    backward: list[float]
    step: list[float]
    all_gather: list[float]
    extra_memory: list[float]
    """What the process held at the most during the step beyond what it held before, megabytes."""
    resident: list[float]
    """What it held at the most during backward and step, less what it held before the engine was built, megabytes."""

    @property
    def local(self) -> list[float]:
        """Seconds of the steps without their all-gather."""
        return [step - gather for step, gather in zip(self.step, self.all_gather, strict=True)]


def status(field: str) -> float:
    """VmRSS or VmHWM of this process, megabytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def start(contender: Contender, stage: int, bucket: int = 50_000_000) -> Any:
    import deepspeed

    import balanced_adam  # noqa: F401

    model = Model()
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if contender.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": contender.optimizer,
        "gradient_clipping": CLIP,
        "zero_optimization": zero,
        "bf16": {"enabled": True},
    }
    return deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())[0]


def run(job: tuple[int, list[Contender]]) -> dict[str, Run]:
    """One rank: the contenders round by round."""
    from deepspeed.runtime.zero import stage_1_and_2

    stage, contenders = job
    gathering = [0.0]
    gather = stage_1_and_2.all_gather_dp_groups

    def timed(*arguments: Any, **more: Any) -> None:
        begin = time.perf_counter()
        gather(*arguments, **more)
        gathering[0] += time.perf_counter() - begin

    stage_1_and_2.all_gather_dp_groups = timed
    engines = {contender.name: start(contender, stage) for contender in contenders}
    runs = {name: Run([], [], [], [], []) for name in engines}
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for number in range(WARM_UP + ROUNDS):
        inputs = [torch.randn(SIZE + 7 * k, generator=generator).mul_(1e-3).bfloat16() for k in range(TENSORS)]
        for name, engine in engines.items():
            loss = engine(inputs)
            torch.distributed.barrier()
            before = time.perf_counter()
            engine.backward(loss)
            between = time.perf_counter()
            torch.distributed.barrier()
            gathering[0] = 0.0
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from now
            held, begin = status("VmRSS"), time.perf_counter()
            engine.step()
            end = time.perf_counter()
            if number >= WARM_UP:
                found = (between - before, end - begin, gathering[0], status("VmHWM") - held, status("VmHWM"))
                for values, value in zip(runs[name], found, strict=True):
                    values.append(value)
    return runs


def measured(stage: int, contenders: list[Contender]) -> dict[str, Run]:
    """The contenders by name, on rank 0."""
    runs: dict[str, Run] = spawn(run, WORLD, (stage, contenders), seconds=1500, fresh=True)[0]
    return runs


def report(stage: int, contenders: list[Contender]) -> str:
    runs = measured(stage, contenders)
    local = {name: r.local for name, r in runs.items()}
    whole = {name: [b + s for b, s in zip(r.backward, r.step, strict=True)] for name, r in runs.items()}
    ours = contenders[0].name
    rows = [
        {
            f"stage {stage}" + ", offload" * contenders[0].offload: name,
            "step without all-gather, ms": f"{statistics.median(local[name]) * 1e3:.1f}"
            f" [{min(local[name]) * 1e3:.1f} .. {max(local[name]) * 1e3:.1f}]",
            "ratio to one pass": ratio(local[name], local[ours]),
            "step, ms": f"{statistics.median(r.step) * 1e3:.1f}",
            "backward + step, ms": f"{statistics.median(whole[name]) * 1e3:.1f}",
            "backward + step, ratio": ratio(whole[name], whole[ours]),
            "memory the step adds, MB": f"{statistics.median(r.extra_memory):.0f}",
        }
        for name, r in runs.items()
    ]
    return markdown_table(rows)


def main() -> None:
    print(f"{machine()}\n")
    print(
        f"{TENSORS * SIZE / 1e6:.0f} M parameters in {TENSORS} tensors, bf16, clipping, {WORLD} ranks of one thread "
        f"each, gloo, median of {ROUNDS} interleaved rounds [min .. max]:\n"
    )
    for stage, contenders in ((1, CONTENDERS), (2, CONTENDERS), (2, OFFLOADED), (3, CONTENDERS), (3, OFFLOADED)):
        print(report(stage, contenders) + "\n", flush=True)
