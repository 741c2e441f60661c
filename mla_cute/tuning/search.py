"""The search of one shape: check, time in interleaved rounds, halve, choose. Knows no GPU, only a `Measurer`.

What is compared is the GPU's time (policy "graph": the host is out of the way) or that and the host's time of the call
("eager").

A round times every live candidate once, in an order of the measurer's. After each rung of rounds the better half stays,
what is within KEEP_WITHIN of the best, and the default, so that every candidate can be compared with the default over
the same rounds. The default is chosen unless another candidate of the last rung is faster by more than GAIN, over all
its rounds and each half of them, and once more over rounds made after it was picked: their medians are the times of
the result.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ..config import KernelConfig
from ..tuned.select import When
from .space import changes

# The most rounds that each rung adds. Where they would take longer than RUNG_SECONDS it adds fewer, but at least
# LEAST_ROUNDS. Medians of single 10 us kernels settle within 1 % after some 100 samples.
RUNGS = (4, 8, 16, 32, 64, 128)
RUNG_SECONDS = 0.4
# Beside its kernels a replay takes the host up to this long, when its graph has to be captured.
REPLAY_US = 300.0
LEAST_ROUNDS = 4
KEEP_WITHIN = 0.02
GAIN = 0.01
# Medians this close are one speed: of such candidates the one that differs least from the default is chosen.
SAME = 0.005
# Candidates that may be picked and not confirmed before the default stays.
DUELS = 3
POLICIES = ("graph", "eager")
# A verdict that begins with one of ORDINARY is no failure.
NO_TIME = "not compiled: no time was left"
PRUNED = "pruned by the model"
ORDINARY = ("chosen", "default", "not chosen", "dropped", "not compiled", PRUNED)


class CandidateError(Exception):
    """A configuration is out of the search; the text is its verdict: "hung after 20 s", "exit -11", "wrong: ..."."""


class ShapeError(Exception):
    """A shape cannot be tuned here; the text says why."""


class StartError(Exception):
    """Nothing can be measured or compiled here; the text says why."""


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What the GPU ran at while it was timed: means of the SM clock in MHz and of power in W, and what kept the clock
    down, of `bench.sustained.THROTTLES`."""

    sm_mhz: float
    watts: float
    throttled: tuple[str, ...] = ()


class Measurer(Protocol):
    """Checks and times configurations of one shape at a time."""

    def open(self, when: When, default: KernelConfig) -> None:
        """Make inputs for a shape, run the default and judge it. ShapeError when that fails or does not fit."""

    def check(self, config: KernelConfig) -> None:
        """Run a configuration and judge its output. CandidateError when it is wrong, fails, hangs or crashes."""

    def samples(self, configs: Sequence[KernelConfig], rounds: int) -> list[list[float]]:
        """Microseconds of each configuration in each of `rounds` interleaved rounds. CandidateError as for `check`,
        whichever of them was the cause."""

    def conditions(self) -> Conditions | None:
        """Of the last `samples`; None where nothing tells them."""

    def chained(self, config: KernelConfig) -> float:
        """Microseconds of a call in a graph of several, back to back. CandidateError as for `check`."""

    def host_us(self, config: KernelConfig) -> float:
        """Microseconds that the host takes for a call with a plan. CandidateError as for `check`."""


@dataclasses.dataclass
class Trial:
    """One candidate. `verdict` is empty while it is live, `rung` the number of rungs it was timed in, `conditions` are
    those of the last of these. `us_chained` has who was timed to the end, `host_us` who is compared by it; `model_us`
    is cost.py's, where it has one."""

    config: KernelConfig
    verdict: str = ""
    rung: int = 0
    samples: list[float] = dataclasses.field(default_factory=list)
    conditions: Conditions | None = None
    us_chained: float | None = None
    host_us: float | None = None
    model_us: float | None = None

    @property
    def us(self) -> float:
        return statistics.median(self.samples)

    @property
    def costs(self) -> list[float]:
        """What is compared, of each sample."""
        return with_host(self.samples, self.host_us)

    @property
    def cost(self) -> float:
        return statistics.median(self.costs)


@dataclasses.dataclass
class Result:
    """A searched shape. `trials[0]` is the default; `chosen` is None when the shape could not be tuned (`why`).

    `us` and `default_us` are of the choice and of the default, over the same rounds.
    """

    trials: list[Trial]
    chosen: Trial | None = None
    why: str = ""
    us: float = 0.0
    default_us: float = 0.0

    @property
    def runner_up(self) -> Trial | None:
        """The next best of the last rung, the default included."""
        last = max(trial.rung for trial in self.trials)
        others = [trial for trial in self.trials if trial.rung == last and trial is not self.chosen]
        return min(others, key=lambda trial: trial.cost, default=None) if last else None


def with_host(samples: Sequence[float], host_us: float | None) -> list[float]:
    return [us + (host_us or 0.0) for us in samples]


def tune_shape(
    measurer: Measurer,
    when: When,
    candidates: Sequence[KernelConfig],
    unfit: Mapping[KernelConfig, str] | None = None,
    step: Callable[[int], None] = lambda live: None,
    policy: str = "graph",
    model_us: Mapping[KernelConfig, float] | None = None,
) -> Result:
    """Search `candidates`, of which the first is the default. `unfit` are verdicts known beforehand, `policy` is one of
    POLICIES, `model_us` what is kept of the model.

    A shape fails, with a reason and no choice, when its default does. `step` is told how many candidates are live, at
    every check and rung.
    """
    trials = [
        Trial(config, (unfit or {}).get(config, ""), model_us=(model_us or {}).get(config)) for config in candidates
    ]
    result, default = Result(trials), trials[0]
    try:
        if default.verdict:
            raise ShapeError(f"the default configuration: {default.verdict}")
        measurer.open(when, default.config)
        for trial in trials[1:]:
            if not trial.verdict:
                step(len(_live(trials)))
                trial.verdict = _verdict(measurer.check, trial.config)
        if policy == "eager":
            _measure(trials, "host_us", measurer.host_us)
        for number, most in enumerate(RUNGS):
            _run_rung(measurer, trials, most)
            if number + 1 < len(RUNGS):
                _halve(trials)
            step(len(_live(trials)))
        _measure(trials, "us_chained", measurer.chained)
        _choose(measurer, result)
    except ShapeError as error:
        result.chosen = None
        result.why = default.verdict = str(error)
    return result


def _live(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if not trial.verdict]


def _verdict(run: Callable[..., object], *args: object) -> str:
    try:
        run(*args)
    except CandidateError as error:
        return str(error)
    return ""


def _measure(trials: Sequence[Trial], field: str, run: Callable[[KernelConfig], float]) -> None:
    """Sets a field of every live trial; those that fail are given their verdicts. ShapeError when the default does."""
    for trial in _live(trials):
        try:
            setattr(trial, field, run(trial.config))
        except CandidateError as error:
            trial.verdict = str(error)
            if trial is trials[0]:
                raise ShapeError(f"the default configuration: {error}") from None


def _run_rung(measurer: Measurer, trials: Sequence[Trial], most: int) -> None:
    """Add a rung's samples to every live trial; those that fail are given their verdicts."""
    while True:
        live = _live(trials)
        rounds = most
        if live[0].samples:
            a_round = sum(trial.us + REPLAY_US for trial in live) * 1e-6
            rounds = max(LEAST_ROUNDS, min(most, int(RUNG_SECONDS / a_round)))
        try:
            taken = measurer.samples([trial.config for trial in live], rounds)
            conditions = measurer.conditions()
        except CandidateError as together:
            _find_failing(measurer, live, together)
            continue
        for trial, us in zip(live, taken, strict=True):
            trial.samples += us
            trial.rung += 1
            trial.conditions = conditions
        return


def _find_failing(measurer: Measurer, live: Sequence[Trial], together: CandidateError) -> None:
    """Time each trial alone after a rung failed. ShapeError when that names none, or names the default."""
    for trial in live:
        trial.verdict = _verdict(measurer.samples, [trial.config], LEAST_ROUNDS)
    if live[0].verdict:
        raise ShapeError(f"the default configuration: {live[0].verdict}")
    if all(not trial.verdict for trial in live):
        raise ShapeError(f"candidates fail together and not alone: {together}")


def _halve(trials: Sequence[Trial]) -> None:
    limit = min(trial.cost for trial in _live(trials)) * (1 + KEEP_WITHIN)
    others = sorted(_live(trials)[1:], key=lambda trial: trial.cost)
    for trial in others[-(-len(others) // 2) :]:
        if trial.cost > limit:
            trial.verdict = f"dropped after rung {trial.rung}"


def is_faster(samples: Sequence[float], default: Sequence[float]) -> bool:
    """By more than GAIN over all rounds, and over each half of them."""
    n = len(samples)
    return all(
        statistics.median(default[part]) > (1 + GAIN) * statistics.median(samples[part])
        for part in (slice(0, n), slice(0, n // 2), slice(n // 2, n))
    )


def _choose(measurer: Measurer, result: Result) -> None:
    """Sets the choice and its times, and the verdicts of what is live."""
    default = result.trials[0]
    result.chosen, result.us, result.default_us = default, default.us, default.us
    for _ in range(DUELS):
        if (best := _best(_live(result.trials), default)) is None:
            break
        if won := _duel(measurer, best, default):
            result.chosen, (result.us, result.default_us) = best, won
            break
    for trial in _live(result.trials):
        trial.verdict = "chosen" if trial is result.chosen else "default" if trial is default else "not chosen"


def _best(live: Sequence[Trial], default: Trial) -> Trial | None:
    """Of the trials faster than the default the fastest, or one of its speed that differs less from the default."""
    faster = [trial for trial in live[1:] if is_faster(trial.costs, default.costs)]
    if not faster:
        return None
    least = min(trial.cost for trial in faster)
    tied = [trial for trial in faster if trial.cost <= least * (1 + SAME)]
    return min(tied, key=lambda trial: changes(trial.config, default.config))


def _duel(measurer: Measurer, best: Trial, default: Trial) -> tuple[float, float] | None:
    """Medians of `best` and the default over new rounds: the best of many candidates was lucky in the old ones, too,
    and with the host, whose time is measured again where it counts.

    None, and a verdict on `best`, when it is not faster now, or its output is wrong.
    """
    if verdict := _verdict(measurer.check, best.config):
        best.verdict = f"after it was timed: {verdict}"
        return None
    a_round = (best.us + default.us + 2 * REPLAY_US) * 1e-6
    rounds = max(LEAST_ROUNDS, min(RUNGS[-1], int(RUNG_SECONDS / a_round)))
    try:
        mine, others = measurer.samples([best.config, default.config], rounds)
        if best.host_us is not None:
            best.host_us, default.host_us = measurer.host_us(best.config), measurer.host_us(default.config)
    except CandidateError as together:
        _find_failing(measurer, [default, best], together)
        return None
    costs = with_host(mine, best.host_us), with_host(others, default.host_us)
    if not is_faster(*costs):
        ratio = statistics.median(costs[1]) / statistics.median(costs[0])
        best.verdict = f"not chosen: {ratio:.3f}x the default's speed in new rounds"
        return None
    return statistics.median(mine), statistics.median(others)
