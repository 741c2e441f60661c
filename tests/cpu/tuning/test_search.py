"""The search of one shape against made-up times: halving, noise, ties, failures, what is chosen."""

import dataclasses

import pytest
from tune_case import DECODE, FakeMeasurer

from mla_cute.config import KernelConfig
from mla_cute.tuning import search
from mla_cute.tuning.search import RUNGS, tune_shape

DEFAULT = KernelConfig()


def config(number):
    return dataclasses.replace(DEFAULT, item_overhead=10 + number)


CONFIGS = [DEFAULT, *map(config, range(19))]


def times(by_config, other=100.0):
    return lambda when, asked: by_config.get(asked, other)


def by_config(result):
    return {trial.config: trial for trial in result.trials}


@pytest.mark.parametrize("seed", range(20))
def test_finds_the_best_in_noise(seed):
    """3 % apart under a noise of 4 % per sample."""
    speeds = {asked: 100.0 + i for i, asked in enumerate(CONFIGS)} | {config(7): 95.0, config(3): 98.0}
    result = tune_shape(FakeMeasurer(times(speeds), noise=0.04, seed=seed), DECODE, CONFIGS)
    assert result.chosen.config == config(7)
    assert result.us == pytest.approx(95, rel=0.02)
    assert result.default_us == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_keeps_the_default(seed):
    result = tune_shape(FakeMeasurer(noise=0.03, seed=seed), DECODE, CONFIGS)
    assert result.chosen.config == DEFAULT
    assert result.chosen.verdict == "chosen"


def test_a_gain_below_the_limit_keeps_the_default():
    result = tune_shape(FakeMeasurer(times({config(1): 99.5})), DECODE, CONFIGS)
    assert result.chosen.config == DEFAULT
    assert by_config(result)[config(1)].verdict == "not chosen"
    assert tune_shape(FakeMeasurer(times({config(1): 98.5})), DECODE, CONFIGS).chosen.config == config(1)


def test_a_lucky_candidate_is_not_chosen_and_the_next_is():
    """Fast until it is picked."""
    measurer = FakeMeasurer()

    def us_of(when, asked):
        if asked == config(1):
            return 88.5 if measurer.timed[asked] <= sum(RUNGS) else 99.8
        return 90.0 if asked == config(2) else 100.0

    measurer.us_of = us_of
    result = tune_shape(measurer, DECODE, [DEFAULT, config(1), config(2), config(3)])
    assert by_config(result)[config(1)].verdict == "not chosen: 1.002x the default's speed in new rounds"
    assert result.chosen.config == config(2)
    measurer = FakeMeasurer(us_of)
    result = tune_shape(measurer, DECODE, [DEFAULT, config(1)])
    assert (result.chosen.config, result.us, result.default_us) == (DEFAULT, 100.0, 100.0)


def test_a_candidate_that_fails_in_its_duel_is_not_chosen():
    measurer = FakeMeasurer(times({config(1): 80.0}))
    real = measurer.samples

    def samples(configs, rounds):
        if measurer.timed.get(config(1), 0) >= sum(RUNGS) and config(1) in configs:
            raise search.CandidateError("hung after 20 s")
        return real(configs, rounds)

    measurer.samples = samples
    result = tune_shape(measurer, DECODE, [DEFAULT, config(1)])
    assert result.chosen.config == DEFAULT
    assert by_config(result)[config(1)].verdict == "hung after 20 s"


@pytest.mark.parametrize("seed", range(10))
def test_heavy_tails_do_not_make_a_winner(seed):
    """A tenth of the samples are twice as long, and 30 candidates of one speed compete."""
    measurer = FakeMeasurer(noise=0.05, seed=seed)
    real = measurer.samples

    def samples(configs, rounds):
        return [
            [us * (2 if measurer.random.random() < 0.1 else 1) for us in of_one] for of_one in real(configs, rounds)
        ]

    measurer.samples = samples
    result = tune_shape(measurer, DECODE, [DEFAULT, *map(config, range(30))])
    assert result.chosen.config == DEFAULT


def test_a_gain_in_one_half_only_keeps_the_default():
    measurer = FakeMeasurer()
    measurer.us_of = lambda when, asked: 80.0 if asked == config(1) and measurer.timed[asked] < 120 else 100.0
    assert tune_shape(measurer, DECODE, [DEFAULT, config(1)]).chosen.config == DEFAULT


def test_of_equal_speeds_the_one_closest_to_the_default_is_chosen():
    far = dataclasses.replace(DEFAULT, item_overhead=8, use_pdl=False, min_blocks=4)
    near = dataclasses.replace(DEFAULT, min_blocks=4)
    speeds = times({far: 90.0, near: 90.3})
    assert tune_shape(FakeMeasurer(speeds), DECODE, [DEFAULT, far, near]).chosen.config == near
    speeds = times({far: 90.0, near: 91.0})
    assert tune_shape(FakeMeasurer(speeds), DECODE, [DEFAULT, far, near]).chosen.config == far


def test_halving_drops_the_slow_and_keeps_the_default_to_the_end():
    speeds = {asked: 100.0 - 4 * i for i, asked in enumerate(CONFIGS)}
    measurer = FakeMeasurer(times(speeds))
    result = tune_shape(measurer, DECODE, CONFIGS)
    assert result.chosen.config == CONFIGS[-1]
    live = [len(call[1]) for call in measurer.asked if call[0] == "samples"]
    # 19, 10, 5, 3, 2, 1 beside the default, which is the slowest
    assert live[: len(RUNGS)] == [20, 11, 6, 4, 3, 2]
    trials = by_config(result)
    assert trials[DEFAULT].rung == len(RUNGS)
    assert trials[DEFAULT].verdict == "default"
    assert trials[config(0)].verdict == "dropped after rung 1"
    assert trials[config(0)].rung == 1
    assert len(trials[DEFAULT].samples) == len(result.chosen.samples) == sum(RUNGS)


def test_what_is_within_two_percent_of_the_best_stays():
    speeds = times({asked: 100.0 + 0.1 * i for i, asked in enumerate(CONFIGS)})
    result = tune_shape(FakeMeasurer(speeds), DECODE, CONFIGS)
    assert all(trial.rung == len(RUNGS) for trial in result.trials)


def test_long_kernels_get_fewer_rounds():
    def rounds(us):
        measurer = FakeMeasurer(lambda when, asked: us)
        tune_shape(measurer, DECODE, [DEFAULT, config(1)])
        return [call[2] for call in measurer.asked if call[0] == "samples"]

    assert rounds(10.0) == list(RUNGS)
    assert rounds(30_000.0) == [4, 6, 6, 6, 6, 6]
    assert rounds(1e6) == [search.LEAST_ROUNDS] * len(RUNGS)


def test_every_candidate_is_checked_before_any_is_timed_and_the_chosen_once_more():
    measurer = FakeMeasurer(times({config(2): 50.0}))
    tune_shape(measurer, DECODE, CONFIGS)
    kinds = [call[0] for call in measurer.asked]
    assert kinds[: len(CONFIGS)] == ["open", *["check"] * (len(CONFIGS) - 1)]
    # Nothing but the two was left for the graphs of several calls.
    assert kinds[len(CONFIGS) :] == ["samples"] * len(RUNGS) + ["chained"] * 2 + ["check", "samples"]
    assert measurer.asked[-2] == ("check", config(2))
    assert measurer.asked[-1] == ("samples", (config(2), DEFAULT), RUNGS[-1])


def test_a_wrong_candidate_is_neither_timed_nor_chosen():
    measurer = FakeMeasurer(times({config(2): 1.0, config(3): 90.0}))
    measurer.fails[config(2)] = "wrong: relative error 1.0"
    result = tune_shape(measurer, DECODE, CONFIGS)
    assert result.chosen.config == config(3)
    assert by_config(result)[config(2)].verdict == "wrong: relative error 1.0"
    assert config(2) not in measurer.timed


def test_a_candidate_that_is_wrong_after_it_was_timed_is_not_chosen():
    measurer = FakeMeasurer(times({config(2): 88.5, config(3): 90.0}))
    seen = measurer.us_of

    def us_of(when, asked):
        measurer.fails[config(2)] = "wrong: a race"
        return seen(when, asked)

    measurer.us_of = us_of
    result = tune_shape(measurer, DECODE, [DEFAULT, config(2), config(3)])
    assert result.chosen.config == config(3)
    assert by_config(result)[config(2)].verdict == "after it was timed: wrong: a race"


def test_known_verdicts_are_kept_and_cost_nothing():
    measurer = FakeMeasurer()
    result = tune_shape(measurer, DECODE, CONFIGS, {config(1): "does not compile: x", config(2): "not compiled: y"})
    assert by_config(result)[config(1)].verdict == "does not compile: x"
    assert ("check", config(1)) not in measurer.asked
    assert ("check", config(2)) not in measurer.asked
    assert ("check", config(3)) in measurer.asked


def test_a_candidate_that_fails_in_a_rung_is_found_and_the_others_go_on():
    measurer = FakeMeasurer(times({config(4): 90.0}))
    measurer.fails_timed = {config(2): "hung after 20 s", config(5): "exit -11"}
    result = tune_shape(measurer, DECODE, CONFIGS)
    assert result.chosen.config == config(4)
    assert by_config(result)[config(2)].verdict == "hung after 20 s"
    assert by_config(result)[config(5)].verdict == "exit -11"
    assert by_config(result)[config(2)].samples == []
    # samples of the search for the culprit are in nobody's: both are compared over the same rounds
    assert len(result.trials[0].samples) == len(result.chosen.samples)


def test_failing_together_and_not_alone_ends_the_shape():
    class Together(FakeMeasurer):
        def samples(self, configs, rounds):
            if len(configs) > 1:
                raise search.CandidateError("exit -9")
            return super().samples(configs, rounds)

    result = tune_shape(Together(), DECODE, CONFIGS)
    assert result.chosen is None
    assert result.why == "candidates fail together and not alone: exit -9"


@pytest.mark.parametrize("how", ["open", "timed", "unfit"])
def test_a_shape_fails_with_its_default(how):
    measurer, unfit = FakeMeasurer(), {}
    if how == "open":
        measurer.fails_open[DECODE] = "the default configuration: wrong"
    elif how == "timed":
        measurer.fails_timed[DEFAULT] = "hung after 20 s"
    else:
        unfit[DEFAULT] = "not compiled: no time was left"
    result = tune_shape(measurer, DECODE, CONFIGS, unfit)
    assert result.chosen is None
    assert result.runner_up is None
    assert result.why.startswith("the default configuration: ")


def test_the_default_alone_is_timed_and_chosen():
    result = tune_shape(FakeMeasurer(lambda when, asked: 12.5), DECODE, [DEFAULT])
    assert (result.chosen.config, result.us, result.default_us, result.runner_up) == (DEFAULT, 12.5, 12.5, None)


def test_the_runner_up_is_the_next_best_of_the_last_rung():
    result = tune_shape(FakeMeasurer(times({config(1): 80.0, config(2): 81.0, config(3): 95.0})), DECODE, CONFIGS)
    assert result.us == 80.0
    assert result.runner_up.us == 81.0
    result = tune_shape(FakeMeasurer(times({config(1): 50.0})), DECODE, CONFIGS)
    assert result.runner_up.us == 100.0  # only the default was left beside it


def test_ctrl_c_is_not_a_verdict():
    def interrupt(when, asked):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_shape(FakeMeasurer(interrupt), DECODE, CONFIGS)


# ---------------------------------------------------------------------------------------------------------------------
# what is measured beside the GPU's time of a call


def test_what_was_timed_to_the_end_is_timed_in_a_row_too():
    result = tune_shape(FakeMeasurer(times({config(1): 80.0, config(2): 81.0})), DECODE, CONFIGS)
    chained = {trial.config: trial.us_chained for trial in result.trials if trial.us_chained is not None}
    assert chained == {DEFAULT: 50.0, config(1): 40.0, config(2): 40.5}
    assert all((trial.us_chained is None) == trial.verdict.startswith("dropped") for trial in result.trials)
    assert [trial.host_us for trial in result.trials] == [None] * len(CONFIGS), "nothing asked for it"


def test_what_cannot_run_in_a_row_is_out():
    measurer = FakeMeasurer(times({config(1): 80.0}))
    fails = {config(1)}

    def chained(asked):
        if asked in fails:
            raise search.CandidateError("hung after 20 s")
        return 50.0

    measurer.chained = chained
    result = tune_shape(measurer, DECODE, [DEFAULT, config(1)])
    assert (result.chosen.config, by_config(result)[config(1)].verdict) == (DEFAULT, "hung after 20 s")
    fails.add(DEFAULT)
    result = tune_shape(measurer, DECODE, [DEFAULT, config(1)])
    assert (result.chosen, result.why) == (None, "the default configuration: hung after 20 s")


def test_a_trial_has_the_conditions_of_its_last_rung():
    measurer = FakeMeasurer(times({asked: 100.0 + i for i, asked in enumerate(CONFIGS)}))
    moments = [search.Conditions(1000.0 + rung, 500.0) for rung in range(len(RUNGS))]
    rungs = iter(moments)
    measurer.conditions = lambda: next(rungs)
    result = tune_shape(measurer, DECODE, CONFIGS)
    assert {trial.rung for trial in result.trials} > {1, len(RUNGS)}
    for trial in result.trials:
        assert trial.conditions == moments[trial.rung - 1]


def test_the_eager_policy_counts_the_host():
    """config(1) is faster on the GPU, by less than what its calls take longer."""
    speeds, host = times({config(1): 90.0, config(2): 95.0}), {config(1): 40.0}

    def chosen(policy):
        measurer = FakeMeasurer(speeds)
        measurer.host_of = lambda asked: host.get(asked, 20.0)
        return tune_shape(measurer, DECODE, [DEFAULT, config(1), config(2)], policy=policy)

    assert chosen("graph").chosen.config == config(1)
    result = chosen("eager")
    assert (result.chosen.config, result.us, result.default_us) == (config(2), 95.0, 100.0), "times are the GPU's"
    assert [trial.host_us for trial in result.trials] == [20.0, 40.0, 20.0]
    assert result.runner_up.config == DEFAULT


def test_a_gain_of_a_hundredth_is_of_what_counts():
    """3 % of the GPU's time are less than 1 % of a call that the host takes 300 us for."""
    measurer = FakeMeasurer(times({config(1): 97.0}))
    measurer.host_of = lambda asked: 300.0
    assert tune_shape(measurer, DECODE, [DEFAULT, config(1)], policy="eager").chosen.config == DEFAULT
    assert tune_shape(measurer, DECODE, [DEFAULT, config(1)]).chosen.config == config(1)


def test_a_lucky_host_time_wins_nothing():
    """It is measured again with the rounds that decide."""
    asked_for = []

    def host_of(asked):
        asked_for.append(asked)
        return 10.0 if asked == config(1) and asked_for.count(asked) == 1 else 20.0

    measurer = FakeMeasurer()
    measurer.host_of = host_of
    result = tune_shape(measurer, DECODE, [DEFAULT, config(1)], policy="eager")
    assert result.chosen.config == DEFAULT
    assert by_config(result)[config(1)].verdict == "not chosen: 1.000x the default's speed in new rounds"
