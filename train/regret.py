"""Print the regret of rules for a tied beta, on finished runs: ``python -m train.regret FOLDER_OR_CSV ...``.

A comparison with several tied betas, each at its best learning rate, gives a loss for every beta: a straight line over
log(1 - beta) between two of its betas, and the nearest beta's loss beyond them. The regret of a rule is the loss at the
beta it chooses minus the loss at the best beta that was run. That beta is the best in hindsight, so a rule can only
beat it by luck.
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
    """The runs and the rules to evaluate."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = (Path("runs/plane"),)
    """Comparisons, one row of the table each.
    A folder has to hold the report.csv of train.report (after train.report A B C it is in A).
    For the rule "pilot" it also needs the pilot.json of train.choose_beta --out.
    A CSV file NAME.csv needs NAME.pilot.json beside it, as docs/results/plane-tiny.csv has.
    Only arms with fp32 state are used."""
    rules: tuple[str, ...] = ("0.95", "0.944", "refresh:1000", "half_life_tokens:10e6", "pilot")
    """Rules as for --betas of train.pretrain, except from:A:to:B; or "pilot", the beta that train.choose_beta chose."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (``python -m train.regret --help``) and return the exit code."""

    def program() -> None:
        regret = parse(Regret, sys.argv[1:] if arguments is None else arguments, "train.regret", __doc__)

        from train.analysis import beta_rules
        from train.analysis.plots import markdown_table

        beta_rules.check(regret.rules)
        print(markdown_table([beta_rules.row(out, regret.rules) for out in regret.runs]))
        print(
            "\nA rule's beta, and its loss over that of the best tied beta that was run, in percent, "
            "with 95 % intervals."
        )

    return exit_code(program)


if __name__ == "__main__":
    sys.exit(main())
