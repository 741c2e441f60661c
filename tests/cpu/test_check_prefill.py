"""Prefill's bad arguments, plans and values: messages of argument, expectation and value, and outputs left alone."""

import re

import pytest
import torch
from call_case import check_prefill, check_prefill_block_table, prefill_problem
from limits import functions_run
from prefill_case import SmallPrefill, make_prefill

import mla_cute
from mla_cute import check as shared
from mla_cute import dims, launch, plan
from mla_cute.call import PREFILL, call_of
from mla_cute.compile import jit
from mla_cute.kernels import registry
from mla_cute.kernels.keys import FIXED_MAX_ITEMS, FIXED_MAX_PIECES, FIXED_MIN_BLOCKS
from mla_cute.plan_prefill import _invariant_items, _invariant_rows
from mla_cute.testing.cases import CACHE_LAYOUTS

TOTAL_Q, HEADS, PAGE_SIZE = 15, 16, 8
CHECKS = {"csr": check_prefill, "table": check_prefill_block_table}
CALLS = {"csr": mla_cute.mla_paged_prefill, "table": mla_cute.mla_paged_prefill_block_table}
FORMS = pytest.mark.parametrize("form", ["csr", "table"])


def small(**kwargs) -> SmallPrefill:
    """kv_indptr [0, 2, 2, 3, 6], 13 page ids, 9 pages, qo_indptr [0, 4, 6, 6, 15]."""
    return make_prefill([4, 2, 0, 9], [9, 0, 1, 24], num_heads=HEADS, page_size=PAGE_SIZE, **kwargs)


def zeros(*shape, dtype=torch.bfloat16, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def ints(*shape, dtype=torch.int32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


# argument, value to put there, exception, what the message has to say besides the argument's name at its start
BAD_BOTH = [
    ("q_nope", None, TypeError, "expected a torch.Tensor, got NoneType"),
    ("q_nope", zeros(15, 16, 512, dtype=torch.float32), TypeError, "torch.bfloat16 or torch.float16, got torch.fl"),
    ("q_nope", zeros(15, 512), ValueError, "expected shape [total_q, H, 512 or 256], got [15, 512]"),
    ("q_nope", zeros(15, 129, 512), ValueError, "expected 1 to 128 heads (dimension 1), got 129"),
    ("q_nope", zeros(15, 16, 512, device="meta"), ValueError, "got device meta"),
    ("q_pe", zeros(15, 16, 64, dtype=torch.float16), TypeError, "expected dtype torch.bfloat16 (that of q_nope)"),
    ("q_pe", zeros(14, 16, 64), ValueError, "expected shape [15, 16, 64], got [14, 16, 64]"),
    ("q_pe", zeros(4, 16, 64), ValueError, "expected shape [15, 16, 64], got [4, 16, 64]"),
    ("ckv_cache", zeros(160, 512), ValueError, "expected shape [num_pages, page_size, 512], got [160, 512]"),
    (
        "q_nope",
        zeros(15, 16, 512).to(torch.float8_e4m3fn),
        TypeError,
        "with a 16-bit ckv_cache, got torch.float8_e4m3fn",
    ),
    ("ckv_cache", zeros(20, 8, 512).to(torch.float8_e5m2), TypeError, "got torch.float8_e5m2"),
    (
        "kpe_cache",
        zeros(9, 8, 64).to(torch.float8_e4m3fn),
        TypeError,
        "torch.bfloat16 (that of q_nope), got torch.float8",
    ),
    ("ckv_scale", 2.0, ValueError, "expected 1.0 with a 16-bit ckv_cache, got 2.0"),
    ("kpe_scale", torch.ones(()), TypeError, "expected a Python number, got a torch.Tensor of torch.float32"),
    ("q_scale", 0.5, ValueError, "expected 1.0 with 16-bit queries, got 0.5"),
    ("ckv_scale_arr", zeros(9, 8, 4, dtype=torch.float32), ValueError, "expected None with a 16-bit ckv_cache, got a"),
    ("kpe_cache", lambda case: case.caches.kpe_cache[1:], ValueError, "expected shape [9, 8, 64], got [8, 8, 64]"),
    ("qo_indptr", [0, 4, 6, 6, 15], TypeError, "expected a torch.Tensor, got list"),
    ("qo_indptr", None, TypeError, "expected a torch.Tensor, got NoneType"),
    ("qo_indptr", ints(5, dtype=torch.int64), TypeError, "expected dtype torch.int32, got torch.int64"),
    ("qo_indptr", ints(0), ValueError, "expected shape [batch + 1], got [0]"),
    ("qo_indptr", ints(5, 1), ValueError, "expected shape [batch + 1], got [5, 1]"),
    ("qo_indptr", torch.tensor(0, dtype=torch.int32), ValueError, "expected shape [batch + 1], got []"),
    ("qo_indptr", ints(5, device="meta"), ValueError, "expected device cpu (that of q_nope), got meta"),
    ("sm_scale", "0.1", TypeError, "expected a Python number, got str '0.1'"),
    ("sm_scale", -0.07, ValueError, "expected a positive number from 2^-126 to 2^126, got -0.07"),
    ("causal", 1, TypeError, "expected True or False, got int 1"),
    ("causal", None, TypeError, "expected True or False, got NoneType None"),
    ("causal", torch.tensor(True), TypeError, "expected True or False, got a torch.Tensor of torch.bool"),
    ("lse_base", 10, ValueError, "expected 2 or 'e', got 10"),
    ("out", zeros(4, 16, 512), ValueError, "expected shape [15, 16, 512], got [4, 16, 512]"),
    ("out", zeros(15, 16, 512, dtype=torch.float32), TypeError, "expected dtype torch.bfloat16 (that of q_nope)"),
    ("out", lambda case: case.q_nope, ValueError, "expected memory of its own, got the memory of q_nope"),
    ("lse", zeros(15, 16), TypeError, "expected dtype torch.float32, got torch.bfloat16"),
    ("lse", zeros(4, 16, dtype=torch.float32), ValueError, "expected shape [15, 16], got [4, 16]"),
    ("lse", zeros(16, 15, dtype=torch.float32).T, ValueError, "expected a contiguous tensor, got strides [1, 15]"),
]
BAD_CSR = [
    ("kv_indptr", ints(5, dtype=torch.int64), TypeError, "expected dtype torch.int32, got torch.int64"),
    ("kv_indptr", ints(16), ValueError, "expected shape [5], got [16]"),
    ("kv_indptr", lambda case: case.caches.kv_indptr[:4], ValueError, "expected shape [5], got [4]"),
    ("kv_indices", None, TypeError, "expected a torch.Tensor, got NoneType"),
    ("kv_indices", ints(4, 9), ValueError, "expected shape [num_kv_indices], got [4, 9]"),
    ("kv_last_page_len", ints(15), ValueError, "expected shape [4], got [15]"),
    ("kv_last_page_len", 8, TypeError, "expected a torch.Tensor, got int 8"),
    ("qo_indptr", ints(6), ValueError, "expected shape"),  # says kv_indptr: the batch is qo_indptr's
]
BAD_TABLE = [
    ("block_table", ints(15, 6), ValueError, "expected shape [4, max_pages], got [15, 6]"),
    ("block_table", ints(4, 6, dtype=torch.int64), TypeError, "expected dtype torch.int32, got torch.int64"),
    ("seq_lens", ints(15), ValueError, "expected shape [4], got [15]"),
    ("seq_lens", [9, 0, 1, 24], TypeError, "expected a torch.Tensor, got list"),
]
BAD = [("csr", *row) for row in BAD_BOTH + BAD_CSR] + [("table", *row) for row in BAD_BOTH + BAD_TABLE]


@pytest.mark.parametrize(
    ("form", "name", "value", "exception", "says"), BAD, ids=[f"{row[0]}-{row[1]}-{i}" for i, row in enumerate(BAD)]
)
def test_bad_argument(form, name, value, exception, says):
    case = small()
    call = getattr(case, form) | case.results
    call[name] = value(case) if callable(value) else value
    named = "kv_indptr" if name == "qo_indptr" and says == "expected shape" else name
    for function in (CHECKS[form], CALLS[form]):
        with pytest.raises(exception, match=f"^{named}: .*{re.escape(says)}") as caught:
            function(**call)
        assert type(caught.value) is exception
        assert case.untouched()


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("early_exit", [True, False])
def test_legal_calls_pass(monkeypatch, form, dtype, early_exit):
    """With the early exit taken out as well: what it accepts, the explanation has to accept."""
    if not early_exit:
        monkeypatch.setattr(shared, "_usual", lambda *arguments: None)
    for causal in (True, False):
        for layout in CACHE_LAYOUTS:
            case = small(dtype=dtype, cache_layout=layout, fused_q=layout == "padded", spare_q=len(layout) - 5)
            total_q, num_pages = case.q_nope.shape[0], case.caches.ckv_cache.shape[0]
            want = prefill_problem(4, total_q, HEADS, PAGE_SIZE, num_pages, causal, dtype, torch.device("cpu"))
            call = getattr(case, form) | {"causal": causal}
            assert CHECKS[form](**call | case.results) == want
            assert CHECKS[form](**call) == want
            assert CHECKS[form](**call) is CHECKS[form](**call), "a plan compares problems by identity"
            assert case.untouched()


@pytest.mark.parametrize("lengths", [([], []), ([0], [0]), ([1], [0]), ([0, 0], [4, 0])])
def test_batches_at_the_edges(lengths):
    case = make_prefill(*lengths, num_heads=1, page_size=1)
    problem = check_prefill(**case.csr)
    assert (problem.batch, problem.total_q) == (len(lengths[0]), sum(lengths[0]))
    assert check_prefill_block_table(**case.table) == problem


@FORMS
def test_gpu_queries_may_be_evenly_spaced_or_not(form):
    case = small(fused_q=True)
    on_gpu = type("OnGpu", (torch.Tensor,), {"is_cuda": True})
    call = getattr(case, form)
    call |= {name: x.as_subclass(on_gpu) for name, x in call.items() if isinstance(x, torch.Tensor)}
    assert CHECKS[form](**call).total_q == TOTAL_Q
    call["q_nope"] = torch.zeros(15, 17, 512, dtype=torch.bfloat16)[:, :16].as_subclass(on_gpu)
    assert CHECKS[form](**call).total_q == TOTAL_Q
    call["qo_indptr"] = ints(10)[::2].as_subclass(on_gpu)
    with pytest.raises(ValueError, match=r"^qo_indptr: expected stride 1 in the last dimension, got strides \[2\]"):
        CHECKS[form](**call)


def test_a_usual_call_is_checked_by_few_functions():
    case = small()
    names = ("q_nope", "q_pe", "ckv_cache", "kpe_cache", "qo_indptr", "kv_indptr", "kv_indices")
    call = call_of(PREFILL, *(case.csr[name] for name in names), 0.1)
    assert functions_run(lambda: shared.check(call)) < 25, "13 with Python 3.11"


# ------------------------------------------------------------------------------------------------ values on the device

BAD_VALUES = [
    ("csr", "qo_indptr", 0, 1, "qo_indptr: expected 0 at position 0, got 1"),
    ("csr", "qo_indptr", 0, -1, "qo_indptr: expected 0 at position 0, got -1"),
    ("csr", "qo_indptr", 2, 3, "qo_indptr: expected values that never decrease, got 3 at position 2"),
    ("csr", "qo_indptr", 4, 1 - 2**31, "qo_indptr: expected values that never decrease, got -2147483647 at position 4"),
    ("csr", "qo_indptr", 4, 16, "qo_indptr: expected values <= 15 (the query tokens of q_nope), got 16 at position 4"),
    ("csr", "kv_indptr", 2, 1, "kv_indptr: expected values that never decrease, got 1 at position 2"),
    ("csr", "kv_indptr", 4, 14, "kv_indptr: expected values <= 13 (the length of kv_indices), got 14 at position 4"),
    ("csr", "kv_indices", 5, 10, "kv_indices: expected page ids in [0, 9), got 10 at position 5"),
    ("csr", "kv_last_page_len", 0, 9, "kv_last_page_len: expected values in [1, 8] for requests with pages, got 9"),
    ("table", "qo_indptr", 0, 2, "qo_indptr: expected 0 at position 0, got 2"),
    ("table", "qo_indptr", 3, 5, "qo_indptr: expected values that never decrease, got 5 at position 3"),
    ("table", "qo_indptr", 4, 99, "qo_indptr: expected values <= 15"),
    ("table", "seq_lens", 3, 49, "seq_lens: expected values in [0, 48] (max_pages * page_size), got 49"),
    ("table", "block_table", (3, 2), 9, "block_table: expected page ids in [0, 9), got 9 at position [3, 2]"),
]


@pytest.mark.parametrize("by_plan", [False, True], ids=["no_plan", "plan"])
@pytest.mark.parametrize("check", ["0", "1"])
@pytest.mark.parametrize(("form", "name", "position", "value", "says"), BAD_VALUES)
def test_values_are_verified(monkeypatch, form, name, position, value, says, check, by_plan):
    """Without MLA_CUTE_CHECK too."""
    case = small()
    monkeypatch.setenv("MLA_CUTE_CHECK", check)
    keywords = case.results | ({"plan": plan_of(case, form)} if by_plan else {})
    if by_plan:
        assert keywords["plan"].verifies == (check == "1")
        monkeypatch.delenv("MLA_CUTE_CHECK")
    call = getattr(case, form)
    CALLS[form](**call, **keywords)
    case.guarded_out.reset()
    case.guarded_lse.reset()
    call[name][position] = value
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        CALLS[form](**call, **keywords)
    assert case.untouched()


@pytest.mark.parametrize("check", ["0", "1"])
def test_spare_queries_and_empty_batches_are_legal(monkeypatch, check):
    monkeypatch.setenv("MLA_CUTE_CHECK", check)
    for case in (small(spare_q=3), small(index_offset=3), make_prefill([], [], num_heads=1, page_size=4)):
        mla_cute.mla_paged_prefill(**case.csr)
        mla_cute.mla_paged_prefill_block_table(**case.table)


# ------------------------------------------------------------------------------------------------ plans


def plan_of(case: SmallPrefill, form: str, **change) -> mla_cute.PrefillPlan:
    arguments = {"num_heads": case.caches.num_heads, "page_size": case.caches.page_size, "total_q": len(case.q_nope)}
    arguments |= {name: case.table[name] for name in ("qo_indptr", "seq_lens")} if form == "table" else {}
    if form == "table":
        table = case.caches.block_table
        arguments |= {"max_pages": table.shape[1], "table_stride": table.stride(0)}
        return mla_cute.plan_prefill_block_table(**arguments | change)
    arguments |= {name: case.csr[name] for name in ("qo_indptr", "kv_indptr", "kv_last_page_len")}
    return mla_cute.plan_prefill(**arguments | change)


@FORMS
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_heads": 8}, "plan for num_heads 16, got one for num_heads 8"),
        ({"page_size": 16}, "plan for page_size 8, got one for page_size 16"),
        ({"total_q": 20}, "plan for total_q 15, got one for total_q 20"),
        ({"causal": False}, "plan for causal True, got one for causal False"),
    ],
)
def test_plan_for_another_problem_is_refused(form, change, says):
    case = small()
    with pytest.raises(ValueError, match=f"^plan: expected a {says}"):
        CALLS[form](**getattr(case, form), **case.results, plan=plan_of(case, form, **change))
    assert case.untouched()


def test_plan_of_another_batch_is_refused():
    other = make_prefill([15], [9], num_heads=HEADS, page_size=PAGE_SIZE)
    case = small()
    with pytest.raises(ValueError, match=r"^plan: expected a plan for batch 4, got one for batch 1"):
        mla_cute.mla_paged_prefill(**case.csr, plan=plan_of(other, "csr"))


def test_plans_of_other_calls_are_refused():
    case = make_prefill([1] * 4, [9, 0, 1, 24], num_heads=HEADS, page_size=PAGE_SIZE)
    caches = case.caches
    decode = mla_cute.plan_decode(caches.kv_indptr, num_heads=HEADS, page_size=PAGE_SIZE)
    prefill, by_table = plan_of(case, "csr"), plan_of(case, "table")
    mla_cute.mla_paged_prefill(**case.csr, plan=prefill)
    for call, arguments, given, wanted, got in (
        (mla_cute.mla_paged_prefill, case.csr, by_table, "plan_prefill", "plan_prefill_block_table"),
        (mla_cute.mla_paged_prefill_block_table, case.table, prefill, "plan_prefill_block_table", "plan_prefill"),
        (mla_cute.mla_paged_prefill, case.csr, decode, "plan_prefill", "plan_decode"),
        (mla_cute.mla_paged_prefill_block_table, case.table, decode, "plan_prefill_block_table", "plan_decode"),
    ):
        with pytest.raises(ValueError, match=f"^plan: expected a plan from {wanted}, got one from {got}$"):
            call(**arguments, plan=given)
    with pytest.raises(ValueError, match=r"^plan: expected a plan from plan_decode, got one from plan_prefill$"):
        mla_cute.mla_paged_decode(*caches.csr_args, plan=prefill)


INDPTR = torch.zeros(5, dtype=torch.int32)
BAD_PLANS = [
    ({"qo_indptr": [0, 1]}, TypeError, "qo_indptr"),
    ({"qo_indptr": INDPTR.long()}, TypeError, "qo_indptr"),
    ({"qo_indptr": INDPTR[:0]}, ValueError, "qo_indptr"),
    ({"num_heads": 129}, ValueError, "num_heads"),
    ({"num_heads": 16.0}, TypeError, "num_heads"),
    ({"page_size": 0}, ValueError, "page_size"),
    ({"total_q": -1}, ValueError, "total_q"),
    ({"total_q": None}, TypeError, "total_q"),
    ({"causal": 1}, TypeError, "causal"),
]


@pytest.mark.parametrize(
    ("change", "exception", "named"),
    [
        *BAD_PLANS,
        ({"kv_indptr": INDPTR[:4]}, ValueError, "kv_indptr"),
        ({"kv_indptr": INDPTR.long()}, TypeError, "kv_indptr"),
        ({"kv_last_page_len": INDPTR}, ValueError, "kv_last_page_len"),
    ],
)
def test_bad_plan_arguments(change, exception, named):
    arguments = {"qo_indptr": INDPTR, "kv_indptr": INDPTR, "num_heads": 16, "page_size": 64, "total_q": 9}
    with pytest.raises(exception, match=f"^{named}: expected "):
        mla_cute.plan_prefill(**arguments | change)


@pytest.mark.parametrize(
    ("change", "exception", "named"),
    [
        *BAD_PLANS,
        ({"seq_lens": INDPTR}, ValueError, "seq_lens"),
        ({"seq_lens": INDPTR[:4].long()}, TypeError, "seq_lens"),
        ({"max_pages": -1}, ValueError, "max_pages"),
    ],
)
def test_bad_block_table_plan_arguments(change, exception, named):
    arguments = {"qo_indptr": INDPTR, "seq_lens": INDPTR[:4], "num_heads": 16, "page_size": 64, "total_q": 9}
    with pytest.raises(exception, match=f"^{named}: expected "):
        mla_cute.plan_prefill_block_table(**arguments | {"max_pages": 2} | change)


@pytest.fixture
def launches(monkeypatch):
    """Plans on the meta device allocate as on a GPU of 132 SMs; what they would launch is recorded."""
    recorded = []
    monkeypatch.setattr(plan, "num_sms", lambda device: 132)
    monkeypatch.setattr(jit, "get", lambda kernel, key, config: lambda *arguments: recorded.append((kernel, arguments)))
    return recorded


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_workspace_and_what_the_planner_gets(launches, batch_invariant):
    qo_indptr, kv_indptr = ints(5, device="meta"), ints(5, device="meta")
    made = mla_cute.plan_prefill(
        qo_indptr, kv_indptr, num_heads=128, page_size=64, total_q=1000, batch_invariant=batch_invariant
    )
    tiles = 2000 + 4
    items = -(-(tiles + (128 * 4 if batch_invariant else 4 * 132)) // 132) * 132
    assert made.max_tiles == tiles
    assert made.table.shape == (132 + tiles + items, 8)
    assert made.part.shape == (128 * 4 * 64 if batch_invariant else 4 * 132 * 64, dims.PART_ROW)
    assert made.workspace_bytes > made.part.nbytes
    assert made.grid == (132, tiles, made.merge_x, made.merge_y)
    assert made.merge_x * made.merge_y <= 2 * 132
    made.has_work = True
    made.update()
    ((kernel, arguments),) = launches
    assert kernel is registry.PREFILL_PLANNER
    assert arguments[:4] == (qo_indptr, kv_indptr, kv_indptr, made.table)
    assert arguments[4].shape == (8, 5)
    config = made.config
    assert arguments[5:] == (
        132, 64, 0, 128, config.min_blocks, config.item_overhead, config.split_penalty, 1, tiles
    )  # fmt: skip


def even_up(n):
    return n + n % 2


@pytest.mark.parametrize("known_length", [False, True])
@pytest.mark.parametrize("num_heads", [1, 16, 128])
def test_invariant_bounds_hold(num_heads, known_length):
    """Against the rule itself, for the longest prompts and contexts there are room for."""
    for q_lens in ([1], [1] * 40, [4, 500, 3], [64, 64], [8, 0, 33], [2000]):
        for kv_len in (0, 64, 1000, 1025, 16400, 100000):
            total_q, batch = sum(q_lens), len(q_lens)
            max_tiles = -(-total_q * num_heads // 64) + batch
            room = kv_len if known_length else None
            max_items = _invariant_items(batch, max_tiles, room)
            max_rows, per_round = _invariant_rows(batch, num_heads, total_q, room)
            assert per_round == batch
            items = rows = 0
            blocks = 2 * -(-kv_len // 128)
            for q_len in q_lens:
                tiles = -(-q_len * num_heads // 64)
                for m in range(tiles if blocks else 0):
                    width = max(1, min(FIXED_MAX_ITEMS // tiles, FIXED_MAX_PIECES))
                    size = max(even_up(-(-blocks // width)), FIXED_MIN_BLOCKS) if width > 1 else blocks
                    pieces = -(-blocks // size)
                    items += pieces
                    rows += pieces * min(64, q_len * num_heads - 64 * m) if pieces > 1 else 0
            assert items <= max_items
            assert rows <= max_rows


def test_rows_are_made_even_where_they_are_not():
    q = torch.randn(6, 4, 512)
    even = torch.randn(6, 4, 576)[..., :512]
    assert launch._even_rows(q) is q
    assert launch._even_rows(even) is even
    cases = (
        torch.randn(6, 5, 512)[:, :4],
        q.transpose(0, 1),
        q[:1].as_strided((1, 4, 512), (7, 512, 1)),
        q[:, 0].as_strided((6, 1, 512), (2048, 8, 1)),
        q[:, 0].contiguous().as_strided((6, 1, 512), (512, 8, 1)),
    )
    for uneven in cases:
        got = launch._even_rows(uneven)
        assert got.stride(0) == got.shape[1] * got.stride(1)
        assert got.stride(2) == 1
        assert torch.equal(got, uneven)


# ------------------------------------------------------------------------------------------------ the registry


def test_variants_by_op():
    everything = registry.variants()
    decode, prefill = registry.variants(ops=("decode",)), registry.variants(ops=("prefill",))
    assert everything == decode + prefill
    keys = {kernel: {key for of, key, _ in decode if of is kernel} for kernel, _, _ in decode}
    steps = {registry.DecodeKey(d, b) for d in registry.DTYPES for b in registry.BOX_ROWS}
    assert set(keys) == {registry.DECODE, registry.DECODE_TILE16, registry.PLANNER}
    assert keys[registry.DECODE] == keys[registry.DECODE_TILE16] == steps
    keys = {kernel: {key for of, key, _ in prefill if of is kernel} for kernel, _, _ in prefill}
    assert keys == {
        registry.PREFILL: {registry.PrefillKey(d, b) for d in registry.DTYPES for b in registry.BOX_ROWS},
        registry.PREFILL_PLANNER: {
            registry.PrefillPlannerKey(lengths, invariant)
            for lengths in registry.LENGTHS
            for invariant in (False, True)
        },
    }
    assert len(registry.variants(dtypes=("bfloat16",), page_sizes=(64, 1), ops=("prefill",))) == 2 + 1 + 6
    with pytest.raises(ValueError, match=r"^kv_formats: expected names from \('', 'tensor', .*got \['block'\]"):
        registry.variants(kv_formats=("block",))
    with pytest.raises(ValueError, match=r"^ops: expected names from \('decode', 'prefill'\), got \['append'\]"):
        registry.variants(ops=("decode", "append"))
