"""Run a comparison of betas, one run after the other, and write the report: ``python -m train.compare --help``.

The plan (train.sweep.plan) is a manifest file. After a Ctrl-C or a crash, start the same command again: finished runs
are skipped, and an interrupted run resumes from its newest checkpoint. To run in parallel, start the command several
times, on one machine or on many that share the folder. Each process takes runs that no other is working on.
"""

from __future__ import annotations

import signal
import sys

from train.common.command_line import parse
from train.common.errors import EXIT_RETRY, ConfigError, RetryError
from train.sweep.options import Comparison


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (``python -m train.compare --help``) and exit with 2 on an error, 130 on Ctrl-C."""
    signal.signal(signal.SIGTERM, _interrupt)  # sent by a batch system; the ranks have to end too
    try:
        comparison = parse(Comparison, sys.argv[1:] if arguments is None else arguments, "train.compare", __doc__)

        from train.sweep.execute import compare

        compare(comparison)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_RETRY if isinstance(error, RetryError) else 2)
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again to resume.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
