"""Tensors that DeepSpeed works on in place of others while a step is taken in one pass.

Both are tensors, whatever DeepSpeed does to them, and both notice it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from balanced_adam.zero.partitions import Slot


class GradientStandIn(Tensor):
    """A flat gradient without memory: its size, dtype and device, and no values.

    DeepSpeed sets it as ``.grad`` and hands it on to its own methods. Whatever asks for its values, or changes them,
    is refused: it would be computed from nothing.
    """

    @staticmethod
    def of(master: Tensor) -> GradientStandIn:
        """As large as ``master``, and one element of memory."""
        return (
            torch.zeros(1, dtype=master.dtype, device=master.device).expand(master.numel()).as_subclass(GradientStandIn)
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function in _SAME:
                return args[0]
            if function is Tensor.to:
                if args[0].as_subclass(Tensor).to(*args[1:], **(kwargs or {})).dtype == args[0].dtype:
                    return args[0]
            elif function in _ABOUT:
                return function(*args, **(kwargs or {}))
        raise RuntimeError(
            f"something calls {getattr(function, '__name__', function)} on the flat gradient of a ZeRO step, which did "
            "not happen in the step that was checked; set fused_zero to false in the optimizer's params, and "
            "DeepSpeed's own passes take the step."
        )


_SAME = (Tensor.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
_ABOUT = (
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "layout", "ndim", "is_cuda", "is_cpu")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf", "is_sparse", "itemsize")),
    Tensor.numel,
    Tensor.nelement,
    Tensor.size,
    Tensor.dim,
    Tensor.element_size,
    Tensor.is_floating_point,
)


class WeightsInStep(Tensor):
    """16-bit weights into which DeepSpeed will copy their master: the same memory, and it tells when that happens."""

    _copied: Callable[[Tensor], bool]

    @staticmethod
    def install(slot: Slot, copied: Callable[[Tensor], bool]) -> None:
        """Put one in the place of the weights there, until they are copied into.

        Args:
            slot: where DeepSpeed finds the weights.
            copied: is given the source of the copy; returns whether it shall not be made.
        """
        plain = slot.tensor

        def once(source: Tensor) -> bool:
            slot.put(plain)
            return copied(source)

        in_step = plain.as_subclass(WeightsInStep)
        in_step._copied = once
        slot.put(in_step)

    @staticmethod
    def remove(slot: Slot) -> None:
        """Put the weights back, if they haven't been copied into."""
        if isinstance(slot.tensor, WeightsInStep):
            slot.put(slot.tensor.as_subclass(Tensor))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            if function is Tensor.copy_ and isinstance(args[0], cls) and args[0]._copied(args[1]):
                return args[0]
            return function(*_plain(args), **(kwargs or {}))


def _plain(value: Any) -> Any:
    if isinstance(value, WeightsInStep):
        return value.as_subclass(Tensor)
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value
