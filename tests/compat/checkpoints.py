"""Checkpoints saved under one DeepSpeed go on under another: ``python -m tests.compat.checkpoints 0.18.6 0.19.8``.

Each cell of tests/parity/test_resume.py is saved at its cut under the first version, loaded under the second, and run
to the end; then the other way round. Weights and moments are compared with the control in plain torch, after loading
and at the end.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import tyro

from tests.compat.archives import said


@dataclass(frozen=True, kw_only=True)
class Across:
    """Which versions, on how many ranks."""

    versions: tyro.conf.Positional[tuple[str, str]]
    """Two of DeepSpeed's versions."""
    ranks: int = 2
    """How many save, and how many load."""
    stages: tuple[int, ...] = (0, 1, 2, 3)
    """ZeRO's stages."""


def save(folder: Path, ranks: int, stages: tuple[int, ...]) -> None:
    """Leg 1: leave the checkpoints, and universal ones beside them where there can be some."""
    from tests.parity import test_resume as resume
    from tests.ranks import spawn

    spawn(resume.save, ranks, (str(folder), [case for case in resume.RIGID if case.stage in stages]))
    for case in resume.convertible(resume.ZERO):
        if case.stage in stages:
            resume.to_universal(folder / str(case), fresh=False)


def load(folder: Path, ranks: int, _: tuple[int, ...]) -> None:
    """Leg 2: go on from what is there, and print a line a cell."""
    from tests.parity import test_resume as resume
    from tests.parity.compare import EXACT, differences
    from tests.parity.control import train
    from tests.parity.versions import possible
    from tests.ranks import device, spawn

    for universal, cases in ((False, possible(resume.RIGID)), (True, resume.convertible(resume.ZERO))):
        there = [case for case in cases if (folder / str(case) / ("universal" if universal else "cut")).exists()]
        outcomes = spawn(resume.load, ranks, resume.Load(str(folder), there, universal))
        for case in there:
            found = [
                differences(
                    [rank[case][when] for rank in outcomes],
                    train(steps, case.absent(), device=device(ranks), stored=case.state),
                )
                for when, steps in enumerate((resume.CUT, resume.END))
            ]
            kind = "universal" if universal else "ZeRO's own"
            print(f"row\t{case}\t{kind}\t{'same bits' if found == [EXACT, EXACT] else found}")


def main() -> int:
    """Run it and print a table; 1 if anything differs, or nothing could be compared."""
    settings = tyro.cli(Across, description=__doc__)
    rows = []
    for saved, loaded in (settings.versions, settings.versions[::-1]):
        with TemporaryDirectory() as folder:
            legs = (
                f"from tests.compat.checkpoints import *; {{}}(Path({folder!r}), {settings.ranks}, {settings.stages})"
            )
            said(saved, legs.format("save"))
            rows += [(saved, loaded, *cells) for cells in said(loaded, legs.format("load"))]
    table = pd.DataFrame(rows, columns=["saved by", "loaded by", "cell", "checkpoint", "outcome"])
    print(table.to_string(index=False))
    same = table["outcome"] == "same bits"
    print(table.assign(same=same).groupby(["saved by", "loaded by", "checkpoint"])["same"].agg(["sum", "size"]))
    return int(same.empty or not same.all())


if __name__ == "__main__":
    sys.exit(main())
