"""BalancedAdam by name in a plain DeepSpeed script, Transformers' Trainer and Accelerate: two real ranks each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.compare import RANK_VARIABLES
from train.ranks import free_port
from train.settings import REPOSITORY

HERE = Path(__file__).parent


@pytest.mark.ranks
@pytest.mark.parametrize("script", ["plain_deepspeed", "trainer", "accelerated"])
def test_two_ranks_train_with_it_under_zero_2(script: str, tmp_path: Path) -> None:
    for_accelerate = tmp_path / "ds.json"
    optimizer = {"type": "BalancedAdam", "params": {"lr": 1e-3, "betas": 0.95}}
    sizes = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}
    for_accelerate.write_text(json.dumps({**sizes, "zero_optimization": {"stage": 2}, "optimizer": optimizer}))
    arguments = {
        "plain_deepspeed": [],
        "trainer": [str(tmp_path), str(REPOSITORY / "ds_configs" / "zero2.json")],  # it fills in every "auto"
        "accelerated": [str(for_accelerate)],
    }
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    # DeepSpeed compiles an op for its inference at the first start on CPU; a folder of our own, so that tests don't race.
    environment |= {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(REPOSITORY / "build" / "extensions")}
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
