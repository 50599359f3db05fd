"""``python -m balanced_adam``: what this machine will do and why, and a short test of every path."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO

import torch

from balanced_adam import BalancedAdam, __version__, kernels, rule
from balanced_adam.kernels import cpu


def devices() -> list[torch.device]:
    """The CPU, and every GPU."""
    return [torch.device("cpu"), *(torch.device("cuda", k) for k in range(torch.cuda.device_count()))]


def kernel(device: torch.device) -> str:
    """What steps parameters on this device, in words."""
    reason = kernels.why_not(device)
    if reason is not None:
        return f"plain torch: {reason}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"fused, compiled by NVRTC for sm_{major}{minor} ({torch.cuda.get_device_name(device)})"
    library = cpu.load()
    isa = cpu.ISA[library.isa] if library.best_isa else "the baseline of this architecture"
    threads = (
        f"{torch.get_num_threads()} threads of {library.openmp}" if library.openmp else "one thread: no OpenMP found"
    )
    return f"fused, {isa}, {threads}"


def deepspeed() -> Iterator[str]:
    """Which DeepSpeed there is, and how it takes ZeRO's step at each stage, which is tried; in lines."""
    if find_spec("deepspeed") is None:
        yield "not installed"
        return
    try:
        with redirect_stdout(StringIO()):  # its log goes there, too
            import deepspeed as imported

            from balanced_adam.zero import registration
    except Exception as error:  # whatever a DeepSpeed runs into that is broken
        yield f"can't be imported: {error}"
        return
    yield registration.refusal() or str(imported.__version__).strip()
    if registration.refusal() is None:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        line = [sys.executable, "-m", *launcher, "-m", "balanced_adam.zero.trial"]
        tried = subprocess.run(line, capture_output=True, text=True)
        yield from (each for each in tried.stdout.splitlines() if each.startswith("  ZeRO-"))
        if tried.returncode:
            yield f"  ZeRO's stages could not be tried: {tried.stderr.strip()[-1000:]}"


def trials(device: torch.device) -> Iterator[tuple[str, bool]]:
    """A step through each kernel on this device, and whether it had the bits of the rule."""
    for dtype in kernels.DTYPES:
        generator = torch.Generator().manual_seed(0)
        param, grad = torch.randn(2, 100_003, generator=generator)
        expected, *_ = rule.update(
            param, grad.to(dtype).float(), torch.zeros(100_003), torch.zeros(100_003),
            step=1, lr=0.1, betas=(0.95, 0.95), eps=1e-8, weight_decay=0.01,
        )  # fmt: skip
        weight, copy = param.to(device), torch.empty(100_003, dtype=dtype, device=device)
        optimizer = BalancedAdam([weight], lr=0.1, fused=True)
        optimizer.set_fused_grad(weight, [grad.to(device, dtype)], lp_param_out=copy)
        optimizer.step()
        right = torch.equal(weight.cpu(), expected) and torch.equal(copy.cpu(), expected.to(dtype))
        yield f"{str(dtype).removeprefix('torch.')} gradient and copy", right


def main() -> int:
    """Print it all; 1 if a path computed something wrong."""
    warnings.simplefilter("ignore")
    print(f"balanced_adam {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    print("DeepSpeed: ", end="")
    for line in deepspeed():
        print(line, flush=True)
    wrong = False
    for device in devices():
        print(f"{device}: {kernel(device)}")
        if kernels.why_not(device) is None:
            start = time.perf_counter()
            results = dict(trials(device))
            for name, right in results.items():
                print(f"  {name}: {'the bits of the rule' if right else 'WRONG'}")
                wrong |= not right
            print(f"  ({time.perf_counter() - start:.2f} s)")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
