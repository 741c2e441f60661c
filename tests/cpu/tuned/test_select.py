"""Tuned configurations: their files, where they are looked for, and what is said of a selection."""

import dataclasses
import json
import logging
import math
import multiprocessing
import pathlib
import re

import pytest
import torch
from limits import PROCESS_S
from tuned_case import FILE, META, NAME, SPEED, Folders, entry, tuned_file, values_of, when, write

import mla_cute
from mla_cute.compile import jit
from mla_cute.config import KERNELS, KernelConfig, why_infeasible
from mla_cute.tuned import select

OTHER = KernelConfig(evict_first=False, min_blocks=8)
SPARSE = entry(op="sparse", page_size=1, kv_len=2048)


@pytest.fixture
def folders(monkeypatch, tmp_path):
    yield Folders(monkeypatch, tmp_path)
    select.clear()


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_the_file_of_a_gpu_is_named_by_it():
    assert select.file_name("NVIDIA H200") == "NVIDIA_H200.json"
    assert select.file_name("NVIDIA GH200 480GB/x\\y") == "NVIDIA_GH200_480GB_x_y.json"


def test_a_file_comes_back_as_it_was_written():
    file = tuned_file(entry(batch=1), entry(OTHER, us=12.125, batch=4), entry(batch=4, op="prefill", q_len=512), SPARSE)
    text = select.dump(file)
    assert select.parse(json.loads(text), "here") == file
    assert select.dump(select.parse(json.loads(text), "here")) == text


def test_a_file_has_an_entry_a_line_in_one_order():
    entries = [entry(batch=b, num_heads=h, op=op) for op in ("prefill", "decode") for h in (128, 8) for b in (16, 4)]
    lines = select.dump(tuned_file(*entries)).splitlines()
    assert select.dump(tuned_file(*reversed(entries))).splitlines() == lines
    shapes = [json.loads(line.rstrip(","))["when"] for line in lines if line.startswith('{"when"')]
    assert [(s["op"], s["num_heads"], s["batch"]) for s in shapes] == sorted(
        (s["op"], s["num_heads"], s["batch"]) for s in shapes
    )
    faster = [dataclasses.replace(entries[3], us=39.0), *entries[:3], *entries[4:]]
    changed = select.dump(tuned_file(*faster)).splitlines()
    assert sum(a != b for a, b in zip(lines, changed, strict=True)) == 1


def test_times_are_kept_to_the_nanosecond():
    assert '"us": 40.123, ' in select.dump(tuned_file(entry(us=40.12345678)))


def with_entry(**change) -> dict:
    values = values_of(entry(batch=1), entry(batch=2))
    values["entries"][1] |= change
    return values


def with_when(**change) -> dict:
    return with_entry(when=dataclasses.asdict(when(batch=2)) | change)


def with_config(**change) -> dict:
    return with_entry(config=KernelConfig().to_dict() | change)


def without_entry_field(name: str) -> dict:
    values = with_entry()
    del values["entries"][1][name]
    return values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "expected a JSON object, got []"),
        ({}, "schema: expected 1, got None; `mla-cute tune` makes a file of this schema"),
        (values_of() | {"schema": 2}, "schema: expected 1, got 2; `mla-cute tune`"),
        (values_of() | {"schema": True}, "schema: expected 1, got True; `mla-cute tune`"),
        (values_of() | {"extra": 1}, "unknown fields ['extra']; known are ['schema', 'gpu', 'made_with', 'entries']"),
        (values_of() | {"gpu": None}, "gpu: expected an object, got None"),
        (values_of() | {"gpu": values_of()["gpu"] | {"uuid": 1}}, "gpu: unknown fields ['uuid']; known are ['name'"),
        (values_of() | {"gpu": {"name": "x"}}, "gpu: missing fields ['sm_count', 'clock_mhz', 'memory_gbps']"),
        (values_of() | {"gpu": values_of()["gpu"] | {"name": ""}}, "gpu.name: expected a text, got ''"),
        (values_of() | {"gpu": values_of()["gpu"] | {"sm_count": 1.5}}, "gpu.sm_count: expected an int >= 1, got 1.5"),
        (values_of() | {"made_with": {"date": "x"}}, "made_with: missing fields ['mla_cute', 'cutlass_dsl', 'driver']"),
        (
            values_of() | {"made_with": values_of()["made_with"] | {"date": 2026}},
            "made_with.date: expected a text, got 2026",
        ),
        (
            values_of() | {"made_with": values_of()["made_with"] | {"seed": "0"}},
            "made_with.seed: expected an int >= 0, got '0'",
        ),
        (
            values_of() | {"made_with": values_of()["made_with"] | {"command": ""}},
            "made_with.command: expected a text, got ''",
        ),
        (values_of() | {"made_with": values_of()["made_with"] | {"host": "x"}}, "made_with: unknown fields ['host']"),
        (with_entry(runner_up=[1]), "entry 1: runner_up: expected an object, got [1]"),
        (with_entry(runner_up={"stages": 3}), "entry 1: runner_up: unknown fields ['stages']; known are ["),
        (with_entry(runner_up={"min_blocks": "4"}), "entry 1: runner_up.min_blocks: expected int, got '4'"),
        (with_entry(runner_up={"min_blocks": 3}), "entry 1: runner_up: min_blocks: expected a positive multiple of"),
        (with_entry(runner_up={}, runner_up_us=None), "entry 1: runner_up: expected none without a runner_up_us"),
        (values_of() | {"entries": {}}, "entries: expected a list, got {}"),
        (values_of() | {"entries": [7]}, "entry 0: expected an object, got 7"),
        (without_entry_field("us"), "entry 1: missing fields ['us']"),
        (with_entry(speed=1), "entry 1: unknown fields ['speed']; known are ['when', 'config', 'us'"),
        (with_entry(us=math.nan), "entry 1: us: expected a finite number > 0, got nan"),
        (with_entry(us=True), "entry 1: us: expected a finite number > 0, got True"),
        (with_entry(default_us=0), "entry 1: default_us: expected a finite number > 0, got 0"),
        (with_entry(default_us=None), "entry 1: default_us: expected a finite number > 0, got None"),
        (with_entry(runner_up_us="12"), "entry 1: runner_up_us: expected a finite number > 0, got '12'"),
        (with_entry(when=[]), "entry 1: when: expected an object, got []"),
        (with_when(heads=16), "entry 1: when: unknown fields ['heads']; known are ['op', 'kv_format'"),
        (with_when(op="append"), "entry 1: when.op: expected one of ('decode', 'prefill', 'sparse'), got 'append'"),
        (with_when(op=["decode"]), "entry 1: when.op: expected one of ('decode', 'prefill', 'sparse'), got ['decode']"),
        (with_when(kv_format="fp4"), "entry 1: when.kv_format: expected one of ('', 'tensor', 'token', 'group'), got"),
        (with_when(q_fp8=1), "entry 1: when.q_fp8: expected true or false, got 1"),
        (with_when(q_fp8=True), "entry 1: when.q_fp8: expected false with a 16-bit cache (kv_format ''), got true"),
        (with_when(num_heads=129), "entry 1: when.num_heads: expected an int from 1 to 128, got 129"),
        (with_when(num_heads=True), "entry 1: when.num_heads: expected an int from 1 to 128, got True"),
        (with_when(page_size=0), "entry 1: when.page_size: expected an int >= 1, got 0"),
        (with_when(batch="2"), "entry 1: when.batch: expected an int >= 1, got '2'"),
        (with_when(q_len=4), "entry 1: when.q_len: expected 1 for decode, got 4"),
        (with_when(op="sparse", page_size=1, q_len=4), "entry 1: when.q_len: expected 1 for sparse, got 4"),
        (with_when(op="sparse"), "entry 1: when.page_size: expected 1 for sparse, got 64"),
        (with_when(kv_len=0), "entry 1: when.kv_len: expected an int >= 1, got 0"),
        (with_when(kv_len=None), "entry 1: when.kv_len: expected the length that was timed, got null"),
        (with_when(lengths="long"), "entry 1: when.lengths: expected one of ('uniform', 'ragged'), got 'long'"),
        (with_when(lengths="ragged", op="prefill"), "entry 1: when.lengths: expected 'uniform' but of decode with a"),
        (with_when(batch=1), "entry 1: when: expected a shape of its own, got that of entry 0"),
        (with_entry(config=None), "entry 1: config: expected an object, got None"),
        (with_config(stages=3), "entry 1: config: unknown fields ['stages']; known are ["),
        (with_config(min_blocks=True), "entry 1: config.min_blocks: expected int, got True"),
        (with_config(min_blocks=3), "entry 1: config: min_blocks: expected a positive multiple of cut_unit 2, got 3"),
        (with_config(min_blocks=0), "entry 1: config: min_blocks: expected a positive multiple of cut_unit 2, got 0"),
        (
            with_config(cut_unit=1, min_blocks=0),
            "entry 1: config: min_blocks: expected a positive multiple of cut_unit 1, got 0",
        ),
        (with_config(cut_unit=3, min_blocks=3), "entry 1: config: cut_unit: expected 1 or 2, got 3"),
        (with_config(cut_unit=0), "entry 1: config: cut_unit: expected 1 or 2, got 0"),
        (with_config(cut_unit=True), "entry 1: config.cut_unit: expected int, got True"),
        (
            with_config(kernel="none"),
            "entry 1: config: kernel: expected one of ('auto', 'tile64', 'tile16'), got 'none'",
        ),
        (
            with_config(fp8_kernel="few"),
            "entry 1: config: fp8_kernel: expected one of ('auto', 'tile64', 'tile16', 'convert'), got 'few'",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_name_and_entry(values, message):
    with pytest.raises(ValueError, match=r"^some\.json: " + re.escape(message)):
        select.parse(values, "some.json")


def test_a_file_says_how_to_make_it_again(tmp_path):
    """Files that were made before do not, and are read."""
    made = tuned_file(entry())
    later = {
        "torch": "2.13.0+cu130",
        "toolkit": "cu13",
        "command": "mla-cute tune --recipe small",
        "seed": 0,
        "commit": None,
    }
    newer = dataclasses.replace(made, made_with=made.made_with | later)
    for file in (made, newer):
        assert select.parse(json.loads(select.dump(file)), "here") == file
    path = write(tmp_path / FILE, entry(batch=1))
    assert select.merge(path, newer).made_with == newer.made_with


def test_only_ragged_entries_name_their_lengths():
    file = tuned_file(entry(), entry(OTHER, lengths="ragged"))
    values = json.loads(select.dump(file))
    assert [at["when"].get("lengths") for at in values["entries"]] == [None, "ragged"]
    assert select.parse(values, "here") == file
    assert str(file.entries[1].when).endswith("batch 8, ragged lengths up to 8192, 16-bit cache")


def test_a_call_takes_ragged_entries_as_others(folders):
    """It does not know its lengths; of two at one distance the uniform one."""
    write(
        folders.user, entry(OTHER, batch=32, lengths="ragged"), entry(batch=8, lengths="ragged"), entry(OTHER, batch=8)
    )
    found = select.select(when(batch=32), META)
    assert (found.config, found.entry.when.lengths, found.when.lengths) == (OTHER, "ragged", "uniform")
    assert select.select(when(batch=8), META).entry.when.lengths == "uniform"


def test_the_runner_up_is_kept_as_what_it_has_other_than_the_chosen_one(tmp_path):
    best = dataclasses.replace(OTHER, evict_first=True, split_penalty=0)
    file = tuned_file(dataclasses.replace(entry(OTHER), runner_up=best), entry(batch=9))
    values = json.loads(select.dump(file))
    assert values["entries"][0]["runner_up"] == {"evict_first": True, "split_penalty": 0}
    assert "runner_up" not in values["entries"][1]
    assert select.parse(values, "here") == file


def test_fields_of_a_config_that_a_file_does_not_name_have_their_default():
    for named in ({"min_blocks": 4}, {"cut_unit": 1}, {"cut_unit": 1, "min_blocks": 1}, {"kernel": "tile16"}):
        file = select.parse(with_entry(config=named), "some.json")
        assert file.entries[1].config == KernelConfig(**named)


def test_kernels_and_where_they_cut_come_back(tmp_path):
    configs = [
        KernelConfig(kernel=kernel, fp8_kernel=fp8_kernel, cut_unit=unit, min_blocks=blocks * unit)
        for kernel in KERNELS
        for fp8_kernel in KERNELS
        for unit in (1, 2)
        for blocks in (1, 3)
    ]
    entries = tuple(entry(config, batch=batch) for batch, config in enumerate(configs, start=1))
    path = write(tmp_path / FILE, *entries)
    assert select.load(path).entries == entries
    values = [at["config"] for at in values_of(*entries)["entries"]]
    assert [(at["kernel"], at["cut_unit"], at["min_blocks"]) for at in values] == [
        (config.kernel, config.cut_unit, config.min_blocks) for config in configs
    ]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"schema": 1, "gpu": NaN'])
def test_what_is_no_json_is_refused_with_the_name_of_the_file(tmp_path, content):
    path = tmp_path / FILE
    path.write_bytes(content)
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}: ")):
        select.load(path)
    with pytest.raises(ValueError, match="No such file"):
        select.load(tmp_path / "absent.json")


def test_shipped_files_are_valid_and_named_by_their_gpu():
    folder = pathlib.Path(mla_cute.__file__).parent / "tuned" / "data"
    assert select.directories()[-1] == ("shipped", folder)
    for path in folder.glob("*"):
        file = select.load(path)
        assert path.name == select.file_name(file.gpu["name"])
        assert file.entries
        assert path.read_text() == select.dump(file), "sorted and formatted as `merge` writes it"
        for at in file.entries:
            assert why_infeasible(at.config) is None
            assert at.config.accuracy == KernelConfig().accuracy, "tuning changes no results"


def test_the_wheel_holds_the_tuned_files():
    tomllib = pytest.importorskip("tomllib", reason="tomllib is Python's from 3.11 on")
    root = pathlib.Path(mla_cute.__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():
        pytest.skip("mla_cute is installed without its pyproject.toml")
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert "tuned/data/*.json" in project["tool"]["setuptools"]["package-data"]["mla_cute"]


# ---------------------------------------------------------------------------------------------------------------------
# merging


def test_merge_makes_the_file_replaces_and_keeps(tmp_path):
    path = tmp_path / "deep" / "folder" / FILE
    first = tuned_file(entry(batch=4), entry(batch=1))
    assert select.merge(path, first) == select.load(path)
    assert select.load(path).entries == (entry(batch=1), entry(batch=4))
    newer = tuned_file(entry(OTHER, us=30.0, batch=4), entry(batch=2))
    newer.made_with["date"] = "2027-01-01"
    merged = select.merge(path, newer)
    assert merged == select.load(path)
    assert merged.entries == (entry(batch=1), entry(batch=2), entry(OTHER, us=30.0, batch=4))
    assert merged.made_with["date"] == "2027-01-01"
    assert sorted(p.name for p in path.parent.iterdir() if p.suffix != ".lock") == [FILE], "nothing temporary is left"


@pytest.mark.parametrize(("gpu", "field"), [({"name": "Another"}, "name"), ({"sm_count": 114}, "sm_count")])
def test_merge_leaves_the_file_of_another_gpu_alone(tmp_path, gpu, field):
    path = write(tmp_path / FILE, entry(), **gpu)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: made on another GPU: expected gpu\.{field} "):
        select.merge(path, tuned_file(entry(batch=1)))
    assert path.read_bytes() == before


def test_merge_neither_replaces_nor_writes_what_is_broken(tmp_path):
    path = tmp_path / FILE
    path.write_text("{")
    with pytest.raises(ValueError, match="^" + re.escape(str(path))):
        select.merge(path, tuned_file(entry()))
    assert path.read_text() == "{"
    path.unlink()
    with pytest.raises(ValueError, match=r"^new entries for .*: entry 0: config: min_blocks"):
        select.merge(path, tuned_file(entry(KernelConfig(min_blocks=3))))
    assert not path.exists()


def _merge_many(path, writer):
    for number in range(20):
        select.merge(path, tuned_file(entry(batch=writer * 20 + number + 1)))


def test_writers_do_not_lose_each_others_entries(tmp_path):
    path = tmp_path / FILE
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_merge_many, args=(path, writer)) for writer in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(PROCESS_S)
    assert [process.exitcode for process in writers] == [0, 0, 0, 0]
    assert [at.when.batch for at in select.load(path).entries] == list(range(1, 81))


# ---------------------------------------------------------------------------------------------------------------------
# which file


def test_the_first_file_of_the_search_path_wins_as_a_whole(folders):
    write(folders.shipped, entry(OTHER), entry(OTHER, batch=32))
    selection = select.select(when(), META)
    assert (selection.source, selection.config) == (f"shipped {FILE} entry 0", OTHER)
    assert (selection.entry, selection.when) == (entry(OTHER), when())
    in_user = KernelConfig(min_blocks=4)
    write(folders.user, entry(in_user))
    assert select.select(when(), META) is selection, "what was selected stays"
    select.clear()
    assert select.select(when(), META).source == f"user {FILE} entry 0"
    assert select.select(when(batch=64), META).source == f"default: no entry of user {FILE} is near"
    folders.use_named()
    select.clear()
    assert select.select(when(), META).config == in_user, "a folder without the file is passed over"
    write(folders.named, entry(KernelConfig(min_blocks=6)))
    select.clear()
    assert select.select(when(), META).source == f"MLA_CUTE_TUNED_DIR {FILE} entry 0"
    assert [label for label, _ in select.search_path(NAME)] == ["MLA_CUTE_TUNED_DIR", "user", "shipped"]
    assert [path for _, path in select.search_path(NAME)] == [folders.named, folders.user, folders.shipped]


def test_the_search_path_does_without_a_home(folders, monkeypatch):
    def homeless():
        raise RuntimeError("no home")

    monkeypatch.setattr(jit, "cache_dir", homeless)
    assert [label for label, _ in select.search_path(NAME)] == ["shipped"]


def test_files_can_be_turned_off(folders, monkeypatch):
    write(folders.shipped, entry(OTHER))
    monkeypatch.setenv("MLA_CUTE_TUNED", "0")
    selection = select.select(when(), META)
    assert selection.source == "default: MLA_CUTE_TUNED=0"
    assert (selection.config, selection.entry) == (select.default_for(when(), SPEED), None)


@pytest.mark.parametrize(
    ("op", "num_heads", "split_penalty", "unit"),
    [
        ("decode", 16, 4, 1),
        ("decode", 17, 4, 2),
        ("decode", 128, 6, 2),
        ("prefill", 16, 4, 2),
        ("prefill", 128, 4, 2),
    ],
)
def test_the_default_is_that_of_the_rows_of_an_item(folders, op, num_heads, split_penalty, unit):
    selection = select.select(when(op=op, num_heads=num_heads, kv_len=65536), META)
    keeps = {"evict_first": False} if (op, num_heads) == ("prefill", 128) else {}  # two row tiles of a token
    assert selection.config == KernelConfig(split_penalty=split_penalty, cut_unit=unit, min_blocks=unit, **keeps)
    assert selection.source == f"default: no tuned file {FILE}"


def test_a_device_that_is_no_gpu_takes_the_default(folders):
    write(folders.shipped, entry(OTHER))
    selection = select.select(when(), torch.device("cpu"))
    assert (selection.source, selection.entry) == ("default: cpu is no GPU", None)


def test_batch_invariant_plans_take_the_default(folders):
    write(folders.shipped, entry(OTHER))
    selection = select.select(when(), META, batch_invariant=True)
    assert (selection.config, selection.entry) == (select.default_for(when(), SPEED), None)
    assert select.select(when(), META).config == OTHER


def test_the_file_of_another_gpu_is_an_error(folders):
    write(folders.user, entry(), name="NVIDIA H200")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"made on another GPU: expected gpu\.name 'NVIDIA Test/1 X', got 'NVIDIA H200'"
        ):
            select.select(when(), META)


def test_a_file_made_with_other_sms_is_not_used_and_that_is_said(folders, caplog):
    write(folders.user, entry(OTHER), sm_count=114)
    with caplog.at_level(logging.INFO, "mla_cute"):
        selection = select.select(when(), META)
        select.select(when(batch=1), META)
    assert selection.source == f"default: user {FILE} was made with 114 SMs, this GPU has 132"
    assert selection.config == select.default_for(when(), SPEED)
    assert caplog.messages == [f"{folders.user} is not used: made with 114 SMs, this {NAME} has 132"]


def test_a_broken_file_is_never_passed_over(folders):
    write(folders.shipped, entry())
    write(folders.user, entry())
    folders.user.write_text(json.dumps(with_config(min_blocks=3)))
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{re.escape(str(folders.user))}: entry 1: config: min_blocks"):
            select.select(when(), META)


# ---------------------------------------------------------------------------------------------------------------------
# what is said


def test_that_there_is_no_file_is_said_once(folders, caplog):
    with caplog.at_level(logging.INFO, "mla_cute"):
        for batch in (1, 2, 3):
            select.select(when(batch=batch), META)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("mla_cute", logging.INFO)
    for text in (NAME, str(folders.user), str(folders.shipped), "`mla-cute tune`", "default"):
        assert text in record.message


def test_selections_are_said_where_asked_each_once(folders, caplog, monkeypatch):
    write(folders.user, entry(OTHER))
    with caplog.at_level(logging.INFO, "mla_cute"):
        select.select(when(batch=4), META)
        assert caplog.records == []
        monkeypatch.setenv("MLA_CUTE_LOG", "1")
        for _ in range(3):
            select.select(when(batch=2), META)
            select.select(when(batch=500), META)
    first, second = caplog.messages
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    for text in (
        "decode, 16 heads",
        "batch 2",
        f"user {FILE} entry 0",
        "distance 2.00",
        "40 us",
        "44 us",
        "min_blocks=8",
    ):
        assert text in first
    assert first.endswith("kernel decode_tile16")
    assert f"batch 500, length 8192, 16-bit cache: default: no entry of user {FILE} is near" in second
    assert not any("\n" in message for message in caplog.messages)
