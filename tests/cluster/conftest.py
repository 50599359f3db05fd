"""Two nodes and a controller, up for all tests; a project folder and a corpus that they share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Cluster, copy_of_project, why_not
from tests.corpus import write_corpus


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    running = Cluster(Path("/tmp/balanced_adam_cluster"))
    yield running
    running.close()


@pytest.fixture(scope="session")
def project(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's copy of the project, with site.env filled in."""
    return copy_of_project(tmp_path_factory.mktemp("user") / "project")


@pytest.fixture(scope="session")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of a few seconds."""
    base = tmp_path_factory.mktemp("data")
    text = (
        "--steps 20 --warmup 1 --batch 4 --sequence-length 32 --validation-fraction 0.2 "
        "--save-every 5 --validate-every 0"
    )
    return [
        *text.split(),
        "--data",
        str(write_corpus(base / "corpus")),
        "--data-cache",
        str(base / "cache"),
        "--timeout",
        "20",
    ]
