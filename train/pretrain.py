"""One training run, started by ``deepspeed``, ``torchrun``, ``accelerate launch``, ``srun`` or plain ``python``."""

from __future__ import annotations

import sys

from train.common.command_line import parse, report_on_rank
from train.common.errors import (
    EXIT_RETRY,
    ConfigError,
    Preempted,
    is_main_process,
)
from train.run.config import Run


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (``python -m train.pretrain --help``) and return the exit code.

    0: finished.
    1: a bug in this program.
    2: the input is invalid or the run has diverged; starting it again would not help.
    75: stopped as asked, a rank was lost, or a file could not be read now; start it again.
    130: Ctrl-C.
    """
    try:
        run = parse(Run, sys.argv[1:] if arguments is None else arguments, "train.pretrain", __doc__)

        from train.distributed.launch import prepare_environment

        prepare_environment()

        from train.checkpoint.resumable_run import pretrain

        pretrain(run)
    except ConfigError as error:
        return report_on_rank(error)
    except (Preempted, KeyboardInterrupt) as stopped:
        if is_main_process():
            sentence = str(stopped) or "\nStopped. Run the same command again to resume from the newest checkpoint."
            print(sentence, file=sys.stderr, flush=True)
        return EXIT_RETRY if isinstance(stopped, Preempted) else 130
    return 0


if __name__ == "__main__":
    code = main()

    from train.distributed.launch import exit_process

    exit_process(code)
