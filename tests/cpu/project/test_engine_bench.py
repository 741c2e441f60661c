"""tune/engine_bench.py without a GPU and without vLLM: figures of profiles, the projection, the table, and the turns of
engines in processes that only answer."""

import json
import pathlib

import engine_bench as eb
import engine_record as er
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
RECORDS = sorted((ROOT / "tune" / "measurements").glob("*/engines_*.json"))
DECODE = "kernel_cutlass_kernel_mla_cutekernelstile16setupTile16_object_at_"
MERGE = "kernel_cutlass_kernel_mla_cutekernelsmergeMerge_object_at_"
PLANNER = "kernel_cutlass_kernel_mla_cutekernelsplannerdecodePlanner_object_at_"


def step_of(begin):
    """Kernels of one step of two layers: plan 2, each layer 10 of attention and 30 of the rest, then 5 of sampling."""
    events = [er.Event(PLANNER, begin, begin + 2)]
    for layer in range(2):
        at = begin + 2 + 40 * layer
        events += [
            er.Event(DECODE, at - 1, at + 8),
            er.Event(MERGE, at + 8, at + 10),
            er.Event("nvjet_tst", at + 10, at + 40),
        ]
    return [*events, er.Event("sample", begin + 82, begin + 87)]


def test_figures_of_a_profile():
    events = [event for step in range(4) for event in step_of(1000 * step)]
    found = er.profile_figures(events, 4)
    assert found["gpu_us"] == 87
    assert found["plan_us"] == 2
    assert found["attention_us"] == 10  # what a kernel waits for the last one is the last one's
    assert found["layer_us"] == 40
    assert found["kernels"][f"attention: {DECODE}"] == 18
    with pytest.raises(ValueError, match="got none"):
        er.profile_figures([], 4)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        (DECODE, "attention"), (MERGE, "attention"), (PLANNER, "plan"),
        ("void sm90::dense::flash_fwd_splitkv_mla_kernel<Traits>(Params)", "attention"),
        ("void flash::flash_fwd_mla_combine_kernel<bf16>(Params)", "attention"),
        ("get_mla_metadata_kernel(GetDecodingMetadataParams)", "plan"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<2", "attention"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdCombine<cute::tuple", "attention"),
        ("void flash::prepare_varlen_num_blocks_kernel<1, true>(int", "plan"),
        ("void vllm::concat_and_cache_mla_kernel<bf16>", "other"), ("void vllm::ConcatMLAQKernel", "other"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "other"), ("Memcpy DtoD", "other"),
    ],
)  # fmt: skip
def test_kinds_of_kernels(kernel, kind):
    assert er.kind_of(kernel) == kind


def figures(attention, plan=2.0):
    return {"gpu_us": 65 + plan + 2 * attention, "plan_us": plan, "attention_us": attention, "layer_us": 30 + attention,
            "kernels": {}}  # fmt: skip


def row_of(cell):
    names = ("CUSTOM bf16", "FLASHMLA bf16", "FLASH_ATTN_MLA bf16", "CUSTOM fp8", "FLASHMLA fp8")
    attention = dict(zip(names, (10.0, 20.0, 15.0, 6.0, 9.0), strict=True))
    windows = {name: {"us": [1000.0, 1100.0, 900.0]}["us"] for name in names}
    return er.summarize(cell, windows, {name: figures(us) for name, us in attention.items()})


def test_projection_and_ratio():
    row = row_of(er.Cell(64, 8192))
    ours = row["engines"]["CUSTOM bf16"]
    assert ours["tpot_us"] == 1000
    assert ours["tokens_per_s"] == 64000
    assert ours["tpot_61_us"] == 65 + 59 * 30 + 2 + 61 * 10
    assert row["best"]["bf16"]["backend"] == "FLASH_ATTN_MLA"
    assert row["best"]["bf16"]["ratio"] == 1.5
    assert row["best"]["fp8"]["ratio"] == 1.5
    assert row["best"]["fp8"]["ratio_61"] == pytest.approx((1837 + 549) / (1837 + 366))


def test_rows_without_profiles_or_peers():
    row = er.summarize(er.Cell(1, 1024), {"CUSTOM bf16": [1.0]}, {})
    assert row["best"] == {}
    row = er.summarize(er.Cell(1, 1024), {"CUSTOM bf16": [1.0]}, {"CUSTOM bf16": figures(1.0)})
    assert row["best"] == {}
    assert "tpot_61_us" in row["engines"]["CUSTOM bf16"]


def test_table():
    record = {"heads": 16, "rows": [row_of(cell) for cell in er.CELLS]}
    lines = er.table([record, record | {"heads": 128}]).splitlines()
    assert len(lines) == 2 + len(er.CELLS)
    assert len({line.count("|") for line in lines}) == 1
    assert lines[-1].startswith("| 64 x 8k + prompt | 10.0 / 15.0 FA, **1.50**; 2.4 / 2.8 ms |")


def test_cells_and_caches():
    assert len(er.CELLS) == 13
    [mixed] = [cell for cell in er.CELLS if cell.mixed]
    for engine in er.ENGINES:
        arguments = eb.llm_arguments(engine, "model", er.CELLS)
        assert arguments["kv_cache_memory_bytes"] >= 128 * 33000 * 2 * 576 * (
            2 if engine.kv_cache_dtype == "bf16" else 1
        )
        assert arguments["max_num_batched_tokens"] >= mixed.batch + er.PROMPT
    assert {cell.batch for cell in er.CELLS} <= set(eb.GRAPHS)
    assert max(steps_of_a_cell(eb.WINDOWS, eb.STEPS), 1) < eb.ROOM


def steps_of_a_cell(windows, steps):
    return 64 + eb.SETTLE + windows * (eb.WARM + steps) + eb.WARM + eb.PROFILED


def answering(connection, engine, heads, cells, log):
    """Stands in for an engine's process. One fails to start, one fails in the second cell."""
    pathlib.Path(log).write_text("the log's last line\n")
    if engine.name == "FLASHMLA fp8":
        return
    connection.send(("ok", {"common": {"gpu": {"name": "none"}}, "backend": engine.backend}))
    prepared = 0
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            return
        prepared += command == "prepare"
        if engine.name == "FLASHMLA bf16" and prepared == 2 and command == "window":
            connection.send(("error", "out of blocks"))
            continue
        value = {
            "window": {"us": 100.0, "tokens": 1.0, "replays": 1.0},
            "profile": figures(5.0) | {"kernels": {"attention: x": 5.0}},
        }.get(command)
        connection.send(("ok", value))


def test_engines_take_turns_and_failures_stay_their_own(tmp_path):
    out = tmp_path / "record.json"
    record = {"heads": 16, "engines": {}, "rows": [], "failures": [], "kernels": {}, "left_out": []}
    peers = [eb.Peer(engine, 16, er.CELLS, tmp_path, target=answering) for engine in er.ENGINES]
    bench = eb.Bench(peers, record, out, windows=2, steps=4)
    try:
        bench.start()
        for cell in er.CELLS[:2]:
            bench.run(cell)
    finally:
        for peer in bench.peers:
            peer.stop()
    found = json.loads(out.read_text())
    assert found["gpu"] == {"name": "none"}
    assert set(found["engines"]) == {engine.name for engine in er.ENGINES} - {"FLASHMLA fp8"}
    assert [(failure["engine"], failure["command"]) for failure in found["failures"]] == [
        ("FLASHMLA fp8", "start"), ("FLASHMLA bf16", "window"),
    ]  # fmt: skip
    assert "the log's last line" in found["failures"][0]["error"]
    first, second = found["rows"]
    assert len(first["engines"]) == 4
    assert first["engines"]["CUSTOM bf16"]["tpot_us_windows"] == [100.0, 100.0]
    assert set(second["engines"]) == {"CUSTOM bf16", "CUSTOM fp8", "FLASH_ATTN_MLA bf16"}


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_records_are_whole_and_the_page_has_their_table(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["failures"] == []
    assert [row["name"] for row in record["rows"]] == [cell.name for cell in er.CELLS]
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    if path.name in page:
        for row in record["rows"]:
            for dtype in ("bf16", "fp8"):
                assert er.entry(row, dtype) in page, row["name"]
