"""BalancedAdam by name in a plain DeepSpeed script, Transformers' Trainer and Accelerate: two real ranks each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.compare import RANK_VARIABLES
from train.ranks import free_port

HERE = Path(__file__).parent
PARAMETERS = {
    "trainer": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    "accelerated": {"lr": 1e-3, "betas": 0.95},
}


@pytest.mark.ranks
@pytest.mark.parametrize("script", ["plain_deepspeed", "trainer", "accelerated"])
def test_two_ranks_train_with_it_under_zero_2(script: str, tmp_path: Path) -> None:
    ds_config = tmp_path / "ds.json"
    optimizer = {"type": "BalancedAdam", "params": PARAMETERS.get(script, {})}
    sizes = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}
    ds_config.write_text(json.dumps({**sizes, "zero_optimization": {"stage": 2}, "optimizer": optimizer}))
    arguments = {"plain_deepspeed": [], "trainer": [str(tmp_path), str(ds_config)], "accelerated": [str(ds_config)]}
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    # DeepSpeed compiles an op for its inference at the first start on CPU; a folder of our own, so that tests don't race.
    environment |= {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(HERE.parent.parent / "build" / "extensions")}
    done = subprocess.run(
        [*line, str(HERE / f"{script}.py"), *arguments[script]],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    # A thread of gloo may abort a CPU process that has done everything, while Python is finalizing; see train.ranks.leave.
    assert done.returncode == 0 or "terminate called without an active exception" in done.stderr, done.stderr[-3000:]
    assert done.stdout.count("USED ('BalancedAdam', 2, 2, 5)\n") == 2, done.stdout
