"""Make token shards of a text, on all cores of one host: ``python -m train.prepare --data TEXT --out FOLDER``.

Then give the folder to ``train.pretrain --data``. After a Ctrl-C or a crash, the same command goes on.
"""

from __future__ import annotations

import os
import signal
import sys

from train.common.command_line import parse
from train.common.errors import EXIT_RETRY, ConfigError, RetryError
from train.common.processes import end_with_parent
from train.data.config import Prepare


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _in_child() -> None:
    """What each process that tokenizes does first: leave Ctrl-C to its parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (``python -m train.prepare --help``) and return the exit code.

    0: the folder is complete. 2: something is wrong. 75: the disk is full, or the like. 130: Ctrl-C.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are the parallelism
    try:
        settings = parse(Prepare, sys.argv[1:] if arguments is None else arguments, "train.prepare", __doc__)

        from train.data.prepare import prepare

        print(prepare(settings), flush=True)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_RETRY if isinstance(error, RetryError) else 2
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    os.register_at_fork(after_in_child=_in_child)
    sys.exit(main())
