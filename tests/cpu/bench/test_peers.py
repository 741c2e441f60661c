"""The peers of the bench, on stand-ins with the signatures of their releases: what is passed, what is not offered, what
is right; and what tables make of them."""

import dataclasses
import importlib.metadata

import pytest
import torch
from bench_case import bench
from peer_case import Calls, flashinfer_modules, install, sgl_flash_mla_module, vllm_modules

from mla_cute.bench import figures, peers, report, runner
from mla_cute.bench.cases import Case, PrefillCase, case_of
from mla_cute.bench.inputs import FP8_SCALE, SM_SCALE

NAMES = ["flashinfer", "flash_mla", "sgl_flash_mla", "flash_attn_3"]
FP8 = Case(4, 2, 100, kv_format="tensor", q_fp8=True)
MIXED = PrefillCase(4, ((2, 1, 100), (1, 5, 70)))


@pytest.fixture
def calls(monkeypatch):
    kept = Calls()
    install(monkeypatch, flashinfer_modules(kept), sgl_flash_mla_module(kept), vllm_modules(kept))
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.33.0" if name == "vllm" else version(name))
    return kept


def rows_of(*cases):
    """By case: what became of each peer."""
    found, status = peers.installed()
    assert list(status) == NAMES
    record = bench(list(cases), peers=(found, status))
    for row in record["rows"]:
        assert row["check"]["ok"], row["case"]
    return {case_of(row): row["peers"] for row in record["rows"]}


def ran(found):
    """Names of the peers that were timed; all of them were right."""
    timed = {name: peer for name, peer in found.items() if "us" in peer}
    assert all(peer["check"]["ok"] for peer in timed.values()), timed
    assert not [peer for peer in found.values() if "error" in peer], found
    return list(timed)


def test_all_four_are_found_at_once_with_their_versions(calls):
    _, status = peers.installed()
    versions = {name: one["version"] for name, one in status.items()}
    assert versions == dict(zip(NAMES, ("0.7.4", "of vllm 0.33.0", "1.0.0", "of vllm 0.33.0"), strict=True))
    assert peers.SHORT_NAMES.keys() == set(NAMES)


def test_a_package_of_the_same_name_is_not_taken_for_another(monkeypatch):
    install(monkeypatch, sgl_flash_mla_module(Calls()))
    _, status = peers.installed()
    assert status["sgl_flash_mla"] == {"present": True, "version": "1.0.0"}
    assert status["flash_mla"]["why"] == (
        "ImportError: the flash_mla that is installed is sgl-flash-mla; No module named 'vllm'"
    )
    assert "vllm" in status["flash_attn_3"]["why"]


CASES = [
    Case(4, 2, 100), Case(4, 2, 100, layout="fused"), Case(3, 4, 70, longest=300), Case(2, 2, 128, dtype="float16"),
    PrefillCase(4, ((2, 3, 100),)), PrefillCase(4, ((2, 3, 100),), causal=False),
]  # fmt: skip


def test_16_bit_cases_are_right_with_all_four(calls, small_rotation):
    for case, found in rows_of(*CASES).items():
        assert ran(found) == NAMES, case


def test_ragged_queries_and_other_pages_are_what_two_of_them_have(calls, small_rotation):
    pages = [dataclasses.replace(CASES[0], page_size=size) for size in (1, 16, 128)]
    found = rows_of(MIXED, *pages)
    assert all(ran(one) == ["flashinfer", "flash_attn_3"] for one in found.values())
    for name in ("flash_mla", "sgl_flash_mla"):
        assert "one number of query tokens per call" in found[MIXED][name]["unsupported"]
        assert found[pages[0]][name] == {"unsupported": "page size 1: FlashMLA has 64 only"}


@pytest.mark.parametrize("layout", ["separate", "fused"])
def test_fp8_cases(layout, calls, small_rotation):
    e4m3 = dataclasses.replace(FP8, layout=layout)
    others = [dataclasses.replace(e4m3, kv_format=name) for name in ("token", "group")]
    bf16, fp16 = dataclasses.replace(e4m3, q_fp8=False), dataclasses.replace(e4m3, dtype="float16")
    drafts = PrefillCase(4, ((2, 3, 100),), kv_format="tensor", q_fp8=True, layout=layout)
    prompt = PrefillCase(64, ((1, 79, 100),), kv_format="tensor", q_fp8=True, layout=layout)
    found = rows_of(e4m3, bf16, fp16, drafts, prompt, *others)
    assert ran(found[e4m3]) == ran(found[drafts]) == ["flash_mla", "sgl_flash_mla"]
    assert ran(found[bf16]) == ["flashinfer"]
    assert "16-bit ones only" in found[e4m3]["flashinfer"]["unsupported"]
    assert "FlashMLA's dense FP8 has e4m3 queries" in found[bf16]["flash_mla"]["unsupported"]
    for name in ("flash_mla", "sgl_flash_mla"):
        assert (
            found[prompt][name]["unsupported"] == "79 query tokens: FlashMLA's dense FP8 has at most 78 tiles of rows"
        )
    assert found[fp16]["sgl_flash_mla"]["unsupported"].startswith("float16 outputs")
    for case in others:
        assert ran(found[case]) == []
        assert "e4m3 throughout" in found[case]["sgl_flash_mla"]["unsupported"]
    assert all("q_v with 16-bit caches only" in one["flash_attn_3"]["unsupported"] for one in found.values())


def test_what_flash_attention_3_is_passed(calls, small_rotation):
    rows_of(MIXED)
    [metadata] = calls.of("get_scheduler_metadata")
    call = calls.of("flash_attn_varlen_func")[0]
    shared = {"max_seqlen_q": 5, "max_seqlen_k": 100, "causal": True, "num_splits": 32}
    sizes = {"batch_size": 3, "num_heads_q": 4, "num_heads_kv": 1, "headdim": 64, "headdim_v": 512, "page_size": 64}
    for name, value in {**shared, **sizes, "qkv_dtype": torch.bfloat16}.items():
        assert metadata[name] == value, name
    assert {name: call[name] for name in shared} == shared
    assert call["softmax_scale"] == SM_SCALE
    assert metadata["cu_seqlens_q"].tolist() == call["cu_seqlens_q"].tolist() == [0, 1, 2, 7]
    assert metadata["cache_seqlens"].tolist() == call["seqused_k"].tolist() == [100, 100, 70]
    assert (call["q"].shape, call["q_v"].shape) == ((7, 4, 64), (7, 4, 512))
    assert call["block_table"].shape == (3, 2)
    assert call["block_table"].dtype is torch.int32


def test_flash_attention_3_has_32_splits_where_graphs_have_them_and_one_plan_of_a_step(calls, small_rotation):
    many = PrefillCase(1, ((1, 513, 520),))
    rows_of(many, PrefillCase(1, ((1, 512, 520),)), CASES[0])
    assert [call["num_splits"] for call in calls.of("get_scheduler_metadata")] == [0, 32, 32]
    assert len(calls.of("flash_attn_varlen_func")) > 3


def test_shorter_requests_have_page_0_behind_their_pages(calls, small_rotation):
    rows_of(Case(2, 3, 60, longest=200))
    for name in ("flash_attn_varlen_func", "flash_mla_with_kvcache", "sgl flash_mla_with_kvcache"):
        call = calls.of(name)[0]
        lengths = call.get("seqused_k", call.get("cache_seqlens"))
        for row, length in zip(call["block_table"], lengths.tolist(), strict=True):
            pages = -(-length // 64)
            assert not row[pages:].any()
        assert call["block_table"].shape == (3, -(-int(lengths.max()) // 64))


def test_what_flash_mla_and_its_fp8_are_passed(calls, small_rotation):
    rows_of(CASES[0], FP8)
    call = calls.of("flash_mla_with_kvcache")[0]
    assert call["q"].shape == (2, 1, 4, 576)
    assert call["head_dim_v"] == 512
    assert call["causal"] is False
    assert calls.of("get_mla_metadata_dense_fp8")[0]["num_q_tokens_per_head_k"] == 4
    assert calls.of("sgl get_mla_decoding_metadata")[0]["num_q_tokens_per_head_k"] == 4
    for call in (calls.of("flash_mla_with_kvcache_fp8")[0], calls.of("sgl flash_mla_with_kvcache")[-1]):
        assert call["descale_q"].tolist() == call["descale_k"].tolist() == [FP8_SCALE]
        assert call["k_cache"].dtype is call["q"].dtype is torch.float8_e4m3fn
    metadata = [id(call["tile_scheduler_metadata"]) for call in calls.of("flash_mla_with_kvcache")]
    assert len(metadata) > 1
    assert len(set(metadata)) == 1


def test_lists_of_tokens_are_what_flash_mla_has(calls, small_rotation):
    rows = Case(4, 2, 40, sparse=True), Case(4, 2, 40, kv_format="group", layout="fused", sparse=True)
    for case, found in rows_of(*rows, dataclasses.replace(rows[0], dtype="float16")).items():
        assert ran(found) == ([] if case.dtype == "float16" else ["flash_mla"])
        assert "lists of tokens" in found["flashinfer"]["unsupported"]
    assert calls.of("flash_mla_sparse_fwd")[0]["q"].shape == (2, 8, 576)
    assert calls.of("flash_mla_with_kvcache")[0]["q"].shape == (2, 1, 64, 576)


def test_flash_mla_itself_has_no_dense_fp8_and_a_gpu_may_have_no_flash_attention_3(monkeypatch, small_rotation):
    kept = Calls()
    modules = vllm_modules(kept, flash_attn_3="FA3 is only supported on devices with compute capability 9.x")
    modules["flash_mla"] = modules.pop("vllm.third_party.flashmla.flash_mla_interface")
    install(monkeypatch, modules)
    found = rows_of(CASES[0], FP8)
    assert found[FP8]["flash_mla"]["unsupported"].startswith("an FP8 cache: FlashMLA has dense FP8 in vLLM's copy")
    assert found[CASES[0]]["flash_mla"]["check"]["ok"]
    assert found[CASES[0]]["flash_attn_3"]["unsupported"].endswith("compute capability 9.x")


@pytest.mark.parametrize(
    ("case", "peer", "owner", "name"),
    [
        (FP8, "flash_mla", "vllm.v1.attention.ops.flashmla", "flash_mla_with_kvcache_fp8"),
        (CASES[0], "flash_attn_3", "vllm.vllm_flash_attn", "flash_attn_varlen_func"),
    ],
)
def test_a_wrong_output_is_no_time_to_compare_with(case, peer, owner, name, calls, monkeypatch, small_rotation):
    """As of a scale left out, an argument at another's place."""
    module = importlib.import_module(owner)
    right = getattr(module, name)
    changed = {"descale_k": torch.ones(1)} if case is FP8 else {"softmax_scale": 1.0}
    monkeypatch.setattr(module, name, lambda **options: right(**options | changed))
    found, status = peers.installed()
    [row] = bench([case], peers=(found, status))["rows"]
    assert row["check"]["ok"]
    assert not row["peers"][peer]["check"]["ok"]
    best, _ = report.best_peer(row)
    assert best != peer
    assert figures.over_best_peer(row).value > 0


def test_e4m3_probabilities_of_a_peer_are_right_and_more_is_not(calls, monkeypatch, small_rotation):
    module = importlib.import_module("vllm.v1.attention.ops.flashmla")
    right = module.flash_mla_with_kvcache_fp8
    for share, ok in ((0.03, True), (0.08, False)):

        def noisy(share=share, **options):
            out, lse = right(**options)
            noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
            return out + share * out.float().norm() / noise.norm() * noise, lse

        monkeypatch.setattr(module, "flash_mla_with_kvcache_fp8", noisy)
        check = rows_of(FP8)[FP8]["flash_mla"]["check"]
        assert check["ok"] is ok
        assert check["limit"] == runner.PEER_FP8_REL_ERR_LIMIT
        assert check["rel_err"] == pytest.approx(share, rel=0.3)


# ------------------------------------------------------------------------------------------------ tables


def row(case, us, **peers_us):
    """Peers by name: a time, or what is there instead."""
    found = {
        name: {"us": value, "check": {"ok": True, "rel_err": 1e-3}} if isinstance(value, float) else value
        for name, value in peers_us.items()
    }
    return {"case": dataclasses.asdict(case), "us_amortised": us, "check": {"ok": True}, "peers": found}


WRONG = {"us": 1.0, "check": {"ok": False, "rel_err": 1.0}}
ROWS = [
    row(Case(16, 1, 1024), 10.0, flashinfer=15.0, flash_mla=12.0, sgl_flash_mla=11.0, flash_attn_3=WRONG),
    row(Case(16, 1, 8192), 20.0, flashinfer=30.0, flash_attn_3=18.0, flash_mla={"error": "x"}),
    row(FP8, 5.0, flash_mla=9.0, flashinfer={"unsupported": "x"}),
    row(dataclasses.replace(FP8, kv_format="token"), 6.0, flashinfer={"unsupported": "x"}),
    row(MIXED, 7.0, flashinfer=14.0),
]


def test_the_best_of_all_peers_stands_beside_a_time_with_its_name():
    assert [report.beside(one) for one in ROWS] == [
        "10.0 (11.0 sgl-flash-mla)", "20.0 (18.0 FA3)", "5.0 (9.0 FlashMLA)", "6.0", "7.0 (14.0 FlashInfer)",
    ]  # fmt: skip
    assert report.best_peer({"case": {}}) is None
    assert report.beside({**ROWS[0], "error": "x"}) == "-"
    assert report.beside(row(Case(16, 1, 1024), 3.0, trtllm=4.0)) == "3.0 (4.0 trtllm)"


def test_tables_beside_the_best_peer_hold_each_format_that_one_has_run():
    tables = report.beside_tables({"rows": ROWS})
    assert tables == [
        ("page 64, bf16", ("heads", "batch", "1024", "8192"), [("16", "1", *map(report.beside, ROWS[:2]))]),
        ("page 64, tensor/e4m3", ("heads", "batch", "100"), [("4", "2", "5.0 (9.0 FlashMLA)")]),
    ]


def test_a_sentence_tells_who_was_fastest_how_often():
    text = report.over_best_peers({"rows": ROWS})
    assert text.startswith("against the fastest peer per cell, 4 cells: faster in 3, geometric mean 1.")
    assert "lowest 0.900x (H=16 B=1 L=8192 page 64 bfloat16)" in text
    assert {"flash_mla 1", "sgl_flash_mla 1", "flash_attn_3 1", "flashinfer 1"} == set(
        text.partition("fastest peer: ")[2].split(", ")
    )
    assert report.over_best_peers({"rows": ROWS[3:4]}) is None


def test_speed_over_the_best_peer():
    assert figures.over_best_peer(ROWS[0]) == figures.Cell(1.1, "11.0 / 10.0 us")
    assert figures.over_best_peer(ROWS[3]) is None
    assert figures.over_best_peer({**ROWS[0], "error": "x"}) == figures.Cell(None, "failed")
