"""What NVRTC makes of the CUDA source, and the C++ compiler of the rule.

``python -m tests.kernels.compiled`` prints it as tables, and needs no GPU.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from balanced_adam.kernels import cuda
from balanced_adam.kernels.cuda import STATE_TYPES
from balanced_adam.kernels.table import Variant
from tests.kernels.bits import VARIANTS
from tests.kernels.build import COMPILER, SOURCES, flags

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
SM, GHZ, TERABYTES = 132, 1.7, 3.0
KERNELS = ("flat", "multi", "squares", "prepare")


class Resources(NamedTuple):
    """What one kernel needs, as ptxas tells it."""

    registers: int
    stack: int
    spilled: int
    """Bytes stored and loaded because registers ran out."""


@cache
def compiled(variant: Variant, architecture: str) -> tuple[bytes, dict[str, Resources]]:
    """Machine code, and what each kernel takes."""
    image, log = cuda.compile(variant, architecture, ["--ptxas-options=-v"])
    pattern = (
        r"Function properties for balanced_adam_(\w+)\D+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads[\s\S]*?Used (\d+) registers"
    )
    found = {
        name: Resources(int(registers), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers in re.findall(pattern, log)
    }
    return image, found


@cache
def _listing(variant: Variant, architecture: str) -> dict[str, list[tuple[int, str]]]:
    """Kernel -> its instructions with their addresses, as cuobjdump shows them."""
    tools = Path(next(iter(find_spec("nvidia").submodule_search_locations))) / "cu13" / "bin"  # type: ignore
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.cubin"
        file.write_bytes(compiled(variant, architecture)[0])
        command: list[str | Path] = [tools / "cuobjdump", "-sass", file]
        done = subprocess.run(
            command, capture_output=True, text=True, env={"PATH": f"{tools}:/usr/bin:/bin"}, check=True
        )
    functions = re.split(r"Function : balanced_adam_", done.stdout)[1:]
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]+);"
    return {f.split()[0]: [(int(at, 16), what) for at, what in re.findall(pattern, f)] for f in functions}


def machine_code(variant: Variant, architecture: str) -> dict[str, list[str]]:
    """Kernel -> its instructions."""
    return {name: [what for _, what in found] for name, found in _listing(variant, architecture).items()}


def vector_loop(variant: Variant, architecture: str) -> int:
    """Instructions in a turn of the flat kernel's loop over vectors of four elements, the shortest with four roots."""
    found = _listing(variant, architecture)["flat"]
    ends = [(at, re.match(r"BRA\S*\s+(?:\S+,\s*)?0x([0-9a-f]+)", what)) for at, what in found]
    loops = [[what for at, what in found if int(target[1], 16) <= at <= end] for end, target in ends if target]
    return min(len(loop) for loop in loops if sum("MUFU.RSQ" in what for what in loop) >= 4)


def accesses(instructions: list[str]) -> Counter[str]:
    """Kinds of memory access: LDG.128, STG.64, LD (generic), LDL (spilled), ..."""
    kinds: Counter[str] = Counter()
    for instruction in instructions:
        opcode, *flags = instruction.split()[0].split(".")
        if opcode in ("LDG", "STG", "LD", "ST", "LDL", "STL"):
            kinds[".".join([opcode, *(f for f in flags if f in ("128", "64", "U16"))])] += 1
    return kinds


LOOP = """
#include "rule.h"
using namespace balanced_adam;
typedef {state} State;
extern "C" void loop(float* __restrict p, const float* __restrict g, State::Word* __restrict first,
                     State::Word* __restrict second, i64 n, const Scalars* scalars) {{
  const Scalars s = *scalars;
#pragma GCC ivdep
  for (i64 i = 0; i < n; i++) {{
    State::Code a = first[i], b = State::TWO ? second[i] : a;
    step<State>(s, p[i], g[i], a, b);
    first[i] = (State::Word)a;
    if (State::TWO) second[i] = (State::Word)b;
  }}
}}
"""


def cpu_loop(state: str) -> Counter[str]:
    """AVX-512 instructions for 16 elements in the loop over fp32 weights, by name. ``state`` is a type in rule.h."""
    with TemporaryDirectory() as folder:
        source, listing = Path(folder) / "loop.cpp", Path(folder) / "loop.s"
        source.write_text(LOOP.format(state=state))
        wide = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
        assert COMPILER is not None, "no C++ compiler"
        subprocess.run([COMPILER, *flags(), *wide, f"-I{SOURCES}", "-S", source, "-o", listing], check=True)
        lines = [line.strip() for line in listing.read_text().splitlines()]
    labels = {line[:-1]: at for at, line in enumerate(lines) if line.endswith(":")}
    jumps = [(labels[line.split()[1]], at) for at, line in enumerate(lines) if re.match(r"j\w+\s+\.L", line)]
    loops = [[x for x in lines[a:b] if not x.startswith(".")] for a, b in jumps if a < b]
    body = min((loop for loop in loops if any("vsqrtps" in x and "zmm" in x for x in loop)), key=len)
    turns = sum("vsqrtps" in x for x in body)
    return Counter({name: count / turns for name, count in Counter(x.split()[0] for x in body).items()})


def main() -> None:
    versions = {p: importlib.metadata.version(p) for p in ("nvidia-cuda-nvrtc", "cuda-bindings")}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print("\nRegisters of a thread (flat / multi / squares), greatest over the variants; nothing is spilled:\n")
    print("| architecture | flat | multi | squares |\n|---|---|---|---|")
    for architecture in ARCHITECTURES:
        found = [compiled(variant, architecture)[1] for variant in VARIANTS]
        assert not any(resources.spilled for kernels in found for resources in kernels.values())
        greatest = [max(kernels[k].registers for kernels in found) for k in KERNELS[:3]]
        print(f"| {architecture} | " + " | ".join(map(str, greatest)) + " |")

    print(
        f"\nInstructions for one element on {SM} SM x 4 x {GHZ} GHz, and the part of the issue slots that they take "
        f"while memory moves {TERABYTES} TB/s (an estimate for an H100):\n"
    )
    print("| moments | gradient, copy | bytes | instructions | issue slots |\n|---|---|---|---|---|")
    for state, (name, stored) in enumerate((("fp32", 8), ("packed32", 4), ("packed16", 2), ("packed8", 1))):
        for grad, copy, what, moved in ((1, 0, "fp32, none", 4), (2, 2, "bf16, bf16", 4)):
            instructions = vector_loop(Variant(1, grad, copy, False, state), "sm_90") / 4
            size = 8 + 2 * stored + moved
            slots = instructions / 32 * (TERABYTES * 1e12 / size) / (SM * 4 * GHZ * 1e9)
            print(f"| {name} | {what} | {size} | {instructions:.0f} | {slots:.0%} |")

    print(f"\nInstructions of the CPU's loop for 16 elements, AVX-512, {version_of_compiler()}:\n")
    print("| moments | all | of vectors | what most of them are |\n|---|---|---|---|")
    for name, state_type in zip(("fp32", "packed32", "packed16", "packed8"), STATE_TYPES, strict=True):
        counts = cpu_loop(state_type)
        vectors = sum(count for kind, count in counts.items() if kind.startswith("v"))
        most = ", ".join(f"{kind} {count:.3g}" for kind, count in counts.most_common(6))
        print(f"| {name} | {counts.total():.0f} | {vectors:.0f} | {most} |")


def version_of_compiler() -> str:
    done = subprocess.run([str(COMPILER), "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


if __name__ == "__main__":
    main()
