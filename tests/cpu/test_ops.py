"""mla_cute.ops on CPU tensors: torch's checks of the ops, torch.compile, and the public calls' results and errors."""

import gc
import inspect
import itertools
import subprocess
import sys

import append_case
import fp8_case
import prefill_case
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mla_cute
from mla_cute.testing.cases import make_case

OPS = torch.ops.mla_cute
ENTRIES = ("mla_paged_decode", "mla_paged_decode_block_table", "mla_paged_prefill", "mla_paged_prefill_block_table")
CALLS = (*ENTRIES, "append_to_cache", "merge_states")
FORMATS = ("bf16", "fp16", "fp8_tensor", "fp8_tensor_q8", "fp8_token", "fp8_group", "fp8_group656_q8")
LENGTHS = (9, 0, 1, 24, 30)
# No two sizes are equal by chance: dynamic shapes make one symbol of those that are, and compile again when they are
# not any more.
NUM_HEADS, PAGE_SIZE = 3, 13
SIZES = {"num_heads": NUM_HEADS, "page_size": PAGE_SIZE, "num_pages": 41, "max_pages": 23}


def arguments(entry, kind="bf16", lengths=LENGTHS):
    """Keywords of a good call, poisoned outside what it may read; every optional tensor that the entry has is given."""
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    sizes = SIZES | {"dtype": dtype}
    if "prefill" in entry:
        small = prefill_case.make_prefill([min(n, 5) for n in lengths[:-1]] + [0], lengths, **sizes)
        case, found = small.caches, small.table if "block_table" in entry else small.csr
        q = found["q_nope"], found["q_pe"]
    else:
        case, q = make_case(lengths, **sizes), None
        pages = (
            ("block_table", "seq_lens") if "block_table" in entry else ("kv_indptr", "kv_indices", "kv_last_page_len")
        )
        names = ("q_nope", "q_pe", "ckv_cache", "kpe_cache", "sm_scale", *pages)
        found = {name: getattr(case, name) for name in names}
    if kind.startswith("fp8"):
        _, layout, *q_fp8 = kind.split("_")
        fp8 = fp8_case.make_fp8(case, layout, bool(q_fp8), q)
        found = found | fp8.tensors | fp8.scales
    return found


def other_options(entry):
    options = {"lse_base": "e", "batch_invariant": True, "config": mla_cute.KernelConfig(min_blocks=4)}
    return options | {"causal": False} if "prefill" in entry else options


def for_op(keywords):
    """What the op takes for these keywords of a public call."""
    keywords = dict(keywords)
    if "lse_base" in keywords:
        keywords["natural_lse"] = keywords.pop("lse_base") == "e"
    if "config" in keywords:
        keywords["config"] = str(keywords["config"].to_dict())
    return keywords


def with_positions(op, keywords):
    """(args, kwargs) as the schema has them."""
    keywords = for_op(keywords)
    names = [a.name for a in op._schema.arguments if not a.kwarg_only]
    return tuple(keywords.pop(name) for name in names), keywords


def new_outputs(keywords):
    rows, heads, _ = keywords["q_nope"].shape
    dtype = keywords["q_pe"].dtype
    dtype = torch.float16 if dtype is torch.float8_e4m3fn else dtype  # not what would be allocated
    return {"out": torch.full((rows, heads, 512), 7.0, dtype=dtype), "lse": torch.full((rows, heads), 7.0)}


def same_bits(a, b):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# ------------------------------------------------------------------------------------------------ torch's own checks

ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def check_op(op, keywords):
    args, kwargs = with_positions(op, keywords)
    fp8 = any(isinstance(x, torch.Tensor) and x.dtype is torch.float8_e4m3fn for x in (*args, *kwargs.values()))
    # test_schema compares inputs before and after with arithmetic that torch does not have for e4m3 on the CPU; the
    # schema is that of the 16-bit call, and what is written is compared bit for bit below.
    utils = ALL_CHECKS[1:] if fp8 else ALL_CHECKS
    assert torch.library.opcheck(op, args, kwargs, test_utils=utils) == dict.fromkeys(utils, "SUCCESS")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["default", "out"])
@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        *((ENTRIES[0], kind) for kind in FORMATS),
        *((entry, kind) for entry in ENTRIES[1:] for kind in ("bf16", "fp8_group656_q8")),
    ],
)
def test_opcheck(entry, kind, form):
    keywords = arguments(entry, kind)
    if form == "out":
        keywords |= new_outputs(keywords)
    op = getattr(getattr(OPS, entry), form)
    check_op(op, keywords | other_options(entry))
    if kind == "bf16":
        check_op(op, keywords)


@pytest.mark.parametrize("dtype", append_case.DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["16bit", "16bit_fused", "tensor_fused", "token", "group_656"])
def test_opcheck_append(layout, dtype):
    cache = append_case.Cache(layout, dtype)
    ckv, kpe = append_case.make_tokens(9, dtype)
    tensors = dict(zip(("ckv", "kpe", "ckv_cache", "kpe_cache"), (ckv, kpe, *cache.args()), strict=True))
    slots = append_case.make_slots(9, torch.int32)
    check_op(OPS.append_to_cache.default, tensors | {"slot_mapping": slots} | cache.keywords())


def make_states(dtype=torch.bfloat16, tokens=5):
    generator = torch.Generator().manual_seed(tokens)
    o = [torch.randn(tokens, NUM_HEADS, 512, generator=generator).to(dtype) for _ in range(2)]
    lse = [torch.randn(tokens, NUM_HEADS, generator=generator) for _ in range(2)]
    lse[0][0] = lse[0][1] = lse[1][1] = -torch.inf
    return {"o_a": o[0], "lse_a": lse[0], "o_b": o[1], "lse_b": lse[1]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_opcheck_merge_states(dtype):
    states = make_states(dtype)
    for lse_base in (2, "e"):
        check_op(OPS.merge_states.default, states | {"lse_base": lse_base})
        out = {"out": torch.empty_like(states["o_a"]), "lse": torch.empty_like(states["lse_a"])}
        check_op(OPS.merge_states.out, states | out | {"lse_base": lse_base})


def test_queries_that_require_grad():
    """A model outside of no_grad: no gradient is recorded, compiled or not, as by the direct call."""
    keywords = arguments("mla_paged_decode")
    keywords["q_nope"].requires_grad_()
    check_op(OPS.mla_paged_decode.default, keywords)
    compiled = torch.compile(lambda: mla_cute.mla_paged_decode(**keywords), fullgraph=True, backend="aot_eager")
    for call in (
        lambda: mla_cute.mla_paged_decode(**keywords),
        lambda: OPS.mla_paged_decode(**for_op(keywords)),
        compiled,
    ):
        assert not any(x.requires_grad for x in call())


# ------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_ops_compute_what_the_calls_do(entry, kind):
    keywords = arguments(entry, kind)
    before = {name: x.clone() for name, x in keywords.items() if isinstance(x, torch.Tensor)}
    direct, through_op = getattr(mla_cute, entry), getattr(mla_cute.ops, entry)
    for options in ({}, other_options(entry)):
        want_out, want_lse = direct(**keywords, **options)
        assert not want_out.isnan().any()
        out, lse = through_op(**keywords, **options)
        assert same_bits(out, want_out)
        assert same_bits(lse, want_lse)
        assert same_bits(through_op(**keywords, **options, return_lse=False), want_out)
        for given in (("out",), ("lse",), ("out", "lse")):
            written = {name: x for name, x in new_outputs(keywords).items() if name in given}
            want = [x.clone() for x in direct(**keywords, **options, **{n: x.clone() for n, x in written.items()})]
            got = dict(zip(("out", "lse"), through_op(**keywords, **options, **written), strict=True))
            assert all(got[name] is written[name] for name in given)
            assert all(same_bits(a, b) for a, b in zip(got.values(), want, strict=True))
    assert all(same_bits(keywords[name], x) for name, x in before.items()), "an input was written"


@pytest.mark.parametrize("layout", ["16bit", "tensor_fused", "token", "group_656"])
def test_append_writes_what_the_call_does(layout):
    cache = append_case.Cache(layout, torch.bfloat16)
    ckv, kpe = append_case.make_tokens(20, torch.bfloat16)
    slots = append_case.make_slots(20, torch.int64)
    expected = cache.appended(ckv, kpe, slots)
    assert mla_cute.ops.append_to_cache(ckv, kpe, *cache.args(), slots, **cache.keywords()) is None
    cache.assert_equal(expected)


def test_merge_through_the_op():
    states = make_states()
    want = mla_cute.merge_states(**states, lse_base="e")
    assert all(map(same_bits, mla_cute.ops.merge_states(**states, lse_base="e"), want))
    out, lse = torch.empty_like(want[0]), torch.empty_like(want[1])
    for given in ({"out": out}, {"lse": lse}, {"out": out, "lse": lse}):
        got = dict(zip(("out", "lse"), mla_cute.ops.merge_states(**states, lse_base="e", **given), strict=True))
        assert all(got[name] is x for name, x in given.items())
        assert all(map(same_bits, got.values(), want))


@pytest.mark.parametrize("name", CALLS)
def test_signatures_are_the_public_ones(name):
    direct, through_op = getattr(mla_cute, name), getattr(mla_cute.ops, name)
    assert through_op is not direct
    assert inspect.signature(through_op) == inspect.signature(direct)
    assert through_op.__doc__ == direct.__doc__


# ------------------------------------------------------------------------------------------------ torch.compile


def compiled(function, compilations=1):
    """The compiled function, which may be compiled in its first calls only."""
    torch._dynamo.reset()
    run = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    calls = itertools.count()

    def call(*args):
        with torch.compiler.set_stance("default" if next(calls) < compilations else "fail_on_recompile"):
            return run(*args)

    return call


BATCHES = ((9, 0, 1, 24, 30), (9, 17), (3,) * 9, (8, 1, 64, 0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entry", "kind"),
    [*((entry, "bf16") for entry in ENTRIES), (ENTRIES[1], "fp8_tensor_q8"), (ENTRIES[2], "fp8_group656")],
)
def test_compiles_once_for_every_batch(entry, kind):
    """The public call, between other work, in a full graph: one compilation serves all batches and pages."""
    direct = getattr(mla_cute, entry)

    def layer(keywords):
        out, lse = direct(**keywords, **other_options(entry))
        return out * 2, lse + 1

    run = compiled(layer)
    for lengths in BATCHES:
        keywords = arguments(entry, kind, lengths)
        assert all(map(same_bits, run(keywords), layer(keywords))), lengths


@pytest.mark.slow
@pytest.mark.parametrize("given", [("out",), ("lse",), ("out", "lse")], ids="_".join)
@pytest.mark.parametrize("entry", ENTRIES)
def test_compiled_calls_write_their_outputs(entry, given):
    def layer(keywords, outputs):
        out = getattr(mla_cute, entry)(**keywords, **outputs, return_lse=False)
        return out + 1

    run = compiled(layer)
    for lengths in BATCHES[:3]:
        keywords = arguments(entry, "bf16", lengths)
        want = getattr(mla_cute, entry)(**keywords)
        outputs = {name: x for name, x in new_outputs(keywords).items() if name in given}
        assert same_bits(run(keywords, outputs), want[0] + 1)
        for name, x in outputs.items():
            assert same_bits(x, want[name == "lse"])


@pytest.mark.parametrize("kind", ["bf16", "fp8_tensor"])
def test_a_step_compiles(kind):
    """Append into views of one fused cache, attend, merge with a second part: what reads comes after what writes."""
    entry = "mla_paged_decode_block_table"

    def step(new, slots, fused, rest, scales):
        ckv_cache, kpe_cache = fused[..., :512], fused[..., 512:]
        mla_cute.append_to_cache(new[:, :512], new[:, 512:], ckv_cache, kpe_cache, slots, **scales)
        part = mla_cute.mla_paged_decode_block_table(ckv_cache=ckv_cache, kpe_cache=kpe_cache, **rest)
        return mla_cute.merge_states(*part, *part)

    run = compiled(step)
    for lengths in ((9, 3, 1, 24), (9, 17), (3,) * 9):
        keywords = arguments(entry, kind, lengths)
        ckv_cache, kpe_cache = keywords.pop("ckv_cache"), keywords.pop("kpe_cache")
        scales = {name: keywords[name] for name in ("ckv_scale", "kpe_scale") if name in keywords}
        fused = torch.cat((ckv_cache, kpe_cache), dim=-1)
        new = torch.randn(len(lengths), 576).bfloat16()
        last = keywords["seq_lens"].long() - 1
        page = keywords["block_table"].gather(1, (last // PAGE_SIZE)[:, None])[:, 0]
        slots = page * PAGE_SIZE + last % PAGE_SIZE
        eager, written = fused.clone(), fused.clone()
        want = step(new, slots, eager, keywords, scales)
        got = run(new, slots, written, keywords, scales)
        assert same_bits(written, eager)
        assert not same_bits(written, fused)
        assert all(map(same_bits, got, want))


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("entry", ENTRIES)
def test_layers_with_scales_of_their_own_share_a_graph(entry, as_tensors):
    """Twelve of them are more than the compiler makes graphs for; a float in the op's schema would take one each."""
    keywords = arguments(entry, "fp8_tensor_q8")
    graphs = []
    torch._dynamo.reset()

    def backend(module, example_inputs):
        graphs.append(module)
        return module

    def layer(scales):
        return getattr(mla_cute, entry)(**keywords | scales)[0] * 2

    run = torch.compile(layer, backend=backend, fullgraph=True)
    for n in range(12):
        scales = {name: x * (1 + n / 8) for name, x in (("ckv_scale", 0.02), ("kpe_scale", 0.01), ("q_scale", 0.5))}
        want = layer(scales)
        if as_tensors:
            scales = {name: torch.tensor([x]) for name, x in scales.items()}
        assert same_bits(run(scales), want)
    assert len(graphs) <= 2
    torch._dynamo.reset()


def test_inputs_of_another_rank_are_an_error_of_the_compiled_code_too():
    keywords = arguments("mla_paged_decode")
    run = compiled(lambda q_nope: mla_cute.mla_paged_decode(**keywords | {"q_nope": q_nope}))
    with pytest.raises(Exception, match=r"q_nope: expected shape \[tokens, H, 512 or 256\], got \["):
        run(torch.zeros(2, 64, dtype=torch.bfloat16))


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, keywords):
            return mla_cute.ops.mla_paged_decode(**keywords)

    keywords = arguments("mla_paged_decode")
    exported = torch.export.export(Layer(), (keywords,), strict=False)
    assert "mla_cute.mla_paged_decode" in exported.graph_module.code
    assert all(map(same_bits, exported.module()(keywords), mla_cute.mla_paged_decode(**keywords)))


@pytest.mark.slow
def test_import_leaves_the_compiler_alone():
    code = "import sys, mla_cute, torch; torch.ops.mla_cute.mla_paged_decode.out; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ------------------------------------------------------------------------------------------------ plans


def plan_for(entry, keywords):
    sizes = {"num_heads": NUM_HEADS, "page_size": PAGE_SIZE}
    if "prefill" in entry:
        sizes |= {"qo_indptr": keywords["qo_indptr"], "total_q": keywords["q_nope"].shape[0]}
    if "block_table" in entry:
        sizes |= {"seq_lens": keywords["seq_lens"], "max_pages": keywords["block_table"].shape[1]}
    else:
        sizes |= {"kv_indptr": keywords["kv_indptr"], "kv_last_page_len": keywords["kv_last_page_len"]}
    return getattr(mla_cute, entry.replace("mla_paged", "plan"))(**sizes)


@pytest.mark.parametrize("entry", ENTRIES)
def test_shared_plans(entry):
    """New plans compile nothing again, and a plan reaches the call: one for another batch is refused."""
    through_op, direct = getattr(mla_cute.ops, entry), getattr(mla_cute, entry)
    # the handle is a constant at first, and then any
    run = compiled(lambda keywords, plan: direct(**keywords, plan=plan), compilations=2)
    for lengths in BATCHES:
        keywords = arguments(entry, "bf16", lengths)
        plan = plan_for(entry, keywords)
        assert plan.update() is plan
        want = through_op(**keywords)
        assert all(map(same_bits, run(keywords, plan), want))
        assert all(map(same_bits, through_op(**keywords, plan=plan), want))
    other = arguments(entry, "bf16", (*LENGTHS, 3))
    for call in (run, lambda keywords, plan: through_op(**keywords, plan=plan)):
        with pytest.raises(ValueError, match=r"^plan: expected a plan "):
            call(other, plan)


def test_a_second_compilation_would_show():
    run = compiled(lambda x, n: x + n)
    run(torch.zeros(3), 1)
    with pytest.raises(RuntimeError, match="recompile"):
        run(torch.zeros(3), "no number")


def test_handles_end_with_their_plan():
    keywords = arguments("mla_paged_decode")
    shared = plan_for("mla_paged_decode", keywords)
    handle = shared.handle
    OPS.mla_paged_decode(**keywords, plan=handle)
    del shared
    gc.collect()
    with pytest.raises(ValueError, match=f"^plan: expected the handle of a plan that is alive, got {handle}"):
        OPS.mla_paged_decode(**keywords, plan=handle)
    assert plan_for("mla_paged_decode", keywords).handle > handle


# ------------------------------------------------------------------------------------------------ errors

BAD = [
    ("q_nope", lambda x: x[0]),
    ("q_nope", lambda x: x[..., :64]),
    ("q_pe", lambda x: x[:1]),
    ("q_pe", lambda x: x[..., :48]),
    ("ckv_cache", lambda x: x[0]),
    ("ckv_cache", lambda x: x[..., :64]),
    ("kpe_cache", lambda x: x[:1]),
    ("kpe_cache", lambda x: x[:, :1]),
    ("ckv_scale_arr", lambda x: x[:1]),
    ("qo_indptr", lambda x: x[None]),
    ("qo_indptr", lambda x: x.long()),
    ("kv_indptr", lambda x: x[1:]),
    ("kv_indptr", lambda x: x.long()),
    ("kv_indices", lambda x: x[None]),
    ("kv_last_page_len", lambda x: x[1:]),
    ("block_table", lambda x: x[1:]),
    ("seq_lens", lambda x: x[1:]),
    ("out", lambda x: x[:1]),
    ("lse", lambda x: x[:1]),
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_fakes_raise_as_the_call_does(entry):
    keywords = arguments(entry, "fp8_group")
    keywords |= new_outputs(keywords)
    tried = 0
    for name, change in BAD:
        if name not in keywords:
            continue
        bad = keywords | {name: change(keywords[name])}
        with pytest.raises((TypeError, ValueError), match=f"^{name}: ") as real:
            getattr(mla_cute, entry)(**bad)
        with FakeTensorMode() as mode:
            fake = {k: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for k, x in bad.items()}
            with pytest.raises(real.type, match=f"^{name}: ") as found:
                getattr(OPS, entry).out(**fake)
        if name not in ("q_nope", "ckv_scale_arr"):  # their messages name dimensions
            assert str(found.value) == str(real.value)
        tried += 1
    assert tried >= 12


@pytest.mark.parametrize("entry", ENTRIES)
def test_ops_raise_as_the_call_does(entry):
    keywords = arguments(entry)
    for change in (
        {"sm_scale": 0.0}, {"lse_base": 10}, {"lse_base": True}, {"ckv_scale": 2.0}, {"plan": 3}, {"return_lse": "no"},
        {"ckv_scale": torch.ones(2)}, {"ckv_scale": torch.ones(1)}, {"batch_invariant": 1},
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError)) as real:
            getattr(mla_cute, entry)(**keywords | change)
        with pytest.raises(real.type) as found:
            getattr(mla_cute.ops, entry)(**keywords | change)
        assert str(found.value) == str(real.value)
    with pytest.raises(TypeError, match=r"^config: expected a KernelConfig or None, got dict"):
        getattr(mla_cute.ops, entry)(**keywords, config={})
    with pytest.raises(ValueError, match=r"^config: unknown fields"):
        getattr(OPS, entry)(**keywords, config="{'speed': 3}")


def test_fake_append_and_merge_raise_as_the_calls_do():
    cache = append_case.Cache("16bit", torch.bfloat16)
    ckv, kpe = append_case.make_tokens(4, torch.bfloat16)
    names = ("ckv", "kpe", "ckv_cache", "kpe_cache", "slot_mapping")
    append = dict(zip(names, (ckv, kpe, *cache.args(), torch.arange(4)), strict=True))
    for call, op, good in (
        (mla_cute.append_to_cache, OPS.append_to_cache, append),
        (mla_cute.merge_states, OPS.merge_states, make_states()),
    ):
        for name in list(good)[1:]:
            bad = good | {name: good[name][..., :1]}
            with pytest.raises(ValueError, match=f"^{name}: ") as real:
                call(**bad)
            with FakeTensorMode() as mode, pytest.raises(ValueError, match=f"^{name}: ") as found:
                op(**{k: mode.from_tensor(x) for k, x in bad.items()})
            assert str(found.value) == str(real.value)
