"""Prefills that convert an FP8 cache to 16 bits: when, with which kernels, and what these are given."""

import pytest
import torch
from call_case import prefill_problem

import mla_cute
from mla_cute import convert, plan
from mla_cute.compile import jit, warmup
from mla_cute.dims import HEAD_DIMS, KV_FORMATS, HeadDims
from mla_cute.kernels import registry
from mla_cute.kernels.keys import ConvertKey, PrefillKey
from mla_cute.tuned.select import Selection, When

BF16, FP16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
META = torch.device("meta")
CONFIG = mla_cute.KernelConfig()
CONVERT, AS_IT_IS = (mla_cute.KernelConfig(fp8_kernel=kernel) for kernel in ("convert", "tile64"))
TOKENS = registry.CONVERT_ROWS["group", False] // 16  # of 16 heads


@pytest.mark.parametrize(
    ("op", "kv_format", "q_fp8", "num_heads", "q_len", "by_default", "asked_for"),
    [
        ("prefill", "group", False, 16, TOKENS, True, True),
        ("prefill", "group", True, 16, 2 * TOKENS, True, True),
        ("prefill", "group", True, 16, 2 * TOKENS - 1, False, True),
        ("prefill", "group", False, 16, TOKENS - 1, False, True),
        ("prefill", "group", False, 128, TOKENS // 8, True, True),
        ("prefill", "group", False, 1, TOKENS, False, True),
        ("prefill", "tensor", False, 16, 2 * TOKENS, True, True),
        ("prefill", "tensor", False, 16, 2 * TOKENS - 1, False, True),
        ("prefill", "tensor", True, 16, 5000, False, False),
        ("prefill", "token", False, 16, 5000, False, True),
        ("prefill", "token", True, 16, 5000, False, True),
        ("prefill", "", False, 16, 5000, False, False),
        ("decode", "group", False, 128, 1, False, False),
        ("sparse", "group", False, 128, 1, False, False),
    ],
)
def test_when_a_call_converts(op, kv_format, q_fp8, num_heads, q_len, by_default, asked_for):
    facts = (op, kv_format, q_fp8, num_heads, q_len)
    assert registry.converts(*facts, CONFIG) == by_default
    assert registry.converts(*facts, CONVERT) == asked_for
    assert not registry.converts(*facts, AS_IT_IS)
    assert not registry.converts(*facts, CONFIG, "float16")
    assert not registry.converts(*facts, CONVERT, "float16")


@pytest.fixture
def got(monkeypatch):
    """Plans on the meta device allocate as on a GPU of 132 SMs; the kernels they ask for are recorded, with their
    calls."""
    recorded = []
    monkeypatch.setattr(plan, "num_sms", lambda device: 132)

    def get(kernel, key, config):
        calls = []
        recorded.append((kernel, key, calls))
        return lambda *args: calls.append(args)

    monkeypatch.setattr(jit, "get", get)
    return recorded


def prefill_plan(total_q=8 * TOKENS, **options):
    indptr = torch.zeros(5, dtype=torch.int32, device=META)
    options = {"kv_format": "group"} | options
    return mla_cute.plan_prefill(indptr, indptr, num_heads=16, page_size=64, total_q=total_q, **options)


def block_table_plan(batch, max_pages, table_stride):
    indptr, lens = (torch.zeros(n, dtype=torch.int32, device=META) for n in (batch + 1, batch))
    options = {"max_pages": max_pages, "table_stride": table_stride, "kv_format": "group", "config": CONVERT}
    return mla_cute.plan_prefill_block_table(indptr, lens, num_heads=16, page_size=64, total_q=8 * TOKENS, **options)


def problem_of(made, dtype=BF16, kv_format="group", q_fp8=False):
    return prefill_problem(4, made.total_q, 16, 64, 9, True, dtype, META, kv_format, q_fp8)


@pytest.mark.parametrize("kv_format", ["tensor", "group"])
def test_the_kernels_of_a_plan_that_converts(got, kv_format):
    made = prefill_plan(kv_format=kv_format)
    got.clear()
    made.launcher(problem_of(made, kv_format=kv_format), made.form)
    assert [(kernel, key) for kernel, key, _ in got] == [
        (registry.CONVERT, ConvertKey("bfloat16", kv_format, False)),
        (registry.PREFILL, PrefillKey("bfloat16", 64, converted=True)),
    ]
    assert made.selection.converts
    assert made.selection.kernel == "prefill_tile64"
    assert str(made.selection).endswith("kernel prefill_tile64 behind convert")


@pytest.mark.parametrize(
    ("options", "dtype", "kernel"),
    [
        ({"total_q": 4 * TOKENS - 4}, BF16, registry.PREFILL_FP8),
        ({"batch_invariant": True}, BF16, registry.PREFILL_FP8),
        ({"config": AS_IT_IS}, BF16, registry.PREFILL_FP8),
        ({}, FP16, registry.PREFILL_FP8),
        ({"batch_invariant": True, "config": CONVERT}, BF16, registry.PREFILL_FP8),
        ({"total_q": 4, "config": CONVERT}, BF16, registry.CONVERT),
        ({"total_q": 4, "config": CONVERT, "max_q_len": 1}, BF16, registry.CONVERT),
    ],
)
def test_the_first_kernel_that_other_plans_ask_for(got, options, dtype, kernel):
    made = prefill_plan(**options)
    got.clear()
    made.launcher(problem_of(made, dtype), made.form)
    assert got[0][0] == kernel
    if made.selection is not None:  # it knows no dtype
        assert made.selection.converts == (kernel == registry.CONVERT or dtype is FP16)


def operands(kv_format, q_fp8, entries, dims=HeadDims(), page_size=64, tokens=8 * TOKENS):
    q_nope, q_pe = (torch.zeros(tokens, 16, width, dtype=BF16) for width in dims)
    ckv = torch.zeros(9, page_size, dims.ckv).to(E4M3)
    kpe = torch.zeros(9, page_size, dims.kpe, dtype=E4M3 if kv_format == "tensor" else BF16)
    if q_fp8:
        q_nope = q_nope.to(E4M3)
    scales = torch.zeros(9, page_size, {"tensor": 1, "token": 1, "group": 4}[kv_format])
    if not dims.kpe:
        q_pe, kpe = q_nope, ckv
    return q_nope, q_pe, ckv, kpe, scales, torch.zeros(entries, dtype=torch.int32)


GRID = (132, 1234, 2, 3)
# What q_nope . ckv and q_pe . kpe are worth, what ckv is; addresses of scales of ckv, kpe and queries; of lse.
NUMBERS = (0.5, 0.75, 0.02, 111, 222, 333, 1.0)
OF_ONE_SCALE = (0.3, 0.3, 0.02, 111, 111, 0, 1.0)


def step_of(got, kv_format, q_fp8=False, dims=HeadDims(), config=CONVERT):
    made = prefill_plan(kv_format=kv_format, q_fp8=q_fp8, config=config)
    got.clear()
    problem = prefill_problem(4, made.total_q, 16, 64, 9, True, BF16, META, kv_format, q_fp8, dims)
    return made, made.launcher(problem, made.form)


@pytest.mark.parametrize("q_fp8", [False, True])
@pytest.mark.parametrize(
    ("kv_format", "dims"), [("tensor", d) for d in HEAD_DIMS] + [("token", HEAD_DIMS[0]), ("group", HEAD_DIMS[0])]
)
def test_what_the_kernels_are_given(got, kv_format, dims, q_fp8):
    if q_fp8 and kv_format == "tensor":
        return
    made, step = step_of(got, kv_format, q_fp8, dims)
    q_nope, q_pe, ckv, kpe, scales, ids = given = operands(kv_format, q_fp8, 50, dims)
    table, part, out, lse = object(), object(), object(), object()
    step(*given, table, part, out, lse, *GRID, *NUMBERS)
    (_, _, (convert_args,)), (_, _, (step_args,)) = got
    ctas, ckv8, kpe8, scales8, ids8, facts, q8, q_pe8, cache, new_ids, new_nope, new_pe, *numbers = convert_args
    assert ctas == 4 * 132
    assert facts is made.rounds[0].scratch
    assert (ckv8.dtype, ckv8.data_ptr(), ckv8.shape) == (torch.uint8, ckv.data_ptr(), ckv.shape)
    assert (kpe8.dtype, kpe8.data_ptr()) == (torch.uint8 if kpe.dtype is E4M3 else BF16, kpe.data_ptr())
    assert scales8 is (ids if kv_format == "tensor" else scales)
    assert ids8 is ids
    assert q_pe8 is q_pe
    assert (q8.dtype, q8.data_ptr()) == (torch.uint8 if q_fp8 else BF16, q_nope.data_ptr())
    assert (cache.shape, cache.dtype) == ((50, 64, sum(dims)), BF16)
    assert (new_ids.shape, new_ids.dtype) == ((50,), torch.int32)
    assert numbers == [0.75 / 0.5, 111, 222, 333, 0]
    step_nope, step_pe, step_ckv, step_kpe, step_ids, *rest = step_args
    assert step_nope is new_nope
    assert new_nope.dtype is BF16
    assert new_nope.shape == q_nope.shape
    assert (new_nope is q_nope) == (not q_fp8)
    assert step_ckv.data_ptr() == cache.data_ptr()
    assert step_ckv.shape[2] == dims.ckv
    if dims.kpe:
        assert step_pe is new_pe
        assert (new_pe is q_pe) == (not q_fp8)
        assert step_kpe.data_ptr() == cache.data_ptr() + 2 * dims.ckv
        assert step_kpe.shape[2] == dims.kpe
    else:
        assert step_pe is step_nope
        assert step_kpe is step_ckv
    assert step_ids is new_ids
    assert rest == [table, part, out, lse, *GRID, 0.5, 0.02, 111, 333, 1.0]


@pytest.mark.parametrize(
    ("batch", "columns", "stride"), [(4, 12, 12), (4, 12, 4096), (1, 12, 4096), (4, 1, 1), (1, 9, 9)]
)
def test_what_lies_between_the_rows_of_a_table_is_not_copied(got, monkeypatch, batch, columns, stride):
    made = block_table_plan(batch, columns, stride)
    got.clear()
    problem = prefill_problem(batch, made.total_q, 16, 64, 9, True, BF16, META, "group")
    step = made.launcher(problem, made.form)
    monkeypatch.setattr(convert, "MOST_CONVERTED_BYTES", batch * columns * 64 * 576 * 2)
    entries = (batch - 1) * stride + columns
    step(*operands("group", False, entries), *"tpol", *GRID, *NUMBERS)
    (_, _, (convert_args,)), (_, _, (step_args,)) = got
    assert convert_args[-1] == (stride - columns if batch > 1 else 0)
    cache, ids = convert_args[8:10]
    assert cache.shape == (batch * columns, 64, 576)
    assert ids.shape == (entries,)
    assert step_args[2].shape == (batch * columns, 64, 512)


@pytest.mark.parametrize(
    ("numbers", "exact"),
    [
        (OF_ONE_SCALE, True),
        ((0.3, 0.075, 0.02, 0, 0, 0, 1.0), True),
        ((0.3, 0.3 * 1.0001, 0.02, 0, 0, 0, 1.0), False),
        ((0.3, 0.3, 0.02, 111, 0, 0, 1.0), False),
        ((0.3, 0.3, 0.02, 111, 222, 0, 1.0), False),
        ((0.3, 0.3, 0.02, 0, 0, 333, 1.0), False),
    ],
)
@pytest.mark.parametrize("config", [None, CONVERT], ids=["auto", "convert"])
@pytest.mark.parametrize("dims", [HeadDims(), HeadDims(512, 0)], ids=str)
def test_by_default_only_what_needs_no_rounding(got, numbers, exact, config, dims):
    _, step = step_of(got, "tensor", dims=dims, config=config)
    step(*operands("tensor", False, 50, dims), *"tpol", *GRID, *numbers)
    converts = exact or config is CONVERT or not dims.kpe
    called = [kernel for kernel, _, calls in got if calls]
    assert called == ([registry.CONVERT, registry.PREFILL] if converts else [registry.PREFILL_FP8])


@pytest.mark.parametrize("entries", [0, 51])
def test_the_fp8_step_where_there_is_no_room_or_no_page(got, entries, monkeypatch):
    _, step = step_of(got, "group")
    monkeypatch.setattr(convert, "MOST_CONVERTED_BYTES", 50 * 64 * 576 * 2)
    given = (*operands("group", False, entries), *"tpol", *GRID, *NUMBERS)
    step(*given)
    step(*given)
    assert [kernel for kernel, *_ in got] == [registry.CONVERT, registry.PREFILL, registry.PREFILL_FP8]
    assert [len(calls) for *_, calls in got] == [0, 0, 2]
    assert got[2][2] == [given, given]


def test_calls_without_a_plan_have_no_short_way(got, monkeypatch):
    """It would make a workspace of its own for each call, where a converted step reads its plan's."""
    from mla_cute import short_way

    made, step = step_of(got, "group")
    monkeypatch.setattr(short_way, "_has_short_way", lambda plan: True)
    monkeypatch.setattr(short_way, "_known", known := {})
    short_way.keep_without_plan("key", step, problem_of(made), made)
    assert not known
    short_way.keep_without_plan("key", lambda *a: None, problem_of(made), made)
    assert "key" in known


def test_shipped_variants():
    found = registry.conversion_variants()
    converts = {key for kernel, key, _ in found if kernel == registry.CONVERT}
    assert converts == {
        ConvertKey("bfloat16", *facts)
        for facts in (("tensor", False), ("token", False), ("token", True), ("group", False), ("group", True))
    }
    assert {key for kernel, key, _ in found if kernel == registry.PREFILL} == {
        PrefillKey("bfloat16", box, converted=True) for box in registry.BOX_ROWS
    }
    assert len(found) == 5 + 5
    assert registry.conversion_variants(["float16"]) == []
    assert registry.conversion_variants(kv_formats=[""]) == []
    only = registry.conversion_variants(page_sizes=[64], kv_formats=["group"], head_dims=HEAD_DIMS)
    assert len(only) == 2 + 1
    assert len(registry.conversion_variants(page_sizes=[64], kv_formats=["tensor"], head_dims=HEAD_DIMS)) == 2 * 6
    selected = warmup.selected(["bfloat16"], [64], ["prefill"], ["group"])
    assert set(only) <= set(selected)
    assert not set(only) & set(warmup.selected(["bfloat16"], [64], ["decode"], ["group"]))
    assert not set(only) & set(warmup.selected(["bfloat16"], [64], ["prefill"], [""]))


@pytest.mark.parametrize("kv_format", ["", *KV_FORMATS])
def test_explain_says_it(kv_format):
    found = mla_cute.explain(
        "prefill", num_heads=16, page_size=64, batch=4, q_len=2048, kv_format=kv_format, device="cpu"
    )
    assert found.selection.converts == (kv_format in ("tensor", "group"))
    assert ("behind one that converts the cache to 16 bits" in str(found)) == found.selection.converts


def test_a_selection_without_conversion_names_the_fp8_kernel():
    when = When("prefill", "group", False, 16, 64, 2048, 4, None)
    assert Selection(CONFIG, "default", None, when).kernel == "prefill_tile64_fp8"
