"""What is installed, and what an import does."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from train.settings import REPOSITORY

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
print([str(w.message) for w in said if "DeepSpeed" in str(w.message)])
"""
WITH_DEEPSPEED = """
import balanced_adam, torch
print(torch.optim.BalancedAdam is balanced_adam.BalancedAdam)
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_without_deepspeed_the_optimizer_works_and_nothing_is_registered() -> None:
    assert python(WITHOUT_DEEPSPEED) == "['deepspeed'] False"


def test_a_deepspeed_that_cannot_be_imported_is_a_warning() -> None:
    expected = "DeepSpeed is installed but can't be imported (CUDA_HOME does not exist). BalancedAdam works without it."
    assert python(BROKEN_DEEPSPEED) == str([expected])


def test_with_deepspeed_importing_registers() -> None:
    assert python(WITH_DEEPSPEED) == "True"


def test_the_wheel_ships_the_optimizer_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        REPOSITORY / "balanced_adam", source / "balanced_adam", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(REPOSITORY / "train", source / "train")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    code = {name for name in names if ".dist-info/" not in name}
    assert code == {f"balanced_adam/{f.name}" for f in (REPOSITORY / "balanced_adam").iterdir() if f.is_file()}
    assert "balanced_adam/py.typed" in code
