"""The report of a bench record: its figures as data, the pictures, the page, the options of the commands."""

import base64
import copy
import html.parser
import pathlib
import re
import sys

import pytest
from bench_case import CEILINGS, H200, SMALL, FakeLibrary, FakeTimer, bench, shrink_rotation, wrong_page

import mla_cute
from mla_cute.bench import command, document, figures, plots, publish, report, runner, targets
from mla_cute.bench.cases import PRESETS, PUBLIC_BEST_US, Case, PrefillCase, case_of
from mla_cute.extras import install_command

RECORDS = pathlib.Path(mla_cute.__file__).resolve().parents[1] / "tune" / "measurements" / "NVIDIA_H200"
# One record of each name, whatever its date.
[BF16], [FP8], [FP8_PREFILL], [PREFILL] = (
    RECORDS.glob(f"{name}_????-??-??.json") for name in ("bf16", "fp8", "fp8_prefill", "prefill_bf16")
)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason='pictures need matplotlib, pip install ".[bench]"')


@pytest.fixture
def bf16():
    return report.load(BF16)


def row_of(case, us=100.0, ok=True, **more):
    """A row as a record holds it, read back from JSON or not."""
    flop, moved = case.flop / us * 1e-6, case.bytes_moved / us * 1e-3
    row = {
        "case": vars(case).copy(), "us": us, "us_min": us, "us_p90": us, "plan_us": 6.1, "us_amortised": us,
        "us_chained": us, "gbps": moved, "tflops": flop, "peers": {},
        "check": {"ok": ok, "rel_err": 2e-3 if ok else 0.3},
    }  # fmt: skip
    runner.apply_ceilings(row, CEILINGS, None)
    return row | more


def share_charts(rows):
    return figures.charts(rows, figures.share_of_ceiling, "share", "Share", figures.Scale.SHARE)


# --- figures


def test_heat_maps_of_the_fp8_record_are_one_per_format_and_prefill_is_bars():
    rows = report.load(FP8)["rows"] + report.load(FP8_PREFILL)["rows"]
    *maps, bars = share_charts(rows)
    assert [chart.title for chart in maps] == [
        f"Share: page 64, {kind} FP8, q {queries}"
        for kind in ("group", "tensor", "token")
        for queries in ("bf16", "e4m3")
    ]
    assert len({chart.name for chart in maps}) == 6
    for chart in maps:
        assert [panel.title for panel in chart.panels] == ["16 heads", "64 heads", "128 heads"]
        assert chart.batches == [1, 16, 128]
        assert chart.lengths == ([1024, 8192, 32768] if "tensor" in chart.title else [8192])
    cells = sum(len(panel.cells) for chart in maps for panel in chart.panels)
    assert cells + len(bars.entries) == len(rows)
    assert len(bars.entries) == sum("groups" in row["case"] for row in rows) == 21
    assert "16 heads, 4 x 2048 of 8192, page 64, group FP8, q bf16" in [name for name, *_ in bars.entries]


def test_share_is_the_larger_one_and_says_of_which_ceiling(bf16):
    [chart, _] = share_charts(bf16["rows"])
    assert [chart.batches, chart.lengths] == [[1, 16, 64, 128], [1024, 8192, 32768]]
    by_case = {case_of(row): row for row in bf16["rows"]}
    for panel, heads in zip(chart.panels, (16, 64, 128), strict=True):
        for (batch, length), cell in panel.cells.items():
            row = by_case[Case(heads, batch, length)]
            assert cell.value == max(row["read_share"], row["cublas_share"])
            assert cell.kind == ("cuBLAS" if heads == 128 else "read")
            assert cell.note == figures.time_text(row["us_amortised"])
    assert (64, 1024) not in chart.panels[0].cells


@pytest.mark.parametrize(
    ("us", "text"),
    [(8.25, "8.2 us"), (99.96, "100 us"), (152.4, "152 us"), (1100, "1.10 ms"), (25_649, "25.6 ms"), (132e3, "132 ms")],
)
def test_time_text(us, text):
    assert figures.time_text(us) == text


def test_rooflines_points_lie_at_flop_per_byte(bf16):
    bf16["rows"][0]["error"] = "lost"
    bf16["rows"][1]["check"]["ok"] = False
    roof = figures.roofline(bf16)
    assert (roof.read_gbps, roof.cublas_tflops) == tuple(bf16["ceilings"]["used"].values())
    assert len(roof.points) == len(bf16["rows"]) - 2
    for point, row in zip(roof.points, bf16["rows"][2:], strict=True):
        assert point.intensity == pytest.approx(row["tflops"] * 1e3 / row["gbps"])
        # No point is above the roof by more than what the ceilings scatter.
        assert row["tflops"] <= 1.02 * min(roof.cublas_tflops, point.intensity * roof.read_gbps * 1e-3)


def test_ragged_batches_and_their_uniform_twins_are_bars_also_beside_a_grid():
    grid = [Case(h, b, n) for h in (16, 64, 128) for b in (16, 64, 128) for n in (1024, 8192)]
    rows = [row_of(case) for case in (*grid, *PRESETS["ragged"])]
    chart, bars = share_charts(rows)
    assert chart.lengths == [1024, 8192]
    assert sum(len(panel.cells) for panel in chart.panels) == len(grid)
    assert len(bars.entries) == len(PRESETS["ragged"])
    assert bars.entries[0][0] == "16 heads, 16 x 1024..32768, page 64, bf16"


def test_many_bars_are_several_pictures():
    rows = [row_of(PrefillCase(16, ((4, 16 * n, 8192),))) for n in range(1, 2 * figures.MOST_BARS)]
    first, second = share_charts(rows)
    assert [first.name, second.name] == ["share_shapes1", "share_shapes2"]
    assert len(first.entries) + len(second.entries) == len(rows)


def test_formats_have_names_of_their_own():
    cases = [
        Case(16, 1, 8192, dtype=dtype, layout=layout, **fp8)
        for dtype in ("bfloat16", "float16")
        for layout in ("separate", "fused")
        for fp8 in ({}, *({"kv_format": f, "q_fp8": q} for f in ("tensor", "token", "group") for q in (False, True)))
    ]
    assert len({figures.format_of(case) for case in cases}) == len(cases)


def test_failed_and_wrong_rows_have_no_figure():
    case = Case(16, 1, 8192)
    assert figures.share_of_ceiling({"case": vars(case), "error": "x"}) == figures.Cell(None, "failed")
    assert figures.share_of_ceiling(row_of(case, ok=False)) == figures.Cell(None, "wrong")


def test_speed_over_peers():
    measure = figures.over_peer("flash_mla")
    case = Case(16, 1, 8192)

    def with_peer(**peer):
        return measure(row_of(case, peers={"flash_mla": peer}))

    assert with_peer(us=150.0, check={"ok": True}) == figures.Cell(1.5, "150 / 100 us")
    assert with_peer(us=1500.0, check={"ok": True}) == figures.Cell(15.0, "1.50 ms / 100 us")
    assert with_peer(us=150.0, check={"ok": False}) == figures.Cell(None, "peer wrong")
    assert with_peer(error="TypeError: x") == figures.Cell(None, "peer failed")
    assert with_peer(unsupported="page size 1") is None
    assert measure(row_of(case)) is None


def test_speed_over_the_public_best_is_the_records(bf16):
    ratios = figures.values(bf16["rows"], figures.over_public_best)
    assert len(ratios) == len(PUBLIC_BEST_US)
    assert ratios == pytest.approx([r["public_best_ratio"] for r in bf16["rows"] if "public_best_ratio" in r])


def test_speed_over_another_record_is_of_the_shapes_of_both(bf16):
    baseline = copy.deepcopy(bf16)
    for row in baseline["rows"]:
        row["us_amortised"] *= 1.25
    baseline["rows"][0]["error"] = "lost"
    del baseline["rows"][1]
    cells = [figures.over_record(baseline)(row) for row in bf16["rows"]]
    assert cells[0] == figures.Cell(None, "baseline failed")
    assert cells[1] is None
    assert [cell.value for cell in cells[2:]] == pytest.approx([1.25] * (len(cells) - 2))


def test_a_record_without_the_field_longest_compares_with_one_that_has_it(bf16):
    case = Case(128, 64, 8192)
    assert all("longest" not in row["case"] for row in bf16["rows"])
    [cell] = [cell for row in bf16["rows"] if (cell := figures.over_record({"rows": [row_of(case)]})(row))]
    assert cell.value == pytest.approx(100.0 / 231.9, rel=0.01)


# --- pictures


@pytest.mark.slow
@pytest.mark.parametrize("path", [BF16, FP8, PREFILL], ids=lambda path: path.stem)
def test_text_of_a_cell_stays_inside_it(path, matplotlib):
    rows = report.load(path)["rows"]
    charts = share_charts(rows)
    charts += figures.charts(rows, figures.over_public_best, "public", "Public", figures.Scale.RATIO)
    checked = 0
    for chart in (chart for chart in charts if isinstance(chart, figures.HeatMaps)):
        canvas = plots._heat_maps(chart)
        canvas.draw_without_rendering()
        for axes in canvas.axes:
            cells = [patch.get_window_extent() for patch in axes.patches]
            for text in axes.texts:
                box = text.get_window_extent()
                assert any(
                    cell.x0 < box.x0 and box.x1 < cell.x1 and cell.y0 < box.y0 and box.y1 < cell.y1 for cell in cells
                ), (chart.title, text.get_text())
                checked += 1
    assert checked > 0 or path is PREFILL


def test_every_kind_of_figure_is_drawn_also_when_all_rows_failed(bf16, matplotlib):
    for row in bf16["rows"]:
        row["error"] = "lost"
    charts = [figures.roofline(bf16), *share_charts(bf16["rows"])]
    assert {type(chart) for chart in charts} == {figures.Roofline, figures.HeatMaps, figures.Bars}
    assert charts[0].points == ()
    for chart in charts:
        assert plots.png(chart).startswith(PNG)


@pytest.mark.parametrize("ratio", [0.02, 1.0, 1.3, 2.2, 50.0])
def test_speed_ups_of_any_size_are_drawn(ratio, matplotlib):
    cells = {(b, n): figures.Cell(ratio, "1 / 2 us") for b in (1, 16) for n in (1024, 8192)}
    chart = figures.HeatMaps("x", "x", figures.Scale.RATIO, (figures.Panel("16 heads", cells),))
    bars = figures.Bars("y", "y", figures.Scale.RATIO, (("a shape", cells[1, 1024]),))
    assert plots.png(chart).startswith(PNG)
    assert plots.png(bars).startswith(PNG)
    assert 1.0 in plots._ratio_ticks(1 / plots._spread([ratio]), plots._spread([ratio]))


# --- page


class Outline(html.parser.HTMLParser):
    """Tags that are open, texts, addresses."""

    VOID = frozenset({"meta", "img", "br", "link", "!doctype"})

    def __init__(self, page):
        super().__init__()
        self.open, self.cells, self.sources, self.tags, self.links, self.ids = [], [], [], set(), [], set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.sources += [attributes[name] for name in ("src", "href") if name in attributes]
        self.ids.add(attributes.get("id"))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "li"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "li"} & set(self.open):
            self.cells[-1] += data


def test_text_is_escaped():
    blocks = [
        document.Heading("a < b"),
        document.Items(["<script>alert(1)</script>"]),
        document.Table(("x|y", "n"), [('"<b>"', "1 WRONG"), ("met", "2")]),
    ]
    page = document.to_html("t & <i>", blocks)
    assert not {"script", "b", "i"} & Outline(page).tags
    assert '<td class="bad">1 WRONG</td>' in page
    assert '<td class="text good">met</td>' in page
    text = document.to_markdown("t_x", blocks)
    assert "| x\\|y | n |\n| --- | ---: |" in text
    assert "* \\<script>" in text
    assert text.startswith("# t\\_x\n")


@pytest.mark.slow
def test_page_holds_everything_and_needs_nothing(bf16, tmp_path, matplotlib):
    bf16["rows"][3]["error"] = "RuntimeError: out of <memory> & luck"
    bf16["rows"][4]["check"] |= {"ok": False}
    baseline = report.load(PREFILL)
    written = publish.write(tmp_path, {"": bf16}, baseline)
    assert sorted(written) == sorted(tmp_path.iterdir())
    page, text = ((tmp_path / name).read_text() for name in ("report.html", "report.md"))
    found = Outline(page)
    assert found.open == []
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in found.sources)
    assert all(source[1:] in found.ids for source in found.sources if source.startswith("#"))
    assert not {"script", "link", "iframe"} & found.tags
    pictures = [path for path in written if path.suffix == ".png"]
    assert len(pictures) == 5
    for path in pictures:
        assert path.read_bytes().startswith(PNG)
        assert base64.b64encode(path.read_bytes()).decode() in page
        assert f"]({path.name})" in text
    for row in bf16["rows"]:
        assert all(cell in found.cells for cell in report.cells(row))
    judged = targets.judge(bf16)
    assert {one.gpu for one in judged} == {None, "NVIDIA H200"}
    for one in judged:
        assert one.what in found.cells
    said = "\n".join(found.cells)
    for fact in ("NVIDIA H200", "580.159.04", "torch 2.11.0+cu130", "4350", "739", *bf16["method"].values()):
        assert fact in said
    assert "53 shapes timed and checked against float32, 2 failed or wrong." in found.cells
    assert targets.sentence(judged) in found.cells
    failed = case_of(bf16["rows"][3]).label
    assert f"FAILED {failed}: RuntimeError: out of <memory> & luck" in found.cells
    assert any(cell.startswith(f"WRONG  {case_of(bf16['rows'][4]).label}") for cell in found.cells)


@pytest.mark.slow
def test_another_gpus_record_is_not_measured_against_microseconds(tmp_path, matplotlib):
    [h100] = (RECORDS.parent / "NVIDIA_H100_80GB_HBM3").glob("table_????-??-??.json")
    publish.write(tmp_path, {"": report.load(h100)})
    page = (tmp_path / "report.html").read_text()
    assert "own targets that are met: 2 of 3 as shares of this run" in page
    assert "microseconds of" not in page
    [table] = re.findall(r"<h2[^>]*>Speeds to reach</h2>.*?</table>", page, re.DOTALL)
    assert re.findall(r'<td class="text">([^<]*)</td><td>', table) == ["every GPU"] * 3


def test_print_shows_tables_whole():
    [rules] = re.findall(r"@media print \{\n(.*?)\n\}\n", document.STYLE, re.DOTALL)
    of = dict(re.findall(r"^ *([^{}\n]+?) \{([^}]*)\}", rules, re.MULTILINE))
    # A box that scrolls on the screen shows on paper what fits into it and cuts the rest.
    scrolling = re.findall(r"^([^{}\n]+?) \{[^}]*overflow: auto", document.STYLE, re.MULTILINE)
    assert scrolling == [".table"]
    assert {"overflow: visible", "max-height: none"} <= set(map(str.strip, of[".table"].split(";")))
    assert "white-space: normal" in of["th, td"]
    assert "display: block" in of["details::details-content"]


@pytest.mark.slow
def test_several_records_are_parts_with_pictures_of_their_own(tmp_path, matplotlib):
    request = publish.Request.of(tmp_path, [BF16, PREFILL], None, [])
    assert request.write() == f"report: {tmp_path / 'report.html'} (8 more files beside it)"
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r"<h2[^>]*>([^<]*)</h2>", page) == [BF16.name, PREFILL.name]
    assert {path.name[:2] for path in tmp_path.glob("*.png")} == {"1_", "2_"}
    assert (tmp_path / "1_share_page64_bf16.png").exists()
    assert not (tmp_path / "2_share_page64_bf16.png").exists()


@pytest.mark.slow
def test_a_baseline_of_another_gpu_is_warned_of(bf16, tmp_path, matplotlib):
    baseline = report.load(BF16)
    baseline["gpu"]["name"] = "NVIDIA H100 80GB HBM3"
    publish.write(tmp_path, {"": bf16}, baseline)
    assert "different GPUs, the ratios compare cards" in (tmp_path / "report.html").read_text()


def test_peers_have_maps_and_their_reasons_are_named_once(tmp_path, matplotlib):
    cases = [Case(h, b, n) for h in (16, 128) for b in (1, 16) for n in (1024, 8192)]
    peers = {"flashinfer": {"us": 150.0, "check": {"ok": True}}, "flash_mla": {"unsupported": "not today"}}
    record = report.load(BF16)
    record["rows"] = [row_of(case, peers=copy.deepcopy(peers)) for case in cases]
    record["peers"] = {name: {"present": True, "version": "9.9"} for name in peers}
    written = {path.name for path in publish.write(tmp_path, {"": record})}
    assert "flashinfer_page64_bf16.png" in written
    assert not any(name.startswith("flash_mla") for name in written)
    found = Outline((tmp_path / "report.html").read_text())
    assert "flash_mla: not today (8 shapes)" in found.cells
    assert "150.0 (1.50x)" in found.cells
    assert "Over flashinfer 9.9: geometric mean 1.500x of 8 shapes, 1.500x to 1.500x, 0 slower." in found.cells


# --- commands


def test_command_reports_a_run(tmp_path, monkeypatch, matplotlib, capsys):
    shrink_rotation(monkeypatch)
    monkeypatch.setattr(runner.Library, "installed", classmethod(lambda cls, *options: FakeLibrary.make(wrong_page)))
    monkeypatch.setattr(command.gpu_facts, "why_not_hopper", lambda: None)
    monkeypatch.setattr(command.gpu_facts, "facts", lambda: H200)
    monkeypatch.setattr(command.gpu_facts, "clocks", lambda gpu: None)
    monkeypatch.setattr(runner, "occupy", lambda device: None)
    monkeypatch.setattr(command, "CudaTimer", FakeTimer)
    monkeypatch.setattr(command, "run", lambda *a, **k: runner.run(*a, **k, ceilings=lambda _: dict(CEILINGS)))
    base = tmp_path / "base.json"
    runner.write_json(base, bench([Case(4, 2, 100, 16)], timer=FakeTimer(us=200.0)))
    folder = tmp_path / "deep" / "report"
    argv = ["--heads", "4", "--batch", "2", "--kv-len", "100", "--page-size", "16", "--report", str(folder)]
    assert command.main([*argv, "--baseline", str(base)]) == 1
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    found = Outline((folder / "report.html").read_text())
    assert "1 shapes timed and checked against float32, 1 failed or wrong." in found.cells


@pytest.mark.slow
def test_both_commands_report_records(tmp_path, matplotlib, capsys):
    options = ["--report", str(tmp_path / "a"), "--record", str(PREFILL), "--baseline", str(BF16)]
    assert command.main(options) == 0
    assert "report: " in capsys.readouterr().out
    cli = pytest.importorskip("mla_cute.cli.app", reason="needs the extra cli")
    from typer.testing import CliRunner

    options[1] = str(tmp_path / "b")
    result = CliRunner().invoke(cli.app, ["bench", *options])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a" / "report.md").read_text() == (tmp_path / "b" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--record", "a.json"], "--record: expected --report DIR beside it, got none"),
        (["--baseline", "a.json"], "--baseline: expected --report DIR beside it, got none"),
        (["--report", "x", "--compare", "a", "b"], "--compare: prints, and makes no report"),
        (["quick", "--report", "x", "--record", "a"], "times nothing, got quick beside it"),
        (["--report", "x", "--record", "a", "--kv-len", "8", "--layout", "fused"], "got --kv-len, --layout beside it"),
        (["--report", "x", "--record", "none.json"], "none.json"),
        (["--report", "x", "--baseline", str(pathlib.Path(__file__))], "not JSON"),
    ],
)
def test_options_that_do_not_go_together(arguments, message, tmp_path, monkeypatch, matplotlib, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    cli = pytest.importorskip("mla_cute.cli.app", reason="needs the extra cli")
    from typer.testing import CliRunner

    result = CliRunner().invoke(cli.app, ["bench", *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_nothing_is_timed(tmp_path, monkeypatch, capsys, small_rotation):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(command, "run", lambda *args, **options: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as stopped:
        command.main(["quick", "--report", str(tmp_path / "x")])
    assert stopped.value.code == 2
    assert f"the report needs matplotlib: {install_command('matplotlib')}" in capsys.readouterr().err
    with pytest.raises(ImportError, match="the report needs matplotlib"):
        plots.png(figures.Bars("x", "x", figures.Scale.SHARE, ()))
    assert not (tmp_path / "x").exists()
    assert bench(SMALL[:1])["failed"] == 0
