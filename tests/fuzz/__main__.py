"""Draw inputs, and see that each is right or refused in a sentence: ``python -m tests.fuzz``.

It prints how many of each kind were taken, refused, and neither; and with ``--sentences`` one refusal of each wording.
"""

from __future__ import annotations

import random
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from tests.fuzz import ds_configs
from tests.fuzz.fuzzers import FUZZERS, Place, outcomes, plain_losses
from train.analysis.plots import markdown_table


@dataclass(frozen=True, kw_only=True)
class Fuzz:
    """How much, and what to print."""

    inputs: int = 1000
    """Of each kind."""
    first: int = 0
    """The first seed."""
    sentences: bool = False
    """Print one refusal of each wording."""
    train: int = 0
    """Train with this many of the ds_configs that are taken, on two ranks."""


def main() -> int:
    """Run it; 1 if there is a problem."""
    settings = tyro.cli(Fuzz, description=__doc__)
    warnings.simplefilter("ignore")
    rows, problems, sentences = [], [], {}
    with TemporaryDirectory() as name:
        place = Place.make(Path(name))
        for kind in FUZZERS:
            began = time.monotonic()
            found = outcomes(kind, range(settings.first, settings.first + settings.inputs), place)
            problems += [
                f"{kind}, seed {seed}: {each.problem}, of {each.given}" for seed, each in found if each.problem
            ]
            sentences.update({each.kind: f"{kind}: {each.said}" for _, each in found if each.said})
            of_known = [each for _, each in found if each.wrong is not None]
            rows.append(
                {
                    "inputs": kind,
                    "drawn": len(found),
                    "taken": sum(not each.said for _, each in found),
                    "refused": sum(bool(each.said) for _, each in found),
                    "wrong by construction": sum(bool(each.wrong) for each in of_known),
                    "tracebacks": sum(each.error is not None for _, each in found),
                    # Of files it isn't known which edits are wrong.
                    "taken in silence": sum(bool(each.wrong) and not each.said and not each.error for each in of_known)
                    if of_known
                    else "-",
                    "seconds": f"{time.monotonic() - began:.1f}",
                }
            )
        if settings.train:
            drawn = (ds_configs.drawn(random.Random(seed)) for seed in range(settings.first, sys.maxsize))
            right = (config for config, wrong, _ in drawn if not wrong)
            taken = [next(right) for _ in range(settings.train)]
            problems += plain_losses(Path(name), place.corpus, taken)
    print(markdown_table([{key: str(value) for key, value in row.items()} for row in rows]))
    for line in [*problems, *(sorted(sentences.values()) if settings.sentences else ())]:
        print(line.encode(errors="backslashreplace").decode())  # some names of files are no text
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
