"""The CUDA source as NVRTC compiles it: IEEE arithmetic, wide accesses, no spills. No GPU is needed to compile."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest

from balanced_adam.kernels import cuda
from balanced_adam.kernels.table import KernelUnavailable, Variant
from tests.kernels.bits import VARIANTS
from tests.kernels.compiled import ARCHITECTURES, KERNELS, accesses, compiled, machine_code

pytestmark = pytest.mark.skipif(find_spec("cuda") is None, reason="cuda-bindings isn't installed")

REGISTERS = 65536
"""The registers of a multiprocessor, on every architecture here."""


# Packed states on two architectures alone, for the time it takes.
COMPILED = [(a, v) for v in VARIANTS for a in (("sm_90", "sm_120") if v.state else ARCHITECTURES)]


@pytest.mark.parametrize(("architecture", "variant"), COMPILED, ids=[f"{a}-{v}" for a, v in COMPILED])
def test_nothing_is_spilled_and_four_blocks_fit_a_multiprocessor(architecture: str, variant: Variant) -> None:
    resources = compiled(variant, architecture)[1]
    assert set(resources) == set(KERNELS)
    for name, kernel in resources.items():
        assert (kernel.stack, kernel.spilled) == (0, 0), name
        assert 4 * cuda.THREADS * (-(-kernel.registers // 8) * 8) <= REGISTERS, name  # allotted by eights


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_no_multiplication_is_contracted_with_an_addition(variant: Variant) -> None:
    ptx = cuda.compile(variant, "compute_90")[0].decode()
    assert not re.findall(r"\b(?:fma|mad)\.[\w.]*f(?:32|64)", ptx)
    assert not re.findall(r"\.(?:approx|ftz)\b", ptx)
    assert "sqrt.rn.f32" in ptx and "div.rn.f32" in ptx


def test_the_check_for_contraction_can_fail() -> None:
    contracted = cuda.compile(Variant(1, 1, 0, False), "compute_90", ["--fmad=true"])[0].decode()
    assert re.findall(r"\bfma\.[\w.]*f32", contracted)


@pytest.mark.parametrize(
    "variant", [Variant(1, 1, 0, False), Variant(1, 2, 2, False), Variant(2, 2, 0, False)], ids=str
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loop_over_vectors_reads_and_writes_16_bytes_at_a_time(architecture: str, variant: Variant) -> None:
    """Four elements: 16 bytes of fp32, 8 of 16 bits. A generic access would be slower; only the factor's is left."""
    wide = {1: "128", 2: "64", 3: "64"}
    code = machine_code(variant, architecture)
    for name in ("flat", "multi"):
        found = accesses(code[name])
        loads = {"LDG.128": 2, "LDG.64": 0}  # the moments
        for dtype in (variant.param, variant.grad):
            loads[f"LDG.{wide[dtype]}"] += 1
        stores = {"STG.128": 2, "STG.64": 0}
        for dtype in (variant.param, *((variant.copy,) if variant.copy else ())):
            stores[f"STG.{wide[dtype]}"] += 1
        assert all(found[kind] >= count for kind, count in loads.items()), found
        assert all(found[kind] == count for kind, count in stores.items()), found
        assert found["LD"] <= 1 and not found["ST"] and not found["LDL"] and not found["STL"], found


def test_a_source_that_does_not_compile_is_one_error_with_the_compilers_words() -> None:
    with pytest.raises(KernelUnavailable, match=r"NVRTC can't compile the CUDA kernel for sm_90 .*incomplete"):
        cuda.compile(Variant(9, 1, 0, False), "sm_90")


def test_an_architecture_that_nvrtc_does_not_know_is_one_error() -> None:
    with pytest.raises(KernelUnavailable, match="sm_12345"):
        cuda.compile(Variant(1, 1, 0, False), "sm_12345")


def test_compiling_writes_into_no_bytes_of_anybody_elses() -> None:
    """Python has one object for each bytes of length 1, and an empty log is one byte long."""
    cuda.compile(Variant(1, 1, 0, False), "sm_90")
    assert [bytes([k])[0] for k in range(256)] == list(range(256))
