"""What is installed, and what an import costs."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import balanced_adam

REPOSITORY = Path(balanced_adam.__file__).parents[1]
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
