"""What a dry run says of a run's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.conftest import Make
from tests.perf.scaling import model_states
from train.common.files import REPOSITORY
from train.run import deepspeed_config, model
from train.run.memory import Memory, estimate


def estimated(make: Make, *more: str, world: int = 2, chunked: bool = False) -> Memory:
    run = make(*more)
    config = model.configuration(run.model, 384, run.data.sequence_length)
    return estimate(run, config, deepspeed_config.resolve(run, world, False), world, chunked)


@pytest.mark.parametrize("state", ["fp32", "packed16", "packed8"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_model_states_are_those_of_the_formula(make: Make, stage: int, state: str) -> None:
    ds_config = str(REPOSITORY / "ds_configs" / f"zero{stage}.json")
    memory = estimated(make, "--ds-config", ds_config, "--precision", "bf16", "--state", state)
    weights = 451_200
    expected = model_states(stage, weights, 2, {"fp32": 8, "packed16": 2, "packed8": 1}[state])
    assert memory[:4] == expected
    assert (memory.layer > 0) == (stage == 3) and memory.total == sum(memory)


def saved_by(network: Any, tokens: torch.Tensor) -> int:
    """Bytes that autograd keeps of a real step, by the addresses of what it keeps."""
    kept: dict[int, torch.Tensor] = {}
    weights = {parameter.data_ptr() for parameter in network.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(input_ids=tokens, labels=tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps_of_a_step(make: Make, precision: str, checkpointing: bool) -> None:
    more = ["--precision", precision, "--batch", "8", "--sequence-length", "64"]
    memory = estimated(make, *more, *(["--activation-checkpointing"] if checkpointing else []))
    run = make(*more)
    network = model.empty(model.configuration(run.model, 384, 64)).train()
    network = network.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    if checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.zeros((4, 64), dtype=torch.int64)
    logits = tokens.numel() * 384
    whole = saved_by(network, tokens)
    assert memory.activations == pytest.approx(whole - 4 * logits, rel=0.1)
    assert memory.logits == 12 * logits


def test_chunks_and_offload_take_their_parts_away(make: Make) -> None:
    full, chunked = (
        estimated(make, "--sequence-length", "1000", "--batch", "256", chunked=way) for way in (False, True)
    )
    assert full.logits == 12 * 128 * 1000 * 384 and chunked.logits == 12 * 2**24
    assert full._replace(logits=0) == chunked._replace(logits=0)
    away = estimated(make, "--ds-config", str(REPOSITORY / "ds_configs" / "zero2-offload.json"), "--precision", "bf16")
    here = estimated(make, "--ds-config", str(REPOSITORY / "ds_configs" / "zero2.json"), "--precision", "bf16")
    assert away.offloaded == here.master + here.state and away.total == here.total - away.offloaded


def test_a_second_copy_of_the_weights_on_each_host_is_counted(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}')
    once = estimated(make, "--ds-config", str(REPOSITORY / "ds_configs" / "zero3.json"), world=4)
    twice = estimated(make, "--ds-config", str(file), world=4)
    assert twice == once._replace(weights=once.weights + 4 * 451_200 / 2)
