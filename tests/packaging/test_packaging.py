"""What is installed, and what an import does."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import deepspeed
import pytest

from tests.kernels.build import COMPILER
from train.common.files import REPOSITORY

WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = None  # as where it isn't installed
import torch
from balanced_adam import BalancedAdam
weight = torch.ones(3, requires_grad=True)
optimizer = BalancedAdam([weight])
weight.sum().backward()
optimizer.step()
print([name for name in sys.modules if name.startswith("deepspeed")], hasattr(torch.optim, "BalancedAdam"))
"""
BROKEN_DEEPSPEED = """
import sys, warnings
from importlib.machinery import ModuleSpec
import torch

class Broken:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name == "deepspeed" else None
    def create_module(self, spec):
        raise OSError("CUDA_HOME does not exist")
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Broken())
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from balanced_adam import BalancedAdam
    optimizer = BalancedAdam([torch.ones(3, requires_grad=True)])
try:
    import deepspeed
except OSError as error:
    print([str(w.message) for w in said if "DeepSpeed" in str(w.message)], error)
"""
WITH_DEEPSPEED = """
import balanced_adam, sys, torch
loaded = [name for name in sys.modules if name.startswith("deepspeed")]
print(torch.optim.BalancedAdam is balanced_adam.BalancedAdam, loaded)
"""
MOVED_DEEPSPEED = """
import os, warnings
import torch
import balanced_adam
from balanced_adam.zero import packed_state

os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
packed_state.overrides = lambda: object.a_method_that_has_moved
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import deepspeed
    import deepspeed.runtime.zero.stage3
warned = [str(each.message) for each in said if "BalancedAdam" in str(each.message)]

def started(name, make):
    network = torch.nn.Linear(2, 1)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    if name:
        config["optimizer"] = {"type": name, "params": {"lr": 0.1} | ({"torch_adam": True} if name == "Adam" else {})}
    try:
        given = {"model_parameters": network.parameters(), "optimizer": make(network)}
        deepspeed.initialize(model=network, config=config, **given)
        return "works"
    except RuntimeError as error:
        return str(error)

Ours = balanced_adam.BalancedAdam
alone = Ours([torch.ones(3, requires_grad=True)])
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
print(warned + [
    started("BalancedAdam", lambda network: None),
    started("", lambda network: Ours(network.parameters())),
    started("", lambda network: lambda parameters: Ours(parameters)),
    started("Adam", lambda network: None),
])
"""


def python(code: str, **environment: str) -> str:
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, cwd=REPOSITORY, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_without_deepspeed_the_optimizer_works_and_has_its_name() -> None:
    assert python(WITHOUT_DEEPSPEED) == "['deepspeed'] True"


def test_a_deepspeed_that_cannot_be_imported_is_left_alone() -> None:
    assert python(BROKEN_DEEPSPEED) == "[] CUDA_HOME does not exist"


def test_importing_does_not_import_deepspeed_but_sets_the_name() -> None:
    assert python(WITH_DEEPSPEED) == "True []"


def test_a_deepspeed_that_has_moved_what_we_need_refuses_it_and_nothing_else() -> None:
    warned, by_name, built, called, another = ast.literal_eval(python(MOVED_DEEPSPEED, DS_ACCELERATOR="cpu"))
    assert re.fullmatch(
        r"BalancedAdam can't register with DeepSpeed 0\.19\.8: .* 'a_method_that_has_moved'; it was tested with "
        r"DeepSpeed 0\.19\.8, so install that version\.",
        by_name,
    )
    assert warned == f"{by_name} BalancedAdam works without DeepSpeed."
    assert (built, called, another) == (by_name, by_name, "works")


def wheel(folder: Path, **environment: str) -> Path:
    """The wheel that pip makes of a copy of the sources."""
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(REPOSITORY / "balanced_adam", source / "balanced_adam", ignore=ignore)
    shutil.copytree(REPOSITORY / "train", source / "train", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    done = subprocess.run(build, cwd=source, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


def contents(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def sources() -> set[str]:
    """What is installed: all of the package but the compiler's leavings."""
    files = {f.relative_to(REPOSITORY) for f in (REPOSITORY / "balanced_adam").rglob("*") if f.is_file()}
    return {str(f) for f in files if f.suffix not in (".so", ".pyc")}


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_the_wheel_ships_the_optimizer_and_its_kernels_and_nothing_else(tmp_path: Path) -> None:
    quick = tmp_path / "c++"  # what the library computes is tested elsewhere; here it may be slow
    quick.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -O0\n')
    quick.chmod(0o700)
    found = wheel(tmp_path, CC=str(quick), CXX=str(quick))
    library = {name for name in contents(found) if name.endswith(".so")}
    assert contents(found) - library == sources()
    assert library == {"balanced_adam/kernels/_cpu.abi3.so"}
    assert "-cp310-abi3-" in found.name  # one wheel for every Python


WITHOUT_KERNEL = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
sys.modules["deepspeed"] = None
import torch, balanced_adam
assert balanced_adam.__file__.startswith(sys.argv[1])
weights = [torch.ones(3, requires_grad=True) for _ in range(2)]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    optimizer = balanced_adam.BalancedAdam(weights, lr=0.5, weight_decay=0.0)
    balanced_adam.BalancedAdam(weights)
for weight in weights:
    weight.sum().backward()
optimizer.step()
assert torch.allclose(weights[0].detach(), torch.full((3,), 0.5))
try:
    balanced_adam.BalancedAdam(weights, fused=True)
except RuntimeError as error:
    print(len(said), said[0].message, "|", error)
"""


def test_without_a_compiler_it_installs_and_runs_in_plain_torch_with_one_warning(tmp_path: Path) -> None:
    found = wheel(tmp_path, CC="/nonexistent/cc", CXX="/nonexistent/c++")
    assert contents(found) == sources()
    zipfile.ZipFile(found).extractall(tmp_path / "installed")
    command = [sys.executable, "-c", WITHOUT_KERNEL, str(tmp_path / "installed")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    reason = (
        "the CPU kernel was not built when balanced_adam was installed; install it again where there is a C++ compiler"
    )
    assert done.stdout == (
        f"1 BalancedAdam steps parameters on cpu in plain torch, which is slower: {reason} | "
        f"fused is True, and a parameter of shape (3,) can't be: {reason}.\n"
    )


def test_the_doctor_finds_every_path_of_this_machine_right() -> None:
    done = subprocess.run([sys.executable, "-m", "balanced_adam"], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert f"DeepSpeed: {deepspeed.__version__.strip()}" in lines
    assert sum(line.startswith("  ZeRO-") and line.endswith(": one pass") for line in lines) == 6
    if COMPILER is not None:
        assert any(line.startswith("cpu: fused, ") for line in lines)
        assert sum("the bits of the rule" in line for line in lines) >= 3
