"""Export a run's weights for transformers, lm_eval and others: ``python -m train.export RUN OUT``.

OUT gets safetensors, the configuration and the tokenizer. The run's folder is only read; the run may be at work.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from train.common.command_line import parse, report_on_rank
from train.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Export:
    """What to export, and where to."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder, whose newest complete checkpoint is exported, or one of its checkpoints,
    RUN/checkpoints/step-N."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """A folder that does not exist or is empty. It appears once everything is written."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the weights in the files. Weights that don't fit into it are refused."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (``python -m train.export --help``) and return the exit code.

    0: OUT is complete. 2: something is wrong. 75: the checkpoint can't be read now. 130: Ctrl-C.
    """
    try:
        settings = parse(Export, sys.argv[1:] if arguments is None else arguments, "train.export", __doc__)

        from train.checkpoint.export import export

        print(export(settings.run, settings.out, settings.dtype), flush=True)
    except ConfigError as error:
        return report_on_rank(error)
    except KeyboardInterrupt:
        print("\nStopped. Nothing was left.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
