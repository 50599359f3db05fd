"""Two thousand drawn inputs: each is taken and computed right, or refused in a sentence that names what is wrong."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.corpus import write_corpus
from tests.fuzz import damaged_files, ds_configs
from tests.fuzz.fuzzers import FUZZERS, Place, outcomes, plain_losses
from tests.fuzz.outcome import Outcome

BATCHES = [(name, first) for name, fuzzer in FUZZERS.items() for first in range(0, fuzzer.inputs, 100)]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Files of a run, a comparison and a corpus, made once by each worker."""
    folder = tmp_path_factory.mktemp("fuzz")
    return Place.make(folder)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "first"), BATCHES)
def test_an_input_is_right_or_is_refused_in_a_sentence(name: str, first: int, place: Place) -> None:
    found = outcomes(name, range(first, first + 100), place)
    problems = [f"seed {seed}: {each.problem}, of {each.given}" for seed, each in found if each.problem]
    assert not problems, "\n".join(problems)
    refused = sum(bool(each.said) for _, each in found)
    assert 0 < refused < 100  # or they are not what they are meant to be


@pytest.mark.ranks
def test_ds_configs_that_are_taken_give_the_losses_of_the_plain_one(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    taken = [config for config, wrong, _ in map(ds_configs.drawn, map(random.Random, range(60))) if not wrong][:8]
    assert not plain_losses(tmp_path, corpus, taken)


PROBLEMS = [
    (Outcome("x", True), "taken in silence"),
    (Outcome("x", False, said="x is 1."), "right, and refused"),
    (Outcome("x", None, error=KeyError("y")), "a traceback: KeyError"),
    (Outcome("x", True, "lr", "it is wrong."), "does not name lr"),
    (Outcome("x", True, "lr", "lr is wrong:\n  too much."), "no sentence"),
    (Outcome("x", True, "lr", "lr is " + "9" * 600), "no sentence"),
    (Outcome("x", True, "a.lr", "it has b.lr = -1; no."), "does not name a.lr"),
    (Outcome("x", True, "a.lr", "it has a, which nobody has."), ""),
    (Outcome("x", True, "warm-up", "warm_up is -1."), ""),
    (Outcome("x", False), ""),
]


@pytest.mark.parametrize(("outcome", "problem"), PROBLEMS)
def test_what_is_wrong_about_an_outcome_is_seen(outcome: Outcome, problem: str) -> None:
    assert outcome.problem.startswith(problem) or problem in outcome.problem
    assert bool(outcome.problem) is bool(problem)


def test_every_reader_reads_the_undamaged_files(place: Place, tmp_path: Path) -> None:
    damaged_files.make(tmp_path / "whole", place.corpus)
    for _, read in damaged_files.READERS:
        read(tmp_path / "whole")
