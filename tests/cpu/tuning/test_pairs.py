"""Entries of shapes that were timed with uniform and with ragged lengths."""

import dataclasses

import pytest
from test_session import run, task
from tune_case import DECODE, FakeMeasurer

from mla_cute.gpu_speed import H200
from mla_cute.tuned import select
from mla_cute.tuning import cost, pairs, space

UNIFORM = dataclasses.replace(DECODE, num_heads=64, batch=64, kv_len=32768)
RAGGED = dataclasses.replace(UNIFORM, lengths="ragged")
DEFAULT = select.default_for(UNIFORM, H200)
# Of the same plan as the default: kernels with another hint.
HINT = dataclasses.replace(DEFAULT, evict_first=False)


def tuned(folder, us, whens=(UNIFORM, RAGGED)):
    """The file of a run where `us(when, config)` is what a configuration takes."""
    todo = task(folder, whens=list(whens))
    run(todo, FakeMeasurer(us))
    return {entry.when: entry for entry in select.load(todo.out).entries}


def by(uniform, ragged):
    """Times by configuration for either; 100 us of others."""
    return lambda when, config: {"uniform": uniform, "ragged": ragged}[when.lengths].get(config, 100.0)


def another(when, n=0):
    """A candidate of that shape that plans otherwise than the default, with the same kernel."""
    key = space.run_key(when, DEFAULT, 132)
    found = [config for config in space.candidates(when, H200) if config.launch() == DEFAULT.launch()]
    return [config for config in found if space.run_key(when, config, 132) != key and config.kernel == "auto"][n]


def test_what_is_best_for_both_is_chosen_for_both(tmp_path):
    entries = tuned(tmp_path, by({HINT: 80.0}, {HINT: 90.0}))
    assert {when: (entry.config, entry.us, entry.default_us) for when, entry in entries.items()} == {
        UNIFORM: (HINT, 80.0, 100.0),
        RAGGED: (HINT, 90.0, 100.0),
    }


@pytest.mark.parametrize("order", [(UNIFORM, RAGGED), (RAGGED, UNIFORM)])
def test_the_least_worst_slowdown_wins(tmp_path, order):
    """The best for uniform lengths loses 1.25x on ragged ones, where the default loses 1.11x on uniform ones."""
    entries = tuned(tmp_path, by({HINT: 90.0}, {HINT: 125.0}), order)
    assert {entry.config for entry in entries.values()} == {DEFAULT}
    assert (entries[UNIFORM].us, entries[RAGGED].us) == (100.0, 100.0)
    assert (entries[UNIFORM].runner_up, entries[UNIFORM].runner_up_us) == (HINT, 90.0), "what is best for them alone"
    entries = tuned(tmp_path / "other", by({HINT: 50.0}, {HINT: 110.0}), order)
    assert {entry.config for entry in entries.values()} == {HINT}
    assert (entries[RAGGED].us, entries[RAGGED].default_us) == (110.0, 100.0)
    assert (entries[RAGGED].runner_up, entries[RAGGED].runner_up_us) == (DEFAULT, 100.0)


def test_a_third_that_is_good_for_both_wins_over_the_best_of_each(tmp_path):
    other = {"uniform": HINT, "ragged": another(RAGGED)}
    timed = (cost.choose(when, space.candidates(when, H200), H200).timed[1:] for when in (UNIFORM, RAGGED))
    [third, *_] = [config for config in set.intersection(*map(set, timed)) if config not in other.values()]

    def us(when, config):
        if config == third:
            return 71.0
        return 70.0 if config == other[when.lengths] else 200.0

    entries = tuned(tmp_path, us)
    assert {entry.config for entry in entries.values()} == {third}
    assert [entry.us for entry in entries.values()] == [71.0, 71.0]


def test_a_gain_of_less_than_a_hundredth_keeps_the_default(tmp_path):
    """HINT wins 2 % of uniform lengths and loses 1.2 % of ragged ones."""
    entries = tuned(tmp_path, by({HINT: 98.0}, {HINT: 101.2}))
    assert {entry.config for entry in entries.values()} == {DEFAULT}


def test_configurations_that_run_a_shape_alike_have_one_time(tmp_path):
    """What is chosen for ragged lengths is no candidate of uniform ones, where another of its plan stands for it."""
    short, ragged = (dataclasses.replace(when, batch=16, kv_len=4096) for when in (UNIFORM, RAGGED))
    uniform = {space.run_key(short, config, 132): config for config in space.candidates(short, H200)}
    config = next(
        config
        for config in space.candidates(ragged, H200)
        if config not in uniform.values()
        and uniform.get(space.run_key(short, config, 132)) not in (None, select.default_for(short, H200))
    )
    stands_for_it = uniform[space.run_key(short, config, 132)]
    entries = tuned(tmp_path, by({stands_for_it: 98.5}, {config: 50.0}), [short, ragged])
    assert {entry.config for entry in entries.values()} == {config}
    assert (entries[short].us, entries[ragged].us) == (98.5, 50.0)


def test_shapes_alone_keep_what_was_chosen_for_them(tmp_path):
    entries = tuned(tmp_path, by({HINT: 90.0}, {HINT: 125.0}), [UNIFORM])
    assert entries[UNIFORM].config == HINT
    assert pairs.partner_of(UNIFORM) == RAGGED
    assert pairs.partner_of(RAGGED) == UNIFORM
    assert pairs.partner_of(dataclasses.replace(UNIFORM, batch=1)) is None
    assert pairs.partner_of(dataclasses.replace(UNIFORM, op="prefill")) is None


def test_a_partner_that_failed_or_is_of_other_sources_does_not_count(tmp_path):
    todo, measurer = task(tmp_path, whens=[UNIFORM, RAGGED]), FakeMeasurer(by({HINT: 90.0}, {HINT: 125.0}))
    measurer.fails_open[RAGGED] = "does not fit"
    run(todo, measurer)
    assert [entry.config for entry in select.load(todo.out).entries] == [HINT]
    todo = task(tmp_path / "other", whens=[RAGGED], digest="old")
    run(todo, FakeMeasurer(by({HINT: 90.0}, {HINT: 125.0})))
    newer = dataclasses.replace(todo, whens=[UNIFORM], digest="new")
    run(newer, FakeMeasurer(by({HINT: 90.0}, {HINT: 125.0})))
    assert {entry.when: entry.config for entry in select.load(todo.out).entries}[UNIFORM] == HINT


def test_a_run_that_goes_on_mends_the_entry_of_the_partner(tmp_path):
    us = by({HINT: 90.0}, {HINT: 125.0})
    assert tuned(tmp_path, us, [UNIFORM])[UNIFORM].config == HINT
    entries = tuned(tmp_path, us, [UNIFORM, RAGGED])
    assert {entry.config for entry in entries.values()} == {DEFAULT}


@pytest.mark.parametrize(
    ("policy", "us", "config"), [("graph", 80.0, HINT), ("eager", 80.0, DEFAULT), ("eager", 70.0, HINT)]
)
def test_slowdowns_are_of_what_the_policy_compares(tmp_path, policy, us, config):
    """1.25x of the default against 1.21x of HINT; beside 300 us of the host both are 1.05x, and the default stays. With
    70 us instead of 80 it is 1.08x there, and HINT wins."""
    todo = task(tmp_path, whens=[UNIFORM, RAGGED], policy=policy)
    measurer = FakeMeasurer(by({HINT: us}, {HINT: 121.0}))
    measurer.host_of = lambda config: 300.0
    run(todo, measurer)
    assert {entry.config for entry in select.load(todo.out).entries} == {config}
