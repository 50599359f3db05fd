"""The fused step beside pages that can't be touched: whatever tensors it gets, it refuses them or stays within them."""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from balanced_adam import BalancedAdam, kernels, packed, rule
from balanced_adam.packed import FORMATS
from tests.ranks import spawn

pytestmark = pytest.mark.ranks

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int16, torch.uint8]
SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0.1}


class Memory:
    """Tensors that begin or end at a page that must not be touched."""

    def __init__(self) -> None:
        self.mapped: list[tuple[int, int]] = []

    def put(self, values: Tensor, at_end: bool = True) -> Tensor:
        """A copy of a dense tensor there."""
        size = values.numel() * values.element_size()
        if size == 0:
            return torch.empty(0, dtype=values.dtype)
        length = (-(-size // PAGE) + 2) * PAGE
        start = LIBC.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        assert LIBC.mprotect(start, PAGE, 0) == 0 and LIBC.mprotect(start + length - PAGE, PAGE, 0) == 0
        self.mapped.append((start, length))
        begin = start + length - PAGE - size if at_end else start + PAGE
        content = (ctypes.c_char * size).from_address(begin)
        place = torch.frombuffer(content, dtype=torch.uint8).view(values.dtype).view(values.shape)
        return place.copy_(values)

    def clear(self) -> None:
        """Unmap it all."""
        for start, length in self.mapped:
            LIBC.munmap(start, length)
        self.mapped = []


def odd_one(draw: random.Random, tensor: Tensor, memory: Memory) -> Tensor:
    """Another tensor in its place: of other size, dtype, layout or device, or one whose memory is gone."""
    how = draw.choice(["size", "size", "dtype", "gaps", "empty", "meta", "no memory"])
    size = tensor.numel()
    if how == "size":
        return memory.put(
            torch.ones(max(0, size + draw.choice([-9, -1, 1, 2, 9, -size // 2, size])), dtype=tensor.dtype)
        )
    if how == "dtype":
        return memory.put(torch.ones(size, dtype=draw.choice(DTYPES)))
    if how == "meta":
        return torch.ones(size, dtype=tensor.dtype, device="meta")
    if how == "no memory":
        gone = torch.ones(size, dtype=tensor.dtype)
        gone.untyped_storage().resize_(0)
        return gone
    if how == "empty":
        return torch.empty(0, dtype=tensor.dtype)
    return memory.put(torch.ones(2 * size + 1, dtype=tensor.dtype))[: 2 * size : 2]


def has_memory(tensor: Tensor) -> bool:
    """Whether it can be read."""
    return not tensor.is_meta and tensor.untyped_storage().nbytes() > 0


def one_update(draw: random.Random, memory: Memory) -> str:
    """One call of the kernels with tensors that fit, or of which one does not; what came of it."""
    size, at_end = draw.choice([1, 2, 7, 31, 64, 1000, 5000, 20_000]), draw.random() < 0.7
    state = draw.choice(["fp32", *FORMATS])
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    values = {"param": torch.randn(size, generator=generator), "grad": torch.randn(size, generator=generator)}
    offset = draw.choice([0, 0, 0, size // 3])
    if draw.random() < 0.5:
        values["grad"] = values["grad"].to(draw.choice([torch.bfloat16, torch.float16]))
    elif draw.random() < 0.3 and state == "fp32":
        values = {name: value.to(torch.bfloat16) for name, value in values.items()}
    values["grad"] = values["grad"][offset:]
    if state == "fp32":
        values |= {"first": torch.zeros(size), "second": torch.zeros(size)}
    else:
        values["first"] = torch.zeros(size, dtype=FORMATS[state].word)
    if draw.random() < 0.5 and values["param"].dtype == torch.float32:
        values["copy"] = torch.zeros(size, dtype=draw.choice([torch.float32, torch.bfloat16, torch.float16]))
    if draw.random() < 0.5:
        values["factor"] = torch.tensor([0.5])
    keep = draw.random() < 0.3 and values["grad"].dtype == values["param"].dtype == torch.float32
    tensors = {name: memory.put(value, at_end) for name, value in values.items()}
    spoilt = draw.choice([None, *tensors])
    if spoilt:
        tensors[spoilt] = odd_one(draw, tensors[spoilt], memory)
    before = {name: tensor.clone() for name, tensor in tensors.items() if has_memory(tensor)}
    named = {"second": None, "copy": None, "factor": None, **tensors}
    scalars = kernels.scalars(1, **SETTINGS, maximize=False)
    update = kernels.Update(scalars=scalars, offset=offset, keep=keep, **named)  # type: ignore[arg-type]
    try:
        kernels.step([update])
    except ValueError as error:
        assert spoilt, error
        for name, value in before.items():
            assert torch.equal(tensors[name], value), "it has changed something before it refused"
        return "refused"
    if spoilt:  # such as a gradient that is shorter, which is a piece, or a size that has come out the same
        return "allowed"
    here = slice(offset, size)
    scaled = before["grad"].float() * (0.5 if "factor" in values else 1.0)
    state_of = [before[name][here] for name in ("first", "second") if name in values]
    step = packed.update if state != "fp32" else rule.update
    expected = step(before["param"][here], scaled, *state_of, step=1, **SETTINGS)
    for name, value in zip(("param", "first", "second"), expected, strict=False):
        wanted = before[name].clone()
        wanted[here] = value
        assert tensors[name].view(torch.uint8).equal(wanted.view(torch.uint8)), name
    return "right"


def one_optimizer(draw: random.Random, memory: Memory) -> str:
    """One step of an optimizer of which one tensor has been replaced by hand since the last."""
    size, state = draw.choice([7, 64, 1000, 5000]), draw.choice(["fp32", *FORMATS])
    param = torch.nn.Parameter(memory.put(torch.randn(size)))
    other = torch.nn.Parameter(memory.put(torch.randn(size)))
    optimizer = BalancedAdam([other, param], lr=0.1, state=state)
    for each in (param, other):
        each.grad = memory.put(torch.randn(size))
    optimizer.step()
    for name, tensor in optimizer.state[param].items():
        if isinstance(tensor, Tensor) and tensor.dim():
            optimizer.state[param][name] = memory.put(tensor)
    kind = draw.choice(["data", "data and grad", "grad", "state", "hand over"])
    if kind == "state":
        name = draw.choice([k for k, v in optimizer.state[param].items() if isinstance(v, Tensor) and v.dim()])
        optimizer.state[param][name] = odd_one(draw, optimizer.state[param][name], memory)
    elif kind == "hand over":
        grad, param.grad = param.grad, None
        assert grad is not None
        copy, factor = memory.put(torch.zeros(size)), memory.put(torch.ones(1))
        spoilt = draw.choice([None, "copy", "factor", "piece"])
        copy = odd_one(draw, copy, memory) if spoilt == "copy" else copy
        factor = odd_one(draw, factor, memory) if spoilt == "factor" else factor
        pieces = [odd_one(draw, grad, memory) if spoilt == "piece" else grad]
        if not optimizer.set_fused_grad(param, pieces, factor, copy):
            param.grad = grad
    else:
        try:
            if kind != "grad":
                param.data = odd_one(draw, param.data, memory)
            if kind != "data":
                param.grad = odd_one(draw, param.data, memory) if kind == "grad" else torch.ones_like(param)
        except RuntimeError:
            return "refused by torch"
    before = other.detach().clone()
    try:
        optimizer.step()
    except (ValueError, RuntimeError, TypeError):
        assert torch.equal(other, before), "it has changed something before it refused"
        return "refused"
    return "stepped"


def fuzz(argument: tuple[int, int]) -> dict[str, int]:
    """Job: so many of both, from a seed; a touched page ends the process."""
    seed, count = argument
    draw, memory = random.Random(seed), Memory()
    found: dict[str, int] = {}
    torch.manual_seed(seed)
    ways: list[Callable[[random.Random, Memory], str]] = [one_update, one_optimizer]
    for number in range(count):
        way = ways[number % 2]
        print(f"seed {seed} number {number}: {way.__name__}", flush=True)
        result = f"{way.__name__} {way(draw, memory)}"
        found[result] = found.get(result, 0) + 1
        memory.clear()
    return found


@pytest.mark.parametrize("seed", range(2))
def test_no_tensor_of_the_contract_is_overrun(seed: int) -> None:
    (found,) = spawn(fuzz, 1, (seed, 1000))
    assert found["one_update right"] > 30 and found["one_update refused"] > 100 and found["one_optimizer refused"] > 50


def touch(how: str) -> None:
    """Job: what must end the process."""
    memory = Memory()
    tensor = memory.put(torch.zeros(7), at_end=how == "after")
    ctypes.c_char.from_address(tensor.data_ptr() + (28 if how == "after" else -1)).value  # noqa: B018


@pytest.mark.parametrize("how", ["before", "after"])
def test_a_page_that_is_touched_ends_the_process(how: str) -> None:
    with pytest.raises(RuntimeError, match="ended with -11"):
        spawn(touch, 1, how)
