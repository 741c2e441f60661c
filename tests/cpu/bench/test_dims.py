"""Bench cases of other head dimensions than 512 + 64."""

import dataclasses

import pytest
import torch
from bench_case import FakeLibrary, FakeTimer

from mla_cute.bench import figures, peers, report, runner
from mla_cute.bench.cases import PRESETS, Case, PrefillCase, case_of, token_bytes
from mla_cute.bench.inputs import KvPool, make_inputs
from mla_cute.dims import HEAD_DIMS, HeadDims

CPU = torch.device("cpu")
OTHERS = HEAD_DIMS[1:]
OTHER_PAIR = pytest.mark.parametrize("dims", OTHERS, ids=str)


def of(dims, **options):
    return Case(4, 2, 100, 16, ckv_dim=dims.ckv, kpe_dim=dims.kpe, **options)


def test_bytes_and_flop():
    case = Case(16, 128, 8192, ckv_dim=256, kpe_dim=64)
    assert case.kv_bytes == 128 * 8192 * 640
    assert case.bytes_moved == 128 * 8192 * 640 + 128 * 16 * (320 + 256) * 2
    assert case.flop == 16 * 2 * (320 + 256) * 128 * 8192
    fp8 = dataclasses.replace(case, kv_format="tensor", q_fp8=True)
    assert fp8.kv_bytes == 128 * 8192 * 320
    assert fp8.bytes_moved == 128 * 8192 * 320 + 128 * 16 * (320 + 512)
    prefill = PrefillCase(16, ((4, 2048, 8192),), kpe_dim=0)
    assert prefill.flop == 16 * 2 * 1024 * prefill.visible_pairs
    assert {f: token_bytes(f) for f in ("", "tensor", "token", "group")} == {
        "": 1152, "tensor": 576, "token": 644, "group": 656,
    }  # fmt: skip


def test_labels_name_what_is_not_usual():
    usual, case = Case(16, 128, 8192), Case(16, 128, 8192, ckv_dim=256)
    assert "+" not in usual.label
    assert case.label == f"{usual.label} 256+64"
    assert PrefillCase(16, ((4, 2048, 8192),), kpe_dim=0).label.endswith(" 512+0")
    row = {"case": dataclasses.asdict(case), "error": "x"}
    assert "bf16/256+64" in report.cells(row)
    assert figures.format_of(case) == "bf16, 256+64"
    assert case_of(row) == case


def test_rows_of_older_records_are_of_512_and_64():
    row = {"case": {"num_heads": 16, "batch": 1, "kv_len": 64, "page_size": 64, "dtype": "bfloat16"}}
    assert case_of(row) == Case(16, 1, 64)
    assert case_of(row).dims == HeadDims()


def test_the_preset():
    cases = PRESETS["dims"]
    assert len(set(cases)) == len(cases) == 5 * 6 + 6 + 2
    assert {case.dims for case in cases} == set(OTHERS)
    assert all(case.dims == (256, 64) for case in cases if case.kv_format)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ckv_dim": 384}, r"ckv_dim, kpe_dim: expected one of 512 \+ 64, .*, got 384 \+ 64"),
        ({"kpe_dim": 16}, r"ckv_dim, kpe_dim: expected one of 512 \+ 64, .*, got 512 \+ 16"),
        ({"ckv_dim": 256, "kv_format": "group"}, r"kv_format: expected tensor with head dimensions 256 \+ 64"),
        ({"kpe_dim": 0, "kv_format": "token"}, r"kv_format: expected tensor with head dimensions 512 \+ 0"),
    ],
)
def test_what_no_case_has(options, message):
    for make in (lambda: Case(16, 1, 64, **options), lambda: PrefillCase(16, ((1, 2, 3),), **options)):
        with pytest.raises(ValueError, match=message):
            make()


@OTHER_PAIR
@pytest.mark.parametrize("layout", ["separate", "fused"])
@pytest.mark.parametrize("kv_format", ["", "tensor"])
def test_inputs(small_rotation, kv_format, layout, dims):
    case = of(dims, layout=layout, kv_format=kv_format, q_fp8=bool(kv_format))
    inputs = make_inputs(case, KvPool.of([case], CPU), CPU)
    for x, width in (
        (inputs.q_nope, dims.ckv), (inputs.q_pe, dims.kpe), (inputs.ckv_cache, dims.ckv), (inputs.kpe_cache, dims.kpe),
        (inputs.out, dims.ckv),
    ):  # fmt: skip
        assert x.shape[-1] == width
    assert inputs.ckv_cache.shape[0] * case.page_size >= case.pool_tokens
    used = inputs.kv_indices.flatten().long()
    assert len(used.unique()) == len(used)
    assert inputs.ckv_cache[used[:50]].float().std() == pytest.approx(1 if not kv_format else 64, rel=0.05)
    if dims.kpe:
        first = inputs.kpe_cache.data_ptr() - inputs.ckv_cache.data_ptr()
        fused = dims.ckv * (1 if kv_format else 2)
        assert (first == fused) is (layout == "fused")
        assert inputs.kpe_cache[used[:50]].float().std() == pytest.approx(1 if not kv_format else 64, rel=0.05)


class AnyPeer(peers.Peer):
    name = short = "any"
    modules = ("torch",)

    def calls(self, inputs):
        raise AssertionError("not asked")


@OTHER_PAIR
@pytest.mark.parametrize("kv_format", ["", "tensor"])
def test_a_row_of_a_record(small_rotation, kv_format, dims):
    case = of(dims, kv_format=kv_format, q_fp8=bool(kv_format))
    row = runner.run_case(case, KvPool.of([case], CPU), FakeTimer(), FakeLibrary.make(), [AnyPeer()])
    assert row["check"]["ok"], row["check"]
    assert row["case"]["ckv_dim"] == dims.ckv
    assert row["case"]["kpe_dim"] == dims.kpe
    assert row["peers"] == {"any": {"unsupported": f"head dimensions {dims}: peers are asked for 512 + 64 only"}}
