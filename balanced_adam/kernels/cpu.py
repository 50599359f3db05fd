"""The CPU kernels: finds the library that was built when the package was installed, and calls it."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from balanced_adam import packed, rule
from balanced_adam.kernels.table import DTYPES, NO_DTYPE, ROW_SIZE, STATES, KernelUnavailable, Update, scalars

ISA = ("baseline", "AVX2", "AVX-512")
"""Names of the instruction sets on x86-64, by number; other architectures have the baseline alone."""


class Library:
    """The kernels of one shared library.

    Args:
        path: the shared library.
        isa: number of the instruction set; None for the best that this processor has.

    Raises:
        KernelUnavailable: if it can't be loaded, or its results are not those of :mod:`balanced_adam.rule`.
    """

    def __init__(self, path: Path, isa: int | None = None) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
            if self._library.balanced_adam_cpu_row_size() != ROW_SIZE:
                raise KernelUnavailable(f"{path} was built from other sources; install balanced_adam again.")
        except (OSError, AttributeError) as error:
            raise KernelUnavailable(f"{path} can't be loaded: {error}") from error
        self.best_isa: int = self._library.balanced_adam_cpu_best_isa()
        self.isa = self.best_isa if isa is None else isa
        self.openmp: str | None = None
        for path_of_runtime in _openmp():
            try:
                runtime = ctypes.CDLL(path_of_runtime, os.RTLD_NOLOAD)  # it is in the process: look it up, load nothing
                functions = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
                addresses = [ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in functions]
            except (OSError, AttributeError):
                continue
            self._library.balanced_adam_cpu_use_openmp(*addresses)
            self.openmp = path_of_runtime
            break
        self.check()

    def step(self, updates: Sequence[Update]) -> None:
        """Carry out all updates; those of one variant together, over all of torch's threads."""
        for variant, group in groupby(sorted(updates, key=_variant), key=_variant):
            rows = [update.row() for update in group]
            count = ctypes.c_longlong(len(rows))
            self._library.balanced_adam_cpu_step(
                b"".join(rows), count, *map(int, variant), self.isa, torch.get_num_threads()
            )

    def measure(self, updates: Sequence[Update], *, directions: bool) -> tuple[Tensor, Tensor]:
        """Measure each gradient, all of one dtype, or each direction (:func:`balanced_adam.rule.direction`) of states
        of one dtype: the sum of squares, and for directions the greatest absolute value; two tensors of shape
        (len(updates),), float64.

        Each depends on its own numbers alone: not on the number of threads, and not on the instruction set.
        """
        count = len(updates)
        squares, greatest = torch.zeros(2, count, dtype=torch.float64, device="cpu")
        if count:
            failed = self._library.balanced_adam_cpu_measure(
                b"".join(update.row() for update in updates),
                ctypes.c_longlong(count),
                NO_DTYPE if directions else DTYPES[updates[0].grad.dtype],
                STATES[updates[0].first.dtype] if directions else 0,
                ctypes.c_void_p(squares.data_ptr()),
                ctypes.c_void_p(greatest.data_ptr()),
                self.isa,
                torch.get_num_threads(),
            )
            if failed:
                raise MemoryError("no memory for a sum of squares")
        return squares, greatest

    def sums_of_squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """The sum of squares of each tensor, shape (len(tensors),), float64; the tensors are dense and of one dtype."""
        return self.measure([Update(t, t, t, t, b"") for t in tensors], directions=False)[0]

    def check(self) -> None:
        """Hold a vector of numbers to the rule, bit for bit: a library built with other flags is found here.

        Raises:
            KernelUnavailable: if a bit differs.
        """
        generator = torch.Generator("cpu").manual_seed(0)
        # Whatever the caller has made torch's defaults.
        numbers = torch.randn(4, 1003, generator=generator, dtype=torch.float32, device="cpu")
        for state in ("fp32", *packed.FORMATS):
            param, grad, m, v = numbers.clone()
            v.square_()
            betas = (0.9, 0.95) if state == "fp32" else (0.95, 0.95)
            setting: dict[str, Any] = {"lr": 0.1, "betas": betas, "eps": 1e-8, "weight_decay": 0.1}
            words = () if state == "fp32" else (packed.pack(packed.FORMATS[state], m, v),)
            tensors = (param, *(words or (m, v)))
            update = packed.update if words else rule.update
            expected = update(param, grad, *tensors[1:], step=3, **setting)
            numbers_of_step = scalars(3, **setting, maximize=False)
            self.step([Update(param, grad, tensors[1], None if words else v, numbers_of_step)])
            # As bytes: words of 16 bits are stored as floats, and a NaN equals none.
            if not all(
                torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(tensors, expected, strict=True)
            ):
                raise KernelUnavailable(
                    f"the CPU kernel's bits are not those of the update rule ({ISA[self.isa]}, {state}); was it built "
                    "with -ffast-math or the like in CFLAGS?"
                )


@cache
def load() -> Library:
    """The library that was built with this package.

    Raises:
        KernelUnavailable: if there is none, which is so when no C++ compiler was at hand, or if it can't be used.
    """
    found = sorted(Path(__file__).parent.glob("_cpu*.so"))
    if not found:
        raise KernelUnavailable(
            "the CPU kernel was not built when balanced_adam was installed; install it again where there is a C++ "
            "compiler"
        )
    return Library(found[0])


def _variant(update: Update) -> tuple[int, int, int, bool, int]:
    return update.variant


def _openmp() -> list[str]:
    """The OpenMP runtimes in this process, torch's own first; none where they can't be seen."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    paths = [fields[5] for line in maps.splitlines() if len(fields := line.split(maxsplit=5)) == 6]
    found = [p for p in dict.fromkeys(paths) if re.fullmatch(r"lib(gomp|iomp5|omp)(-\w+)?\.so[.\d]*", Path(p).name)]
    own = str(Path(torch.__file__).parent.parent)  # wheels keep it in torch/lib or torch.libs
    return sorted(found, key=lambda path: not path.startswith(own))
