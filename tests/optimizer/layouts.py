"""A small model laid out over ranks in every way that users have, and the same model in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

pytest.importorskip("torch", "2.6", reason="before torch 2.6 FSDP2 and DTensor have no public names")
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from balanced_adam import BalancedAdam
from tests.ranks import device

SHAPES = {"matrix": (7, 5), "wide": (3, 8), "long": (33,), "short": (2,), "one": (1, 1)}
"""None of them divides by 3, and on 3 and 4 ranks some shards are empty."""
STEPS, BETAS = 6, (0.9, 0.9, 0.99)  # each for two steps, the last for all that follow
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
    """The whole gradient of a parameter: small dyadic rationals, whose sums of squares are exact in any order."""
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


def optimizer_of(model: Weights, state: str, kind: type[BalancedAdam] = BalancedAdam, **more: Any) -> BalancedAdam:
    """Two groups, as users have them."""
    named = dict(model.named_parameters())
    matrices = [p for p in named.values() if p.dim() > 1]
    others = [p for p in named.values() if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return kind(groups, lr=0.1, betas=0.9, weight_decay=0.1, state=state, **more)


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
    """The bits of everything."""
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


def several(jobs: list[tuple[Any, Any]]) -> list[Any]:
    """Job: several of them in one process, since starting the ranks takes longer than they do."""
    return [job(argument) for job, argument in jobs]
