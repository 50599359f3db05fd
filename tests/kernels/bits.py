"""What the kernels are compared with and on: the torch rule, on numbers of every kind, in memory at every alignment."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from balanced_adam import packed, rule
from balanced_adam.kernels.table import Update, Variant, scalars
from tests.kernels.build import emulated

DTYPES = {0: None, 1: torch.float32, 2: torch.bfloat16, 3: torch.float16}
MASTER = [Variant(1, grad, copy, False) for grad in (1, 2, 3) for copy in (0, 1, 2, 3)]
IN_PLACE = [Variant(2, 2, 0, False), Variant(3, 3, 0, False)]
KEEP = [Variant(1, 1, copy, True, state) for copy in (0, 1, 2, 3) for state in (0, 1, 2, 3)]
PACKED = [
    Variant(param, grad, copy, False, state)
    for param, grad, copy in ((1, 1, 0), (1, 2, 2), (1, 3, 3), (2, 2, 0), (3, 3, 0))
    for state in (1, 2, 3)
]
PACKED += [Variant(1, grad, copy, False, 2) for grad, copy in ((1, 2), (1, 3), (2, 0), (3, 0))]
VARIANTS = MASTER + IN_PLACE + PACKED
"""Those that CUDA has, if not every combination with a packed state; the CPU has KEEP as well."""
WORDS = (torch.float32, torch.int32, torch.bfloat16, torch.uint8)
SIZES = (1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1027)
BETAS = [(0.95, 0.95), (0.9, 0.999)]


class Setting(NamedTuple):
    """The hyper-parameters of a step."""

    lr: float = 1e-2
    betas: rule.Betas = (0.95, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    maximize: bool = False


class State(NamedTuple):
    """Everything a kernel reads or writes."""

    param: Tensor
    grad: Tensor
    first: Tensor
    second: Tensor | None
    copy: Tensor | None
    factor: Tensor | None

    def clone(self, shift: int = 0) -> State:
        """The same, at other addresses: ``shift`` elements past a multiple of 64 bytes."""
        return State._make(None if t is None else placed(t, shift) for t in self)


def placed(values: Tensor, shift: int) -> Tensor:
    size = values.element_size()
    buffer = torch.zeros(values.numel() * size + 64 * (1 + size), dtype=torch.uint8)
    start = -buffer.data_ptr() % 64 + shift * size
    place = buffer[start : start + values.numel() * size].view(values.dtype)
    place.copy_(values)
    return place


def awkward(size: int, generator: torch.Generator) -> Tensor:
    """Numbers over the whole range of float32; of eight, one is a zero, a denormal, an infinity, a NaN or huge."""
    x = torch.randn(size, generator=generator) * 10.0 ** torch.randint(-25, 4, (size,), generator=generator)
    tiny = torch.finfo(torch.float32).tiny
    strange = torch.tensor(
        [0.0, -0.0, tiny, tiny / 3, -tiny / 1000, 1e-45, 3e19, -1e38, torch.inf, -torch.inf, torch.nan]
    )
    which = torch.randint(0, len(strange) * 8, (size,), generator=generator)
    return torch.where(which < len(strange), strange[which.clamp(max=len(strange) - 1)], x)


def first(variant: Variant, size: int, seed: int, factor: float | None = 0.37, *, tame: bool = False) -> State:
    """A state before its first step."""
    generator = torch.Generator().manual_seed(seed)
    param = torch.randn(size, generator=generator).to(DTYPES[variant.param])
    copy = None if variant.copy == 0 else torch.zeros(size, dtype=DTYPES[variant.copy])
    zeros = torch.zeros(size, dtype=WORDS[variant.state])
    second = None if variant.state else torch.zeros(size)
    grad = gradient(variant, size, seed, tame=tame)
    return State(param, grad, zeros, second, copy, None if factor is None else torch.tensor([factor]))


def gradient(variant: Variant, size: int, seed: int, *, tame: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    values = torch.randn(size, generator=generator) if tame else awkward(size, generator)
    return values.to(DTYPES[variant.grad])


def expected(state: State, setting: Setting, step: int, keep: bool = False) -> State:
    """The state after a step of the torch rule."""
    scaled = state.grad.float() * (1.0 if state.factor is None else state.factor)
    second: Tensor | None = None
    if state.second is None:
        param, first = packed.update(state.param, scaled, state.first, step=step, **setting._asdict())
    else:
        param, first, second = rule.update(
            state.param, scaled, state.first, state.second, step=step, **setting._asdict()
        )
    copy = None if state.copy is None else param.to(state.copy.dtype)
    return State(param, scaled if keep else state.grad, first, second, copy, state.factor)


def update(state: State, setting: Setting, step: int, keep: bool = False) -> Update:
    return Update(
        state.param,
        state.grad,
        state.first,
        state.second,
        scalars(step, **setting._asdict()),
        copy=state.copy,
        factor=state.factor,
        keep=keep,
    )


def same(ours: State, control: State) -> bool:
    """Bit for bit, but that one NaN is as good as another; words are no numbers."""
    pairs = zip(ours._replace(first=_bits(ours.first)), control._replace(first=_bits(control.first)), strict=True)
    return all(_same(a, b) for a, b in pairs if a is not None and b is not None)


def _bits(first: Tensor) -> Tensor:
    return first.view(torch.int16) if first.dtype == torch.bfloat16 else first


def _same(a: Tensor, b: Tensor) -> bool:
    integer = {4: torch.int32, 2: torch.int16, 1: torch.int8}[a.element_size()]
    return a.dtype == b.dtype and bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


Run = Callable[[Update], None]


def emulated_flat(update: Update) -> None:
    """The flat CUDA kernel, in small blocks."""
    emulated(update.variant).emulate_flat(update.row(), ctypes.c_longlong(64))


def emulated_multi(update: Update) -> None:
    """The multi-tensor CUDA kernel: the tensor goes in as three, cut at odd places."""
    size = update.grad.numel()
    cuts = sorted({0, size // 3, min(2 * (size // 3) + 1, size), size})
    chunk, chunks, rows = 64, 0, []
    for begin, end in pairwise(cuts):
        piece = update._replace(grad=update.grad[begin:end], offset=begin)
        rows.append(piece.row(chunks))
        chunks += -(-(end - begin) // chunk)
    table = b"".join(rows)
    emulated(update.variant).emulate_multi(table, ctypes.c_longlong(len(rows)), ctypes.c_longlong(chunk), chunks)


def runs(
    state: State, setting: Setting, steps: int, variant: Variant, size: int, run: Run, seed: int
) -> Iterator[bool]:
    """Step after step, whether the kernel's state is the rule's; ``state`` is the kernel's."""
    control = state.clone()
    for step in range(1, steps + 1):
        grad = gradient(variant, size, seed + step, tame=seed % 2 == 0)
        state.grad.copy_(grad)
        control = expected(control._replace(grad=grad), setting, step, variant.keep)
        run(update(state, setting, step, variant.keep))
        yield same(state, control)
