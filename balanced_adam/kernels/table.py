"""What a kernel gets: one :class:`Update` per tensor (or piece of one), packed as ``Row`` of ``rule.h``."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from balanced_adam import dtensor, packed, rule

DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
"""The dtypes that kernels take, with their numbers in ``rule.h``."""
NO_DTYPE = 0
STATES = {torch.float32: 0, torch.int32: 1, torch.bfloat16: 2, torch.uint8: 3}
"""The dtypes that moments are stored in, with the number that the CPU kernel has for them."""

_POINTERS = struct.Struct("@6P2q")  # param, grad, copy, first, second, factor, size, first_chunk
_SCALARS = struct.Struct("@10fI4x")
_RECIPE = struct.Struct("@2P6d")
ROW_SIZE = _POINTERS.size + _SCALARS.size


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in any of the usual orders."""
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


class KernelUnavailable(RuntimeError):
    """There is no kernel for this device; the message says why."""


class Variant(NamedTuple):
    """What a kernel is compiled for: dtypes by their numbers, whether the scaled gradient is kept, and how moments are
    stored."""

    param: int
    grad: int
    copy: int
    keep: bool
    state: int = 0


class Recipe(NamedTuple):
    """What the scalars of a step are made from on the device itself, so that a CUDA graph can be replayed."""

    step: Tensor
    """The step count, one float32 on the device, before this step. The kernel advances it."""
    lr: float | Tensor
    """A number, or one float32 on the device."""
    betas: rule.Betas
    eps: float
    weight_decay: float
    maximize: bool

    def pack(self) -> bytes:
        """``Recipe`` of ``rule.h``."""
        on_device = isinstance(self.lr, Tensor)
        return _RECIPE.pack(
            self.step.data_ptr(),
            self.lr.data_ptr() if isinstance(self.lr, Tensor) else 0,
            0.0 if on_device else self.lr,
            *self.betas,
            self.eps,
            self.weight_decay,
            -1.0 if self.maximize else 1.0,
        )


class Update(NamedTuple):
    """One step of a tensor, or of a piece of one. All tensors are dense, on one device, and in the same memory
    order."""

    param: Tensor
    """The weights: float32, or bfloat16 or float16 with a gradient of the same dtype."""
    grad: Tensor
    """The gradient of ``param``'s elements ``offset`` to ``offset + grad.numel()``, in memory order."""
    first: Tensor
    """``exp_avg`` in float32, or the words of both moments (:mod:`balanced_adam.packed`); as many elements as
    ``param``."""
    second: Tensor | None
    """``exp_avg_sq``; None with packed words."""
    scalars: bytes | Recipe
    """From :func:`scalars`; or a recipe, on CUDA and for whole tensors only; or nothing, where none are read."""
    offset: int = 0
    copy: Tensor | None = None
    """Where the new weights go a second time, in this tensor's dtype; as many elements as ``param``."""
    factor: Tensor | None = None
    """One float32 on the same device; multiplies the gradient."""
    keep: bool = False
    """Store factor * gradient in place of the gradient (float32 on CPUs only)."""

    @classmethod
    def of(cls, param: Tensor, grad: Tensor, moments: dict[str, Tensor], scalars: bytes | Recipe) -> Update:
        """The step of a whole parameter, from the tensors that hold its moments by name."""
        first, *second = moments.values()
        return cls(param, grad, first, second[0] if second else None, scalars)

    @property
    def variant(self) -> Variant:
        """What its kernel has to be compiled for."""
        copy = NO_DTYPE if self.copy is None else DTYPES[self.copy.dtype]
        return Variant(DTYPES[self.param.dtype], DTYPES[self.grad.dtype], copy, self.keep, STATES[self.first.dtype])

    def check(self) -> None:
        """See that the kernel reads and writes within these tensors, and takes each for what it is.

        Raises:
            ValueError: naming the tensor, where one has another size, dtype, device or layout than the parameter asks
                for.
        """
        param, grad, first, second, copy, factor = (
            self.param, self.grad, self.first, self.second, self.copy, self.factor
        )  # fmt: skip
        whole, here = param.numel(), param.device
        if param.dtype not in DTYPES or grad.dtype not in DTYPES or first.dtype not in STATES:
            raise ValueError(
                f"the parameter is {param.dtype}, its gradient {grad.dtype} and its state {first.dtype}; no kernel "
                "takes these."
            )
        if (second is None) is (first.dtype is torch.float32):
            raise ValueError(f"the state is {first.dtype} {'without' if second is None else 'with'} a second moment.")
        if param.dtype is not torch.float32 and (grad.dtype is not param.dtype or copy is not None or self.keep):
            raise ValueError(
                f"the parameter is {param.dtype}; its gradient must be so too, and it has no copy and keeps none."
            )
        if copy is not None and copy.dtype not in DTYPES:
            raise ValueError(f"the copy is {copy.dtype}; no kernel writes that.")
        if self.keep and grad.dtype is not torch.float32:
            raise ValueError(f"the gradient is {grad.dtype}; only a float32 one can be kept.")
        if not 0 <= self.offset <= whole - grad.numel():
            raise ValueError(
                f"the gradient has {grad.numel()} elements from element {self.offset} on, and its parameter {whole}."
            )
        for name, tensor in (("state", first), ("second moment", second), ("copy", copy)):
            if tensor is not None and tensor.numel() != whole:
                raise ValueError(
                    f"the {name} has {tensor.numel()} elements, and its parameter {whole}; has it been given other "
                    "data?"
                )
        if factor is not None and (factor.numel() != 1 or factor.dtype is not torch.float32):
            raise ValueError(f"the factor is {factor.numel()} elements of {factor.dtype}; it must be one float32.")
        if second is not None and second.dtype is not first.dtype:
            raise ValueError(f"the second moment is {second.dtype}, and the first {first.dtype}.")
        self._check_memory(here)
        if factor is not None and factor.device != here:
            raise ValueError(f"the factor is on {factor.device}, and its parameter on {here}.")

    def _check_memory(self, here: torch.device) -> None:
        """See that the tensors of elements are plain ones with memory on this device, without gaps."""
        for name, tensor in (
            ("parameter", self.param),
            ("gradient", self.grad),
            ("state", self.first),
            ("second moment", self.second),
            ("copy", self.copy),
        ):
            if tensor is None:
                continue
            if tensor.device != here or here.type == "meta":
                raise ValueError(f"the {name} is on {tensor.device}, and its parameter on {here}.")
            if dtensor.is_opaque(tensor) or dtensor.is_dtensor(tensor):
                raise ValueError(f"the {name} is a {type(tensor).__name__}; a kernel takes plain tensors.")
            if tensor.data_ptr() == 0 and tensor.numel():
                raise ValueError(f"the {name} has {tensor.numel()} elements and no memory.")
            if not is_dense(tensor):
                raise ValueError(
                    f"the {name} has gaps in memory: its shape is {tuple(tensor.shape)}, its strides {tensor.stride()}."
                )

    def row(self, first_chunk: int = 0) -> bytes:
        """``Row`` of ``rule.h``; of tensors that :meth:`check` has seen."""
        at = self.offset
        copy, factor, second = self.copy, self.factor, self.second
        return _POINTERS.pack(
            self.param.data_ptr() + at * self.param.element_size(),
            self.grad.data_ptr(),
            0 if copy is None else copy.data_ptr() + at * copy.element_size(),
            self.first.data_ptr() + at * self.first.element_size(),
            0 if second is None else second.data_ptr() + at * second.element_size(),
            0 if factor is None else factor.data_ptr(),
            self.grad.numel(),
            first_chunk,
        ) + (self.scalars if isinstance(self.scalars, bytes) else b"").ljust(_SCALARS.size, b"\0")


@lru_cache(maxsize=64)  # the parameters of a group are alike
def scalars(
    step: int,
    lr: float,
    betas: rule.Betas,
    eps: float,
    weight_decay: float,
    maximize: bool,
    corrected: int | None = None,
) -> bytes:
    """``Scalars`` of ``rule.h`` for step number ``step``: worked out in double, rounded once.

    Bias correction is that of step number ``corrected``, if it is another (:mod:`balanced_adam.bias_correction`).
    """
    beta1, beta2 = betas
    correction = rule.bias_correction(step if corrected is None else corrected, betas, eps)
    return _SCALARS.pack(
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        max(correction.eps, torch.finfo(torch.float32).tiny),
        lr * correction.scale,
        1.0 - lr * weight_decay,
        -1.0 if maximize else 1.0,
        0.0 if beta1 == beta2 else -1.0,
        1.0 / correction.scale,
        packed.start(step),
    )
