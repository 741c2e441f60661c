"""Tables of the command line in terminals of several widths: what names a row and its result is never left out."""

import contextlib
import fcntl
import io
import json
import os
import pathlib
import pty
import re
import struct
import subprocess
import sys
import termios
import types

import pytest
import torch
import typer.rich_utils  # noqa: F401, it reads FORCE_COLOR when it is imported, and keeps it for other tests
from bench_case import H200
from rich.progress import TextColumn
from typer.testing import CliRunner

import mla_cute
from mla_cute import gpu as gpu_facts
from mla_cute.bench import command, report
from mla_cute.bench.cases import PrefillCase
from mla_cute.cli import app as app_module
from mla_cute.cli import bench as bench_module
from mla_cute.cli import check as checking
from mla_cute.cli import check_fp8 as checking_fp8
from mla_cute.cli import demo as showing
from mla_cute.cli import sanitize as sanitizing
from mla_cute.cli import screen
from mla_cute.testing.cases import CaseSpec
from mla_cute.tuning import recipes
from mla_cute.tuning import report as tune_report

ROOT = pathlib.Path(mla_cute.__file__).resolve().parents[1]
RECORDS = ROOT / "tune" / "measurements" / "NVIDIA_H200"
# One record of each name, whatever its date.
[TABLE], [PREFILL], [TUNED] = (
    RECORDS.glob(f"{name}_????-??-??.json") for name in ("table", "prefill_bf16", "tune_deepseek-v3-formats")
)
WIDTHS = (60, 80, 100, 120)
INFO = {
    "registers": 168, "spill_bytes": 0, "smem_bytes": 231_424, "threads": 384, "compile_seconds": 11.4, "cached": False,
    "kernels": [{"name": "RowsSm90_object_at"}, {"name": "Merge_object_at"}],
    "instructions": {"HGMMA": 88, "HMMA": 136, "UTMALDG": 9, "LDGSTS": 36},
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(gpu_facts, "why_not_hopper", lambda: "there is no GPU in this test")


def run(width, *arguments):
    """In a terminal of so many columns, or into a pipe for None."""
    # FORCE_COLOR is what makes rich take the runner's buffer for a terminal.
    terminal = {"FORCE_COLOR": "1", "COLUMNS": str(width)} if width else {"FORCE_COLOR": None, "COLUMNS": None}
    done = CliRunner().invoke(app_module.app, [str(x) for x in arguments], env={"NO_COLOR": "1", **terminal})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return types.SimpleNamespace(status=done.exit_code, text=re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.output))


def tables(text):
    """Of each table its rows as dicts by column; cells and headers on several lines are joined by spaces."""
    found, lines, header = [], [], []
    for line in text.splitlines():
        if line.startswith("┏"):
            lines, header = [], []
        elif line.startswith("┃"):
            header.append([cell.strip() for cell in line.strip("┃").split("┃")])
        elif line.startswith("┡"):
            names = [" ".join(filter(None, parts)) for parts in zip(*header, strict=True)]
        elif line.startswith("│"):
            lines.append([cell.strip() for cell in line.strip("│").split("│")])
        elif line.startswith("└"):
            found.append((names, lines))
    return found


def assert_fits(text, width):
    assert "…" not in text
    for line in text.splitlines():
        if line[:1] in "┏┃┡│└":
            assert len(line) <= width, line


def columns_left_out(text):
    return [
        name
        for line in re.findall(r"^left out in \d+ columns: (.*); a wider terminal", text, re.M)
        for name in line.split(", ")
    ]


def check_table(text, width, wanted, everything, rows=None):
    """`wanted` columns are there, and of the others those that the line under the table does not name."""
    assert_fits(text, width)
    names, lines = next(found for found in tables(text) if set(wanted) <= set(found[0]))
    missing = [name for name in everything if name not in names]
    assert [name for name in columns_left_out(text) if name in missing] == sorted(
        dict.fromkeys(missing), key=columns_left_out(text).index
    )
    assert set(names) | set(missing) == set(everything)
    for row in rows or ():
        shown = {name: cell for name, cell in zip(everything, row, strict=True) if name in wanted}
        assert any(all(line[names.index(name)] == cell for name, cell in shown.items()) for line in lines), shown
    return names, lines


# ---------------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def recorded(monkeypatch):
    """A Hopper GPU whose bench answers with the record given."""

    def answer(record):
        monkeypatch.setattr(gpu_facts, "why_not_hopper", lambda: None)
        monkeypatch.setattr(gpu_facts, "facts", lambda: H200)
        names = [name for name, peer in record["peers"].items() if peer["present"]]
        found = [types.SimpleNamespace(name=name) for name in names]
        monkeypatch.setattr(command, "find_peers", lambda wanted: (found, {}))
        monkeypatch.setattr(command.Library, "installed", classmethod(lambda cls, *options: None))
        monkeypatch.setattr(command, "time_cases", lambda *args, **shown: record)
        return names

    return answer


@pytest.mark.parametrize("width", WIDTHS)
def test_bench(width, recorded):
    record = report.load(TABLE)
    record["rows"][1] = {"case": record["rows"][1]["case"], "error": "RuntimeError: out of luck"}
    record["rows"][2]["check"]["ok"] = False
    peers = recorded(record)
    assert peers == ["flashinfer", "flash_mla", "sgl_flash_mla", "flash_attn_3"]
    done = run(width, "bench", "table")
    everything = (*bench_module.COLUMNS, *peers)
    rows = [bench_module.cells(row, bench_module.COLUMNS, peers) for row in record["rows"]]
    wanted = ("H", "B", "L", "page", "dtype", "us", "rel err")
    names, lines = check_table(done.text, width, wanted, everything, rows)
    assert len(lines) == len(rows)
    assert lines[1][names.index("us")] == "error"
    assert lines[2][names.index("rel err")].endswith(" WRONG")
    assert columns_left_out(done.text)[:2] == (["chained", "plan"] if width < 120 else columns_left_out(done.text)[:2])
    assert "a pipe or the record (--out FILE) has them" in done.text


@pytest.mark.parametrize("width", WIDTHS)
def test_bench_of_long_shapes(width, recorded):
    """Prefill steps of two groups over FP8 caches have the longest cells."""
    record = report.load(TABLE)
    step = PrefillCase(
        128, ((64, 1, 8192), (1, 2048, 8192)), dtype="float16", layout="fused", kv_format="tensor", q_fp8=True
    )
    record["rows"] = [record["rows"][0] | {"case": vars(step)}]
    recorded(record)
    text = run(width, "bench", "prefill").text
    assert_fits(text, width)
    names, lines = tables(text)[0]
    assert names[:6] == ["H", "B", "L", "page", "dtype", "us"]
    joined = ["".join(cells) for cells in zip(*lines, strict=True)]
    assert joined[:5] == ["128", "64+1", "1/8192+2048/8192", "64", "tensor/e4m3/fp16/fused"]


@pytest.mark.parametrize("width", WIDTHS)
def test_compare(width, tmp_path):
    other = json.loads(TABLE.read_bytes())
    (tmp_path / "b.json").write_text(json.dumps(other))
    text = run(width, "bench", "--compare", TABLE, tmp_path / "b.json").text
    rows, _ = report.compare(other, other)
    wanted = ("H", "B", "L", "page", "dtype", "a us", "b us", "a / b")
    _, lines = check_table(text, width, wanted, report.COMPARE_COLUMNS, rows)
    assert len(lines) == len(rows) == 30


@pytest.mark.parametrize("width", WIDTHS)
def test_demo_on_a_gpu(width, recorded):
    record = report.load(TABLE)
    record["rows"] = [row for row in record["rows"] if row["case"]["num_heads"] in showing.DEPLOYMENTS]
    failed = record["rows"][0]
    record["rows"][0] = {"case": failed["case"], "error": "RuntimeError: out of luck"}
    recorded(record)
    text = run(width, "demo").text
    columns = ("", *showing.GPU_COLUMNS)
    rows = [
        ("TP8" if row["case"]["num_heads"] == 16 else "DP", *bench_module.cells(row, columns[1:], []))
        for row in record["rows"]
    ]
    assert rows[0][5] == "error"
    check_table(text, width, ("", "H", "B", "L", "page", "us+plan/61", "rel err"), columns, rows)


@pytest.mark.parametrize("width", WIDTHS)
def test_demo_on_the_cpu(width, monkeypatch):
    specs = (CaseSpec(16, 64, torch.bfloat16, (0, 1, 63, 64, 65, 100)), CaseSpec(4, 1, torch.float16, (1, 70)))
    monkeypatch.setattr(showing, "CPU_SPECS", specs)
    monkeypatch.setattr(showing.jit, "compile_info", lambda *_: INFO)
    done = run(width, "demo")
    assert done.status == 0
    cpu = ("H", "page", "dtype", "tokens per request", "rel err", "result")
    _, lines = check_table(done.text, width, cpu, showing.CPU_COLUMNS)
    assert [(line[0], line[3], line[-1]) for line in lines] == [
        ("16", "0, 1, 63, 64, 65, 100", "ok"),
        ("4", "1, 70", "ok"),
    ]
    names, lines = check_table(done.text, width, ("kernel", "registers", "spill bytes"), showing.KERNEL_COLUMNS)
    labels = [showing.label(variant) for variant in showing.showcase_variants()]
    assert "".join("".join(line[0] for line in lines).split()) == "".join("".join(labels).split())
    assert [line[names.index("registers")] for line in lines].count("168") == len(labels)


def test_demo_says_under_the_table_what_is_wrong(monkeypatch):
    monkeypatch.setattr(showing, "CPU_SPECS", (CaseSpec(4, 1, torch.float16, (1, 70)),))
    real = checking.run_spec

    def wrong(spec, device):
        for what, verdict in real(spec, device):
            yield what, type(verdict)(**{**vars(verdict), "failures": ("output: expected [x] and found y " * 3,)})

    monkeypatch.setattr(checking, "run_spec", wrong)
    done = run(60, "demo", "--kernels", "0")
    assert done.status == 1
    _, [line] = check_table(done.text, 60, ("H", "page", "result"), showing.CPU_COLUMNS)
    assert line[-1] == "FAILED"
    assert re.search(r"^FAILED h4-page1.*: output: expected \[x\] and found y ", done.text, re.M)


def test_wide_has_all_columns_of_the_record(recorded):
    record = report.load(TABLE)
    peers = recorded(record)
    text = run(60, "bench", "table", "--wide").text
    (names, lines), *_ = tables(text)
    assert names == [*report.COLUMNS, *peers]
    assert lines == [list(report.cells(row, peers)) for row in record["rows"]]
    assert not columns_left_out(text)


@pytest.mark.parametrize(
    ("arguments", "columns"),
    [
        (("bench", "--compare", TABLE, TABLE), report.COMPARE_COLUMNS),
        (("demo", "--kernels", "1"), showing.CPU_COLUMNS),
        (("demo", "--kernels", "1"), showing.KERNEL_COLUMNS),
        (("check", "--quick"), checking.COLUMNS),
        (("tune", "report", TUNED), tune_report.GROUP_COLUMNS),
    ],
)
def test_wide_has_all_columns(arguments, columns, monkeypatch):
    small = CaseSpec(4, 1, torch.float16, (1, 70))
    monkeypatch.setattr(showing, "CPU_SPECS", (small,))
    monkeypatch.setattr(showing.jit, "compile_info", lambda *_: INFO)
    monkeypatch.setattr(checking, "specs", lambda quick, seed, on_gpu: [small])
    narrow, wide = run(40, *arguments).text, run(40, *arguments, "--wide").text
    assert re.search(r"; a wider terminal, --wide( or a pipe|, a pipe or .*) has them", narrow)
    assert "left out" not in wide
    assert list(columns) not in [names for names, _ in tables(narrow)]
    assert list(columns) in [names for names, _ in tables(wide)]


@pytest.mark.parametrize("width", WIDTHS)
def test_check(width, monkeypatch):
    specs = [CaseSpec(4, page, dtype, (3, 70)) for page in (1, 64) for dtype in (torch.bfloat16, torch.float16)]
    monkeypatch.setattr(checking, "specs", lambda quick, seed, on_gpu: specs)
    text = run(width, "check", "--quick").text
    names, lines = check_table(text, width, ("page size", "dtype", "worst rel err", "result"), checking.COLUMNS)
    assert [(line[0], line[1], line[names.index("result")]) for line in lines] == [
        (page, dtype, "ok") for page in ("1", "64") for dtype in ("bf16", "fp16")
    ]


@pytest.mark.parametrize("width", WIDTHS)
def test_check_fp8(width, monkeypatch):
    chosen = [spec for spec in checking_fp8.specs() if spec.num_heads == 16 and spec.data == "6 channels x 50"][:2]
    monkeypatch.setattr(checking_fp8, "specs", lambda: chosen)
    monkeypatch.setattr(checking_fp8, "CPU_LENGTHS", (64, 1))
    done = run(width, "check", "--fp8")
    wanted = ("data", "format", "q", "H", "accuracy", "result")
    names, lines = check_table(done.text, width, wanted, checking_fp8.COLUMNS)
    assert lines[0][:5] == ["6 channels x 50", "tensor", "bf16", "16", "high"]
    assert lines[0][-1] == "ok"
    assert "kernel: rel err" in names or width == 60
    assert "the record (--json FILE) has them" in done.text or not columns_left_out(done.text)


@pytest.mark.parametrize("width", WIDTHS)
def test_sanitize(width, monkeypatch):
    found = [(name, "decode_tile64", "ok") for name in list(sanitizing.cases())[:30]]
    found[1] = (*found[1][:2], "3 errors of memcheck: Invalid __global__ read of size 16 bytes [0x7f] at /usr/[/x]")
    monkeypatch.setattr(gpu_facts, "why_not_hopper", lambda: None)
    monkeypatch.setattr(sanitizing, "run", lambda tool, say: (found, 1))
    done = run(width, "check", "--sanitize")
    assert done.status == 1
    names, lines = check_table(done.text, width, ("case", "result"), sanitizing.COLUMNS)
    results = [line[names.index("result")] for line in lines]
    assert results.count("ok") == 29
    assert "".join("".join(results).replace("ok", "").split()) == "".join(found[1][2].replace("ok", "").split())


@pytest.mark.parametrize("width", WIDTHS)
def test_info(width, monkeypatch, tmp_path):
    long = tmp_path / ("a" * 100) / "[bold]b"
    monkeypatch.setenv("MLA_CUTE_CACHE_DIR", str(long))
    monkeypatch.setenv("CUDA_HOME", "/tmp/[/x]")
    text = run(width, "info").text
    assert_fits(text, width)
    (_, facts), (names, variables) = tables(text)
    assert names == ["variable", "value"]
    for lines in (facts, variables):
        assert str(long) in "".join("".join(line[1] for line in lines).split())
    assert ["CUDA_HOME", "/tmp/[/x]"] in variables
    assert mla_cute.__version__ in [line[1] for line in facts]


def test_a_pipe_gets_everything_however_wide_it_is(monkeypatch, tmp_path):
    long = str(tmp_path / ("a" * 200) / ("b" * 100))
    monkeypatch.setenv("MLA_CUTE_CACHE_DIR", long)
    assert run(None, "info").text.count(f" {long} ") == 2
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("COLUMNS", raising=False)
    assert CliRunner().invoke(app_module.app, ["info"]).output.count(long) == 2


@pytest.mark.parametrize("width", WIDTHS)
def test_tune(width, monkeypatch):
    text = run(width, "tune", "--recipe", "small", "--dry-run").text
    columns = ("op, cache", "shapes", "candidates", "most of a shape")
    _, lines = check_table(text, width, ("op, cache", "candidates"), columns)
    assert sum(int(line[1]) for line in lines) == len(recipes.load("small"))
    text = run(width, "tune", "report", TUNED).text
    columns = ("op, cache", "shapes", "not the default", "geometric mean", "least", "most", "failed")
    _, lines = check_table(text, width, ("op, cache", "geometric mean", "least", "failed"), columns)
    assert "prefill, tensor FP8, q 16 bit" in [line[0] for line in lines]


@pytest.mark.parametrize("width", [40, 60, 200])
def test_a_long_label_leaves_the_bar_its_numbers(width):
    bar = screen.progress_bar(TextColumn("{task.fields[left]}", markup=False))
    bar.add_task("h16-page64-bf16-" + "b" * 100, total=7200, completed=1234, left="12 min left")
    console = screen.Console(width=width, file=io.StringIO())
    console.print(bar.get_renderable())
    [line] = console.file.getvalue().splitlines()
    assert len(line) <= width
    assert re.search(r" 1234/7200 \S+ 12 min left h", line)
    assert "…" in line or width == 200


@pytest.mark.slow
def test_lines_of_tune_stand_above_the_bar():
    """In a terminal of their own: what another console prints begins on the line of the bar."""
    command = [sys.executable, "-m", "mla_cute", "tune", "report", str(TUNED)]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    env |= {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        data = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(ours, 1 << 16):
                data += part
        os.close(ours)
    assert process.returncode == 0
    before = data.decode().partition("tuned against default")[0]
    assert "0:00" not in re.split(r"\x1b\[2K", before)[-1]


# -------------------------------------------------------------------------------------------------------- show_table


def shown(capsys, width, *args, **options):
    screen.show_table(*args, on=screen.Console(width=width, force_terminal=True, no_color=True), **options)
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


def test_columns_go_in_the_order_given_and_no_further_than_needed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1")  # what makes the console's width count
    columns, row = ("name", "one", "two", "three"), ("x" * 10, "1" * 10, "2" * 10, "3" * 10)
    for width, left_out in ((53, []), (45, []), (44, ["two"]), (34, ["two"]), (33, ["two", "one"])):
        text = shown(capsys, width, "t", columns, [row], drop=("two", "none", "one"))
        assert [name for name in columns_left_out(text) if name != "none"] == left_out, width
        assert tables(text)[0][1] == [[cell for name, cell in zip(columns, row, strict=True) if name not in left_out]]


def test_what_fits_nowhere_is_printed_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1")
    text = shown(capsys, 20, "t", ("name", "us"), [("x" * 60, "12.5")])
    assert tables(text)[0] == (["name", "us"], [["x" * 60, "12.5"]])


def test_titles_and_cells_are_text_and_no_markup(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1")
    text = shown(capsys, 80, "of [/b]", ("[i]n", "us"), [("[red]x[/]", "[/]")])
    assert "of [/b]" in text
    assert tables(text)[0] == (["[i]n", "us"], [["[red]x[/]", "[/]"]])


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "--seed", 10**20), "--seed: expected at most 1099511627776 either way, got 100000000000000000000"),
        (("check", "--soak-seed", 10**20), "--soak-seed: expected at most 1099511627776 either way, got 1000000"),
        (("check", "--timeout", "nan"), "--timeout: expected seconds, more than 0 and at most 1e+09, got nan"),
        (("check", "--timeout", "-1"), "--timeout: expected seconds, more than 0 and at most 1e+09, got -1"),
        (("check", "--timeout", "inf"), "--timeout: expected seconds, more than 0 and at most 1e+09, got inf"),
        (("check", "--sanitize", "--tool", "foo"), "--tool: expected one of memcheck, synccheck, racecheck, got 'foo'"),
        (("check", "--fp8", "--json", "{folder}"), "--json: {folder}: expected a file, got a folder"),
        (("check", "--fp8", "--json", "{file}/a.json"), "--json: {file}/a.json: cannot be written: "),
        (("tune", "report", TUNED, "--out", "{file}"), "{file}: expected a folder, got a file"),
        (("tune", "report", "{file}"), "{file}: not JSON: "),
        (("export-solution", "--out", "{file}"), "[Errno 20] Not a directory: '{file}/"),
        (("export-solution", "--out", "{folder}", "nope"), "definition: expected one of mla_paged_decode_h16"),
        (("bench", "--compare", "{file}", "{file}"), "{file}: not JSON: "),
    ],
)
def test_usage_errors_are_one_line_in_a_narrow_terminal_too(arguments, message, tmp_path):
    folder, file = tmp_path / ("long" * 20), tmp_path / "file"
    folder.mkdir()
    file.write_text("mine")
    names = {"folder": folder, "file": file}
    done = run(60, *(str(x).format(**names) for x in arguments))
    assert done.status == 2
    assert done.text.startswith(f"mla-cute: {message.format(**names)}")
    assert done.text.count("\n") == 1
    assert file.read_text() == "mine"
    assert list(folder.iterdir()) == []


def test_bench_is_not_run_where_its_record_cannot_be_written(recorded, tmp_path, monkeypatch):
    recorded(report.load(TABLE))
    monkeypatch.setattr(command, "time_cases", lambda *args, **shown: pytest.fail("it ran"))
    done = run(60, "bench", "--out", tmp_path)
    assert (done.status, done.text) == (2, f"mla-cute: --out: {tmp_path}: expected a file, got a folder\n")


def test_info_of_a_cache_that_is_a_file_or_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("MLA_CUTE_CACHE_DIR", str(tmp_path / "file"))
    done = run(None, "info")
    assert done.status == 0
    assert f"CANNOT BE WRITTEN: {tmp_path / 'file'} is not a directory. New kernels are not kept." in done.text

    def refused(self, *args):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setenv("MLA_CUTE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(pathlib.Path, "iterdir", refused)
    monkeypatch.setattr(pathlib.Path, "glob", refused)
    monkeypatch.setattr(pathlib.Path, "exists", refused)
    done = run(None, "info")
    assert done.status == 0
    assert "CANNOT BE WRITTEN: Permission denied. New kernels are not kept." in done.text


def test_options_of_bench_are_the_same_on_both_command_lines():
    actions = command.parser()._actions
    text = run(200, "bench", "--help").text
    assert all(flag in text for action in actions for flag in action.option_strings)
    dests = {action.dest for action in actions} - {"help"}
    assert bench_module.bench.__annotations__.keys() == dests | {"wide"}  # argparse's tables have all columns anyway


@pytest.mark.parametrize("width", [60, 80, 200])
def test_help_of_bench_shows_that_compare_takes_two_records(width):
    text = run(width, "bench", "--help").text
    assert re.search(r"--compare +A B ", text)
    assert "--batch-invariant " in text
