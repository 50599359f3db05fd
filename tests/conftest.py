"""The session's folder, and a heap that is quick to collect."""

import gc
import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest

from tests import session

hypothesis.settings.register_profile("however_slow", deadline=None)
hypothesis.settings.load_profile("however_slow")


def pytest_configure() -> None:
    # The workers of pytest-xdist share the cores. Before torch is imported; tests that want more threads ask for them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    session.folder()  # made by the controller of pytest-xdist, whose workers inherit the name


def pytest_collection_finish() -> None:
    """DeepSpeed collects garbage once or twice an engine; what was imported up to here need not be looked through."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    """What a failed test has started ends with it."""
    yield
    if ranks := sys.modules.get("tests.ranks"):
        ranks.end_all()
