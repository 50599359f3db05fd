"""torch.distributed.checkpoint: what two ranks, or AdamW, have saved loads on any number of ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

pytest.importorskip("torch", "2.6", reason="before torch 2.6 FSDP2 and DTensor have no public names")
from torch.distributed.fsdp import fully_shard

from balanced_adam import BalancedAdam
from balanced_adam.state import FORMATS
from tests import session
from tests.optimizer.layouts import (
    STEPS,
    Weights,
    assert_same,
    everything,
    gradient,
    in_one_process,
    like,
    optimizer_of,
    several,
    sharded,
    take,
)
from tests.ranks import device, spawn

pytestmark = pytest.mark.ranks


def save(folder: str) -> Any:
    """Job: save every format after all steps, through torch.distributed.checkpoint and as one whole state dict."""
    result = {}
    for state in FORMATS:
        model = sharded(Weights(), "fully_shard 2")
        optimizer = optimizer_of(model, state)
        take(model, optimizer, range(STEPS))
        result[state] = everything(model, optimizer)
        state_dict_saver.save(
            {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)},
            checkpoint_id=f"{folder}/{state}",
        )
        saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
        if dist.get_rank() == 0:
            torch.save(saved, f"{folder}/{state}.pt")
    return result


LOADS = ("sharded", "whole on rank 0", "unsharded")


def load(folder: str) -> Any:
    """Job: in every way, load each format into an optimizer that has never stepped, and take one more step."""
    result: dict[str, Any] = {}
    world = dist.get_world_size()
    for way in LOADS[: 3 if world == 1 else 2]:
        for state in FORMATS:
            model = Weights()
            with torch.no_grad():
                for param in model.parameters():
                    param.zero_()
            if way != "unsharded":
                fully_shard(model, mesh=init_device_mesh(device(world), (world,)))
            optimizer = optimizer_of(model, state)
            content = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
            state_dict_loader.load(content, checkpoint_id=f"{folder}/{state}")
            model.load_state_dict(content["model"])
            options = StateDictOptions()
            if way == "whole on rank 0":
                file = f"{folder}/{state}.pt"
                content["optimizer"] = torch.load(file, weights_only=True) if dist.get_rank() == 0 else {}
                options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_optimizer_state_dict(model, optimizer, content["optimizer"], options=options)
            loaded = everything(model, optimizer)
            take(model, optimizer, range(STEPS, STEPS + 1))
            result[f"{way} {state}"] = loaded, everything(model, optimizer)
    return result


@session.shared
def saved() -> list[list[Any]]:
    """What each of two ranks held when it saved, and what it made of a checkpoint of AdamW's."""
    folder = session.folder() / "sharded"
    folder.mkdir()
    return spawn(several, 2, [(save, str(folder)), (from_adamw, str(folder))])


@session.shared
def loaded_on(world: int) -> list[Any]:
    """What each rank of so many has loaded of what two have saved."""
    saved()
    return spawn(load, world, str(session.folder() / "sharded"))


@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize(
    ("world", "way"), [(1, "unsharded"), *((world, way) for world in (1, 2, 3) for way in LOADS[:2])]
)
def test_a_distributed_checkpoint_of_two_ranks_loads_on_any_number(world: int, way: str, state: str) -> None:
    held = saved()[0][0][state]
    expected, _ = in_one_process(state, STEPS + 1)
    for results in loaded_on(world):
        loaded, after = results[f"{way} {state}"]
        assert_same(loaded, held)
        assert_same(after, expected)


def from_adamw(folder: str) -> list[float]:
    """Job: AdamW saves after six steps at 0.9; what each way of loading it makes of the product of betas."""
    model = sharded(Weights(), "fully_shard 2")
    theirs = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.9))
    for step in range(STEPS):
        for name, param in model.named_parameters():
            param.grad = like(param, gradient(name, step))
        theirs.step()
    state_dict_saver.save({"optimizer": get_optimizer_state_dict(model, theirs)}, checkpoint_id=f"{folder}/adamw")
    whole_state = get_optimizer_state_dict(model, theirs, options=StateDictOptions(full_state_dict=True))
    products = []
    theirs.zero_grad()  # else torch makes no state to load into
    for way in ("partial", "whole"):
        optimizer = BalancedAdam(model.parameters(), betas=0.95)
        content = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        options = StateDictOptions()
        if way == "partial":
            planner = DefaultLoadPlanner(allow_partial_load=True)
            state_dict_loader.load(content, checkpoint_id=f"{folder}/adamw", planner=planner)
        else:
            content["optimizer"] = whole_state if dist.get_rank() == 0 else {}
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(model, optimizer, content["optimizer"], options=options)
        products.append(optimizer.state[next(model.parameters())]["log_beta_product"])
    return products


def test_what_adamw_has_saved_counts_as_taken_at_its_betas() -> None:
    for _, products in saved():
        assert products == pytest.approx([STEPS * math.log(0.9)] * 2, rel=1e-14)
