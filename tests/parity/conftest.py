"""Cells that this DeepSpeed can't run are skipped, with the reason."""

from __future__ import annotations

import pytest

from tests.parity.cases import Case
from tests.parity.versions import why_not


def pytest_itemcollected(item: pytest.Item) -> None:
    for value in (
        item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
    ):
        if isinstance(value, Case) and (reason := why_not(value)):
            item.add_marker(pytest.mark.skip(reason=reason))
