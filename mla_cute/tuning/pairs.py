"""What entries are written of a shape that was timed with uniform and with ragged lengths.

A call does not know whether its requests are alike: the host sees how many there are and how long the longest may be.
So both entries get one configuration, and selection need not choose between them. It is the one whose worst slowdown of
the two is the least, a slowdown being its time over that of the configuration chosen for those lengths alone. Eligible
are the default, what was chosen for either, and what was timed to the end for both; of others the medians are of few
rounds. The default stays unless another's worst slowdown is less by more than GAIN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping

from ..config import KernelConfig
from ..tuned.select import Entry, When
from .search import GAIN, ORDINARY
from .space import changes, run_key
from .store import Key, Measured


def partner_of(when: When) -> When | None:
    """The same shape with the other kind of lengths; None where there are not two kinds."""
    if when.op != "decode" or when.batch == 1:
        return None
    return dataclasses.replace(when, lengths="uniform" if when.lengths == "ragged" else "ragged")


def entries(shapes: Iterable[Measured], measured: Mapping[Key, Measured], num_sms: int) -> tuple[Entry, ...]:
    """The entries of tuned `shapes`, and of their partners among `measured`: of the same dtype and sources."""
    found: dict[When, Entry] = {}
    for shape in shapes:
        if shape.when in found or (own := shape.entry()) is None:
            continue
        other = None
        if (partner := partner_of(shape.when)) is not None:
            other = measured.get((partner, shape.dtype))
        if other is None or other.chosen is None or not _are_of_one_run(shape, other):
            found[shape.when] = own
            continue
        timed = _Timed(shape, num_sms), _Timed(other, num_sms)
        config = _best_of_both(*timed)
        found |= {one.shape.when: one.entry(config) for one in timed}
    return tuple(found.values())


def _are_of_one_run(a: Measured, b: Measured) -> bool:
    return (a.source_sha256, a.policy) == (b.source_sha256, b.policy)


class _Timed:
    """A tuned shape's times, by what runs: configurations that run it alike have one time."""

    def __init__(self, shape: Measured, num_sms: int):
        assert shape.chosen is not None
        self.shape, self._num_sms = shape, num_sms
        self.chosen = shape.chosen
        tried = [
            (KernelConfig.from_dict(trial["config"]), trial)
            for trial in shape.candidates
            if trial["us"] is not None and trial["verdict"].startswith(ORDINARY)
        ]
        self.default = tried[0][0]
        self._us: dict[Hashable, float] = {self.key(config): trial["us"] for config, trial in tried}
        # Of the choice the rounds after it was picked count, and those of the default beside it.
        assert shape.us is not None
        assert shape.default_us is not None
        self._us |= {self.key(self.default): shape.default_us, self.key(self.chosen): shape.us}
        self._host_us = {self.key(config): trial.get("host_us") or 0.0 for config, trial in tried}
        last = max(trial["rung"] for _, trial in tried)
        self.to_the_end = [config for config, trial in tried if trial["rung"] == last]
        self.keys_to_the_end = {self.key(config) for config in self.to_the_end}

    def key(self, config: KernelConfig) -> Hashable:
        return run_key(self.shape.when, config, self._num_sms)

    def slowdown(self, config: KernelConfig) -> float | None:
        """Over what was chosen for this shape alone; None where it was not timed."""
        key, best = self.key(config), self.key(self.chosen)
        if key not in self._us:
            return None
        return (self._us[key] + self._host_us[key]) / (self._us[best] + self._host_us[best])

    def entry(self, config: KernelConfig) -> Entry:
        """With `config`. Where that is not this shape's own choice, the own choice is the next best."""
        own = self.shape.entry()
        assert own is not None
        if config == own.config:
            return own
        us = self._us[self.key(config)]
        return dataclasses.replace(own, config=config, us=us, runner_up_us=own.us, runner_up=own.config)


def _best_of_both(a: _Timed, b: _Timed) -> KernelConfig:
    default = a.default
    eligible = [default, a.chosen, b.chosen]
    for one, other in ((a, b), (b, a)):
        eligible += [config for config in one.to_the_end if other.key(config) in other.keys_to_the_end]
    worst: dict[KernelConfig, float] = {}
    for config in eligible:
        slowdowns = a.slowdown(config), b.slowdown(config)
        if slowdowns[0] is not None and slowdowns[1] is not None:
            worst[config] = max(slowdowns[0], slowdowns[1])
    best = min(worst, key=lambda config: (worst[config], changes(config, default)))
    return best if worst[default] > (1 + GAIN) * worst[best] else default
