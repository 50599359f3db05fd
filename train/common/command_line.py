"""The command line of every command, made from its dataclass of settings by tyro."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable
from itertools import groupby
from typing import TypeVar

import tyro

from train.common.errors import ConfigError

Settings = TypeVar("Settings")


def exit_code(program: Callable[[], None]) -> int:
    """Run it: 0; or 2 where the input is bad, with the sentence for who gave it on stderr."""
    try:
        program()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(settings: type[Settings], arguments: list[str], module: str, description: str | None) -> Settings:
    """Settings from command-line arguments of ``python -m MODULE`` (``--help`` prints and exits, as usual).

    Raises:
        ConfigError: for unknown options and for values of the wrong type.
    """
    arguments = [a for a in arguments if not a.startswith("--local_rank")]  # the deepspeed launcher adds it
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                settings,
                prog=f"python -m {module}",
                args=arguments,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(f"{_one_sentence(complaint.getvalue())}; see python -m {module} --help.") from None


def _one_sentence(box: str) -> str:
    """The first paragraph in tyro's error box, below its title, as one line."""
    lines = [re.sub(r"[╭╮╰╯│─]+|-{5,}", " ", line).strip() for line in box.splitlines() if not line.startswith("╭")]
    paragraphs = [" ".join(group) for filled, group in groupby(lines, bool) if filled]
    title = "╭" not in box  # without Unicode the title is a paragraph of its own
    return paragraphs[min(int(title), len(paragraphs) - 1)].rstrip(".")
