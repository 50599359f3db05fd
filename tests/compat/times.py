"""What the one pass gains under several DeepSpeeds: ``python -m tests.compat.times 0.16.9 0.19.5 0.19.8``.

A step of a DeepSpeed engine on two ranks (tests/perf/engine.py), in one pass, in DeepSpeed's own passes, and by
DeepSpeed's Adam; each version in one run, round by round. Two minutes a version, on a quiet machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from tests.compat.archives import said
from tests.perf import engine
from tests.perf.measure import machine, ratio

STAGES = (1, 2, 3)
CONTENDERS = {
    "own passes": engine.UNFUSED,
    "DeepSpeed's Adam": engine.Contender("DeepSpeed Adam", engine.ADAM),
    "its torch_adam": engine.Contender("DeepSpeed Adam, torch_adam", engine.TORCH_ADAM),
}


@dataclass(frozen=True, kw_only=True)
class Times:
    """Which versions."""

    versions: tyro.conf.Positional[tuple[str, ...]]
    """DeepSpeed's versions."""


def rows() -> None:
    """In the DeepSpeed of this process: print a row for each stage."""
    import deepspeed

    for stage in STAGES:
        runs = engine.measured(stage, [engine.ONE_PASS, *CONTENDERS.values()])
        ours = runs[engine.ONE_PASS.name].local
        found = [ratio(runs[contender.name].local, ours) for contender in CONTENDERS.values()]
        milliseconds = f"{sorted(ours)[len(ours) // 2] * 1e3:.0f}"
        print("row", deepspeed.__version__.strip(), f"ZeRO-{stage}", milliseconds, *found, sep="\t")


def main() -> None:
    """Run it and print a table."""
    settings = tyro.cli(Times, description=__doc__)
    head = ["DeepSpeed", "stage", "one pass, ms", *CONTENDERS]
    print(f"{machine().rpartition(', ')[0]}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for version in settings.versions:
        for cells in said(version, "from tests.compat.times import rows; rows()"):
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
