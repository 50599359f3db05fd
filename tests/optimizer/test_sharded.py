"""Parameters that are DTensors (FSDP2, tensor parallelism) and other optimizers that shard: the bits of one process."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from balanced_adam import BalancedAdam
from balanced_adam.state import FORMATS
from tests import session
from tests.ranks import device, spawn

pytestmark = pytest.mark.ranks

SHAPES = {"matrix": (7, 5), "wide": (3, 8), "long": (33,), "short": (2,), "one": (1, 1)}
"""None of them divides by 3, and on 3 and 4 ranks some shards are empty."""
STEPS, BETAS = 6, (0.9, 0.9, 0.99)  # of the last step on
LAYOUTS: dict[str, tuple[tuple[int, ...], list[Placement]]] = {
    "fully_shard 2": ((2,), [Shard(0)]),
    "fully_shard 3": ((3,), [Shard(0)]),
    "hybrid": ((2, 2), [Replicate(), Shard(0)]),
    "tensor parallel": ((2, 2), [Shard(0), Shard(-1)]),
    "replicate": ((2,), [Replicate()]),
}


class Weights(nn.Module):
    """Parameters alone: their gradients are given."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))


def gradient(name: str, step: int) -> Tensor | None:
    """The whole gradient of a parameter in a step; small dyadic rationals, so that sums of squares are exact in any order."""
    if (name, step) == ("wide", 2):
        return None
    generator = torch.Generator().manual_seed(1000 * step + list(SHAPES).index(name))
    return torch.randint(-16, 17, SHAPES[name], generator=generator) / 32.0


def sharded(model: Weights, layout: str) -> Weights:
    """The model, its parameters laid out so."""
    shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh(device(dist.get_world_size()), shape)
    if layout.startswith("fully_shard"):
        fully_shard(model, mesh=mesh)
    elif layout == "hybrid":
        fully_shard(model, mesh=init_device_mesh(mesh.device_type, shape, mesh_dim_names=("replica", "shard")))
    else:
        for name, param in list(model.named_parameters()):
            setattr(model, name, nn.Parameter(distribute_tensor(param.detach(), mesh, placements)))
    return model


def like(param: Tensor, value: Tensor | None) -> Tensor | None:
    """A whole tensor, laid out as the parameter."""
    if value is None or not isinstance(param, DTensor):
        return value
    return distribute_tensor(value.to(param.device), param.device_mesh, param.placements)


def optimizer_of(model: Weights, state: str, **more: Any) -> BalancedAdam:
    """Two groups, as users have them."""
    named = dict(model.named_parameters())
    matrices = [p for p in named.values() if p.dim() > 1]
    others = [p for p in named.values() if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return BalancedAdam(groups, lr=0.1, betas=0.9, weight_decay=0.1, state=state, **more)


def take(model: Weights, optimizer: BalancedAdam, steps: range, clip: float | None = None) -> list[Any]:
    """Take these steps; the sizes of the updates."""
    sizes = []
    for step in steps:
        for group in optimizer.param_groups:
            group["betas"] = (BETAS[min(step // 2, 2)],) * 2
        for name, param in model.named_parameters():
            param.grad = like(param, gradient(name, step))
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        sizes.append(optimizer.update_size())
    return sizes


def whole(tensor: Any) -> Any:
    """All of a tensor, on every rank; words of 16 bits by their bits, since some of them are NaN."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    if isinstance(tensor, Tensor):
        tensor = tensor.detach().cpu().clone()
        tensor = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return tensor


def everything(model: Weights, optimizer: BalancedAdam) -> dict[str, Tensor]:
    """Weights and state by name, whole."""
    result = {}
    for name, param in model.named_parameters():
        result[name] = whole(param)
        result |= {f"{name}.{key}": whole(value) for key, value in sorted(optimizer.state[param].items())}
    return result


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Of everything, the bits."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        same = torch.equal(value, right[name]) if isinstance(value, Tensor) else value == right[name]
        assert type(value) is type(right[name]) and same, name


def in_one_process(state: str, steps: int = STEPS, clip: float | None = None) -> tuple[dict[str, Tensor], list[Any]]:
    """The oracle: plain tensors, plain torch."""
    model = Weights()
    optimizer = optimizer_of(model, state, fused=False)
    sizes = take(model, optimizer, range(steps), clip)
    return everything(model, optimizer), sizes


def train(layout: str) -> Any:
    """Of each format: everything after all steps, and this rank's update sizes."""
    result = {}
    for state in FORMATS:
        model = sharded(Weights(), layout)
        optimizer = optimizer_of(model, state, fused=True)  # which insists on the kernels
        sizes = take(model, optimizer, range(STEPS), clip=0.25)
        result[state] = everything(model, optimizer), sizes
    return result


def several(jobs: list[tuple[Any, Any]]) -> list[Any]:
    """Job: several of them in one process, since starting the ranks takes longer than they do."""
    return [job(argument) for job, argument in jobs]


@session.shared
def on(world: int) -> list[dict[str, Any]]:
    """Of each rank of so many: what all jobs that need them have returned, by name."""
    jobs: dict[str, tuple[Any, Any]] = {
        name: (train, name) for name, (shape, _) in LAYOUTS.items() if torch.Size(shape).numel() == world
    }
    if world == 2:
        folder = session.folder() / "sharded"
        folder.mkdir()
        jobs |= {"save": (save, str(folder)), "refused": (refused, None), "travel": (travel, None)}
        jobs |= {"stepped between": (stepped_between, None), "from AdamW": (from_adamw, str(folder))}
        jobs |= {f"redundant {state}": (zero_redundancy, state) for state in REDUNDANT}
    return [dict(zip(jobs, results, strict=True)) for results in spawn(several, world, list(jobs.values()))]


@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtensors_have_the_bits_of_one_process(layout: str, state: str) -> None:
    shape, placements = LAYOUTS[layout]
    ranks = [results[layout][state] for results in on(torch.Size(shape).numel())]
    expected, sizes = in_one_process(state, clip=0.25)
    for values, _ in ranks:
        assert_same(values, expected)
    copies = 2 if Replicate() in placements else 1
    for number, size in enumerate(sizes):
        of_ranks = [mine[number] for _, mine in ranks]
        assert sum(s.numel for s in of_ranks) == copies * size.numel
        assert max(s.greatest for s in of_ranks) == pytest.approx(size.greatest, rel=1e-12)
        assert sum(s.sum_of_squares for s in of_ranks) == pytest.approx(copies * size.sum_of_squares, rel=1e-6)


def save(folder: str) -> Any:
    """Save every format after all steps, through torch.distributed.checkpoint and as one whole state dict."""
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
def loaded_on(world: int) -> list[Any]:
    """What each rank of so many has loaded of what two have saved."""
    on(2)
    return spawn(load, world, str(session.folder() / "sharded"))


@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize(
    ("world", "way"), [(1, "unsharded"), *((world, way) for world in (1, 2, 3) for way in LOADS[:2])]
)
def test_a_distributed_checkpoint_of_two_ranks_loads_on_any_number(world: int, way: str, state: str) -> None:
    held = on(2)[0]["save"][state]
    expected, _ = in_one_process(state, STEPS + 1)
    for results in loaded_on(world):
        loaded, after = results[f"{way} {state}"]
        assert_same(loaded, held)
        assert_same(after, expected)


def from_adamw(folder: str) -> list[float]:
    """AdamW saves after six steps at 0.9; what each way of loading it makes of the product of betas."""
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
    for results in on(2):
        assert results["from AdamW"] == pytest.approx([STEPS * math.log(0.9)] * 2, rel=1e-14)


def refused(_: None) -> list[str]:
    """What is said of sums that haven't been taken, of gradients placed otherwise, and of state from elsewhere."""
    mesh = init_device_mesh(device(2), (2,))
    said = []

    def attempt(action: Any) -> None:
        try:
            action()
        except ValueError as error:
            said.append(str(error))

    part = torch.ones(4, 4, device=mesh.device_type)
    partial = DTensor.from_local(part, mesh, [Partial()])
    attempt(lambda: BalancedAdam([nn.Parameter(partial)]))
    param = nn.Parameter(distribute_tensor(part, mesh, [Shard(0)]))
    before = whole(param)
    optimizer = BalancedAdam([param], lr=0.1)
    for gradient in (partial, distribute_tensor(part, mesh, [Replicate()])):
        param.grad = None
        param.__dict__.pop("grad", None)
        param.grad = gradient
        attempt(optimizer.step)
    assert torch.equal(before, whole(param)) and not optimizer.state
    param.grad = distribute_tensor(part, mesh, [Shard(0)])
    optimizer.step()
    plain = BalancedAdam([nn.Parameter(part.clone())], lr=0.1)
    attempt(lambda: plain.load_state_dict(optimizer.state_dict()))
    # A state dict of one process is cut to the parameter's parts.
    plain.param_groups[0]["params"][0].grad = part.clone()
    plain.step()
    other = BalancedAdam([param], lr=0.1)
    other.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert torch.equal(whole(other.state[param]["exp_avg"]), whole(plain.state_dict()["state"][0]["exp_avg"]))
    return said


def test_what_cannot_be_stepped_in_parts_is_refused_in_a_sentence() -> None:
    said = on(2)[0]["refused"]
    assert len(said) == 4
    assert "parameter of shape (4, 4) is a DTensor placed as (Partial(sum),)" in said[0]
    assert "gradient of shape (4, 4) is a DTensor placed as (Partial(sum),)" in said[1]
    assert "placed as (Replicate(),)" in said[2] and "redistribute the gradient" in said[2]
    assert "its parameter is a plain tensor" in said[3]


REDUNDANT = ("fp32", "packed16")


def stepped_between(_: None) -> list[str]:
    """What autograd says of a step between forward and backward."""
    param = nn.Parameter(distribute_tensor(torch.ones(4, 4), init_device_mesh(device(2), (2,)), [Shard(0)]))
    optimizer = BalancedAdam([param], lr=0.1)
    said = []
    for fused in (True, False):
        optimizer = BalancedAdam([param], lr=0.1, fused=fused)
        loss = (param * param).sum()
        param.grad = torch.ones_like(param)
        optimizer.step()
        try:
            loss.backward()
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_autograd_notices_a_step_of_a_dtensor() -> None:
    said = on(2)[0]["stepped between"]
    assert len(said) == 2 and all("modified by an inplace operation" in each for each in said)


def zero_redundancy(state: str) -> Any:
    """The steps through torch's own ZeRO-1, cut, consolidated and loaded in the middle."""
    model = Weights()
    settings: dict[str, Any] = {
        "optimizer_class": BalancedAdam,
        "lr": 0.1,
        "betas": 0.9,
        "weight_decay": 0.1,
        "state": state,
    }
    optimizer = ZeroRedundancyOptimizer(model.parameters(), **settings)
    for step in range(STEPS):
        if step == 3:
            optimizer.consolidate_state_dict(to=0)
            box: list[Any] = [optimizer.state_dict() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(box)
            optimizer = ZeroRedundancyOptimizer(model.parameters(), **settings)
            optimizer.load_state_dict(box[0])
        for name, param in model.named_parameters():
            param.grad = gradient(name, step)
        optimizer.step()
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize("state", REDUNDANT)
def test_zero_redundancy_optimizer_has_the_bits_of_one_process(state: str) -> None:
    model = Weights()
    alone = BalancedAdam(model.parameters(), lr=0.1, betas=0.9, weight_decay=0.1, state=state, fused=False)
    for step in range(STEPS):
        for name, param in model.named_parameters():
            param.grad = gradient(name, step)
        alone.step()
    for results in on(2):
        assert_same(results[f"redundant {state}"], {name: param.detach() for name, param in model.named_parameters()})


EVERY_WORD = torch.arange(-(2**15), 2**15, dtype=torch.int16)


def test_every_word_of_two_bytes_travels_and_is_copied_bit_for_bit() -> None:
    for results in on(2):
        assert all(torch.equal(EVERY_WORD, value) for value in results["travel"])


def travel(_: None) -> list[Tensor]:
    """Words that rank 0 has, in every way that states travel."""
    place = device(2)
    mine = EVERY_WORD.view(torch.bfloat16).to(place)
    empty = torch.zeros_like(mine) if dist.get_rank() else mine.clone()
    dist.broadcast(empty, 0)
    gathered = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(gathered, mine)
    mesh = init_device_mesh(place, (2,))
    cut = distribute_tensor(mine, mesh, [Shard(0)])
    copied = torch.empty_like(mine).copy_(mine)
    strided = torch.empty_like(mine.view(256, 256)).copy_(mine.view(256, 256).t()).t().reshape(-1)
    return [
        t.view(torch.int16).cpu() for t in (empty, *gathered, cut.full_tensor(), copied, strided, torch.cat(mine.split(7)))
    ]  # fmt: skip
