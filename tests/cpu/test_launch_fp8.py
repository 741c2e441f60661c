"""FP8 calls: which kernels their plans ask for, and what the step is launched with."""

import math
import types

import pytest
import torch
from call_case import decode_problem, prefill_problem
from fp8_call_case import BF16, CHECKS, FORM, FP16, LAYOUT, Q_FP8, Call, make_call, on_gpu
from fp8_case import make_fp8

import mla_cute
from mla_cute import launch, plan
from mla_cute.call import DECODE, FORMS, call_of
from mla_cute.compile import jit
from mla_cute.kernels import registry
from mla_cute.testing.cases import make_case
from mla_cute.testing.prefill import make_prefill_case
from mla_cute.testing.runs import plan_of

# ------------------------------------------------------------------------------------------------ plans and launches


@pytest.fixture
def steps(monkeypatch):
    """Plans on the meta device allocate as on a GPU of 132 SMs; the kernels they ask for are recorded."""
    recorded = []
    monkeypatch.setattr(plan, "num_sms", lambda device: 132)
    monkeypatch.setattr(jit, "get", lambda kernel, key, config: recorded.append((kernel, key)) or (lambda *a: None))
    return recorded


@pytest.mark.parametrize(
    ("num_heads", "decode_kernels"),
    [
        (16, (registry.DECODE_TILE16, registry.DECODE_TILE16_FP8)),
        (17, (registry.DECODE, registry.DECODE_TILE32_FP8)),
        (32, (registry.DECODE, registry.DECODE_TILE32_FP8)),
        (33, (registry.DECODE, registry.DECODE_FP8)),
    ],
)
@pytest.mark.parametrize("page_size", [64, 1, 24])
def test_one_plan_asks_for_the_step_of_each_cache(steps, page_size, num_heads, decode_kernels):
    meta = torch.device("meta")
    indptr = torch.zeros(5, dtype=torch.int32, device=meta)
    sizes = {"num_heads": num_heads, "page_size": page_size}
    decode = mla_cute.plan_decode(indptr, **sizes)
    prefill = mla_cute.plan_prefill(indptr, indptr, **sizes, total_q=15)
    box = registry.box_rows_of(page_size)
    for made, kernels, facts in (
        (decode, decode_kernels, (4, num_heads, page_size, 9)),
        (prefill, (registry.PREFILL, registry.PREFILL_FP8), (4, 15, num_heads, page_size, 9, True)),
    ):
        kind = decode_problem if made is decode else prefill_problem
        bf16_key = (registry.DecodeKey if made is decode else registry.PrefillKey)("bfloat16", box)
        for problem, kernel, key in (
            (kind(*facts, BF16, meta), kernels[0], bf16_key),
            (kind(*facts, BF16, meta, "tensor", False), kernels[1], registry.Fp8Key("bfloat16", box, "tensor", False)),
            (kind(*facts, FP16, meta, "tensor", True), kernels[1], registry.Fp8Key("float16", box, "tensor", True)),
            (kind(*facts, FP16, meta, "token", False), kernels[1], registry.Fp8Key("float16", box, "token", False)),
            (kind(*facts, BF16, meta, "group", True), kernels[1], registry.Fp8Key("bfloat16", box, "group", True)),
        ):
            steps.clear()
            made.launcher(problem, made.form)
            assert steps == [(kernel, key)]
            made.launcher(problem, made.form)
            assert len(steps) == 1, "the same problem asks once"


@pytest.mark.parametrize("options", [{}, {"batch_invariant": True}], ids=["balanced", "invariant"])
@pytest.mark.parametrize(
    ("num_heads", "max_q_len", "few"), [(16, 2, True), (16, 3, False), (32, 1, True), (5, 6, True), (16, None, False)]
)
def test_a_prefill_of_few_rows_has_a_kernel_over_fp8_caches(steps, num_heads, max_q_len, few, options):
    meta = torch.device("meta")
    indptr = torch.zeros(5, dtype=torch.int32, device=meta)
    sizes = {"num_heads": num_heads, "page_size": 64, "total_q": 15, "max_q_len": max_q_len} | options
    sizes |= {"kv_format": "group", "q_fp8": True}
    seq_lens = torch.zeros(4, dtype=torch.int32, device=meta)
    facts = (4, 15, num_heads, 64, 9, True, BF16, meta)
    for made in (
        mla_cute.plan_prefill(indptr, indptr, **sizes),
        mla_cute.plan_prefill_block_table(indptr, seq_lens, **sizes, max_pages=9),
    ):
        assert made.max_q_len == max_q_len
        assert made.has_few_rows == (few and not options)
        steps.clear()
        made.launcher(prefill_problem(*facts, "group", True), made.form)
        made.launcher(prefill_problem(*facts), made.form)
        fp8 = registry.PREFILL_TILE32_FP8 if made.has_few_rows else registry.PREFILL_FP8
        assert [kernel for kernel, _ in steps] == [fp8, registry.PREFILL]
        assert made.selection.kernel == fp8.name


@pytest.mark.parametrize("max_q_len", [-1, 2.0, True])
def test_a_bad_max_q_len_is_refused(max_q_len):
    indptr = torch.zeros(5, dtype=torch.int32)
    with pytest.raises((TypeError, ValueError), match=r"max_q_len: expected (an int|>= 0), got"):
        mla_cute.plan_prefill(indptr, indptr, num_heads=16, page_size=64, total_q=15, max_q_len=max_q_len)


@pytest.mark.parametrize("entry", ["csr", "block_table"])
def test_requests_of_more_query_tokens_than_the_plan_was_told(entry):
    case = make_prefill_case([(2, 100), (3, 50), (1, 1)], num_heads=4, page_size=16)
    case.call(entry, plan=plan_of(case, entry, max_q_len=3))
    with pytest.raises(ValueError, match=r"qo_indptr: expected at most 2 query tokens .*, got 3 of request 1"):
        case.call(entry, plan=plan_of(case, entry, max_q_len=2))


@pytest.mark.parametrize(
    ("num_heads", "chosen", "few"),
    [
        (16, "auto", True),
        (16, "tile16", True),
        (16, "tile64", False),
        (17, "auto", False),
        (17, "tile16", True),
        (128, "tile16", True),
        (17, "tile64", False),
        (64, "tile64", False),
    ],
)
@pytest.mark.parametrize("field", ["kernel", "fp8_kernel"])
def test_the_config_chooses_the_kernel_of_tile16(steps, field, num_heads, chosen, few):
    """Each field for its kind of cache; over the other kind the kernel stays that of the heads."""
    meta = torch.device("meta")
    indptr = torch.zeros(5, dtype=torch.int32, device=meta)
    config = mla_cute.KernelConfig(**{field: chosen})
    made = mla_cute.plan_decode(indptr, num_heads=num_heads, page_size=64, config=config)
    few_fp8, few_16bit = (few if field == name else num_heads <= 16 for name in ("fp8_kernel", "kernel"))
    steps.clear()
    made.launcher(decode_problem(4, num_heads, 64, 9, BF16, meta, "group", True), DECODE)
    row_tiles = registry.DECODE_TILE32_FP8 if num_heads <= 32 else registry.DECODE_FP8
    kernel = registry.DECODE_TILE16_FP8 if few_fp8 else row_tiles
    assert steps == [(kernel, registry.Fp8Key("bfloat16", 64, "group", True))]
    steps.clear()
    made.launcher(decode_problem(4, num_heads, 64, 9, BF16, meta), DECODE)
    kernel = registry.DECODE_TILE16 if few_16bit else registry.DECODE
    assert steps == [(kernel, registry.DecodeKey("bfloat16", 64))]


@pytest.mark.parametrize(
    ("num_heads", "config", "kv_format", "ctas"),
    [(16, {}, "tensor", 132), (64, {}, "tensor", 132), (65, {}, "group", 66),
     (32, {"fp8_kernel": "tile16"}, "token", 66), (100, {"fp8_kernel": "tile16"}, "tensor", 18),
     (128, {"fp8_kernel": "tile16"}, "tensor", 16), (128, {"kernel": "tile16"}, "tensor", 66),
     (128, {"fp8_kernel": "tile16"}, "", 66), (128, {"kernel": "tile16"}, "", 16),
     (100, {"kernel": "tile16"}, "", 18), (32, {"kernel": "tile16"}, "", 66), (32, {}, "", 132), (65, {}, "", 66),
     (16, {}, "", 132), (16, {"kernel": "tile64"}, "", 132)],
)  # fmt: skip
def test_row_tiles_of_the_kernel_share_the_sms(steps, num_heads, config, kv_format, ctas):
    """A plan has as many work lists as there are SMs for each row tile of the kernel it is made for."""
    indptr = torch.zeros(5, dtype=torch.int32, device=torch.device("meta"))
    config = mla_cute.KernelConfig(**config)
    made = mla_cute.plan_decode(indptr, num_heads=num_heads, page_size=64, config=config, kv_format=kv_format)
    assert made.num_parts == ctas


@pytest.mark.parametrize("field", ["kernel", "fp8_kernel"])
def test_an_unknown_kernel_is_refused(steps, field):
    indptr = torch.zeros(5, dtype=torch.int32, device=torch.device("meta"))
    with pytest.raises(ValueError, match=rf"config: {field}: expected one of .*, got 'few'"):
        mla_cute.plan_decode(indptr, num_heads=16, page_size=64, config=mla_cute.KernelConfig(**{field: "few"}))


FORM_OF = dict(zip(CHECKS, FORMS, strict=True))


def launched(call: Call, packs_rows: bool = False, **change) -> tuple:
    """The arguments that the step of this call gets."""
    arguments = {"lse_base": 2, "out": None, "lse": None} | call.arguments | change
    options = ("ckv_scale", "kpe_scale", "q_scale")
    scales = dict.fromkeys(options, 1.0) | {"ckv_scale_arr": None}
    scales |= {name: arguments[name] for name in scales if name in arguments}
    of_round = plan.Round(0, 4, "table", "scratch", (5, 6, 7), ())
    stand_in = types.SimpleNamespace(
        has_work=True, packs_rows=packs_rows, part="part", rounds=(of_round,), verifies=False, form=DECODE
    )
    recorded = []
    problem = CHECKS[call.form](**on_gpu(call.arguments | change))
    made = call_of(FORM_OF[call.form], **arguments | scales)
    made = made._replace(pages=made.pages._replace(ids="indices"))
    result = launch.launch(lambda *got: recorded.append(got), problem, stand_in, made)
    (got,) = recorded
    assert got[8] is result[0]
    assert got[9] is result[1]
    return got


def same_memory(got: torch.Tensor, x: torch.Tensor) -> bool:
    return (got.data_ptr(), got.shape, got.stride()) == (x.data_ptr(), x.shape, x.stride())


@FORM
@LAYOUT
@Q_FP8
def test_what_the_step_is_launched_with(form, layout, q_fp8):
    call = make_call(form, layout, q_fp8)
    q_nope, q_pe, ckv, kpe, scales, indices, table, part, out, lse, *numbers = launched(call)
    for got, name in ((q_nope, "q_nope"), (q_pe, "q_pe"), (ckv, "ckv_cache"), (kpe, "kpe_cache")):
        x = call.arguments[name]
        assert got.dtype is x.dtype
        assert same_memory(got, x)
    assert (indices, table, part) == ("indices", "table", "part")
    assert out is call.arguments["out"]
    assert lse is call.arguments["lse"]
    assert scales.dtype is torch.float32
    assert scales.dim() == 3
    tensor = layout == "tensor"
    assert same_memory(scales, lse.unsqueeze(-1) if tensor else call.arguments["ckv_scale_arr"])
    ckv_scale, kpe_scale = (call.arguments.get(name, 1.0) for name in ("ckv_scale", "kpe_scale"))
    q_scale = call.arguments.get("q_scale", 1.0)
    assert (ckv_scale != kpe_scale) is tensor
    assert (q_scale != 1.0) is q_fp8
    per_score = 0.1 * math.log2(math.e)
    assert numbers[:3] == [5, 6, 7]
    *factors, ckv_at, kpe_at, q_at, lse_scale = numbers[3:]
    assert factors == pytest.approx(
        [per_score * ckv_scale * q_scale, per_score * kpe_scale * (q_scale if tensor else 1.0), ckv_scale]
    )
    assert (ckv_at, kpe_at, q_at, lse_scale) == (0, 0, 0, 1.0)
    assert all(type(x) is float for x in (*factors, lse_scale))


@FORM
@Q_FP8
def test_scales_that_are_tensors_go_in_by_their_address(form, q_fp8):
    call = make_call(form, "tensor", q_fp8)
    scales = {name: torch.tensor([x]) for name, x in (("ckv_scale", 3.0), ("kpe_scale", 5.0), ("q_scale", 7.0))}
    scales["kpe_scale"] = scales["kpe_scale"].squeeze()
    if not q_fp8:
        del scales["q_scale"]
    numbers = launched(call, **scales)[10:]
    *factors, ckv_at, kpe_at, q_at, lse_scale = numbers[3:]
    assert factors == pytest.approx([0.1 * math.log2(math.e), 0.1 * math.log2(math.e), 1.0])
    assert (ckv_at, kpe_at) == (scales["ckv_scale"].data_ptr(), scales["kpe_scale"].data_ptr())
    assert q_at == (scales["q_scale"].data_ptr() if q_fp8 else 0)
    mixed = launched(call, ckv_scale=scales["ckv_scale"], kpe_scale=0.5)[10:]
    q_scale = call.arguments.get("q_scale", 1.0)
    assert mixed[3:6] == pytest.approx(
        (0.1 * math.log2(math.e) * q_scale, 0.1 * math.log2(math.e) * 0.5 * q_scale, 1.0)
    )
    assert mixed[6:9] == (ckv_at, 0, 0)


def test_launch_in_base_e_with_ints_for_scales():
    *_, nope, rope, factor, ckv_at, kpe_at, q_at, lse_scale = launched(
        make_call("decode", "tensor", True), lse_base="e", ckv_scale=3, kpe_scale=5, q_scale=7, sm_scale=1
    )
    assert [nope, rope, factor, lse_scale] == pytest.approx([21 / math.log(2), 35 / math.log(2), 3.0, math.log(2)])
    assert all(type(x) is float for x in (nope, rope, factor, lse_scale))
    assert ckv_at == kpe_at == q_at == 0


@FORM
def test_launch_allocates_the_output(form):
    for layout, q_fp8, dtype, want in (
        ("tensor", True, FP16, BF16),
        ("tensor", False, FP16, FP16),
        ("group", True, FP16, FP16),
        ("token", True, BF16, BF16),
    ):
        call = make_call(form, layout, q_fp8, outputs=False, dtype=dtype)
        got = launched(call)
        assert (got[8].dtype, list(got[8].shape)) == (want, list(call.arguments["q_nope"].shape))
        assert got[8].is_contiguous()
        assert (got[9].dtype, list(got[9].shape)) == (torch.float32, list(got[8].shape[:2]))


@LAYOUT
@Q_FP8
def test_prefill_rows_are_made_even(layout, q_fp8):
    call = make_call("prefill", layout, q_fp8)
    for name in ("q_nope", "q_pe"):
        x = call.arguments[name]
        uneven = torch.zeros(x.shape[0], x.shape[1] + 1, x.shape[2]).to(x.dtype)[:, :-1]
        uneven.view(torch.uint8).copy_(x.view(torch.uint8))
        call.arguments[name] = uneven
    got = launched(call, packs_rows=True)
    for x, name in zip(got[:2], ("q_nope", "q_pe"), strict=True):
        want = call.arguments[name]
        assert x.stride(0) == x.shape[1] * x.stride(1)
        assert torch.equal(x.view(torch.uint8), want.view(torch.uint8))


def test_odd_strides_are_packed_for_the_launch():
    case = make_case([1], num_heads=1, page_size=1, num_pages=1)
    for layout in ("token", "group"):
        fp8 = make_fp8(case, layout, True)
        arguments = (
            {name: getattr(case, name) for name in ("kv_indptr", "kv_indices", "sm_scale")} | fp8.tensors | fp8.scales
        )
        last = 9 if layout == "token" else 1
        for name in ("q_nope", "q_pe", "ckv_cache", "kpe_cache"):
            arguments[name] = arguments[name].as_strided(arguments[name].shape, (7, 3, 1))
        array = arguments["ckv_scale_arr"]
        arguments["ckv_scale_arr"] = array.as_strided(array.shape, (7, 3, last))
        got = launched(Call("decode", arguments, fp8, ()))
        for x in got[:5]:
            assert x.stride() == torch.empty(x.shape).stride()


# ------------------------------------------------------------------------------------------------ the registry


def test_variants_of_fp8_caches():
    assert registry.variants(kv_formats=("",)) == registry.variants()
    everything = registry.variants(kv_formats=("", *registry.KV_FORMATS))
    assert [v for v in everything if not isinstance(v[1], registry.Fp8Key)] == registry.variants()
    decodes = (registry.DECODE_FP8, registry.DECODE_TILE32_FP8, registry.DECODE_TILE16_FP8)
    for kernel in (*decodes, registry.PREFILL_FP8, registry.PREFILL_TILE32_FP8):
        keys = [key for of_kernel, key, _ in everything if of_kernel is kernel]
        assert len(keys) == len(set(keys)) == 3 * 2 * 2 * 5
        assert set(keys) == {
            registry.Fp8Key(dtype, box, kv_format, q_fp8)
            for dtype in registry.DTYPES
            for box in registry.BOX_ROWS
            for kv_format in registry.KV_FORMATS
            for q_fp8 in (False, True)
        }
    only = registry.variants(("bfloat16",), (64,), ops=("decode",), kv_formats=("group",))
    assert [(kernel, key) for kernel, key, _ in only if kernel is not registry.PLANNER] == [
        (kernel, registry.Fp8Key("bfloat16", 64, "group", q_fp8)) for kernel in decodes for q_fp8 in (False, True)
    ]
    assert len(only) == 6 + 6, "planners are needed for any cache"
