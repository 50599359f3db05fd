"""``python -m balanced_adam``: what this machine will do and why, and a short test of every path."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec

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


def deepspeed() -> str:
    """Which DeepSpeed there is, and whether ZeRO's step is taken in one pass with it."""
    if find_spec("deepspeed") is None:
        return "not installed"
    from balanced_adam.zero import TESTED_DEEPSPEED, one_pass, registration

    try:
        changed = [
            f"{cls.__name__}.{method}"
            for cls in one_pass.classes()
            if (method := one_pass.unrecognised(cls.__name__) or one_pass.replaced(cls))
        ]
        found = version("deepspeed")
    except Exception as error:  # whatever a DeepSpeed runs into that is broken, or has moved what is looked at
        return f"can't be imported: {error}"
    if reason := registration.refusal():
        return reason
    tested = "the version tested" if found == TESTED_DEEPSPEED else f"tested was {TESTED_DEEPSPEED}"
    passes = f"DeepSpeed's own passes, since it has changed: {', '.join(changed)}" if changed else "one pass"
    return f"{found} ({tested}); ZeRO's step: {passes}"


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
    print(f"DeepSpeed: {deepspeed()}")
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
