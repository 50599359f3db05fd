"""A dry run: one training and one validation batch, and an estimate of the memory needed."""

from __future__ import annotations

import os
from typing import Any

from train.common.errors import first_line
from train.run.memory import described, estimate
from train.run.trainer import Trainer


def dry_run(trainer: Trainer, ds_config: dict[str, Any]) -> None:
    """Run one training and one validation batch, and print estimates of memory: ours, and DeepSpeed's of each stage."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    chunked = trainer.facts["loss"] == "chunked"
    try:
        memory = estimate(trainer.run, trainer.engine.module.config, ds_config, trainer.ranks.world, chunked)
        estimated = described(memory)
    except Exception as error:  # of any class: not every model runs on tensors without content
        estimated = f"no estimate of this model's memory: {first_line(error)}"
    line = trainer.train_step()
    ranks, weights = trainer.ranks, trainer.parameters
    validation_loss = trainer.validate()["validation_loss"]
    if not ranks.is_main:
        return
    print(estimated)
    local = int(os.environ["LOCAL_SIZE"])
    hosts = max(1, ranks.world // local)
    largest = max(
        sum(getattr(p, "ds_numel", p.numel()) for p in m.parameters(False)) for m in trainer.engine.module.modules()
    )
    print(
        f"{weights / 1e6:.2f} M parameters on {ranks.world} ranks; "
        "model states by DeepSpeed's estimators, in GiB (host, per GPU):"
    )
    for offload in (False, True):
        host, gpu = estimate_zero2_model_states_mem_needs(weights, local, hosts, offload, 1.5)[:2]
        print(f"  ZeRO-2{' with offload' if offload else ''}: {host / 2**30:.2f}, {gpu / 2**30:.2f}")
        host, gpu = estimate_zero3_model_states_mem_needs(weights, largest, local, hosts, offload, offload, True, 1.5)[
            :2
        ]
        print(f"  ZeRO-3{' with offload' if offload else ''}: {host / 2**30:.2f}, {gpu / 2**30:.2f}")
    print(
        f"one batch: loss {line['loss']:.4f}, validation loss {validation_loss:.4f}, {line['step_seconds']:.2f} s, "
        f"{line['memory_gib']:.2f} GiB in use. Nothing was written to {trainer.run.out}."
    )
