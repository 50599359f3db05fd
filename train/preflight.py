"""Check all hosts before a run: ``LAUNCHER -m train.preflight ...``, with the options of train.pretrain.

Every rank takes part. Each problem is reported in one sentence that names the host, before the first training step.
Plain ``python -m train.preflight --ranks N ...`` checks only settings, data and model, for N ranks.
"""

from __future__ import annotations

import sys

from train.common.command_line import parse, report_on_rank
from train.common.errors import ConfigError, is_main_process
from train.run.config import Preflight


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0: nothing wrong was found. 2: something is wrong. 75: a rank was lost, or a file could not be read now.
    """
    try:
        run = parse(Preflight, sys.argv[1:] if arguments is None else arguments, "train.preflight", __doc__)

        from train.distributed.launch import prepare_environment

        prepare_environment()

        from train.checkpoint import branch
        from train.run.preflight import preflight

        branch.check(run)
        summary = preflight(run)
        if is_main_process():
            print(summary, flush=True)
    except ConfigError as error:
        return report_on_rank(error)
    return 0


if __name__ == "__main__":
    code = main()

    from train.distributed.launch import exit_process

    exit_process(code)
