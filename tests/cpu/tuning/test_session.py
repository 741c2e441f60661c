"""Runs over many shapes: both files after every shape, resume, budget, Ctrl-C, damaged and foreign files."""

import dataclasses
import json
import math

import pytest
from tune_case import DECODE, GPU, MADE_WITH, FakeMeasurer

from mla_cute.config import KernelConfig
from mla_cute.gpu_speed import H200
from mla_cute.tuned import select
from mla_cute.tuned.select import When
from mla_cute.tuning import cost, search, session, space, store
from mla_cute.tuning.recipes import coarse_first
from mla_cute.tuning.search import StartError
from mla_cute.tuning.session import Task

WHENS = [dataclasses.replace(DECODE, batch=b, kv_len=n) for b in (1, 16, 128) for n in (1024, 8192)]
ORDER = coarse_first(WHENS)


class Screen:
    def __init__(self):
        self.lines, self.steps = [], []

    def say(self, text):
        self.lines.append(text)

    def step(self, done, total, label, seconds_left):
        self.steps.append((done, total, label, seconds_left))


class Clock:
    """A second per question, and what is added."""

    def __init__(self, tick=0.0):
        self.now, self.tick = 1000.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


def faster(when, config):
    """Without evict_first everything is 10 % faster, at batch 1 nothing is."""
    return 90.0 if not config.evict_first and when.batch > 1 else 100.0


def nothing_missing(variants, step):
    assert list(variants)
    return {}


def task(folder, **changes):
    values = {
        "whens": WHENS,
        "dtype": "bfloat16",
        "out": folder / "tuned" / "Test_GPU.json",
        "measurements": folder / "raw.json",
        "gpu": GPU,
        "speed": H200,
        "made_with": MADE_WITH,
        "digest": "abc",
    }
    return Task(**(values | changes))


def run(todo, measurer=None, compiling=nothing_missing, clock=None):
    screen, measurer = Screen(), measurer or FakeMeasurer(faster)
    outcome = session.run(todo, session.open_store(todo), measurer, compiling, screen, clock or Clock())
    return outcome, measurer, screen


def test_shapes_of_lists_are_stored_and_selected(tmp_path):
    whens = [When("sparse", "", False, 64, 1, 1, tokens, 2048) for tokens in (4, 128)]
    compiled = []
    todo = task(tmp_path, whens=whens)
    outcome, _, _ = run(todo, compiling=lambda variants, step: compiled.extend(variants) or {})
    assert {shape.when for shape in outcome.tuned} == set(whens)
    assert all(getattr(key, "sparse", True) for _, key, _ in compiled)
    entries = {entry.when: entry for entry in select.load(todo.out).entries}
    assert set(entries) == set(whens)
    grid = select.Grid(select.load(todo.out))
    index = grid.nearest(dataclasses.replace(whens[1], batch=100))
    assert grid.file.entries[index].when == whens[1]
    assert session.group_of(whens[0]) == "sparse, 16-bit cache"
    assert run(todo)[0].resumed == coarse_first(whens)


def test_a_run_fills_both_files(tmp_path):
    todo = task(tmp_path)
    outcome, measurer, screen = run(todo)
    assert measurer.opened == ORDER
    assert [shape.when for shape in outcome.tuned] == ORDER
    assert (outcome.failed, outcome.left_out, outcome.resumed) == ([], [], [])
    file = select.load(todo.out)
    assert (file.gpu, file.made_with) == (GPU, MADE_WITH)
    entries = {entry.when: entry for entry in file.entries}
    assert set(entries) == set(WHENS)
    for when, entry in entries.items():
        default = select.default_for(when, H200)
        assert entry.default_us == 100.0
        if when.batch == 1:
            assert (entry.config, entry.us) == (default, 100.0)
        else:
            assert (entry.config, entry.us) == (dataclasses.replace(default, evict_first=False), 90.0)
    gpu, shapes = store.load(todo.measurements)
    assert gpu == GPU
    assert {shape.when: shape.entry() for shape in shapes} == entries
    for shape in shapes:
        listed = [KernelConfig.from_dict(trial["config"]) for trial in shape.candidates]
        timed, pruned, us = cost.choose(shape.when, space.candidates(shape.when, H200), H200)
        assert listed == [*timed, *pruned]
        assert [trial["model_us"] for trial in shape.candidates] == [round(us[c], 2) if us else None for c in listed]
        tried, left_out = shape.candidates[: len(timed)], shape.candidates[len(timed) :]
        assert all(trial["verdict"] != search.PRUNED for trial in tried)
        assert all(trial["us"] > 0 and trial["samples"] > 0 and trial["rung"] > 0 for trial in tried)
        assert {(trial["verdict"], trial["us"], trial["rung"]) for trial in left_out} <= {(search.PRUNED, None, 0)}
    assert any("100.0 -> 90.0 us (1.111x), evict_first=False" in text for text in screen.lines)
    assert any("batch 1" in text and "the default, 100.0 us" in text for text in screen.lines)
    assert screen.steps[-1] == (6, 6, "done", 0.0)


def test_the_time_left_follows_from_the_shapes_done(tmp_path):
    clock = Clock()
    measurer = FakeMeasurer(faster)
    real = measurer.open

    def open_slowly(when, default):
        clock.now += 10
        real(when, default)

    measurer.open = open_slowly
    _, _, screen = run(task(tmp_path), measurer, clock=clock)
    left = {done: seconds for done, _, label, seconds in screen.steps if "candidates" in label}
    assert left == {0: None, 1: 50.0, 2: 40.0, 3: 30.0, 4: 20.0, 5: 10.0}


def test_tuned_entries_of_other_shapes_stay(tmp_path):
    todo = task(tmp_path)
    other = dataclasses.replace(DECODE, num_heads=128)
    entry = select.Entry(other, KernelConfig(), 10.0, 11.0, None)
    select.merge(todo.out, select.TunedFile(GPU, MADE_WITH, (entry,)))
    run(todo)
    assert {e.when for e in select.load(todo.out).entries} == {other, *WHENS}


class Interrupting(FakeMeasurer):
    """Ctrl-C (or worse) in the middle of a shape."""

    def __init__(self, after, error=KeyboardInterrupt):
        super().__init__(faster)
        self.after, self.error = after, error

    def samples(self, configs, rounds):
        if len(self.opened) > self.after:
            raise self.error
        return super().samples(configs, rounds)


def test_ctrl_c_keeps_what_is_done_and_a_second_run_goes_on(tmp_path):
    todo = task(tmp_path)
    outcome, measurer, _ = run(todo, Interrupting(2))
    assert outcome.interrupted
    assert [shape.when for shape in outcome.tuned] == ORDER[:2]
    assert outcome.left_out == ORDER[2:]
    assert {entry.when for entry in select.load(todo.out).entries} == set(ORDER[:2])
    assert any("4 shapes left out, interrupted" in text for text in session.summary(outcome))

    outcome, measurer, screen = run(todo)
    assert measurer.opened == ORDER[2:]
    assert outcome.resumed == ORDER[:2]
    assert screen.lines[0].startswith("2 of 6 shapes are in ")
    assert {entry.when for entry in select.load(todo.out).entries} == set(WHENS)

    outcome, measurer, _ = run(todo)
    assert measurer.opened == []
    assert outcome.resumed == ORDER


def test_a_killed_run_resumes(tmp_path):
    """SIGKILL leaves what the files hold: an exception that nothing catches is the same to them."""
    todo = task(tmp_path)
    with pytest.raises(SystemExit):
        run(todo, Interrupting(3, SystemExit))
    _, measurer, _ = run(todo)
    assert measurer.opened == ORDER[3:]


def test_ctrl_c_while_compiling(tmp_path):
    def interrupted(variants, step):
        raise KeyboardInterrupt

    outcome, measurer, _ = run(task(tmp_path), compiling=interrupted)
    assert outcome.interrupted
    assert outcome.left_out == ORDER
    assert measurer.asked == []


def test_a_process_that_cannot_come_back_ends_the_run_and_keeps_what_is_done(tmp_path):
    outcome, _, _ = run(task(tmp_path), Interrupting(1, StartError("the GPU is gone")))
    assert outcome.error == "the GPU is gone"
    assert not outcome.interrupted
    assert len(outcome.tuned) == 1
    assert "5 shapes left out, the GPU is gone; the same command goes on with them:" in session.summary(outcome)


@pytest.mark.parametrize("change", [{"digest": "other sources"}, {"dtype": "float16"}])
def test_other_sources_and_dtypes_are_measured_anew(tmp_path, change):
    run(task(tmp_path))
    _, measurer, _ = run(task(tmp_path, **change))
    assert measurer.opened == ORDER
    _, shapes = store.load(tmp_path / "raw.json")
    assert len(shapes) == (6 if "digest" in change else 12)


def test_a_resumed_run_fills_another_tuned_file(tmp_path):
    run(task(tmp_path))
    _, measurer, _ = run(task(tmp_path, out=tmp_path / "again.json"))
    assert measurer.opened == []
    assert {entry.when for entry in select.load(tmp_path / "again.json").entries} == set(WHENS)


def test_failed_shapes_have_no_entry_and_are_tried_again(tmp_path):
    todo, measurer = task(tmp_path), FakeMeasurer(faster)
    measurer.fails_open[ORDER[0]] = "needs 300.0 GB of GPU memory, 100.0 GB are there"
    outcome, _, screen = run(todo, measurer)
    assert [shape.when for shape in outcome.failed] == [ORDER[0]]
    assert screen.lines[0] == f"FAILED {ORDER[0]}: needs 300.0 GB of GPU memory, 100.0 GB are there"
    assert {entry.when for entry in select.load(todo.out).entries} == set(ORDER[1:])
    shape = store.load(todo.measurements)[1][0]
    assert (shape.chosen, shape.entry()) == (None, None)
    _, measurer, _ = run(todo)
    assert measurer.opened == ORDER[:1]
    assert len(select.load(todo.out).entries) == 6


def test_failing_candidates_are_counted_in_the_line_and_kept_in_the_file(tmp_path):
    todo, measurer = task(tmp_path, whens=[DECODE]), FakeMeasurer(faster)
    found = space.candidates(DECODE, H200)
    measurer.fails = {found[1]: "hung after 20 s", found[2]: "exit -11"}
    _, _, screen = run(todo, measurer)
    assert screen.lines[-1].endswith("; 2 candidates failed")
    tried = store.load(todo.measurements)[1][0].candidates
    assert [trial["verdict"] for trial in tried[1:3]] == ["hung after 20 s", "exit -11"]
    assert tried[1]["us"] is None


# -------------------------------------------------------------------------------------------------------- the budget


def test_the_budget_ends_the_run_before_a_shape_that_does_not_fit(tmp_path):
    clock, measurer = Clock(), FakeMeasurer(faster)
    real = measurer.open

    def open_slowly(when, default):
        clock.now += 10
        real(when, default)

    measurer.open = open_slowly
    outcome, _, _ = run(task(tmp_path, budget_s=35.0), measurer, clock=clock)
    assert [shape.when for shape in outcome.tuned] == ORDER[:3]
    assert clock.now - 1000 <= 35
    text = session.summary(outcome)
    assert text[0] == "3 shapes tuned, 0 were done before, 0 failed"
    assert text[1].startswith("3 shapes left out, the budget is spent")
    assert text[2] == "  3 of decode, 16-bit cache"


def test_compiling_takes_its_share_of_the_budget_and_what_is_missing_is_left_out(tmp_path):
    clock = Clock()
    variants = {}

    def compiling(wanted, step):
        wanted = list(dict.fromkeys(wanted))
        for done, variant in enumerate(wanted, start=1):
            clock.now += 10
            variants[variant] = done
            if not step(done, len(wanted)):
                return dict.fromkeys(wanted[done:], "not compiled: no time was left")
        return {}

    outcome, measurer, screen = run(task(tmp_path, budget_s=60.0), compiling=compiling, clock=clock)
    assert len(variants) == 3  # half the budget: the default's two, and one more
    default = select.default_for(DECODE, H200)
    assert list(variants)[:2] == space.variants_of(DECODE, default, "bfloat16")
    assert len(outcome.tuned) == 6
    launches = {trial["verdict"] for trial in outcome.tuned[0].candidates}
    assert "not compiled: no time was left" in launches
    assert any("not compiled" in text for text in screen.lines)


def test_a_shape_whose_default_had_no_time_is_left_out(tmp_path):
    def compiling(wanted, step):
        return dict.fromkeys(wanted, search.NO_TIME)

    outcome, measurer, _ = run(task(tmp_path), compiling=compiling)
    assert len(outcome.left_out) == 6
    assert not outcome.failed
    assert measurer.asked == []
    outcome, _, _ = run(task(tmp_path))
    assert len(outcome.tuned) == 6


def test_the_defaults_kernels_may_take_more_of_the_budget(tmp_path):
    clock, compiled = Clock(), []

    def compiling(wanted, step):
        wanted = list(dict.fromkeys(wanted))
        for done, variant in enumerate(wanted, start=1):
            clock.now += 35
            compiled.append(variant)
            if not step(done, len(wanted)):
                return dict.fromkeys(wanted[done:], search.NO_TIME)
        return {}

    outcome, _, _ = run(task(tmp_path, budget_s=100.0), compiling=compiling, clock=clock)
    assert compiled == space.variants_of(DECODE, select.default_for(DECODE, H200), "bfloat16")
    assert len(outcome.tuned) == 6


def test_a_shape_whose_default_does_not_compile_fails(tmp_path):
    def compiling(wanted, step):
        return dict.fromkeys(wanted, "does not compile: registers")

    outcome, measurer, _ = run(task(tmp_path), compiling=compiling)
    assert len(outcome.failed) == 6
    assert measurer.asked == []
    assert outcome.failed[0].why == "the default configuration: does not compile: registers"


def test_no_budget_is_no_end(tmp_path):
    outcome, _, _ = run(task(tmp_path, budget_s=math.inf), clock=Clock(tick=1e6))
    assert len(outcome.tuned) == 6


# ----------------------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"raw\.json: not JSON: .*; delete it to measure anew"),
        ('{"kind": "mla_cute.tuning", "schema": 1, "gpu": {}, "sha', r"raw\.json: not JSON"),
        ("[]", r"raw\.json: not a measurements file"),
        ('{"kind": "mla_cute.bench.decode"}', r"raw\.json: not a measurements file"),
        ('{"kind": "mla_cute.tuning", "schema": 0}', r"raw\.json: schema 0, this version reads 1"),
        ('{"kind": "mla_cute.tuning", "schema": 1, "gpu": {}}', r"raw\.json: expected an object gpu and a list shapes"),
        (
            '{"kind": "mla_cute.tuning", "schema": 1, "gpu": {}, "shapes": [{}]}',
            r"raw\.json: shapes\[0\]: missing fields \['when', 'dtype', ",
        ),
        (
            '{"kind": "mla_cute.tuning", "schema": 1, "gpu": {}, "shapes": [null]}',
            r"shapes\[0\]: expected an object, got",
        ),
        (
            '{"kind": "mla_cute.tuning", "schema": 1, "gpu": {}, "shapes": []}',
            r"raw\.json: gpu\.name: expected a text, got",
        ),
        (
            '{"kind": "mla_cute.tuning", "schema": 1, "gpu": {"name": "NVIDIA H20"}, "shapes": []}',
            r"raw\.json: measured on NVIDIA H20, this GPU is Test GPU",
        ),
    ],
)
def test_a_damaged_or_foreign_measurements_file_is_an_error_that_names_it(tmp_path, content, message):
    todo = task(tmp_path)
    todo.measurements.write_text(content)
    with pytest.raises(ValueError, match=message):
        session.open_store(todo)
    assert todo.measurements.read_text() == content


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda shape: shape.update(us=None), r"shapes\[0\]: us: expected a number > 0 of a tuned shape, got None"),
        (lambda shape: shape["chosen"].update(tiles=3), r"shapes\[0\]: chosen: config: unknown fields \['tiles'\]"),
        (lambda shape: shape.update(extra=1), r"shapes\[0\]: unknown fields \['extra'\]"),
        (lambda shape: shape["when"].pop("batch"), r"shapes\[0\]: when: missing fields \['batch'\]"),
        (lambda shape: shape["when"].update(kv_len=None), r"shapes\[0\]: when.kv_len: expected the length"),
        (lambda shape: shape["when"].update(op="sleep"), r"shapes\[0\]: when.op: expected one of"),
        (lambda shape: shape.update(default_us=math.nan), r"shapes\[0\]: default_us: expected a number > 0"),
        (lambda shape: shape.update(runner_up_us="9"), r"shapes\[0\]: runner_up_us: expected a number > 0 or null"),
        (
            lambda shape: shape.update(policy="fast"),
            r"shapes\[0\]: policy: expected one of \('graph', 'eager'\), got 'fast'",
        ),
        (lambda shape: shape.update(runner_up=3), r"shapes\[0\]: runner_up: expected an object, got 3"),
        (lambda shape: shape["candidates"][0].update(sm_mhz="x"), r"candidates\[0\]\.sm_mhz: expected a number > 0 or"),
        (lambda shape: shape.update(chosen=[]), r"shapes\[0\]: chosen: expected an object, got \[\]"),
        (lambda shape: shape.update(made_with=None), r"shapes\[0\]: made_with: expected an object, got None"),
        (lambda shape: shape.update(candidates=[]), r"shapes\[0\]: candidates: expected the default first, got \[\]"),
        (lambda shape: shape.update(candidates=None), r"shapes\[0\]: candidates: expected a list, got None"),
        (lambda shape: shape["candidates"][1].pop("verdict"), r"candidates\[1\]: missing fields \['verdict'\]"),
        (lambda shape: shape["candidates"][0].update(config=None), r"candidates\[0\]\.config: expected an object"),
    ],
)
def test_a_damaged_shape_is_an_error_that_names_it(tmp_path, spoil, message):
    todo = task(tmp_path, whens=[DECODE])
    run(todo)
    values = json.loads(todo.measurements.read_text())
    spoil(values["shapes"][0])
    todo.measurements.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        session.open_store(todo)


def test_another_gpus_tuned_file_is_refused_before_anything_runs(tmp_path):
    todo = task(tmp_path)
    select.merge(todo.out, select.TunedFile(GPU | {"name": "NVIDIA H20"}, MADE_WITH, ()))
    with pytest.raises(ValueError, match=r"Test_GPU\.json: made on another GPU"):
        session.open_store(todo)


def test_the_measurements_are_one_shape_a_line(tmp_path):
    todo = task(tmp_path)
    run(todo)
    lines = todo.measurements.read_text().splitlines()
    assert sum(text.startswith('{"when"') for text in lines) == 6
    assert json.loads(todo.measurements.read_text())["method"]["us"].startswith("median of CUDA-graph replays")


def test_group_names():
    assert session.group_of(DECODE) == "decode, 16-bit cache"
    assert session.group_of(When("prefill", "group", True, 1, 1, 1, 1, 1)) == "prefill, group FP8, q e4m3"


def test_rows_say_what_was_measured_beside_the_gpus_time(tmp_path):
    todo, measurer = task(tmp_path, whens=[DECODE], policy="eager"), FakeMeasurer(faster)
    measurer.at = search.Conditions(1500.0, 612.0, ("SW Power Cap",))
    run(todo, measurer)
    [shape] = store.load(todo.measurements)[1]
    assert shape.policy == "eager"
    chosen = next(row for row in shape.candidates if row["verdict"] == "chosen")
    assert {name: chosen[name] for name in ("us", "us_chained", "host_us", "sm_mhz", "watts", "throttled")} == {
        "us": 90.0, "us_chained": 45.0, "host_us": 20.0,
        "sm_mhz": 1500.0, "watts": 612.0, "throttled": ["SW Power Cap"],
    }  # fmt: skip
    dropped = next(row for row in shape.candidates if row["verdict"].startswith("dropped"))
    assert (dropped["us_chained"], dropped["host_us"]) == (None, 20.0)
    todo = task(tmp_path / "plain", whens=[DECODE])
    run(todo)
    rows = store.load(todo.measurements)[1][0].candidates
    assert {row[name] for row in rows for name in ("host_us", "sm_mhz", "watts", "throttled")} == {None}


def test_a_shape_is_measured_again_for_another_policy(tmp_path):
    graph, eager = (task(tmp_path, whens=[DECODE], policy=policy) for policy in ("graph", "eager"))
    assert run(graph)[0].resumed == []
    assert run(graph)[0].resumed == [DECODE]
    assert run(eager)[0].resumed == []
    assert run(eager)[0].resumed == [DECODE]


def test_records_from_before_are_read(tmp_path):
    todo = task(tmp_path, whens=[DECODE])
    run(todo)
    values = json.loads(todo.measurements.read_text())
    for name in ("runner_up", "policy"):
        del values["shapes"][0][name]
    for row in values["shapes"][0]["candidates"]:
        for name in ("us_chained", "host_us", "sm_mhz", "watts", "throttled"):
            del row[name]
    todo.measurements.write_text(json.dumps(values))
    assert run(todo)[0].resumed == [DECODE]
