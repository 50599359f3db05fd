"""What DeepSpeed's ZeRO does with a BalancedAdam, tried: a small engine of one rank for each stage, for two steps.

``torchrun --nproc-per-node 1 -m balanced_adam.zero.trial``, as ``python -m balanced_adam`` starts it.
"""

from __future__ import annotations

import logging
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "ZeRO-1": {"zero_optimization": {"stage": 1}},
    "ZeRO-2": {"zero_optimization": {"stage": 2}},
    "ZeRO-2, offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "ZeRO-3": {"zero_optimization": {"stage": 3}},
    "ZeRO-3, offload": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
    "ZeRO-1, fp32 accumulation": {
        "zero_optimization": {"stage": 1},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
}
"""The main ways, in bf16: entries of a ds_config."""


def main() -> None:
    """Print each configuration, and how its second step was taken: in one pass, or why not."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if get_accelerator().device_name() == "cpu":  # else DeepSpeed compiles it, for its inference
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(get_accelerator().communication_backend_name(), auto_mpi_discovery=False, verbose=False)
    for name, entries in CONFIGURATIONS.items():
        try:
            with redirect_stdout(StringIO()):  # DeepSpeed prints how much memory it uses
                taken = _trial(entries)
        except Exception as error:  # whatever this DeepSpeed runs into
            taken = f"fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(f"  {name}: {taken}", flush=True)
    torch.distributed.destroy_process_group()


def _trial(entries: dict[str, Any]) -> str:
    import deepspeed

    from balanced_adam.zero.decision import Plan, decision
    from balanced_adam.zero.partitions import stage

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "BalancedAdam", "params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        **entries,
    }
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
    try:
        for _ in range(2):
            engine.backward(engine(torch.ones(1, 8, device=engine.device, dtype=torch.bfloat16)).float().sum())
            engine.step()
        if stage(engine.optimizer) is None:
            return f"not there: DeepSpeed makes a {type(engine.optimizer).__name__}"
        taken = decision(engine.optimizer)
        return "one pass" if taken.plan is Plan.ONE_PASS else f"DeepSpeed's own passes: {taken.obstacle}"
    finally:
        engine.destroy()


if __name__ == "__main__":
    main()
