"""The launcher, from an Update to the kernel's arguments: real cuda.bindings, a driver made of the emulated kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from balanced_adam.kernels import cuda
from balanced_adam.kernels.table import Variant
from tests.kernels.build import HERE, SHARED, compiled, definitions, needs_compiler
from train.common.files import REPOSITORY

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(find_spec("cuda") is None, reason="cuda-bindings isn't installed"),
]

PROGRAM = """
import math, torch
from balanced_adam.kernels import cuda
from balanced_adam.kernels.table import ROW_SIZE, Recipe, Update, Variant
from tests.kernels.bits import Setting, expected, first, same, update

STREAM = 7
variant = Variant({variant})
kernels = cuda.Module(cuda.compile(variant, "sm_90")[0])
setting = Setting(betas=(0.9, 0.99))

def table_of(rows, extra=b""):
    return torch.frombuffer(bytearray(rows + extra), dtype=torch.uint8)

for size in (1, 5, 1000, cuda.CHUNK, 2 * cuda.CHUNK + 3):
    state = first(variant, size, seed=1).clone(size % 4)
    control = expected(state, setting, 3)
    cuda.launch_flat(kernels, update(state, setting, 3), STREAM)
    assert same(state, control), ("flat", size)

states = [first(variant, size, seed=size).clone(1) for size in (3, 2 * cuda.CHUNK + 3, 1, 500)]
controls = [expected(state, setting, 3) for state in states]
rows, chunks = cuda.rows([update(state, setting, 3) for state in states])
assert chunks == 6 and len(rows) == 4 * ROW_SIZE
cuda.launch_multi(kernels, table_of(rows), len(states), chunks, STREAM)
assert all(map(same, states, controls)), "multi"

# Step and lr on the device: the scalars are made there.
controls = [expected(state, setting, 4) for state in states]
steps = [torch.tensor(3.0) for _ in states]
lr = torch.tensor(setting.lr)
setting_on_device = dict(betas=setting.betas, eps=setting.eps, weight_decay=setting.weight_decay, maximize=False)
recipes = [Recipe(step, lr if k % 2 else float(lr), **setting_on_device) for k, step in enumerate(steps)]
controls = [expected(state, setting._replace(lr=float(lr)), 4) for state in states]
updates = [update(state, setting, 1)._replace(scalars=recipe) for state, recipe in zip(states, recipes)]
rows, chunks = cuda.rows(updates)
table = table_of(rows, b"".join(recipe.pack() for recipe in recipes))
cuda.launch_prepare(kernels, table, len(states), STREAM)
cuda.launch_multi(kernels, table, len(states), chunks, STREAM)
assert all(map(same, states, controls)), "prepare"
assert [int(step) for step in steps] == [4] * 4

tensors = [torch.randn(n).to(states[0].grad.dtype) for n in (7, 2 * cuda.CHUNK + 3, 4096)]
rows, chunks = cuda.rows([Update(t, t, t, t, b"") for t in tensors])
parts = torch.full((chunks, cuda.THREADS), math.nan, dtype=torch.float64)
cuda.launch_squares(kernels, table_of(rows), len(tensors), parts, STREAM)
sums = [s.sum() for s in parts.split([1, 3, 1])]
for s, t in zip(sums, tensors):
    assert math.isclose(s, math.fsum(x * x for x in t.double().tolist()), rel_tol=1e-14), "squares"

try:
    cuda.Module(b"no machine code")
except cuda.KernelUnavailable as error:
    assert str(error) == "cuModuleLoadData: CUDA_ERROR_INVALID_IMAGE", error
else:
    raise AssertionError("a bad image was accepted")
print("right")
"""


@pytest.mark.parametrize(
    "variant",
    [Variant(1, 1, 0, False), Variant(1, 2, 2, False), Variant(2, 2, 0, False), Variant(1, 2, 2, False, 2)],
    ids=str,
)
def test_every_kernel_gets_its_arguments(tmp_path: Path, variant: Variant) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a real driver; test_gpu.py uses it")
    flags = ["-O1", *SHARED, *definitions(variant, cuda.THREADS), "-Wl,-soname,libcuda.so.1"]
    library = compiled("fake_driver-{}{}{}{}{}.so".format(*map(int, variant)), HERE / "fake_driver.cpp", flags)
    shutil.copy(library, tmp_path / "libcuda.so.1")
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    program = PROGRAM.replace("{variant}", ", ".join(map(repr, variant)))
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "right"
