"""Many runs, one after the other, and the report at the end: ``python -m train.compare --help``.

The plan (train.sweep.plan) is a manifest file. Start it again after a Ctrl-C or a crash: finished runs are skipped, a cut one goes on
from its newest checkpoint. Start it several times, on one machine or on many that share the folder: each takes runs that no
other one is at.
"""

from __future__ import annotations

import signal
import sys

from train.common.command_line import parse
from train.common.errors import ConfigError
from train.sweep.options import Comparison


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Command line: ``python -m train.compare --help``."""
    signal.signal(signal.SIGTERM, _interrupt)  # what a batch system sends: end the ranks too
    try:
        comparison = parse(Comparison, sys.argv[1:] if arguments is None else arguments, "train.compare", __doc__)

        from train.sweep.execute import compare

        compare(comparison)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
