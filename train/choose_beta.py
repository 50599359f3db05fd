"""Choose a beta for your model and text from a short pilot run: ``python -m train.choose_beta -- --data FOLDER``.

The module train.probe.pilot explains what is measured, and why.
"""

from __future__ import annotations

import math
import sys

from train.common.command_line import exit_code, parse
from train.common.files import write_json
from train.common.schemas import PILOT_FILE
from train.probe.options import Pilot


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (``python -m train.choose_beta --help``) and return the exit code."""

    def program() -> None:
        pilot = parse(Pilot, sys.argv[1:] if arguments is None else arguments, "train.choose_beta", __doc__)

        from train.distributed.launch import prepare_environment

        prepare_environment()

        from train.probe.pilot import choose, report

        choice, plan = choose(pilot)
        print(report(choice, plan))
        if pilot.out:
            inputs = {"noise": choice.noise, "drift": choice.drift, "error": choice.error, **plan}
            beta = None if math.isnan(choice.beta) else choice.beta
            write_json(pilot.out / PILOT_FILE, {"beta": beta, "range": choice.range, **inputs})

    return exit_code(program)


if __name__ == "__main__":
    code = main()

    from train.distributed.launch import exit_process

    exit_process(code)
