"""Records out of files: what a run writes is read, and what is damaged is refused in one line that says where."""

import json
import math
import pathlib

import pytest
from bench_case import FP8_CASES, H200, SMALL, FakeLibrary, bench, wrong_page

import mla_cute
from mla_cute.bench import command, outputs, report, runner

RECORDS = pathlib.Path(mla_cute.__file__).resolve().parents[1] / "tune" / "measurements"
[WITH_PEERS] = (RECORDS / "NVIDIA_H200").glob("table_????-??-??.json")
BENCH_RECORDS = [path for path in RECORDS.glob("*/*.json") if b'"kind": "mla_cute.bench' in path.read_bytes()]


@pytest.fixture
def record():
    return json.loads(WITH_PEERS.read_bytes())


def written(folder, record):
    """With what `runner.write_json` refuses: NaN."""
    path = folder / "bad.json"
    path.write_text(json.dumps(record))
    return path


@pytest.mark.parametrize("path", BENCH_RECORDS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_records_are_read_as_they_are(path):
    assert report.load(path) == json.loads(path.read_bytes())


@pytest.mark.parametrize("gpu", [None, H200])
def test_what_a_run_writes_is_read(gpu, small_rotation, monkeypatch, tmp_path):
    monkeypatch.setattr(runner.gpu_facts, "clocks", lambda gpu: {"sm_mhz": 1755, "power_w": None})
    monkeypatch.setattr(runner, "occupy", lambda device: None)

    def broken(*args, **options):
        raise RuntimeError("out of luck")

    for library in (FakeLibrary.make(), FakeLibrary.make(wrong_page)):
        made = bench([*SMALL, FP8_CASES[0]], library, gpu=gpu)
        runner.write_json(tmp_path / "a.json", made)
        assert report.load(tmp_path / "a.json") == json.loads(json.dumps(made))
    made = bench(SMALL[:2], FakeLibrary.make(broken), gpu=gpu)
    assert all("error" in row for row in made["rows"])
    assert "error" in made["host"]
    runner.write_json(tmp_path / "b.json", made)
    assert report.load(tmp_path / "b.json")["failed"] == 3
    nan = bench(SMALL[:1], FakeLibrary.make(lambda *args, **options: None), gpu=gpu)
    assert nan["rows"][0]["check"]["rel_err"] is None
    runner.write_json(tmp_path / "c.json", nan)
    assert report.load(tmp_path / "c.json")["failed"] == 1


def test_an_interrupted_run_is_read(small_rotation, tmp_path):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    made = bench(SMALL[:1], FakeLibrary.make(interrupted))
    assert made["complete"] is False
    runner.write_json(tmp_path / "a.json", made)
    assert report.load(tmp_path / "a.json")["rows"] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a record of mla_cute.bench, got an empty file"),
        (b" \n", "expected a record of mla_cute.bench, got an empty file"),
        (b"\x89PNG\r\n\x1a\n\xff", "not JSON: 'utf-8' codec can't decode byte 0x89"),
        (b"\x00\x01\x02", "not JSON: "),
        (b"{", "not JSON: Expecting property name"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a record of mla_cute.bench"),
        (b"null", "not a record of mla_cute.bench"),
        (b'{"kind": "mla_cute.tuning"}', "not a record of mla_cute.bench"),
        (b'{"kind": "mla_cute.bench.decode", "schema": [2]}', "schema a list, this version reads 1"),
        (b'{"kind": "mla_cute.bench.decode", "schema": 1}', "date: missing"),
    ],
)
def test_a_file_that_is_no_record_is_named_in_one_line(content, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bad") as caught:
        report.load(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def row(**values):
    return lambda record: record["rows"][3].update(values)


def case(**values):
    return lambda record: record["rows"][3]["case"].update(values)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (row(us=None), "row 3: us: expected a number, got null"),
        (row(us="12"), 'row 3: us: expected a number, got "12"'),
        (row(us_amortised=math.nan), "row 3: us_amortised: expected a finite number, got NaN"),
        (row(us_amortised=0), "row 3: us_amortised: expected a number > 0, got 0"),
        (row(us_chained=-math.inf), "row 3: us_chained: expected a finite number, got -Infinity"),
        (row(gbps=10**400), "row 3: gbps: expected a finite number, got 1000"),
        (row(plan_us=True), "row 3: plan_us: expected a number, got true"),
        (row(public_best_us=None), "row 3: public_best_us: expected a number, got null"),
        (lambda r: r["rows"][3].pop("public_best_us"), "row 3: public_best_us: missing"),
        (lambda r: r["rows"][3].pop("us_min"), "row 3: us_min: missing"),
        (lambda r: r["rows"][3].pop("case"), "row 3: case: missing"),
        (lambda r: r["rows"].insert(3, None), "row 3: expected an object, got null"),
        (lambda r: r["rows"].insert(3, []), "row 3: expected an object, got a list"),
        (row(error=None), "row 3: error: expected a text, got null"),
        (row(check=None), "row 3: check: expected an object, got null"),
        (row(check={"ok": 1, "rel_err": 0.1}), "row 3: check.ok: expected true or false, got 1"),
        (row(check={"ok": True}), "row 3: check.rel_err: missing"),
        (row(check={"ok": True, "rel_err": "x"}), 'row 3: check.rel_err: expected a number, got "x"'),
        (row(peers=[]), "row 3: peers: expected an object, got a list"),
        (row(peers={"x": {"us": 0}}), "row 3: peers.x.check: missing"),
        (row(peers={"x": {"unsupported": None}}), "row 3: peers.x.unsupported: expected a text, got null"),
        (case(num_heads=129), "row 3: case.num_heads: expected 1..128, got 129"),
        (case(batch=1.5), "row 3: case.batch: expected an integer, got 1.5"),
        (case(dtype=[]), "row 3: case.dtype: expected a text, got a list"),
        (case(speed=1), "row 3: case.speed: unknown; known are num_heads, batch"),
        (lambda r: r["rows"][3]["case"].pop("kv_len"), "row 3: case.kv_len: missing"),
        (
            lambda r: r["rows"][3].update(case={"num_heads": 1, "groups": [[1, 2]]}),
            "row 3: case.groups: expected (count, q_len, kv_len) of at least 1",
        ),
        (
            lambda r: r["rows"][3].update(case={"num_heads": 1, "groups": [1]}),
            "row 3: case.groups[0]: expected a list, got 1",
        ),
        (lambda r: r.update(rows={}), "rows: expected a list, got an object"),
        (lambda r: r.pop("rows"), "rows: missing"),
        (lambda r: r.update(gpu=[]), "gpu: expected an object, got a list"),
        (lambda r: r["gpu"].pop("name"), "gpu.name: missing"),
        (lambda r: r["gpu"].update(memory_bytes="141 GB"), 'gpu.memory_bytes: expected an integer, got "141 GB"'),
        (lambda r: r.update(git={"commit": None}), "git.dirty: missing"),
        (lambda r: r.update(source_sha256=None), "source_sha256: expected a text, got null"),
        (lambda r: r.update(method=None), "method: expected an object, got null"),
        (lambda r: r["ceilings"]["used"].update(read_gbps=0), "ceilings.used.read_gbps: expected a number > 0, got 0"),
        (lambda r: r["ceilings"].update(start=None), "ceilings.start: expected an object, got null"),
        (lambda r: r["host"].update(call_us=None), "host.call_us: expected a number, got null"),
        (lambda r: r["host"].pop("call_without_plan_us"), "host.call_without_plan_us: missing"),
        (lambda r: r["peers"].update(x=None), "peers.x: expected an object, got null"),
        (lambda r: r["peers"].update(x={"present": False}), "peers.x.why: missing"),
    ],
)
def test_a_damaged_record_is_refused_with_the_place(record, spoil, message, tmp_path):
    spoil(record)
    path = written(tmp_path, record)
    with pytest.raises(ValueError, match="bad") as caught:
        report.load(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spoil", [row(us_amortised=None), lambda r: r["rows"].insert(3, None)])
def test_the_commands_refuse_a_damaged_record_with_status_2(record, spoil, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason='pictures need matplotlib, pip install ".[bench]"')
    cli = pytest.importorskip("mla_cute.cli.app", reason="needs the extra cli")
    from typer.testing import CliRunner

    spoil(record)
    bad, good, folder = str(written(tmp_path, record)), str(WITH_PEERS), str(tmp_path / "report")
    for arguments in (
        ["--compare", bad, good],
        ["--compare", good, bad],
        ["--report", folder, "--record", bad],
        ["--report", folder, "--record", good, "--baseline", bad],
        ["--report", folder, "--baseline", bad],
    ):
        with pytest.raises(SystemExit) as stopped:
            command.main(arguments)
        assert stopped.value.code == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert f"error: {bad}: row 3: " in message
        done = CliRunner().invoke(cli.app, ["bench", *arguments])
        assert done.exit_code == 2
        assert done.output.startswith(f"mla-cute: {bad}: row 3: ")
        assert done.output.count("\n") == 1
    assert not (tmp_path / "report").exists()


@pytest.mark.slow
def test_a_report_that_cannot_be_written_is_a_usage_error(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason='pictures need matplotlib, pip install ".[bench]"')
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "report.html").mkdir(parents=True)
    for name, message in (("file", "expected a folder, got a file"), ("folder", "Is a directory")):
        with pytest.raises(SystemExit) as stopped:
            command.main(["--report", str(tmp_path / name), "--record", str(WITH_PEERS)])
        assert stopped.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "error: --report: " in error
        assert message in error
        assert str(tmp_path / name) in error
    assert (tmp_path / "file").read_text() == "mine"


def test_outputs_are_tried_before_a_run(tmp_path, monkeypatch):
    outputs.check_file(tmp_path / "a" / "b.json")
    outputs.check_folder(tmp_path / "c" / "d")
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["a", "c", "d"]

    def read_only(dir):
        raise OSError(30, "Read-only file system", str(dir))

    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", read_only)
    with pytest.raises(OSError, match=r"b\.json: cannot be written: Read-only file system$"):
        outputs.check_file(tmp_path / "b.json")
    with pytest.raises(OSError, match=r"c: cannot be written: Read-only file system$"):
        outputs.check_folder(tmp_path / "c")
