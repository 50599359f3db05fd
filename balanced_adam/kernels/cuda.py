"""The CUDA kernels: compiled by NVRTC in this process, for the device at hand, when they are first needed.

Every CUDA build of torch brings NVRTC, and from torch 2.10 on the Python bindings to it. Nothing is written to disk, so
that a thousand ranks on one shared file system can't get in each other's way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from balanced_adam.kernels.table import DTYPES, NO_DTYPE, ROW_SIZE, KernelUnavailable, Recipe, Update, Variant

THREADS = 256
CHUNK = 16384
"""Elements that one block takes; a multiple of the vector width. Not yet tuned on a GPU."""

STATE_TYPES = ("Float32State", "Packed32State", "Packed16State", "Packed8State")
"""Names of rule.h's state types, by ``Variant.state``."""
_FOLDER = Path(__file__).parent


def options(variant: Variant, architecture: str) -> list[str]:
    """NVRTC's options: IEEE arithmetic without contraction, for an architecture such as ``sm_90`` or ``compute_90``."""
    return [
        f"--gpu-architecture={architecture}",
        "--std=c++17",
        "--fmad=false",
        "--ftz=false",
        "--prec-div=true",
        "--prec-sqrt=true",
        f"-DPARAM={variant.param}",
        f"-DGRAD={variant.grad}",
        f"-DCOPY={variant.copy}",
        f"-DSTATE={STATE_TYPES[variant.state]}",
        f"-DTHREADS={THREADS}",
    ]


def compile(variant: Variant, architecture: str, extra: Sequence[str] = ()) -> tuple[bytes, str]:
    """The compiled kernels, machine code for an ``sm_`` architecture and PTX for a ``compute_`` one, and the compiler's
    log.

    Needs NVRTC, but no GPU and no driver.

    Raises:
        KernelUnavailable: if NVRTC or its bindings are missing, or it refuses the source.
    """
    try:
        from cuda.bindings import nvrtc
    except Exception as error:  # ImportError, or what a broken installation runs into
        raise KernelUnavailable(
            f"the package cuda-bindings, which compiles the CUDA kernel, can't be imported ({error}); "
            "`pip install cuda-bindings` of CUDA's major version"
        ) from error

    def check(result: tuple[Any, ...]) -> Any:
        code, *values = result
        if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelUnavailable(f"NVRTC: {code.name}")
        return values[0] if values else None

    source, rule = (_FOLDER / "cuda.cu").read_bytes(), (_FOLDER / "rule.h").read_bytes()
    flags = [flag.encode() for flag in (*options(variant, architecture), *extra)]
    try:
        program = check(nvrtc.nvrtcCreateProgram(source, b"cuda.cu", 1, [rule], [b"rule.h"]))
        (code,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        log = _writable(check(nvrtc.nvrtcGetProgramLogSize(program)))
        check(nvrtc.nvrtcGetProgramLog(program, log))
        text = log.decode(errors="replace").strip("\0 \n")
        if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelUnavailable(f"NVRTC can't compile the CUDA kernel for {architecture} ({code.name}): {text}")
        machine = architecture.startswith("sm_")
        size = nvrtc.nvrtcGetCUBINSize if machine else nvrtc.nvrtcGetPTXSize
        read = nvrtc.nvrtcGetCUBIN if machine else nvrtc.nvrtcGetPTX
        image = _writable(check(size(program)))
        check(read(program, image))
        check(nvrtc.nvrtcDestroyProgram(program))
    except (RuntimeError, OSError) as error:  # the bindings' own, where the shared library is missing
        if isinstance(error, KernelUnavailable):
            raise
        raise KernelUnavailable(f"NVRTC can't be loaded ({error})") from error
    return image, text


def _writable(size: int) -> bytes:
    """Bytes that the bindings may write into. Python keeps one object for every bytes of length 0 or 1: never those."""
    return bytes(max(2, size))


class Module:
    """The kernels of one variant, loaded into the context of one device.

    Args:
        image: machine code from :func:`compile`.

    Raises:
        KernelUnavailable: if the driver refuses it.
    """

    def __init__(self, image: bytes) -> None:
        self._module = _driver("cuModuleLoadData", image)
        self._image = image
        self._functions: dict[str, Any] = {}

    def launch(self, name: str, blocks: int, threads: int, stream: int, *arguments: Any) -> None:
        """Launch kernel ``balanced_adam_<name>``; the arguments are ctypes objects of the kernel's own types."""
        if name not in self._functions:
            self._functions[name] = _driver("cuModuleGetFunction", self._module, f"balanced_adam_{name}".encode())
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        function = self._functions[name]
        _driver("cuLaunchKernel", function, blocks, 1, 1, threads, 1, 1, 0, stream, ctypes.addressof(pointers), 0)


def _driver(name: str, *arguments: Any) -> Any:
    from cuda.bindings import driver

    code, *values = getattr(driver, name)(*arguments)
    if code != driver.CUresult.CUDA_SUCCESS:
        raise KernelUnavailable(f"{name}: {code.name}")
    return values[0] if values else None


@cache
def _context(device: int) -> Any:
    torch.cuda.init()
    return _driver("cuDevicePrimaryCtxRetain", _driver("cuDeviceGet", device))


def _make_context_current(device: int) -> None:
    """The driver needs a context in this thread, which torch makes current only when it needs one itself."""
    _driver("cuCtxSetCurrent", _context(device))


@cache
def module(variant: Variant, device: int) -> Module:
    """The kernels of a variant on a device; compiled once per process. Load them before capturing a CUDA graph.

    Raises:
        KernelUnavailable: as :func:`compile` and :class:`Module`.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("BalancedAdam: take a step with these parameters before capturing one in a CUDA graph.")
    with torch.cuda.device(device):
        _make_context_current(device)
        major, minor = torch.cuda.get_device_capability(device)
        return Module(compile(variant, f"sm_{major}{minor}")[0])


def step(updates: Sequence[Update]) -> None:
    """Carry out all updates on their device's current stream; those of one device and variant in one launch."""
    for (device, variant, _), group in groupby(sorted(updates, key=_place), key=_place):
        members = list(group)
        with torch.cuda.device(device):
            _make_context_current(device)
            stream = torch.cuda.current_stream().cuda_stream
            kernels = module(variant, device)
            if isinstance(members[0].scalars, Recipe):
                table, chunks = rows(members)
                recipes = b"".join(update.scalars.pack() for update in members if isinstance(update.scalars, Recipe))
                both = _upload_for_capture(table + recipes, device, stream)
                launch_prepare(kernels, both, len(members), stream)
                launch_multi(kernels, both, len(members), chunks, stream)
            elif len(members) == 1:
                launch_flat(kernels, members[0], stream)
            else:
                table, chunks = rows(members)
                launch_multi(kernels, _upload(table, device), len(members), chunks, stream)


def sums_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of each tensor, shape (len(tensors),), float64, on their device; dense and of one dtype."""
    device = tensors[0].device
    pieces = [Update(t, t, t, t, b"") for t in tensors]  # only the gradient's pointer and size are read
    variant = Variant(1, DTYPES[tensors[0].dtype], NO_DTYPE, False)
    with torch.cuda.device(device):
        _make_context_current(device.index)
        table, chunks = rows(pieces)
        parts = torch.empty(chunks, THREADS, dtype=torch.float64, device=device)
        launch_squares(
            module(variant, device.index), _upload(table, device.index), len(tensors), parts,
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        while parts.shape[1] > 1:  # a fixed tree; the order of torch's own sum may depend on the number of rows
            half = parts.shape[1] // 2
            parts = parts[:, :half] + parts[:, half:]
        lengths = torch.tensor([_chunks(t.numel()) for t in tensors], device=device)
        return torch.segment_reduce(parts.squeeze(1), "sum", lengths=lengths, unsafe=True)


def rows(updates: Sequence[Update]) -> tuple[bytes, int]:
    """The table of ``Row`` for the multi-tensor kernels, and the number of chunks in all."""
    table, chunks = [], 0
    for update in updates:
        table.append(update.row(chunks))
        chunks += _chunks(update.grad.numel())
    return b"".join(table), chunks


def launch_flat(kernels: Module, update: Update, stream: int) -> None:
    """One long array."""
    blocks = _chunks(update.grad.numel())
    if blocks:
        row = ctypes.create_string_buffer(update.row(), ROW_SIZE)
        kernels.launch("flat", blocks, THREADS, stream, row, ctypes.c_longlong(CHUNK))


def launch_multi(kernels: Module, table: Tensor, count: int, chunks: int, stream: int) -> None:
    """All rows of a table in device memory."""
    if chunks:
        pointer, number, chunk = ctypes.c_void_p(table.data_ptr()), ctypes.c_longlong(count), ctypes.c_longlong(CHUNK)
        kernels.launch("multi", chunks, THREADS, stream, pointer, number, chunk)


def launch_prepare(kernels: Module, table: Tensor, count: int, stream: int) -> None:
    """Fill in the scalars of ``count`` rows from the recipes that follow them in device memory."""
    recipes, pointer = ctypes.c_void_p(table.data_ptr() + count * ROW_SIZE), ctypes.c_void_p(table.data_ptr())
    kernels.launch("prepare", -(-count // THREADS), THREADS, stream, recipes, pointer, ctypes.c_longlong(count))


def launch_squares(kernels: Module, table: Tensor, count: int, parts: Tensor, stream: int) -> None:
    """Sums of squares into ``parts``, shape (chunks, THREADS), float64."""
    if len(parts):
        pointer, number, chunk = ctypes.c_void_p(table.data_ptr()), ctypes.c_longlong(count), ctypes.c_longlong(CHUNK)
        sums = ctypes.c_void_p(parts.data_ptr())
        kernels.launch("squares", len(parts), THREADS, stream, pointer, number, chunk, sums)


def _place(update: Update) -> tuple[int, Variant, bool]:
    return update.param.device.index, update.variant, isinstance(update.scalars, Recipe)


def _chunks(size: int) -> int:
    return -(-size // CHUNK)


def _upload(table: bytes, device: int) -> Tensor:
    """The table in device memory, in the order of the current stream; torch's allocators keep both ends alive as
    long."""
    pinned = torch.frombuffer(bytearray(table), dtype=torch.uint8).pin_memory()
    return pinned.to(f"cuda:{device}", non_blocking=True)


_spare: dict[tuple[int, int], Tensor] = {}
"""(device, size) -> pinned memory, made in a step outside of any capture, for one within."""
_captured: list[Tensor] = []
"""Pinned memory that graphs copy from at every replay; kept as long as the process."""


def _upload_for_capture(table: bytes, device: int, stream: int) -> Tensor:
    """As :func:`_upload`, but may be captured into a graph: nothing is allocated on the host meanwhile."""
    if not torch.cuda.is_current_stream_capturing():
        if (device, len(table)) not in _spare:
            _spare[device, len(table)] = torch.empty(len(table), dtype=torch.uint8, pin_memory=True)
        return _upload(table, device)
    if (device, len(table)) not in _spare:
        raise RuntimeError("BalancedAdam: take a step with these parameters before capturing one in a CUDA graph.")
    pinned = _spare.pop((device, len(table)))
    _captured.append(pinned)
    pinned.copy_(torch.frombuffer(bytearray(table), dtype=torch.uint8))
    result = torch.empty(len(table), dtype=torch.uint8, device=f"cuda:{device}")
    _driver("cuMemcpyHtoDAsync", result.data_ptr(), pinned.data_ptr(), len(table), stream)
    return result
