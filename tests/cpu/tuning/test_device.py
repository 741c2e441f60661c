"""What runs in the measuring process, on CPU tensors: the reference stands for the kernels, the timer is fake."""

import dataclasses

import pytest
import torch

from mla_cute.bench import cases as cases_module
from mla_cute.bench import runner
from mla_cute.bench.inputs import KvPool, make_inputs
from mla_cute.config import KernelConfig
from mla_cute.tuned.select import When
from mla_cute.tuning import device as device_module
from mla_cute.tuning import search
from mla_cute.tuning.device import Device
from mla_cute.tuning.recipes import case_of
from mla_cute.tuning.search import CandidateError, ShapeError, tune_shape

DEFAULT = KernelConfig()
DECODE = When("decode", "", False, 4, 16, 1, 3, 100)
PREFILL = When("prefill", "", False, 4, 1, 5, 2, 20)
FP8 = When("decode", "group", True, 4, 16, 1, 2, 40)
SPARSE = When("sparse", "", False, 4, 1, 1, 3, 70)
SPARSE_FP8 = When("sparse", "group", True, 4, 1, 1, 2, 40)
GB = 10**9


def config(number):
    return dataclasses.replace(DEFAULT, item_overhead=number)


class CpuTimer:
    """Runs replays; the i-th of a sequence takes 100 + i us."""

    device = torch.device("cpu")

    def __init__(self):
        self.captured, self.warmed, self.order = 0, [], []

    def capture(self, fn):
        self.captured += 1
        return fn

    def synchronize(self):
        pass

    def host_us(self, fn, calls, chunks):
        fn()
        return 20.0 + calls + chunks / 100

    def warm(self, replays):
        self.warmed.append(len(replays))

    def sequence(self, replays, alive):
        for replay in replays:
            replay()
        alive()
        self.order.append(len(replays))
        return [float(100 + i) for i in range(len(replays))]


@pytest.fixture(autouse=True)
def small_rotation(monkeypatch):
    monkeypatch.setattr(cases_module, "ROTATION_BYTES", 2_000_000)
    monkeypatch.setattr(cases_module, "ROTATION_TARGET", 2_000_000)


def library_with(change=None):
    """The installed library; `change(config, out, lse)` after each call may spoil what it wrote."""
    library = runner.Library.installed()
    if change is None:
        return library

    def changing(function):
        def call(*args, **options):
            function(*args, **options)
            change(options["config"], options["out"], options["lse"])

        return call

    names = ("decode", "prefill", "sparse")
    return dataclasses.replace(library, **{name: changing(getattr(library, name)) for name in names})


def make(
    whens=(DECODE, PREFILL, FP8, SPARSE, SPARSE_FP8), change=None, memory=GB, timer=None, dtype="bfloat16", meter=None
):
    signs = []
    made = Device(list(whens), dtype, timer or CpuTimer(), library_with(change), memory, lambda: signs.append(1), meter)
    made.signs = signs
    return made


@pytest.mark.parametrize("when", [DECODE, PREFILL, FP8, SPARSE, SPARSE_FP8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_right_outputs_pass_and_samples_come_by_configuration(when, dtype):
    measured = make(dtype=dtype)
    measured.open(when, DEFAULT)
    measured.check(config(9))
    taken = measured.samples([DEFAULT, config(9)], 5)
    assert [len(us) for us in taken] == [5, 5]
    # every sample is one configuration's: of each round one of two consecutive ones
    assert sorted(us for of_one in taken for us in of_one) == [float(100 + i) for i in range(10)]
    for us in zip(*taken, strict=True):
        assert abs(us[0] - us[1]) == 1
    assert measured.signs


def test_consecutive_replays_are_on_consecutive_slots(monkeypatch):
    seen = []
    timer = CpuTimer()
    measured = make([DECODE], timer=timer)
    measured.open(DECODE, DEFAULT)
    inputs = measured._shape.inputs
    assert inputs.num_slots == 6
    real = timer.sequence
    monkeypatch.setattr(timer, "sequence", lambda replays, alive: (seen.extend(replays), real(replays, alive))[1])
    configs = [DEFAULT, config(9), config(10)]
    measured.samples(configs, 4)
    measured.samples(configs, 1)
    slot_of = {replay: slot for asked in configs for slot, replay in measured._shape.running[asked].graphs.items()}
    assert [slot_of[replay] for replay in seen] == [i % 6 for i in range(15)]


def test_graphs_are_captured_once_and_only_where_they_are_needed():
    timer = CpuTimer()
    measured = make([DECODE], timer=timer)
    measured.open(DECODE, DEFAULT)
    measured.samples([DEFAULT], 4)
    assert timer.captured == 4
    measured.samples([DEFAULT], 40)
    assert timer.captured == 6
    assert timer.warmed == [4, 2]
    measured.open(DECODE, DEFAULT)  # another shape: graphs of the old one are of no use
    measured.samples([DEFAULT], 1)
    assert timer.captured == 7


def spoil(only, how):
    def change(asked, out, lse):
        if asked == only:
            how(out, lse)

    return change


@pytest.mark.parametrize(
    "how",
    [
        lambda out, lse: out.fill_(float("nan")),
        lambda out, lse: out[-1, -1].mul_(1.05),
        lambda out, lse: out[-1, -1].zero_(),
        lambda out, lse: lse[0, 0].add_(0.1),
        lambda out, lse: lse[0, 0].fill_(float("nan")),
    ],
    ids=["nan", "one row 5 % off", "one row missing", "one lse off", "one lse nan"],
)
@pytest.mark.parametrize("when", [DECODE, PREFILL, FP8, SPARSE, SPARSE_FP8])
def test_a_wrong_candidate_is_found_and_a_wrong_default_fails_the_shape(when, how):
    measured = make(change=spoil(config(9), how))
    measured.open(when, DEFAULT)
    measured.check(config(8))
    with pytest.raises(CandidateError, match=r"^wrong: relative error"):
        measured.check(config(9))
    measured.check(config(8))  # its outputs are nobody else's


def test_a_wrong_default_fails_the_shape():
    measured = make(change=spoil(DEFAULT, lambda out, lse: out.mul_(1.05)))
    with pytest.raises(
        ShapeError, match=r"^the default configuration: wrong: relative error 5\.\de-02 \(limit 0\.008\)"
    ):
        measured.open(DECODE, DEFAULT)


def test_outputs_are_poisoned_so_a_candidate_that_writes_nothing_is_wrong():
    measured = make([DECODE])
    measured.open(DECODE, DEFAULT)
    shape = measured._shape
    shape.running[config(9)] = device_module._Running([lambda: None] * shape.inputs.num_slots)
    with pytest.raises(CandidateError, match=r"^wrong: relative error not finite"):
        measured.check(config(9))


def test_a_shape_beyond_the_memory_is_refused_and_does_not_size_the_pool():
    large = dataclasses.replace(DECODE, batch=64, kv_len=100_000)
    assert device_module.footprint(case_of(large, "bfloat16")) > GB
    measured = make([DECODE, large])
    with pytest.raises(ShapeError, match=r"^needs 7\.4 GB of GPU memory, 1\.0 GB are there$"):
        measured.open(large, DEFAULT)
    assert measured._pool.num_tokens < 10_000
    measured.open(DECODE, DEFAULT)


@pytest.mark.parametrize("when", [DECODE, PREFILL, FP8, SPARSE, SPARSE_FP8])
def test_footprint_is_what_pool_and_inputs_take(when):
    case = case_of(when, "bfloat16")
    inputs = make_inputs(case, KvPool.of([case], torch.device("cpu")), torch.device("cpu"))
    tensors = (inputs.q_nope, inputs.q_pe, inputs.out, inputs.lse)
    assert device_module.footprint(case) == case.pool_bytes + sum(x.nbytes for x in tensors)


def test_what_a_shape_allocated_is_given_back_before_the_next(monkeypatch):
    """When nothing of it is held any more: memory that only torch can use is what CUDA's own allocations lack."""
    held = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append(device._shape))
    device = make([DECODE, PREFILL])
    for when in (DECODE, PREFILL, DECODE):
        device.open(when, DEFAULT)
    assert held == [None] * 3


def test_a_search_on_the_device(monkeypatch):
    """The whole chain but the kernels: the fake times rise by the sample, so no candidate beats another for sure."""
    monkeypatch.setattr(search, "RUNGS", (4, 8, 16))
    broken = config(9)
    measured = make([DECODE], change=spoil(broken, lambda out, lse: out.zero_()))
    result = tune_shape(measured, DECODE, [DEFAULT, broken, config(8)])
    assert result.chosen is not None
    assert result.trials[1].verdict.startswith("wrong: ")
    assert len(result.trials[0].samples) == 4 + 8 + 16


def test_usable_asks_the_device():
    timer = CpuTimer()
    measured = make([DECODE], timer=timer)
    assert measured.is_usable()

    def dead():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    timer.synchronize = dead
    assert not measured.is_usable()


# ---------------------------------------------------------------------------------------------------------------------
# clocks, graphs of several calls, the host


class Meter:
    """A GPU whose moments are told one after the other, the last one for ever."""

    def __init__(self, *moments):
        self.moments = list(moments)

    def moment(self):
        found = self.moments.pop(0) if len(self.moments) > 1 else self.moments[0]
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def rests(monkeypatch):
    taken = []
    monkeypatch.setattr(device_module.time, "sleep", taken.append)
    return taken


def test_clocks_are_those_under_load(rests):
    timer = CpuTimer()
    measured = make([DECODE], timer=timer, meter=Meter((1980, 500.0, 0), (1900, 600.0, 0x2)))
    measured.open(DECODE, DEFAULT)
    assert measured.conditions() is None, "nothing was timed"
    measured.samples([DEFAULT], 3)
    assert measured.conditions() == search.Conditions(1980, 500)
    measured.samples([DEFAULT], 3)
    # The clock of an application (0x2) is what somebody wanted.
    assert measured.conditions() == search.Conditions(1900, 600, ())
    assert (timer.order, rests) == ([3, 3], [])


@pytest.mark.parametrize(
    ("second", "throttled"), [((1950, 550.0, 0), ()), ((1700, 700.0, 0x24), ("SW Power Cap", "SW Thermal Slowdown"))]
)
def test_what_was_kept_down_is_timed_once_more_after_a_rest(rests, second, throttled):
    timer = CpuTimer()
    measured = make([DECODE], timer=timer, meter=Meter((1500, 700.0, 0x4), second))
    measured.open(DECODE, DEFAULT)
    [taken] = measured.samples([DEFAULT], 5)
    assert (timer.order, rests) == ([5, 5], [device_module.REST_S])
    assert len(taken) == 5
    assert measured.conditions() == search.Conditions(*map(round, second[:2]), throttled)


def test_without_a_meter_nothing_is_known_and_nothing_waits(rests):
    for meter in (None, Meter(RuntimeError("NVML reads no clocks of this GPU: Not Supported"))):
        measured = make([DECODE], meter=meter)
        measured.open(DECODE, DEFAULT)
        assert [len(us) for us in measured.samples([DEFAULT], 3)] == [3]
        assert measured.conditions() is None
    assert rests == []


def test_a_call_in_a_row_is_a_share_of_its_graph():
    timer = CpuTimer()
    measured = make([DECODE], timer=timer)
    measured.open(DECODE, DEFAULT)
    written = measured._shape.inputs.out
    written.fill_(float("nan"))
    us = measured.chained(config(9))
    assert timer.captured == 1
    # The fake's first replay takes 100 us, those of the second sequence 100 to 106.
    assert us == pytest.approx(102.5 / device_module.CHAIN)
    assert timer.order == [1, device_module.CHAIN_REPLAYS - 1]
    assert not written.isnan().any(), "all six slots, round and round"


def test_long_calls_are_not_replayed_for_long(monkeypatch):
    timer = CpuTimer()
    monkeypatch.setattr(
        timer, "sequence", lambda replays, alive: [60_000.0] * len(timer.order.append(len(replays)) or replays)
    )
    measured = make([DECODE], timer=timer)
    measured.open(DECODE, DEFAULT)
    assert measured.chained(DEFAULT) == 60_000.0 / device_module.CHAIN
    assert timer.order == [1, 1]


def test_the_host_is_timed_with_a_plan():
    measured = make([DECODE])
    measured.open(DECODE, DEFAULT)
    assert measured.host_us(config(9)) == 20.0 + 20 + 0.05
