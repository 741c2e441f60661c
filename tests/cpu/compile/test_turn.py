"""Processes that warm up at once take turns; and whom they do not wait for. No GPU: see jit_case."""

import os
import subprocess
import sys
import time

import filelock
import pytest
from jit_case import HERE, ROOT, assert_works, forget_everything, result_of, start_process
from limits import PROCESS_S

from mla_cute import warmup
from mla_cute.compile import jit, turn
from mla_cute.compile import warmup as warmup_module
from mla_cute.tuning.workers import compile_variants
from toy_keys import TOY, ToyConfig, ToyKey

pytestmark = pytest.mark.slow  # every test starts processes

VARIANT = (TOY, ToyKey(), ToyConfig())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    return forget_everything(tmp_path, monkeypatch)


def no_wait():
    raise AssertionError("nobody holds the lock")


def ready_and_go(gate):
    """Script of a process that says that it is ready, and goes on when the gate is there."""
    return f"""
    import pathlib
    print("ready", flush=True)
    while not pathlib.Path({str(gate)!r}).exists():
        time.sleep(0.01)
    """


def run_at_once(script, gate, number, **env):
    processes = [start_process(ready_and_go(gate) + script, **env) for _ in range(number)]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    gate.touch()
    return processes


def most_at_once(lines):
    running = most = 0
    for what, *_ in lines:
        running += 1 if what == "begin" else -1
        most = max(most, running)
    assert running == 0
    return most


@pytest.mark.parametrize(("number", "directories"), [(3, 1), (2, 2)], ids=["one directory", "directories of their own"])
def test_ranks_that_warm_up_at_once_compile_in_turns(tmp_path, cache, number, directories):
    log = tmp_path / "log"
    own = "" if directories == 1 else "os.environ['MLA_CUTE_CACHE_DIR'] += str(os.getpid())"
    script = f"""
    import os
    import mla_cute
    from mla_cute.compile.jit import KernelRef
    {own}
    ref = KernelRef("slow_toy", "slow_toy", "SlowToy")
    warmed = mla_cute.warmup(variants=[(ref, ToyKey(), ToyConfig(32 * n)) for n in (1, 2, 3)], num_workers=2)
    print(json.dumps([w.cached for w in warmed]))
    """
    processes = run_at_once(script, tmp_path / "gate", number, SLOW_TOY_LOG=str(log))
    printed = [process.communicate(timeout=PROCESS_S) for process in processes]
    assert all(process.returncode == 0 for process in processes), printed
    lines = [line.split() for line in log.read_text().splitlines()]
    assert most_at_once(lines) <= 2  # of one process
    begun = [num_threads for what, _, num_threads in lines if what == "begin"]
    assert sorted(begun) == sorted(["32", "64", "96"] * directories)
    assert len({pid for _, pid, _ in lines}) <= 2 * directories
    said = [err.count("mla_cute: another process compiles kernels (") for _, err in printed]
    assert sorted(said) == [0] + [1] * (number - 1)
    cached = sorted(out.splitlines()[-1] for out, _ in printed)
    assert cached == ["[false, false, false]"] * directories + ["[true, true, true]"] * (number - directories)


def test_single_calls_at_once_compile_once(tmp_path, cache):
    log = tmp_path / "log"
    script = """
    jit.get(jit.KernelRef("slow_toy", "slow_toy", "SlowToy"), ToyKey(), ToyConfig())
    print(json.dumps(jit.counters()))
    """
    found = [result_of(p) for p in run_at_once(script, tmp_path / "gate", 3, SLOW_TOY_LOG=str(log))]
    assert sorted(counters["compiled"] for counters in found) == [0, 0, 1]
    assert log.read_text().count("begin") == 1


def test_a_holder_that_dies_blocks_nobody(tmp_path, monkeypatch):
    path = tmp_path / "compiling.lock"
    monkeypatch.setattr(turn, "lock_path", lambda: path)
    code = (
        "import pathlib, time\nfrom mla_cute.compile import turn\n"
        f"turn.lock_path = lambda: pathlib.Path({str(path)!r})\n"
        "with turn.turn(lambda: None, lambda: True):\n    print('held', flush=True)\n    time.sleep(100)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(HERE)))}
    holder = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    waited = []

    def kill():
        waited.append(turn._acquire(filelock.FileLock(str(path))))
        holder.kill()

    start = time.monotonic()
    with turn.turn(kill, lambda: True) as alive:
        alive()
        assert not turn._acquire(filelock.FileLock(str(path)))
    assert waited == [False]
    assert time.monotonic() - start < 30
    holder.communicate(timeout=PROCESS_S)
    with turn.turn(no_wait, lambda: True):
        pass


def test_a_stuck_holder_is_passed_by(cache, monkeypatch, caplog, capsys):
    monkeypatch.setattr(turn, "_STUCK_S", 0.3)
    with filelock.FileLock(str(turn.lock_path())):
        (warmed,) = warmup(variants=[VARIANT], num_workers=1)
    assert not warmed.cached
    assert_works(jit.get(*VARIANT))
    remark, line = capsys.readouterr().err.splitlines()
    assert remark.startswith("mla_cute: another process compiles kernels (")
    assert remark.endswith("compiling.lock is locked), waiting for it")
    assert line.startswith("[1/1] toy ")
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1
    assert "has finished no kernel for 0 s, compiling beside it" in said[0]


def test_a_holder_that_goes_on_is_waited_for(cache, monkeypatch):
    """It finishes a kernel every 0.2 s, five times: together longer than what counts as stuck."""
    monkeypatch.setattr(turn, "_STUCK_S", 0.8)
    lock = filelock.FileLock(str(turn.lock_path()))
    beat = turn.lock_path().with_suffix(".beat")
    asked = []

    def is_needed():
        asked.append(time.monotonic())
        time.sleep(0.2)
        if len(asked) == 5:
            lock.release()
        beat.touch()
        return True

    lock.acquire()
    with turn.turn(beat.touch, is_needed):
        assert len(asked) == 5
        assert not turn._acquire(filelock.FileLock(str(turn.lock_path())))
    assert asked[-1] - asked[0] > 0.7


def test_waiting_ends_when_others_have_compiled_everything(cache, monkeypatch):
    def compile_parallel(variants, num_workers):
        raise AssertionError(f"nothing is left of {variants}")

    def compile_elsewhere(text):
        assert "another process compiles kernels" in text
        jit.prepare(*VARIANT)
        turn.lock_path().with_suffix(".beat").touch()

    monkeypatch.setattr(warmup_module, "_compile_parallel", compile_parallel)
    with filelock.FileLock(str(turn.lock_path())):
        ((variant, seconds, elsewhere),) = warmup_module.compile_missing([VARIANT], 1, compile_elsewhere)
    assert (variant, elsewhere) == (VARIANT, True)
    assert seconds > 0


def test_where_no_lock_can_be_made_it_goes_on(cache, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(turn, "lock_path", lambda: tmp_path / "file" / "compiling.lock")
    (warmed,) = warmup(variants=[VARIANT], num_workers=1, progress=False)
    assert not warmed.cached
    assert any("compiling without waiting for other processes" in record.getMessage() for record in caplog.records)


def test_the_lock_is_the_users_and_the_machines(monkeypatch, tmp_path):
    monkeypatch.setattr(turn.tempfile, "tempdir", str(tmp_path))
    assert turn.lock_path() == tmp_path / f"mla_cute-compiling-{os.getuid()}.lock"
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    assert turn.lock_path() == tmp_path / "mla_cute-compiling-4321.lock"


def test_the_tuner_takes_its_turn_too(cache, monkeypatch, capsys):
    monkeypatch.setattr(turn, "_STUCK_S", 0.2)
    with filelock.FileLock(str(turn.lock_path())):
        assert compile_variants([VARIANT], 1) == {}
    assert "another process compiles kernels" in capsys.readouterr().err


def test_the_lock_is_free_after_a_failure(cache):
    def fail(done, total, warmed):
        raise KeyError("of the caller")

    with pytest.raises(KeyError):
        warmup(variants=[VARIANT], num_workers=1, progress=fail)
    with turn.turn(no_wait, lambda: True):
        pass
