"""The fuzzers by name, and how they are run."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.corpus import write_corpus
from tests.fuzz import command_lines, damaged_files, ds_configs, optimizer_inputs
from tests.fuzz.outcome import Outcome
from tests.ranks import spawn
from train.common.command_line import parse
from train.distributed.launch import prepare_environment
from train.run.config import Run


@dataclass(frozen=True)
class Place:
    """A folder, and what the fuzzers read in it."""

    folder: Path
    corpus: Path
    whole: Path
    """What :func:`tests.fuzz.damaged_files.make` has filled."""
    run: Run
    """A run whose ds_config is a file here."""

    @staticmethod
    def make(folder: Path) -> Place:
        """Fill a folder."""
        if "RANK" not in os.environ:
            prepare_environment()
        corpus = write_corpus(folder / "corpus")
        damaged_files.make(folder / "whole", corpus)
        options = ["--out", str(folder / "run"), "--ds-config", str(folder / "ds.json"), "--batch", "4"]
        run = parse(Run, [*options, "--micro-batch", "2"], "train.pretrain", None)
        return Place(folder, corpus, folder / "whole", run)


@dataclass(frozen=True)
class Fuzzer:
    """What is drawn from a seed, and how much of it the tests draw."""

    outcome: Callable[[int, Place, Path], Outcome]
    """Of a seed; the folder is empty."""
    inputs: int


FUZZERS = {
    "optimizer inputs": Fuzzer(lambda seed, _, __: optimizer_inputs.outcome(seed), 700),
    "ds_configs": Fuzzer(lambda seed, place, _: ds_configs.outcome(seed, place.run), 600),
    "command lines": Fuzzer(lambda seed, place, folder: command_lines.outcome(seed, folder, place.corpus), 400),
    "damaged files": Fuzzer(lambda seed, place, folder: damaged_files.outcome(seed, place.whole, folder), 400),
}


def outcomes(name: str, seeds: Iterable[int], place: Place) -> list[tuple[int, Outcome]]:
    """What becomes of each seed's input."""
    found = []
    # A mistyped model is looked for on the hub, for long where there is no network.
    with patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
        for seed in seeds:
            folder = place.folder / "input"
            folder.mkdir()
            found.append((seed, FUZZERS[name].outcome(seed, place, folder)))
            shutil.rmtree(folder)
    return found


def plain_losses(folder: Path, corpus: Path, configs: list[dict[str, Any]]) -> list[str]:
    """Which of these ds_configs, all of which are right, train on two ranks to other losses than a plain one.

    They are to say only how a run is computed, so that the losses are those of stage 1 to a few roundings.
    """
    text = f"--data {corpus} --data-cache {folder}/cache --out {folder}/out --sequence-length 32 --batch 4"
    options = f"{text} --micro-batch 1 --validation-fraction 0.2 --warmup 1 --steps 6".split()
    plain = dict(ds_configs.shipped())["zero1.json"]
    own = [copy.deepcopy(plain), *map(ds_configs.without_batches, configs)]
    (first, *others), _ = spawn(ds_configs.losses, 2, (options, folder, own), 60 + 5 * len(own))
    assert len(set(first)) == 3, first
    return [
        f"{found}, not {first}, of {config}"
        for found, config in zip(others, configs, strict=True)
        if isinstance(found, str) or any(abs(a - b) > 2e-6 for a, b in zip(found, first, strict=True))
    ]
