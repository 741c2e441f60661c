"""Fixtures of several CPU test files."""

import pytest


@pytest.fixture
def small_rotation(monkeypatch):
    from bench_case import shrink_rotation

    shrink_rotation(monkeypatch)
