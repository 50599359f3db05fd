"""Analyse a comparison over the beta plane from report.csv files: ``python -m train.plane FILE ... --out plane.svg``.

It draws a heat map and prints the cost of tying the betas, the noise between seeds, and the number of seeds needed to
show a small difference. train.report includes the same for a comparison's folder. This command reads tables that were
kept, such as those in docs/results.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from train.common.command_line import exit_code, parse
from train.common.errors import ConfigError, require
from train.common.files import write_text


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The tables to read and the figure to write."""

    tables: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """report.csv files of train.report. Their runs are combined; no run may be in two of them."""
    out: Path = Path("plane.svg")
    """File of the heat map, as SVG. The tables are printed."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (``python -m train.plane --help``) and return the exit code."""

    def program() -> None:
        kept = parse(Kept, sys.argv[1:] if arguments is None else arguments, "train.plane", __doc__)

        from train.analysis import beta_grid
        from train.analysis.lr_selection import best_lr
        from train.analysis.plots import as_svg

        table = beta_grid.read(*kept.tables)
        best = best_lr(table)
        require(
            beta_grid.is_grid(best),
            "the tables have too few pairs of betas for a plane; it needs two tied and two untied ones.",
        )
        figure = as_svg(beta_grid.heat_map(beta_grid.cells_of(best), beta_grid.edges(table)))
        try:
            kept.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept.out, figure)
        except OSError as error:
            raise ConfigError(f"out is {kept.out}, which can't be written: {error.strerror}.") from None
        print(beta_grid.markdown(table, best))
        print(kept.out.resolve())

    return exit_code(program)


if __name__ == "__main__":
    sys.exit(main())
