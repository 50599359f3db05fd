"""What rules for a tied beta cost on runs that were made: ``python -m train.regret FOLDER_OR_CSV ...``.

A comparison with several tied betas, each at its best learning rate, has a loss for every beta: between two of its betas, a
straight line over log(1 - beta); beyond them, that of the nearest. A rule's regret is the loss at the beta it chooses less that
at the best of those that were run, which was chosen by looking, so that no rule can do better but by luck.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from train.common.command_line import exit_code, parse


@dataclass(frozen=True, kw_only=True)
class Regret:
    """Which runs, and which rules."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = (Path("runs/plane"),)
    """Each is a row: a folder with the report.csv of train.report (A, after train.report A B C) and what train.choose_beta --out has left, or
    such a table that was kept, as docs/results/plane-tiny.csv and its plane-tiny.pilot.json. Betas of fp32 state count."""
    rules: tuple[str, ...] = ("0.95", "0.944", "refresh:1000", "half_life_tokens:10e6", "pilot")
    """As --betas of train.pretrain takes them, but for from:A:to:B; "pilot" is what train.choose_beta has found."""


def main(arguments: list[str] | None = None) -> int:
    """Command line: ``python -m train.regret --help``; the exit code."""

    def program() -> None:
        regret = parse(Regret, sys.argv[1:] if arguments is None else arguments, "train.regret", __doc__)

        from train.analysis import beta_rules
        from train.analysis.plots import markdown_table

        beta_rules.check(regret.rules)
        print(markdown_table([beta_rules.row(out, regret.rules) for out in regret.runs]))
        print(
            "\nA rule's beta, and its loss over that of the best tied beta that was run, in percent, with 95 % intervals."
        )

    return exit_code(program)


if __name__ == "__main__":
    sys.exit(main())
