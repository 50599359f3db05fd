"""Report the runs of a comparison: a table on the terminal, Markdown, CSV, and one self-contained HTML page."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from train.common.command_line import exit_code, parse


@dataclass(frozen=True, kw_only=True)
class Report:
    """The runs to report, and the baseline."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = (Path("runs/compare"),)
    """Folders of comparisons, each with a manifest.json. Their runs are combined.
    The report goes into the first folder."""
    baseline: str = ""
    """The arm that the others are compared with, such as 0.9,0.95. Default: the first arm with an ended run."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (``python -m train.report FOLDER``) and exit with 2 on an error."""

    def program() -> None:
        report = parse(Report, sys.argv[1:] if arguments is None else arguments, "train.report", __doc__)

        from train.analysis.report_page import write_report

        write_report(*report.runs, baseline=report.baseline)

    if code := exit_code(program):
        sys.exit(code)


if __name__ == "__main__":
    main()
