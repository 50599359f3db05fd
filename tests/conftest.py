"""How the tests are spread over pytest-xdist's workers (``make test``: --dist loadgroup)."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share what took long to make go to one worker, the largest groups first; any other to whichever worker is free."""
    groups = {item: group_of(item) for item in items}
    for item, group in groups.items():
        if group:
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (groups[item] is None, "parity" not in item.path.parts))


def group_of(item: pytest.Item) -> str | None:
    """A group's name, or None for a test on its own."""
    name = item.path.stem
    if "parity" in item.path.parts:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if name == "test_exact" and "world" in parameters:
            return f"{name}-{parameters['world']}"
        return "of_the_wrong" if name in ("test_mutants", "test_registration") else name
    if "kernels" in item.path.parts or "cluster" in item.path.parts:
        return name
    return name if "straight" in getattr(item, "fixturenames", ()) else None
