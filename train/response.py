"""Measure how an update responds to a change in the gradient's scale, for any betas, on gradients of a real run.

The module train.analysis.scale_response explains what is measured.
"""

from __future__ import annotations

import re
import sys

from train.common.command_line import exit_code, parse
from train.common.errors import require
from train.probe.options import Response
from train.sweep.arms import Arm


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (``python -m train.response --help``) and return the exit code."""

    def program() -> None:
        response = parse(Response, sys.argv[1:] if arguments is None else arguments, "train.response", __doc__)

        from train.distributed.launch import prepare_environment

        prepare_environment()

        from train.analysis.scale_response import STABLE, Averages, Mean, write
        from train.probe.recordings import of_language, of_vision

        require(
            bool(response.at) and min(response.at) >= response.window > STABLE,
            f"at is {' '.join(map(str, response.at))} and window is {response.window}; "
            f"window must be above {STABLE}, and every step of at must be at least window.",
        )
        require(response.elements >= 1, f"elements is {response.elements}; it must be at least 1.")
        require(bool(response.betas), "betas is empty; give at least one pair.")
        require(
            response.out.is_dir() or not response.out.exists(),
            f"out is {response.out}, which is a file; give a folder.",
        )
        pairs: dict[str, Averages] = {}
        for text in response.betas:
            if mean := re.fullmatch(r"mean:(\d+)", text):
                require(
                    0 < int(mean[1]) <= response.window,
                    f"betas has {text!r}, and window is {response.window}; a mean is of 1 to that many steps.",
                )
                pairs[text] = (Mean(int(mean[1])),) * 2
                continue
            arm = Arm.parse(text)
            require(
                isinstance(arm.betas, tuple) and (arm.state, arm.optimizer) == ("fp32", "adam"),
                f"betas has {text!r}; give one number, or beta1,beta2, or mean:STEPS.",
            )
            pairs[str(arm)] = (float(arm.betas[0]), float(arm.betas[-1]))
        recordings = of_language(response) if response.task == "language" else of_vision(response)
        write(response.out, pairs, recordings)

    return exit_code(program)


if __name__ == "__main__":
    code = main()

    from train.distributed.launch import exit_process

    exit_process(code)
