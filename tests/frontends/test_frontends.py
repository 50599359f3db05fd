"""BalancedAdam by name in a plain DeepSpeed script, Transformers' Trainer and Accelerate: two real ranks each."""

import json
from pathlib import Path

import pytest
import torch

from balanced_adam import BalancedAdam
from tests.frontends import import_order
from tests.ranks import Program, environment, start
from train.common.files import REPOSITORY


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
    # DeepSpeed compiles an op for its inference at the first start on CPU: in a folder of our own, lest tests race.
    settings = environment(DS_ACCELERATOR="cpu", TORCH_EXTENSIONS_DIR=str(REPOSITORY / "build" / "extensions"))
    program = Program(f"tests.frontends.{script}", arguments[script], settings, tmp_path / "log", world=2)
    started = start(program, fresh=script == "plain_deepspeed")  # as a user starts it
    # A thread of gloo may abort a CPU process that has done everything, while Python is finalizing;
    # see train.distributed.launch.exit_process.
    code, said = started.wait(), started.said()
    assert code == 0 or "terminate called without an active exception" in said, said[-3000:]
    assert said.count("USED ('BalancedAdam', 2, 2, 5)\n") == 2, said


@pytest.mark.ranks
@pytest.mark.parametrize("order", import_order.ORDERS)
def test_deepspeed_may_be_imported_before_or_after(order: str, tmp_path: Path) -> None:
    network = import_order.model()
    optimizer = BalancedAdam(network.parameters(), **import_order.SETTINGS, fused=False)  # type: ignore[arg-type]
    for _ in range(import_order.STEPS):
        optimizer.zero_grad()
        network(torch.tensor([[0.5, -2.0]])).sum().backward()
        optimizer.step()
    (weights,) = [weight.detach().flatten().tolist() for weight in network.parameters()]
    settings = environment(DS_ACCELERATOR="cpu")
    program = Program("tests.frontends.import_order", [order], settings, tmp_path / "log", world=2)
    started = start(program, fresh=True)  # forked ranks have imported both
    code, said = started.wait(), started.said()
    assert code == 0 or "terminate called without an active exception" in said, said[-3000:]
    assert said.count(f"CPU fused, ZeRO-1 one pass: {weights}\n") == 2, said
