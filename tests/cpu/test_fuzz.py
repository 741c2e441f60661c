"""Hypothesis over the arguments of attention, plans and explain on the CPU; test_fuzz_cache.py has the other calls.

A valid call works and gives what an independent computation gives. A valid call with one argument replaced by a wrong
value raises TypeError or ValueError that begins with an argument's name, and writes nothing. Each example is a call
that is drawn; all wrong values are tried on it.
"""

import dataclasses
import fractions
import functools

import numpy
import pytest
import torch
from fuzz_case import (
    FLOATS_OF_NO_CACHE,
    NO_BASES,
    NO_BOOLS,
    NO_FORMATS,
    NO_SCALES,
    NO_TENSOR_SCALES,
    NO_TENSORS,
    as_bytes,
    assert_all_refused,
    fault,
    no_ints,
    snapshot,
    written,
    wrong_tensors,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mla_cute
from mla_cute import check, expect
from mla_cute.cli import soak
from mla_cute.testing.cases import CACHE_LAYOUTS, OUT_LAYOUTS, Q_LAYOUTS
from mla_cute.testing.fp8 import LAYOUTS, compare_fp8
from mla_cute.testing.verdict import compare

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
DTYPES = (torch.bfloat16, torch.float16)

fuzz = functools.partial(
    settings, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)

ATTENTION = {
    ("decode", "csr"): mla_cute.mla_paged_decode,
    ("decode", "block_table"): mla_cute.mla_paged_decode_block_table,
    ("prefill", "csr"): mla_cute.mla_paged_prefill,
    ("prefill", "block_table"): mla_cute.mla_paged_prefill_block_table,
}
EVERY_ATTENTION = pytest.mark.parametrize(("op", "entry"), ATTENTION)


@st.composite
def scenarios(draw, op, entry):
    """A small scenario of the soak; `index_offset` and `drift` are as there."""
    layout = draw(st.sampled_from(("", "", *LAYOUTS)))
    request = st.tuples(st.just(1) if op == "decode" else st.integers(0, 4), st.integers(0, 9))
    return soak.Scenario(
        seed=draw(st.integers(0, 1000)),
        op=op,
        kind="repeat",
        num_heads=draw(st.sampled_from((1, 2, 5, 17))),
        page_size=draw(st.sampled_from((1, 3, 4, 8))),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=layout,
        q_fp8=bool(layout) and draw(st.booleans()),
        steps=(tuple(draw(st.lists(request, min_size=1, max_size=3))),),
        causal=op == "prefill" and draw(st.booleans()),
        cache_layout=draw(st.sampled_from(CACHE_LAYOUTS)),
        q_layout=draw(st.sampled_from(Q_LAYOUTS)),
        out_layout=draw(st.sampled_from(OUT_LAYOUTS)),
        shared_pages=draw(st.sampled_from((0, 1))),
        drift=draw(st.sampled_from((0.0, 30.0))),
        index_offset=draw(st.sampled_from((0, 3))),
        entry=entry,
        with_plan=draw(st.booleans()),
        batch_invariant=draw(st.booleans()),
        lse_base=draw(st.sampled_from((2, "e"))),
        config=None,
    )


def plan_of(scenario, case):
    return soak.plan_of(scenario, soak.Subject(case, None, scenario.lse_base))


def call_of(scenario):
    """(subject, keyword arguments of the call, all of them)."""
    it = soak.subject(scenario, 0, CPU)
    case = it.case
    names = ["q_nope", "q_pe", "ckv_cache", "kpe_cache", "sm_scale", "out", "lse"]
    names += ["kv_indptr", "kv_indices", "kv_last_page_len"] if scenario.entry == "csr" else ["block_table", "seq_lens"]
    names += ["qo_indptr", "causal"] if scenario.op == "prefill" else []
    args = {name: getattr(case, name) for name in names}
    args |= {"ckv_scale": 1.0, "kpe_scale": 1.0, "q_scale": 1.0, "ckv_scale_arr": None}
    args |= it.fp8.scales if it.fp8 is not None else {}
    args |= {"lse_base": scenario.lse_base, "return_lse": True}
    args["plan"] = plan_of(scenario, case) if scenario.with_plan else None
    args |= {"config": None, "batch_invariant": scenario.batch_invariant}
    return it, args


# ------------------------------------------------------------------------------------------------ attention: valid


@EVERY_ATTENTION
def test_a_valid_attention_call_is_right(op, entry):
    @fuzz(max_examples=40)
    @given(scenarios(op, entry), st.data())
    def check(scenario, data):
        it, args = call_of(scenario)
        case = it.case
        expected = it.expected()
        # optional arguments may be left out
        for name in ("out", "lse"):
            if data.draw(st.booleans(), label=f"no {name}"):
                args[name] = None
        if args["out"] is None and scenario.q_fp8 and scenario.layout == "tensor":
            expected.dtype = torch.bfloat16
        if data.draw(st.booleans(), label="odd strides"):  # the CPU takes any
            for name in ("q_nope", "q_pe"):
                x = args[name]
                args[name] = as_bytes(x).repeat_interleave(2, -1).view(x.dtype)[..., ::2]
        convert = data.draw(st.sampled_from((float, numpy.float64, fractions.Fraction)), label="sm_scale")
        args["sm_scale"] = convert(args["sm_scale"])
        args["return_lse"] = data.draw(st.booleans(), label="return_lse")
        it.reset()
        inputs = snapshot({name: x for name, x in args.items() if name not in ("out", "lse")})
        result = ATTENTION[op, entry](**args)
        assert not written(inputs)
        out, lse = result if args["return_lse"] else (result, args["lse"])
        assert args["out"] is None or out is args["out"]
        rows = case.queries[-1]
        compare_rows = compare if it.fp8 is None else compare_fp8
        verdict = compare_rows(out[:rows], None if lse is None else lse[:rows], expected)
        assert verdict.ok, verdict
        if args["out"] is not None:
            assert case.guarded_out.intact(rows)
        if args["lse"] is not None:
            assert case.guarded_lse.intact(rows)

    check()


# ------------------------------------------------------------------------------------------------ attention: invalid


def wrong_attention(scenario, it, args):
    """(argument, what, value) of everything that the call has to refuse."""
    fp8, q_fp8, kv_format = bool(scenario.layout), scenario.q_fp8, scenario.layout.removesuffix("656")
    other = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}[scenario.dtype]
    # beside 16-bit caches and queries, every other one
    others = FLOATS_OF_NO_CACHE if fp8 else (*FLOATS_OF_NO_CACHE, other)
    for name in ("q_nope", "q_pe", "ckv_cache", "kpe_cache", "out"):
        yield from ((name, *x) for x in wrong_tensors(args[name], dtypes=others, optional=name == "out"))
    if fp8:
        yield "ckv_cache", "16-bit among e4m3", args["ckv_cache"].to(other)
    if fp8 and not q_fp8:
        yield "q_pe", "the other 16-bit dtype", args["q_pe"].to(other)
        yield "out", "the other 16-bit dtype", args["out"].to(other)
    yield from (("lse", *x) for x in wrong_tensors(args["lse"], dtypes=(torch.bfloat16, torch.float64), optional=True))
    for name in ("kv_indptr", "kv_last_page_len", "seq_lens", "qo_indptr"):
        if name in args:
            optional = name == "kv_last_page_len"
            yield from ((name, *x) for x in wrong_tensors(args[name], dtypes=(torch.int16,), optional=optional))
    if "kv_indices" in args:
        # more or fewer page ids than needed are no error of a shape
        yield from (("kv_indices", *x) for x in wrong_tensors(args["kv_indices"], widths=False, rows=False))
    if "block_table" in args:
        yield from (("block_table", *x) for x in wrong_tensors(args["block_table"], widths=False))

    for name in ("sm_scale", "ckv_scale", "kpe_scale", "q_scale"):
        takes_tensors = q_fp8 if name == "q_scale" else kv_format == "tensor" and name != "sm_scale"
        numbers = [x for x in NO_SCALES if not (takes_tensors and isinstance(x, torch.Tensor))]
        yield from ((name, repr(x)[:40], x) for x in (*numbers, *NO_TENSOR_SCALES))
    if kv_format != "tensor":
        yield from ((name, "2.0", 2.0) for name in ("ckv_scale", "kpe_scale"))
    if not q_fp8:
        yield "q_scale", "2.0", 2.0
    if kv_format in ("token", "group"):
        array = args["ckv_scale_arr"]
        yield from (
            ("ckv_scale_arr", what, x)
            for what, x in wrong_tensors(array, dtypes=(torch.bfloat16, torch.float64))
            if what != "wider" or array.shape[-1] != 3
        )
    else:
        yield "ckv_scale_arr", "not of this format", torch.ones(*args["ckv_cache"].shape[:2], 1)
        yield from (("ckv_scale_arr", type(x).__name__, x) for x in NO_TENSORS)

    yield from (("lse_base", repr(x), x) for x in NO_BASES)
    if "causal" in args:
        yield from (("causal", repr(x), x) for x in NO_BOOLS)
    yield from wrong_plans(scenario, it)
    yield from (("plan", repr(x), x) for x in (object(), True, "x"))
    yield from wrong_options()
    yield from wrong_outputs(args)


def wrong_outputs(args):
    """Memory that cannot be written one element at a time, or is read as well."""
    out, lse, q_nope = args["out"], args["lse"], args["q_nope"]
    rows, heads = lse.shape
    if rows > 1:
        yield "out", "expanded rows", out[:1].expand(out.shape)
        yield "lse", "expanded rows", lse[:1].expand(lse.shape)
    if heads > 1:
        yield "out", "expanded heads", out[:, :1].expand(out.shape)
    if rows > 1 and heads > 1:
        yield "lse", "transposed", lse.new_empty(heads, rows).T
    if rows and heads > 1:
        yield "lse", "every other", lse.new_empty(rows, 2 * heads)[:, ::2]
    if rows and q_nope.dtype is out.dtype:
        yield "out", "the queries", q_nope


def wrong_plans(scenario, it):
    """Of another shape, op or metadata form."""
    case = it.case
    for name, more in (("num_heads", 1), ("page_size", 1)):
        yield (
            "plan",
            f"other {name}",
            plan_of(scenario, dataclasses.replace(case, **{name: getattr(case, name) + more})),
        )
    other_form = dataclasses.replace(scenario, entry="csr" if scenario.entry == "block_table" else "block_table")
    yield "plan", "other form", plan_of(other_form, case)
    batch = torch.arange(len(case.lengths) + 2, dtype=torch.int32)
    sizes = {"num_heads": case.num_heads, "page_size": case.page_size}
    yield "plan", "other batch or form", mla_cute.plan_decode(batch, **sizes)
    total_q = case.q_nope.shape[0]
    yield "plan", "other batch, form or op", mla_cute.plan_prefill(batch, batch, total_q=total_q, **sizes)
    if scenario.op == "prefill":
        yield "plan", "other mask", plan_of(scenario, dataclasses.replace(case, causal=not case.causal))
        yield "plan", "other op", plan_of(dataclasses.replace(scenario, op="decode"), _as_decode(case))


def _as_decode(case):
    fields = {f.name: getattr(case, f.name) for f in dataclasses.fields(soak.DecodeCase)}
    return soak.DecodeCase(**fields)


@EVERY_ATTENTION
def test_a_wrong_argument_of_attention_is_refused(op, entry):
    @fuzz(max_examples=8)
    @given(scenarios(op, entry))
    def check(scenario):
        it, args = call_of(scenario)
        it.reset()
        assert_all_refused(ATTENTION[op, entry], args, wrong_attention(scenario, it, args))

    check()


def wrong_values(scenario, case, data):
    """(argument, what, value) of metadata whose values are undefined behaviour on a GPU."""

    def changed(name, at, value):
        x = getattr(case, name).clone()
        x[at] = value
        return name, f"[{at}] = {value}", x

    page_size, num_pages = scenario.page_size, case.ckv_cache.shape[0]
    bad_id = data.draw(st.sampled_from((-1, num_pages, 2**31 - 1)), label="page id")
    b = max(range(len(case.lengths)), key=case.lengths.__getitem__)
    has_pages = case.lengths[b] > 0
    if scenario.entry == "csr":
        last = case.kv_indptr[-1].item()
        yield changed("kv_indptr", 0, -1)
        yield changed("kv_indptr", -1, case.kv_indices.shape[0] + 1)
        if last > scenario.index_offset:
            yield changed("kv_indptr", 0, last + 1)
        if has_pages:
            yield changed("kv_indices", int(case.kv_indptr[b]), bad_id)
            for wrong in (0, -1, page_size + 1):
                yield changed("kv_last_page_len", b, wrong)
    else:
        yield changed("seq_lens", b, -1)
        yield changed("seq_lens", b, case.block_table.shape[1] * page_size + 1)
        if has_pages:
            yield changed("block_table", (b, 0), bad_id)
    if scenario.op == "prefill":
        yield changed("qo_indptr", 0, 1)
        yield changed("qo_indptr", -1, case.total_q + 1)


@EVERY_ATTENTION
def test_wrong_values_of_metadata_are_refused(op, entry):
    @fuzz(max_examples=25)
    @given(scenarios(op, entry), st.data())
    def check(scenario, data):
        it, args = call_of(scenario)
        it.reset()
        ATTENTION[op, entry](**args)
        it.reset()
        assert_all_refused(ATTENTION[op, entry], args, wrong_values(scenario, it.case, data))

    check()


# ------------------------------------------------------------------------------------------------ plans and explain

PLANS = {
    "plan_decode": ("kv_indptr", "kv_last_page_len", "num_kv_indices"),
    "plan_decode_block_table": ("seq_lens", "max_pages", "table_stride"),
    "plan_prefill": ("qo_indptr", "kv_indptr", "kv_last_page_len", "num_kv_indices", "total_q", "causal"),
    "plan_prefill_block_table": ("qo_indptr", "seq_lens", "max_pages", "table_stride", "total_q", "causal"),
}


@st.composite
def plan_args(draw, name):
    batch, kv_format = draw(st.integers(1, 5)), draw(st.sampled_from(("", "tensor", "token", "group")))
    indptr = torch.arange(batch + 1, dtype=torch.int32)
    values = {
        "kv_indptr": indptr,
        "qo_indptr": indptr.clone(),
        "seq_lens": indptr[1:].clone(),
        "kv_last_page_len": draw(st.sampled_from((None, torch.ones(batch, dtype=torch.int32)))),
        "num_kv_indices": draw(st.none() | st.integers(batch, 100)),
        "max_pages": draw(st.integers(0, 100)),
        "table_stride": draw(st.none() | st.integers(100, 200)),
        "total_q": draw(st.integers(batch, 50)),
        "causal": draw(st.booleans()),
    }
    return {key: values[key] for key in PLANS[name]} | {
        "num_heads": draw(st.integers(1, 128)),
        "page_size": draw(st.integers(1, 300)),
        "config": draw(st.sampled_from((None, mla_cute.KernelConfig(min_blocks=4)))),
        "batch_invariant": draw(st.booleans()),
        "kv_format": kv_format,
        "q_fp8": bool(kv_format) and draw(st.booleans()),
        "max_kv_len": draw(st.none() | st.integers(0, 10**6)),
    }


def wrong_options():
    yield from (("batch_invariant", repr(x), x) for x in NO_BOOLS)
    yield from (("config", repr(x), x) for x in ("x", 3, {}, mla_cute.KernelConfig(min_blocks=3)))


def wrong_hints(args):
    yield from (("num_heads", repr(x), x) for x in no_ints(1, 128))
    yield from (("page_size", repr(x), x) for x in no_ints(1))
    yield from (("max_kv_len", repr(x), x) for x in no_ints(0, optional=True))
    yield from (("kv_format", repr(x), x) for x in NO_FORMATS)
    yield from (("q_fp8", repr(x), x) for x in NO_BOOLS)
    if not args["kv_format"]:
        yield "q_fp8", "with a 16-bit cache", True


def wrong_plan_args(args):
    yield from wrong_hints(args)
    lengths = {"kv_indptr": "kv_last_page_len", "seq_lens": None}
    for name in ("kv_indptr", "qo_indptr", "seq_lens"):
        if name in args:
            # what fixes the batch may have any length
            fixed = "qo_indptr" in args or args.get(lengths.get(name) or "") is not None
            wrong = wrong_tensors(args[name], dtypes=(torch.int16, torch.float32), widths=fixed, rows=fixed)
            yield from ((name, *x) for x in wrong)
    if args.get("kv_last_page_len") is not None:
        yield from (("kv_last_page_len", *x) for x in wrong_tensors(args["kv_last_page_len"], optional=True))
    for name in ("max_pages", "total_q"):
        if name in args:
            yield from ((name, repr(x), x) for x in no_ints(0))
    if "causal" in args:
        yield from (("causal", repr(x), x) for x in NO_BOOLS)
    for name in ("table_stride", "num_kv_indices"):
        if name in args:
            yield from ((name, repr(x), x) for x in no_ints(0, optional=True))
    yield from wrong_options()


@pytest.mark.parametrize("name", PLANS)
def test_plans(name):
    function = getattr(mla_cute, name)

    @fuzz(max_examples=20)
    @given(plan_args(name))
    def check(args):
        plan = function(**args)
        batch = len(args["seq_lens"]) if "seq_lens" in args else len(args["kv_indptr"]) - 1
        assert (plan.batch, plan.num_heads, plan.page_size) == (batch, args["num_heads"], args["page_size"])
        assert plan.update() is plan
        assert_all_refused(function, args, wrong_plan_args(args), names=[*args, "device"])

    check()


@fuzz(max_examples=40)
@given(st.data())
def test_explain(data):
    op = data.draw(st.sampled_from(("decode", "prefill")))
    kv_format = data.draw(st.sampled_from(("", "tensor", "token", "group")))
    args = {
        "op": op,
        "num_heads": data.draw(st.integers(1, 128)),
        "page_size": data.draw(st.integers(1, 300)),
        "batch": data.draw(st.integers(1, 10**5)),
        "max_kv_len": data.draw(st.none() | st.integers(0, 10**7)),
        "q_len": 1 if op == "decode" else data.draw(st.integers(1, 10**5)),
        "kv_format": kv_format,
        "q_fp8": bool(kv_format) and data.draw(st.booleans()),
        "batch_invariant": data.draw(st.booleans()),
        "device": data.draw(st.sampled_from(("cpu", CPU))),
    }
    found = mla_cute.explain(**args)
    assert found.kernel == "float32 reference"
    assert found.selection.entry is None
    wrong = [("op", repr(x), x) for x in (None, "append", "", 3, [], b"decode", torch.tensor([1, 2]))]
    wrong += [(name, repr(x), x) for name in ("batch", "q_len") for x in no_ints(1)]
    wrong += [("batch_invariant", repr(x), x) for x in NO_BOOLS]
    if op == "decode":
        wrong.append(("q_len", "2", 2))
    wrong += [
        ("device", repr(x), x) for x in ("nonsense", 3.5, True, -1, *([] if torch.cuda.is_available() else ["cuda", 0]))
    ]
    assert_all_refused(mla_cute.explain, args, [*wrong_hints(args), *wrong])


# ------------------------------------------------------------------------------------------------ the judge


def test_what_is_no_refusal_is_told():
    x = torch.zeros(3)

    def call(x, how):
        if how == "writes":
            x.add_(1)
        raise {"index": IndexError("x: "), "subclass": UnicodeError("x: "), "no name": ValueError("size: wrong")}.get(
            how, ValueError("x: wrong")
        )

    for how, says in (
        ("writes", "memory was written"),
        ("index", "raised IndexError"),
        ("subclass", "raised UnicodeError"),
        ("no name", "names no argument"),
    ):
        assert says in fault(call, {"x": x, "how": how}, ["x", "how"])
    assert fault(call, {"x": x, "how": "well"}, ["x", "how"]) is None
    assert fault(lambda x: None, {"x": x}, ["x"]) == "was accepted"


def test_a_check_that_is_missing_shows(monkeypatch):
    """The wrong values find what they are for."""
    scenario = dataclasses.replace(soak.draw(0, False), op="decode", num_heads=2, page_size=4, causal=False)
    scenario = dataclasses.replace(scenario, steps=(((1, 5), (1, 0)),), entry="csr", kind="repeat", layout="")
    it, args = call_of(scenario)
    wrong = list(wrong_attention(scenario, it, args))
    assert_all_refused(mla_cute.mla_paged_decode, args, wrong)
    monkeypatch.setattr(check, "expect_scale", lambda name, x: None)
    monkeypatch.setattr(expect, "expect_device", lambda name, x, device: None)
    with pytest.raises(AssertionError, match=r"sm_scale: nan") as found:
        assert_all_refused(mla_cute.mla_paged_decode, args, wrong)
    assert "kv_indices: on the meta device" in str(found.value)
