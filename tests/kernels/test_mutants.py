"""The net has teeth: wrong flags, wrong arithmetic and wrong addresses are found."""

from __future__ import annotations

import ctypes
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from balanced_adam.kernels.cpu import Library, load
from balanced_adam.kernels.table import KernelUnavailable, Variant
from tests.kernels.bits import IN_PLACE, KEEP, Run, Setting, first, runs
from tests.kernels.build import (
    HERE,
    SHARED,
    SOURCES,
    compiled,
    copied,
    cpu_library,
    definitions,
    mutated,
    needs_compiler,
)

pytestmark = needs_compiler

WRONG_ARITHMETIC = {
    "denormals_kept": ("rule.h", "(bits(x) & 0x7fffffffu) < 0x00800000u ? 0.0f : x;", "x;"),
    "squares_in_another_order": ("rule.h", "(grad * grad) * s.rest2", "(grad * s.rest2) * grad"),
    "decay_after_the_move": (
        "rule.h",
        "param * s.shrink - move * s.rate",
        "(param - move * s.rate) * s.shrink",
    ),
    "m_outlives_v": ("rule.h", "v <= s.spent ? 0u : 0xffffffffu", "0xffffffffu"),
    "weight_not_in_the_dither": ("rule.h", "weight * 0x85ebca6bu + s.start", "s.start"),
    "step_not_in_the_dither": ("rule.h", "0x00000279u + s.start", "0x00000279u"),
    "scale_one_octave_off": ("rule.h", "0x7f800000u) + 0x20000000u", "0x7f800000u) + 0x20800000u"),
    "greatest_level_runs_over": ("rule.h", "level > W_TOP << W_SHIFT ? W_TOP << W_SHIFT : level", "level"),
    "greatest_r_runs_over": ("rule.h", "size > R_TOP ? R_TOP : size", "size"),
    "sign_of_m_lost": ("rule.h", "(sign >> (32 - R_BITS)) | ", ""),
    "rounded_up_always": ("rule.h", "(RATIO_LESS_1 * 1.1920928955078125e-07f) + 1.0f", "0.0f + 1.0f"),
    "no_bound": ("rule.h", "-s.limit > move ? -s.limit : move", "move"),
    "bf16_truncated": ("rule.h", "(u + 0x7fffu + ((u >> 16) & 1u)) >> 16", "u >> 16"),
    "ties_away_from_even": ("rule.h", "(u + 0x7fffu + ((u >> 16) & 1u)) >> 16", "(u + 0x8000u) >> 16"),
    "fp16_denormals_lost": ("rule.h", "rest < 0x0400u ? denormal : u", "rest < 0x0400u ? 0u : u"),
}
KERNEL = {
    "cpu.cpp": {
        "factor_forgotten": ("cpu.cpp", "Element<GRAD>::load(grad[i]) * factor", "Element<GRAD>::load(grad[i])"),
        "sign_forgotten": ("cpu.cpp", "1.0f) * s.sign", "1.0f)"),
        "kept_with_the_sign": ("cpu.cpp", "store(g * s.sign)", "store(g)"),
    },
    "cuda.cu": {
        "tail_forgotten": (
            "cuda.cu",
            "for (int i = last + threadIdx.x; i < size; i += blockDim.x) step_one",
            "if (0) for (int i = 0; ;) step_one",
        ),
        "head_done_twice": (
            "cuda.cu",
            "i < first; i += blockDim.x) step_one",
            "i < first + 1 && i < size; i += THREADS) step_one",
        ),
        "factor_forgotten": ("cuda.cu", "*row.factor * row.scalars.sign", "row.scalars.sign"),
    },
}  # fmt: skip
MUTANTS = [(kernel, name) for kernel in KERNEL for name in {**WRONG_ARITHMETIC, **KERNEL[kernel]}]


def has_the_bits(run: Run, keeps: bool = False) -> bool:
    """A short form of test_bits; numbers from odd seeds are awkward ones."""
    for variant in (
        *(Variant(1, 2, 2, False), Variant(1, 3, 3, False), Variant(1, 1, 0, False), *IN_PLACE[:1]),
        *(Variant(1, 1, 0, False, state) for state in (1, 2, 3)),
        *(KEEP[:1] if keeps else ()),
    ):
        for seed in (4, 5):
            state = first(variant, 131, seed).clone(seed % 2)
            for setting in (Setting(maximize=seed == 4), Setting(betas=(0.9, 0.99)), Setting(lr=0.0, weight_decay=0.0)):
                state.param.copy_(torch.arange(256, 387) / 512)  # every other one is a tie in bf16
                if not all(runs(state, setting, 8, variant, 131, run, seed)):
                    return False
    return True


class Unchecked(Library):
    def check(self) -> None:
        pass


def runner(kernel: str, sources: Path, *extra: str) -> Run:
    if kernel == "cpu.cpp":
        kernels = Unchecked(compiled("cpu.so", sources / kernel, [*SHARED, *extra], sources))
        return lambda update: kernels.step([update])

    @cache
    def emulated(variant: Variant) -> ctypes.CDLL:
        flags = [*SHARED, *definitions(variant), *extra]
        return ctypes.CDLL(str(compiled("emulator.so", HERE / "emulator.cpp", flags, sources)))

    return lambda update: emulated(update.variant).emulate_flat(update.row(), ctypes.c_longlong(64))


@pytest.mark.parametrize("kernel", KERNEL)
def test_the_sources_as_they_are_pass(kernel: str) -> None:
    assert has_the_bits(runner(kernel, SOURCES, "-O0"), kernel == "cpu.cpp")


@pytest.mark.parametrize(("kernel", "name"), MUTANTS, ids=[f"{k}-{n}" for k, n in MUTANTS])
def test_wrong_arithmetic_is_found(kernel: str, name: str) -> None:
    sources = mutated(f"{kernel}-{name}", *{**WRONG_ARITHMETIC, **KERNEL[kernel]}[name])
    assert not has_the_bits(runner(kernel, sources, "-O0"), kernel == "cpu.cpp")


# What -ffast-math allows; by that name GCC would also link in code that makes this process flush denormals for good.
RECKLESS = {
    "contraction": ["-O2", "-ffp-contract=fast", "-mfma"],
    "fast_math": ["-O1", "-fassociative-math", "-freciprocal-math", "-fno-signed-zeros", "-ffinite-math-only"],
}


@pytest.mark.parametrize("flags", RECKLESS)
@pytest.mark.parametrize("kernel", KERNEL)
def test_contraction_and_fast_math_are_found(kernel: str, flags: str) -> None:
    if load().best_isa == 0:
        pytest.skip("this processor has no fused multiply-add to contract to")
    extra = RECKLESS[flags] + (["-mavx2"] if kernel == "cuda.cu" else [])
    assert not has_the_bits(runner(kernel, copied(f"{kernel}-{flags}"), *extra))


def test_a_library_built_with_contraction_refuses_to_load() -> None:
    if load().best_isa == 0:
        pytest.skip("this processor has no fused multiply-add to contract to")
    for isa in range(load().best_isa + 1):
        with pytest.raises(KernelUnavailable, match="bits are not those of the update rule"):
            Library(cpu_library(*RECKLESS["contraction"]), isa)


SANITIZERS = ["-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-static-libasan"]
WRONG_ADDRESSES = {
    "alignment_ignored": ("cuda.cu", "return agree ? head : -1;", "return agree ? head : 0;"),
    "head_ignored": ("cuda.cu", "return past ? WIDTH - past : 0;", "return 0;"),
    "one_element_too_far": (
        "cuda.cu",
        "i = last + threadIdx.x; i < size; i += blockDim.x) step_one",
        "i = last + threadIdx.x; i <= size; i += THREADS) step_one",
    ),
    "a_row_too_long": (
        "cuda.cu",
        "int size = (int)(rest < chunk_size ? rest : chunk_size), head = head_of(a);",
        "int size = (int)chunk_size, head = head_of(a);",
    ),
    "squares_one_too_far": ("cuda.cu", "i < size; i += blockDim.x) sum +=", "i <= size; i += THREADS) sum +="),
    "cpu_one_too_far": ("cpu.cpp", "for (i64 i = at; i < stop; i++) {", "for (i64 i = at; i <= stop; i++) {"),
    "cpu_squares_past_the_end": (
        "cpu.cpp",
        "whole = count / LANES * LANES",
        "whole = (count + LANES - 1) / LANES * LANES",
    ),
}  # fmt: skip


def sanitized(sources: Path, variant: Variant) -> subprocess.CompletedProcess[str]:
    *dtypes, threads = definitions(variant)
    macros = [*(definition.replace("-D", "-DSANITIZED_") for definition in dtypes), threads]
    program = compiled("sanitized", HERE / "sanitized.cpp", [*SANITIZERS, *macros], sources)
    return subprocess.run([program], capture_output=True, text=True)


@pytest.mark.parametrize(
    "variant", [Variant(1, 1, 0, False), Variant(1, 2, 2, False, 1), Variant(2, 2, 0, False, 3)], ids=str
)
def test_no_kernel_reads_or_writes_a_byte_outside_its_arrays(variant: Variant) -> None:
    done = sanitized(SOURCES, variant)
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr


@pytest.mark.parametrize("name", WRONG_ADDRESSES)
def test_a_wrong_address_is_found(name: str) -> None:
    done = sanitized(mutated(name, *WRONG_ADDRESSES[name]), Variant(1, 1, 2, False))
    assert done.returncode != 0
    assert "runtime error" in done.stderr or "AddressSanitizer" in done.stderr
