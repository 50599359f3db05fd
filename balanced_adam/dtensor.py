"""Parameters that are DTensors, as FSDP2's ``fully_shard`` and tensor parallelism make them: each rank steps its own
part.

The rule works element by element, so a part steps as it would within the whole tensor. State is made of DTensors placed
as their parameter, so that torch.distributed.checkpoint shards it anew for any number of ranks. No arithmetic is done
on DTensors themselves: in torch 2.13 their ``>>`` and ``<<`` by a number return the operand unchanged.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_PLAIN = (Tensor, torch.nn.Parameter)
_PLACES = ("torch.distributed.tensor", "torch.distributed._tensor")  # the latter up to torch 2.4


def is_dtensor(tensor: Any) -> bool:
    """Whether it is one."""
    if type(tensor) in _PLAIN:
        return False
    module = _module()
    return module is not None and isinstance(tensor, module.DTensor)


def is_opaque(tensor: Tensor) -> bool:
    """Whether its class, which is not DTensor, decides what operations on it do."""
    if type(tensor) in _PLAIN:
        return False
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not is_dtensor(tensor)


def _module() -> Any:
    """The one that has DTensor. None unless somebody has imported it, which takes half a second: then there is no
    DTensor either."""
    return next((m for name in _PLACES if hasattr(m := sys.modules.get(name), "DTensor")), None)


def local(tensor: Tensor) -> Tensor:
    """This rank's part, which shares memory with it; any other tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        part = cast("DTensor", tensor).to_local()
    return part.wait() if hasattr(part, "wait") else part  # of a collective that is under way


@torch.no_grad()
def placed_as(param: Tensor, part: Tensor) -> Tensor:
    """What has ``part`` as this rank's part, placed as the parameter; ``part`` itself where that is no DTensor."""
    if not is_dtensor(param):
        return part
    # Not from_local, which moves the part to the mesh's device: FSDP2 may keep parameters on the CPU.
    whole = torch.empty_like(param, dtype=part.dtype)
    local(whole).copy_(part)
    return whole


@torch.no_grad()
def distributed_as(param: Tensor, value: Tensor) -> Tensor:
    """``value``, which every rank has whole or which lies otherwise on the parameter's mesh, placed as the
    parameter."""
    if not is_dtensor(param):
        return value
    like = cast("DTensor", param)
    if is_dtensor(value) and cast("DTensor", value).placements == like.placements:
        return value
    if not is_dtensor(value):  # every rank cuts its part from what it has
        everywhere = [_module().Replicate()] * like.device_mesh.ndim
        value = _module().DTensor.from_local(value, like.device_mesh, everywhere, run_check=False)
    return placed_as(param, local(cast("DTensor", value).redistribute(like.device_mesh, like.placements)))


def obstacle(param: Tensor, other: Tensor | None = None) -> str | None:
    """Why ``param`` can't be stepped, alone or with ``other`` as its gradient, in a sentence; None if it can.

    Sums that are still spread over the ranks (``Partial``) are refused: the square of a part is no part of the square.
    """
    for name, tensor in (("parameter", param), ("gradient", other)):
        if (
            tensor is not None
            and is_dtensor(tensor)
            and any(p.is_partial() for p in cast("DTensor", tensor).placements)
        ):
            return (
                f"a {name} of shape {tuple(tensor.shape)} is a DTensor placed as {cast('DTensor', tensor).placements}, "
                "and Partial is a sum that has not been taken yet; redistribute it to Shard or Replicate first."
            )
    if other is None or not (is_dtensor(param) or is_dtensor(other)):
        return None
    if is_dtensor(param) and is_dtensor(other):
        theirs, ours = cast("DTensor", other), cast("DTensor", param)
        if theirs.placements == ours.placements and theirs.device_mesh == ours.device_mesh:
            return None
    return (
        f"the gradient of a parameter of shape {tuple(param.shape)} is {_place(other)}, and the parameter "
        f"{_place(param)}; redistribute the gradient to the parameter's placements."
    )


def refuses(param: Tensor, value: Tensor) -> str | None:
    """Why a loaded ``value`` can't become state of ``param``, in a sentence; None if it can."""
    if is_dtensor(value) and any(p.is_partial() for p in cast("DTensor", value).placements):
        return f"the loaded state has a DTensor placed as {cast('DTensor', value).placements}; redistribute it first."
    if is_dtensor(value) and not is_dtensor(param):
        return (
            "the loaded state has a DTensor, and its parameter is a plain tensor; load it through "
            "torch.distributed.checkpoint, or give its full_tensor()."
        )
    if is_dtensor(value) and cast("DTensor", value).device_mesh != cast("DTensor", param).device_mesh:
        return (
            f"the loaded state has a DTensor on {cast('DTensor', value).device_mesh}, and its parameter is on "
            f"{cast('DTensor', param).device_mesh}; load it through torch.distributed.checkpoint."
        )
    return None


def _place(tensor: Tensor) -> str:
    if not is_dtensor(tensor):
        return "a plain tensor"
    return f"placed as {cast('DTensor', tensor).placements} on {cast('DTensor', tensor).device_mesh}"
