"""Runs -> a table on the terminal, Markdown, CSV, and one self-contained HTML page."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from train.common.command_line import exit_code, parse


@dataclass(frozen=True, kw_only=True)
class Report:
    """Where the runs are."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = (Path("runs/compare"),)
    """Folders of comparisons (each holds manifest.json), which are put together; the report goes into the first one."""
    baseline: str = ""
    """The arm the others are compared with. Default: the first arm."""


def main(arguments: list[str] | None = None) -> None:
    """Command line: ``python -m train.report FOLDER``."""

    def program() -> None:
        report = parse(Report, sys.argv[1:] if arguments is None else arguments, "train.report", __doc__)

        from train.analysis.report_page import write_report

        write_report(*report.runs, baseline=report.baseline)

    if code := exit_code(program):
        sys.exit(code)


if __name__ == "__main__":
    main()
