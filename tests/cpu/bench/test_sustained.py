"""`bench --sustained`: power between two moves of the counter, what a call takes, and where the figures go."""

import argparse
import sys
import types

import pytest
from bench_case import FakeTimer, bench

from mla_cute.bench import command, reading, report, runner, sustained
from mla_cute.bench.cases import Case
from mla_cute.bench.options import seconds
from mla_cute.bench.sustained import NvmlMeter, Sustain
from mla_cute.option import UsageError


class Card:
    """A GPU under load: a call takes `us`; the counter of energy moves every `tick` seconds; `watts` from the third
    tenth of a second on, twice as much before."""

    def __init__(self, us=250.0, watts=600.0, tick=0.1, mhz=1500):
        self.now, self.us, self.watts, self.tick, self.mhz, self.calls = 0.0, us, watts, tick, mhz, 0
        self.queued = 0

    def clock(self):
        return self.now

    def enqueue(self, replays, first, count):
        assert first == self.queued, "a call twice, or left out"
        self.queued += count

        def wait():
            self.calls += count
            self.now += count * self.us * 1e-6

        return wait

    def synchronize(self):
        self.calls = self.queued

    def read(self):
        moved = int(self.now / self.tick + 1e-9) * self.tick
        early = min(moved, 0.3)
        return round(1000 * self.watts * (2 * early + (moved - early))), self.mhz


def measured(card, asked=2.0, replays=(None, None, None)):
    return sustained.measure(card, replays, card.us, Sustain(asked, card), clock=card.clock)


@pytest.mark.parametrize("tick", [0.01, 0.1, 0.25])
@pytest.mark.parametrize("us", [8.0, 250.0, 25_000.0])
def test_energy_of_a_call(us, tick):
    """What comes before the load has settled is left out; the counter's own steps are not what limits it."""
    card = Card(us=us, tick=tick)
    found = measured(card)
    assert found.us == pytest.approx(us, rel=1e-6)
    assert found.watts == pytest.approx(600, rel=0.05 if us > 10_000 else 0.02)
    assert found.mj == pytest.approx(found.watts * us * 1e-3)
    assert found.sm_mhz == 1500
    assert found.cycles == pytest.approx(us * 1500)
    assert card.calls == card.queued
    assert card.now == pytest.approx(2.0 + sustained.SETTLE_S, abs=0.1)


def test_a_counter_that_stands_still_is_an_error():
    with pytest.raises(RuntimeError, match="counter of energy moved 0 times"):
        measured(Card(tick=100.0))


class Meter:
    """Each read a little later: 690 W."""

    def __init__(self):
        self.reads = 0

    def read(self):
        self.reads += 1
        return 1000 * self.reads, 1400 + self.reads % 2


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(sustained, "SETTLE_S", 0.0)


def of_record(monkeypatch, fast, peers=((), {})):
    return bench([Case(2, 2, 200, 64)], peers=peers, sustain=Sustain(0.3, Meter()), timer=FakeTimer(us=5000.0))


def test_a_record_has_it_and_is_read_again(monkeypatch, fast, small_rotation, tmp_path):
    record = of_record(monkeypatch, fast)
    [row] = record["rows"]
    assert "error" not in row
    assert row["sustained"].keys() == {"us", "mj", "watts", "sm_mhz", "cycles"}
    assert row["sustained"]["mj"] == pytest.approx(row["sustained"]["us"] * row["sustained"]["watts"] * 1e-3)
    path = tmp_path / "record.json"
    runner.write_json(path, record)
    assert report.load(path)["rows"][0]["sustained"] == row["sustained"]
    [line] = [line for line in report.summary(record) if line.startswith("sustained, ")]
    assert f"{row['sustained']['mj']:.1f} mJ" in line
    row["sustained"]["mj"] = "much"
    with pytest.raises(ValueError, match=r"sustained\.mj"):
        reading.check(record)


def test_peers_are_in_it_and_ours_is_the_mean_of_both_sides(monkeypatch, fast, small_rotation):
    order = []
    figures = iter([100.0, 300.0, 200.0])

    def measure(timer, replays, us, sustain):
        order.append(us)
        mj = next(figures)
        return sustained.Sustained(10.0, mj, 600.0, 1500.0, 15000.0)

    monkeypatch.setattr(sustained, "measure", measure)
    monkeypatch.setattr(runner, "_time_peer", lambda peer, inputs, timer, sustain: {
        "us": 12.0, "check": {"ok": True, "rel_err": 1e-3}, "sustained": measure(timer, [], 12.0, sustain).to_dict()
    })  # fmt: skip
    peer = types.SimpleNamespace(name="flash_mla", version="1")
    record = of_record(monkeypatch, fast, ([peer], {"flash_mla": {"present": True, "version": "1"}}))
    [row] = record["rows"]
    assert row["sustained"]["mj"] == 150.0
    assert row["peers"]["flash_mla"]["sustained"]["mj"] == 300.0
    text = "\n".join(report.summary(record))
    assert "150.0 mJ, 10.0 us, 600 W, 1500 MHz; flash_mla 300.0 mJ" in text
    assert "1 cells: geometric mean 2.000x, lowest 2.000x, less in 1" in text


@pytest.mark.parametrize("text", ["0", "0.4", "61", "nan", "two", ""])
def test_seconds_that_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected 0\.5 to 60 seconds, got"):
        seconds(text)


def test_without_the_library_or_a_counter_it_says_so(monkeypatch):
    gpu = types.SimpleNamespace(uuid="abc")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(UsageError, match="--sustained: needs nvidia-ml-py"):
        command._sustain(1.0, gpu)
    error = type("NVMLError", (Exception,), {})

    def refuse(handle):
        raise error("Not Supported")

    fake = types.SimpleNamespace(
        NVMLError=error, NVML_CLOCK_SM=1, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=refuse, nvmlDeviceGetClockInfo=lambda handle, kind: 1500,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    with pytest.raises(UsageError, match="NVML reads no energy of this GPU: Not Supported"):
        command._sustain(1.0, gpu)
    fake.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 7
    assert NvmlMeter("abc").read() == (7, 1500)
    fake.nvmlDeviceGetPowerUsage = lambda handle: 612_500
    fake.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0x24
    assert NvmlMeter("abc").moment() == (1500, 612.5, 0x24)
    fake.nvmlDeviceGetCurrentClocksThrottleReasons = refuse
    with pytest.raises(RuntimeError, match="NVML reads no clocks of this GPU: Not Supported"):
        NvmlMeter("abc").moment()
    assert command._sustain(None, None) is None
    with pytest.raises(UsageError, match="--sustained: torch does not tell which GPU"):
        command._sustain(1.0, types.SimpleNamespace(uuid=None))
