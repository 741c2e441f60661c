"""Stand-ins for the GPU in the tests of tuning: a Measurer with made-up times, and devices for a real process."""

import os
import random
import time

from mla_cute.tuned.select import When
from mla_cute.tuning.search import CandidateError, Conditions, ShapeError, StartError

DECODE = When("decode", "", False, 16, 64, 1, 16, 8192)
GPU = {"name": "Test GPU", "sm_count": 132, "clock_mhz": 1980, "memory_gbps": 4350.0}
MADE_WITH = {"mla_cute": "0.1.0", "cutlass_dsl": "4.8.1", "driver": "580.1", "date": "2026-11-24"}


class FakeMeasurer:
    """Answers with `us_of(when, config)` times noise. What is asked of it is written down in `asked`."""

    def __init__(self, us_of=lambda when, config: 100.0, noise=0.0, seed=0):
        self.us_of, self.noise, self.random = us_of, noise, random.Random(seed)
        self.asked, self.opened, self.when = [], [], None
        self.fails = {}  # config -> verdict of its check
        self.fails_timed = {}  # config -> verdict whenever it is timed
        self.fails_open = {}  # when -> why
        self.timed = {}  # config -> samples taken
        self.at = None  # Conditions
        self.host_of = lambda config: 20.0

    def open(self, when, default):
        self.asked.append(("open", when, default))
        self.opened.append(when)
        self.when = when
        if when in self.fails_open:
            raise ShapeError(self.fails_open[when])

    def check(self, config):
        self.asked.append(("check", config))
        if config in self.fails:
            raise CandidateError(self.fails[config])

    def samples(self, configs, rounds):
        self.asked.append(("samples", tuple(configs), rounds))
        for config in configs:
            if config in self.fails_timed:
                raise CandidateError(self.fails_timed[config])
        taken = []
        for config in configs:
            self.timed[config] = self.timed.get(config, 0) + rounds
            mean = self.us_of(self.when, config)
            taken.append([mean * (1 + self.noise * self.random.gauss(0, 1)) for _ in range(rounds)])
        return taken

    def conditions(self):
        return self.at

    def chained(self, config):
        self.asked.append(("chained", config))
        return 0.5 * self.us_of(self.when, config)

    def host_us(self, config):
        self.asked.append(("host_us", config))
        return self.host_of(config)


class ToyDevice:
    """For the measuring process. What a configuration does is in its item_overhead."""

    SLEEPS, DIES, RAISES, WRONG, POISONS, SLOW = 101, 102, 103, 104, 105, 106

    def __init__(self, alive, stays_usable=True):
        self.alive, self.usable, self.when = alive, True, None
        self.stays_usable = stays_usable

    def facts(self):
        return {"gpu": GPU, "driver": "580.1", "pid": os.getpid()}

    def is_usable(self):
        return self.usable

    def open(self, when, default):
        self.when = when
        if when.batch == 13:
            raise ShapeError("needs 300.0 GB of GPU memory, 100.0 GB are there")
        self._act(default)

    def check(self, config):
        assert self.when is not None, "a shape is open, also after a restart"
        self._act(config)

    def samples(self, configs, rounds):
        for config in configs:
            self._act(config)
        return [[float(self.when.batch + config.item_overhead)] * rounds for config in configs]

    def conditions(self):
        return Conditions(1500.0, 600.0, ("SW Power Cap",))

    def chained(self, config):
        self._act(config)
        return 7.5

    def host_us(self, config):
        self._act(config)
        return 21.5

    def _act(self, config):
        what = config.item_overhead
        if what == self.SLEEPS:
            time.sleep(600)
        if what == self.DIES:
            os.write(2, b"first line\nterminate called without an active exception\n")
            os._exit(11)
        if what == self.RAISES:
            raise RuntimeError("no such kernel")
        if what == self.WRONG:
            raise CandidateError("wrong: relative error 1.0e+00 (limit 0.008), lse 0.0e+00")
        if what == self.POISONS:
            self.usable = False
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if what == self.SLOW:
            for _ in range(6):
                time.sleep(0.5)
                self.alive()


def toy_device(alive):
    return ToyDevice(alive)


def no_gpu(alive):
    raise StartError("nothing to tune on: no GPU in this test")


def broken_device(alive):
    raise ZeroDivisionError("cannot start")
