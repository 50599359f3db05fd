"""A corpus that takes no time, and the harness's settings that fit it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.corpus import write_corpus
from train.common.command_line import parse
from train.distributed.launch import prepare_environment
from train.run.config import Run

Make = Callable[..., Run]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def small_run(corpus: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Command-line options of a run of a few seconds."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    text = (
        "--steps 6 --warmup 1 --batch 4 --sequence-length 32 --validation-fraction 0.2 "
        "--save-every 3 --validate-every 0"
    )
    return [*text.split(), "--out", str(tmp_path / "run"), "--data", str(corpus), "--data-cache", str(cache)]


@pytest.fixture
def make(small_run: list[str]) -> Make:
    """Settings from the options above and more; a later option wins."""

    def settings(*more: str) -> Run:
        merged = dict(zip(small_run[::2], small_run[1::2], strict=True))
        arguments = list(more)
        for name, value in merged.items():
            if name not in more:
                arguments += [name, value]
        return parse(Run, arguments, "train.pretrain", None)

    return settings


@pytest.fixture(autouse=True)
def one_rank() -> None:
    """What plain python does before a run."""
    if "RANK" not in os.environ:
        prepare_environment()
