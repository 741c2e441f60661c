"""The order in which workers get the CPU tests."""

import types

import pytest
import run_order


def item(name, *marks):
    found = {mark.name: mark for mark in marks}
    return types.SimpleNamespace(nodeid=name, get_closest_marker=found.get)


def compiles(name, *arguments):
    return item(name, pytest.mark.compiles(*arguments).mark)


QUICK = [item(f"quick {i}") for i in range(9)]
SLOW = [item(f"slow {i}", pytest.mark.slow.mark) for i in range(2)]


def order(items, workers):
    return [found.nodeid for found in run_order.dealt(items, workers)]


def test_every_worker_begins_with_its_share_of_what_is_slow():
    variants = [compiles("a1", "a", 2), compiles("b", "b", 3), compiles("c", "c", 2), compiles("a2", "a", 2)]
    found = order([*QUICK[:4], *variants, *SLOW, *QUICK[4:], compiles("no group")], 2)
    assert found[:8] == ["b", "no group", "slow 0", *(f"quick {i}" for i in range(5))]
    assert found[8:] == ["a1", "a2", "c", "slow 1", *(f"quick {i}" for i in range(5, 9))]


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 40])
@pytest.mark.parametrize(
    "items",
    [
        [],
        QUICK,
        [compiles("a", "a", 9), compiles("b", "b", 1), compiles("c", "c", 1), compiles("d", "d", 1)],
        [*QUICK, *(compiles(f"{i}", i % 5, 5 - i % 5) for i in range(40)), *SLOW],
    ],
)
def test_no_test_is_lost(items, workers):
    assert sorted(order(items, workers)) == sorted(found.nodeid for found in items)
