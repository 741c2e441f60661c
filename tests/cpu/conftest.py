"""Fixtures of several CPU test files, and their order."""

import pytest
import run_order


@pytest.fixture
def small_rotation(monkeypatch):
    from bench_case import shrink_rotation

    shrink_rotation(monkeypatch)


def pytest_collection_modifyitems(config, items):
    if workers := getattr(config, "workerinput", {}).get("workercount"):
        items[:] = run_order.dealt(items, workers)
