"""Memory, checkpoints and lost work at a scale that isn't here: formulas, held to what can be measured.

``python -m tests.perf scaling``; docs/scaling.md explains them.
"""

from __future__ import annotations

import gc
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from tests.perf.engine import MEGABYTE, ONE_PASS, SIZE, TENSORS, balanced, start, status
from tests.perf.measure import machine
from tests.ranks import spawn
from train.analysis.plots import markdown_table

MODELS = {"1.3B": (1.3e9, 0.5e9, 8), "7B": (7e9, 0.55e9, 64), "70B": (70e9, 2e9, 512)}
"""Name: weights, weights of the largest layer, GPUs."""
STATES = {"fp32, 8 bytes": 8, "packed32, 4": 4, "packed16, 2": 2, "packed8, 1": 1}
"""Optimizer state: bytes a weight."""
GPU_HOURS_PER_FAILURE = 54 * 24 * 16384 / 419
"""Llama 3 405B: 419 unexpected interruptions in 54 days on 16384 GPUs (arXiv 2407.21783, section 3.3.4)."""
SUMMED = 1.3e9
"""Bytes of SHA-256 a second of one rank. At stages 1 and 2 rank 0 alone writes the 16-bit weights, and sums them."""
GIB, WORLD = 2**30, 2


class Bytes(NamedTuple):
    """What one rank holds, bf16 with fp32 master weights, after the backward pass and during the step."""

    weights: float
    gradients: float
    master: float
    state: float

    @property
    def whole(self) -> float:
        return sum(self)


def model_states(stage: int, weights: float, ranks: int, state: float) -> Bytes:
    """By formula (arXiv 1910.02054, section 3), but without an fp32 copy of the gradients: the one pass needs none."""
    share = weights / ranks
    return Bytes(
        2 * (share if stage == 3 else weights), 2 * (weights if stage == 1 else share), 4 * share, state * share
    )


def measured(job: tuple[int, bool, str]) -> dict[str, float]:
    """Job: bytes of this rank's tensors after the backward pass, the most that it held, and of a checkpoint."""
    stage, offload, state = job
    before, resident = alive(), status("VmRSS")
    engine = start(ONE_PASS._replace(optimizer=balanced(state=state), offload=offload), stage, bucket=2 * SIZE)
    inputs = [torch.full((SIZE + 7 * k,), 1e-3, dtype=torch.bfloat16) for k in range(TENSORS)]
    ours = 2 * sum(x.numel() for x in inputs)
    sizes: dict[str, float] = {}
    for _ in range(2):  # the optimizer makes its state in the first step
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from now
        engine.backward(engine(inputs))
        sizes["backward"] = alive() - before - ours
        engine.step()
        sizes["peak"] = (status("VmHWM") - resident) * MEGABYTE - ours
    with TemporaryDirectory() as folder:
        box = [folder]
        torch.distributed.broadcast_object_list(box)
        engine.save_checkpoint(box[0], tag="all")
        torch.distributed.barrier()
        sizes["checkpoint"] = sum(f.stat().st_size for f in (Path(box[0]) / "all").iterdir())
        torch.distributed.barrier()
    return sizes


def alive() -> int:
    """Bytes of all distinct storages that tensors in this process refer to."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def estimated(stage: int, weights: float, largest: float, ranks: int) -> float:
    """DeepSpeed's own estimate for one GPU: with its fp32 gradients, and at stage 3 with the largest layer gathered."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    here: dict[str, Any] = {"num_gpus_per_node": 8, "num_nodes": ranks // 8, "cpu_offload": False}
    if stage == 3:
        return float(
            estimate_zero3_model_states_mem_needs(int(weights), int(largest), cpu_offload_params=False, **here)[1]
        )
    return float(estimate_zero2_model_states_mem_needs(int(weights), **here)[1])


def best_interval(save_seconds: float, gpus: int) -> float:
    """Seconds between checkpoints that lose the least: to first order sqrt(2 C M), M between failures (Young 1974)."""
    return math.sqrt(2 * save_seconds * GPU_HOURS_PER_FAILURE * 3600 / gpus)


def lost(interval: float, save_seconds: float, gpus: int) -> float:
    """The share of time that goes into saving, and into what is done again after a failure."""
    return save_seconds / interval + interval / 2 / (GPU_HOURS_PER_FAILURE * 3600 / gpus)


def main() -> None:
    print(f"{machine()}\n")
    weights = float(sum(SIZE + 7 * k for k in range(TENSORS)))
    rows = []
    for stage, offload in ((1, False), (2, False), (3, False), (2, True), (3, True)):
        for name, size in STATES.items():
            state = name.partition(",")[0]
            found = spawn(measured, WORLD, (stage, offload, state), fresh=True)[0]
            rows.append(
                {
                    f"ZeRO, {WORLD} ranks, 40 M weights": f"{stage}, offload" if offload else str(stage),
                    "state": state,
                    "allocated, bytes a weight": f"{found['backward'] / weights:.2f}",
                    "formula": "" if offload else f"{model_states(stage, weights, WORLD, size).whole / weights:.2f}",
                    "peak": f"{found['peak'] / weights:.2f}",
                    "checkpoint": f"{found['checkpoint'] / weights:.2f}",
                }
            )
    print(markdown_table(rows) + "\n", flush=True)
    rows = []
    for name, (weights, largest, gpus) in MODELS.items():
        for stage in (1, 2, 3):
            gathered = 2 * largest if stage == 3 else 0.0
            needed = {
                state: f"{(model_states(stage, weights, gpus, size).whole + gathered) / GIB:.1f}"
                for state, size in STATES.items()
            }
            deepspeeds = f"{estimated(stage, weights, largest, gpus) / GIB:.1f}" if stage > 1 else "none"
            rows.append(
                {
                    "GiB on each GPU": f"{name} on {gpus}",
                    "ZeRO": str(stage),
                    **needed,
                    "DeepSpeed's estimate": deepspeeds,
                }
            )
    print(markdown_table(rows) + "\n")
    rows = []
    for name, (weights, _, gpus) in MODELS.items():
        stored = 14 * weights
        for gigabytes in (2, 50):
            seconds = stored / (gigabytes * 1e9) + 2 * weights / SUMMED
            interval = best_interval(seconds, gpus)
            rows.append(
                {
                    "checkpoint": f"{name} on {gpus}: {stored / 1e9:.0f} GB",
                    "to storage of": f"{gigabytes} GB/s: {seconds:.1f} s in all",
                    "best interval": f"{interval / 60:.0f} min",
                    "lost then": f"{lost(interval, seconds, gpus):.2%}",
                    "lost at every 10 min": f"{lost(600, seconds, gpus):.2%}",
                    "lost at every 3 h": f"{lost(10800, seconds, gpus):.2%}",
                }
            )
    print(markdown_table(rows))
