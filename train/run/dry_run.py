"""A dry run: one training and one validation batch, and an estimate of the memory needed."""

from __future__ import annotations

import os

from train.run.trainer import Trainer


def dry_run(trainer: Trainer) -> None:
    """Run one training and one validation batch, and print DeepSpeed's memory estimates for each ZeRO stage."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    line = trainer.train_step()
    ranks, weights = trainer.ranks, trainer.parameters
    validation_loss = trainer.validate()["validation_loss"]
    if not ranks.is_main:
        return
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
