"""The measuring process, a real one: hangs, crashes, errors, restarts. And compiling, without a compiler."""

import dataclasses
import functools
import os
import time

import pytest
from tune_case import DECODE, GPU, ToyDevice, broken_device, no_gpu, toy_device

from mla_cute.compile import jit, warmup
from mla_cute.config import KernelConfig
from mla_cute.tuning import device, workers
from mla_cute.tuning.search import CandidateError, Conditions, ShapeError, StartError, tune_shape
from mla_cute.tuning.workers import ChildMeasurer, compile_variants

pytestmark = pytest.mark.slow  # every test starts processes

DEFAULT = KernelConfig()


def config(what):
    return dataclasses.replace(DEFAULT, item_overhead=what)


@pytest.fixture
def child():
    with ChildMeasurer(toy_device, timeout_s=2.0) as measurer:
        yield measurer


def test_facts_and_samples_come_from_another_process(child):
    facts = child.facts()
    assert facts["gpu"] == GPU
    assert facts["pid"] != os.getpid()
    child.open(DECODE, DEFAULT)
    child.check(config(5))
    assert child.samples([DEFAULT, config(5)], 3) == [[20.0] * 3, [21.0] * 3]
    assert child.conditions() == Conditions(1500.0, 600.0, ("SW Power Cap",))
    assert (child.chained(config(5)), child.host_us(config(5))) == (7.5, 21.5)
    assert child.facts()["pid"] == facts["pid"]


def test_a_hanging_candidate_is_killed_and_the_next_runs_on_the_same_shape(child):
    child.open(DECODE, DEFAULT)
    pid = child.facts()["pid"]
    begin = time.monotonic()
    with pytest.raises(CandidateError, match=r"^hung after 2 s$"):
        child.check(config(ToyDevice.SLEEPS))
    assert time.monotonic() - begin < 300, "it sleeps for 600 s"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert child.samples([DEFAULT], 2) == [[20.0, 20.0]]
    assert child.facts()["pid"] != pid


def test_a_crash_is_written_down_with_its_status_and_last_words(child):
    child.open(DECODE, DEFAULT)
    with pytest.raises(CandidateError, match=r"^exit 11: terminate called without an active exception$"):
        child.samples([DEFAULT, config(ToyDevice.DIES)], 4)
    child.check(DEFAULT)


def test_an_exception_is_a_verdict_and_leaves_the_process(child):
    child.open(DECODE, DEFAULT)
    pid = child.facts()["pid"]
    with pytest.raises(CandidateError, match=r"^RuntimeError: no such kernel$"):
        child.check(config(ToyDevice.RAISES))
    with pytest.raises(CandidateError, match=r"^wrong: relative error"):
        child.check(config(ToyDevice.WRONG))
    assert child.facts()["pid"] == pid


def test_a_dead_context_is_not_blamed_on_the_next_candidate(child):
    child.open(DECODE, DEFAULT)
    pid = child.facts()["pid"]
    with pytest.raises(CandidateError, match="illegal memory access"):
        child.check(config(ToyDevice.POISONS))
    child.check(DEFAULT)
    assert child.facts()["pid"] != pid


def test_signs_of_life_keep_a_slow_candidate(child):
    child.open(DECODE, DEFAULT)
    child.check(config(ToyDevice.SLOW))  # 3 s in all, silent for 0.5


def test_a_default_that_hangs_crashes_or_does_not_fit_fails_the_shape(child, monkeypatch):
    monkeypatch.setattr(workers, "OPEN_TIMEOUT_S", 1.0)
    with pytest.raises(ShapeError, match=r"^the default configuration: hung after 1 s$"):
        child.open(DECODE, config(ToyDevice.SLEEPS))
    with pytest.raises(ShapeError, match=r"^the default configuration: exit 11"):
        child.open(DECODE, config(ToyDevice.DIES))
    with pytest.raises(ShapeError, match=r"^needs 300\.0 GB"):
        child.open(dataclasses.replace(DECODE, batch=13), DEFAULT)
    child.open(DECODE, DEFAULT)


def test_a_search_goes_on_past_a_hang_and_a_crash(child):
    bad = {"hung after 2 s": config(ToyDevice.SLEEPS), "exit 11": config(ToyDevice.DIES)}
    fast = dataclasses.replace(DEFAULT, item_overhead=0)
    result = tune_shape(child, DECODE, [DEFAULT, *bad.values(), fast])
    assert result.chosen.config == fast
    assert (result.us, result.default_us) == (16.0, 20.0)
    for verdict, trial in zip(bad, result.trials[1:3], strict=True):
        assert trial.verdict.startswith(verdict)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_gpu, "^nothing to tune on: no GPU in this test$"),
        (broken_device, "^the measuring process: ZeroDivisionError: cannot start$"),
    ],
)
def test_a_process_that_cannot_start_says_why(make, message):
    with ChildMeasurer(make) as measurer, pytest.raises(StartError, match=message):
        measurer.facts()


def test_the_real_device_cannot_start_without_a_hopper_gpu(monkeypatch):
    monkeypatch.setattr(device.gpu_facts, "why_not_hopper", lambda: "there is no GPU in this test")
    with pytest.raises(StartError, match=r"^nothing to tune on: there is no GPU in this test$"):
        device.maker([DECODE], "bfloat16")(lambda: None)


def test_leaving_ends_the_process_and_its_log():
    with ChildMeasurer(toy_device) as measurer:
        pid, log = measurer.facts()["pid"], measurer._log
        assert log.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not log.exists()


# ------------------------------------------------------------------------------------------------------- compiling


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that fails on "bad", knows "old", and counts its processes."""
    asked = {}

    def compile_parallel(variants, num_workers):
        asked["variants"], asked["workers"] = list(variants), num_workers
        for variant in variants:
            failed = variant[0] == "bad"
            yield variant, RuntimeError("Traceback\n  error: too many registers") if failed else 1.0

    monkeypatch.setattr(jit, "is_cached", lambda kernel, key, launch: kernel == "old")
    monkeypatch.setattr(jit, "is_writable", lambda: True)
    monkeypatch.setattr(warmup, "_compile_parallel", compile_parallel)
    return asked


def variant(name, number=0):
    return (name, number, None)


def test_what_is_missing_is_compiled_once_and_failures_are_kept_by_variant(compiler):
    steps = []

    def step(done, total):
        steps.append((done, total))
        return True

    wanted = [variant("old"), variant("a"), variant("bad"), variant("a"), variant("b")]
    left = compile_variants(wanted, 7, step)
    assert left == {variant("bad"): "does not compile: error: too many registers"}
    assert compiler["variants"] == [variant("a"), variant("bad"), variant("b")]
    assert compiler["workers"] == 3
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_compiling_ends_when_it_is_told_to(compiler):
    left = compile_variants([variant("a", i) for i in range(4)], None, lambda done, total: done < 2)
    assert left == {variant("a", i): "not compiled: no time was left" for i in (2, 3)}


def test_nothing_missing_starts_no_process(compiler):
    assert compile_variants([variant("old")], None) == {}
    assert compiler == {}


def test_an_unwritable_directory_is_an_error(compiler, monkeypatch):
    monkeypatch.setattr(jit, "is_writable", lambda: False)
    with pytest.raises(StartError, match="MLA_CUTE_CACHE_DIR"):
        compile_variants([variant("a")], None)


def test_a_make_function_has_to_travel():
    make = device.maker([DECODE], "bfloat16")
    assert isinstance(make, functools.partial)
    assert make.args == ([DECODE], "bfloat16")
