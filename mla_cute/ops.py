"""The calls as torch custom ops, for `torch.compile(fullgraph=True)` and `torch.export`.

    torch.ops.mla_cute.mla_paged_decode(...)        returns (output, lse)
    torch.ops.mla_cute.mla_paged_decode.out(...)    writes its arguments out and lse
    torch.ops.mla_cute.append_to_cache(...)         writes the cache

and likewise mla_paged_decode_block_table, mla_paged_prefill, mla_paged_prefill_block_table, mla_sparse, merge_states.

The functions of this module have the signatures of the public calls and go through the ops, in eager mode too.
`torch.compile` traces them in place of the public calls, so code that calls `mla_cute.mla_paged_decode` compiles as it
is; without compilation the public calls know nothing of this module. Non-strict `torch.export` does not replace them:
code to be exported calls `mla_cute.ops`. Through an op an eager call takes 5 us more than directly (measured on CPU
tensors without the reference: 11.1 us for 6.4; through a function of this module 12.5).

What is no tensor or number crosses an op's schema like this:

    numbers     as Scalar: layers that differ in a float share a graph, which a float of the schema would specialise
    scales      that are tensors as `ckv_scale_tensor` and so on
    lse_base    as `natural_lse`
    config      as text
    plan        as its `handle`, an integer. Without a plan the op plans in the call, on the GPU, from the metadata it
                is given: under CUDA-graph capture the planner is captured with it. A plan is made and updated outside
                of the compiled code, which does not know that the ops read what `plan.update()` writes.

Fake implementations check shapes, metadata and devices as the calls do, and nothing that needs an address or a value.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from . import api, append, attend, sparse
from .call import (
    DECODE,
    DECODE_TABLE,
    METADATA,
    PREFILL,
    PREFILL_TABLE,
    SPARSE,
    Call,
    Form,
    arguments_of,
    call_of,
    no_channels,
)
from .check import FP8, expect_no_array, expect_pages
from .config import KernelConfig
from .dims import CKV_DIM, GROUP_DIM, HeadDims
from .expect import (
    CKV_DIMS,
    KPE_DIMS,
    expect_bool,
    expect_channels,
    expect_device,
    expect_indptr,
    expect_lse_base,
    expect_not_alone,
    expect_shape,
)
from .merge_states import merge_states as _merge_states
from .plan import Plan, expect_config, expect_plan, plan_of

F = TypeVar("F", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("mla_cute", "DEF")
_OPTIONS = (
    "Tensor? ckv_scale_arr=None, Scalar ckv_scale=1.0, Scalar kpe_scale=1.0, Scalar q_scale=1.0, "
    "Tensor? ckv_scale_tensor=None, Tensor? kpe_scale_tensor=None, Tensor? q_scale_tensor=None, "
    "bool natural_lse=False, bool batch_invariant=False, str? config=None, SymInt? plan=None"
)
_SCALES = ("ckv_scale", "kpe_scale", "q_scale")


def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The new op. Not `torch.library.custom_op`, whose Python layers add 12 to 16 us to an eager call; these add 4."""
    _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    # as the direct calls: no gradient is recorded
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"mla_cute::{name}", fake, lib=_LIBRARY)
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.mla_cute, packet), overload or "default")


def _without_result(function: Callable[..., Any]) -> Callable[..., None]:
    def run(*args: Any, **options: Any) -> None:
        function(*args, **options)

    return run


def _encoded(config: KernelConfig) -> str:
    """As a literal: JSON's encoder cannot be traced."""
    return "{" + ", ".join([f"{name!r}: {value!r}" for name, value in config.to_dict().items()]) + "}"


@functools.lru_cache(maxsize=256)
def _config_of(encoded: str | None) -> KernelConfig | None:
    return None if encoded is None else KernelConfig.from_dict(ast.literal_eval(encoded))


# ------------------------------------------------------------------------------------------------ the attentions


def _define_attention(call: F, form: Form) -> F:
    """Define the op of a public call, with its out-variant; returns the function with its signature that goes through
    them."""
    name = call.__name__
    metadata = ", ".join(f"Tensor {argument}" for argument in METADATA[form])
    required = f"Tensor q_nope, Tensor? q_pe, Tensor ckv_cache, Tensor? kpe_cache, {metadata}, Scalar sm_scale"
    options = _OPTIONS
    if not form.by_table:
        options = f"Tensor? kv_last_page_len=None, {options}"
    if form is SPARSE:
        options = f"Tensor? topk_lens=None, Tensor? sink=None, {options}"
    if form.op == "prefill":
        options = f"bool causal=True, {options}"
    fake = functools.partial(_fake_attention, form=form)

    def run(
        *args: Any, natural_lse: bool = False, config: str | None = None, plan: int | None = None, **options: Any
    ) -> Any:
        lse_base = "e" if natural_lse else 2
        for scale in _SCALES:
            on_device = options.pop(f"{scale}_tensor", None)
            if on_device is not None:
                options[scale] = on_device
        return call(
            *args, lse_base=lse_base, config=_config_of(config), plan=None if plan is None else plan_of(plan), **options
        )

    op = _define(name, f"({required}, *, {options}) -> (Tensor output, Tensor lse)", run, fake)
    out_op = _define(
        f"{name}.out",
        f"({required}, *, {options}, Tensor(a!) out, Tensor(b!) lse) -> ()",
        _without_result(run),
        _without_result(fake),
    )

    @functools.wraps(call)
    def through_op(
        *args: Any,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        lse_base: int | str = 2,
        return_lse: bool = True,
        config: KernelConfig | None = None,
        plan: Plan | None = None,
        **options: Any,
    ) -> Any:
        for scale in _SCALES:
            if isinstance(options.get(scale), torch.Tensor):
                options[f"{scale}_tensor"] = options.pop(scale)
        expect_bool("return_lse", return_lse)
        for flag in ("causal", "batch_invariant"):
            expect_bool(flag, options.get(flag, False))
        expect_config(config)
        if plan is not None:
            expect_plan(plan)
        options["natural_lse"] = _is_natural(lse_base)
        options["config"] = None if config is None else _encoded(config)
        options["plan"] = None if plan is None else plan.handle
        if out is None and lse is None:
            out, lse = op(*args, **options)
            return (out, lse) if return_lse else out
        if out is None or lse is None:
            q_nope = args[0] if args else options["q_nope"]
            q_pe = args[1] if len(args) > 1 else options["q_pe"]
            new_out, new_lse = _new_outputs(q_nope, q_pe)
            out, lse = new_out if out is None else out, new_lse if lse is None else lse
        out_op(*args, out=out, lse=lse, **options)
        return (out, lse) if return_lse else out

    return cast(F, through_op)


def _is_natural(lse_base: int | str) -> bool:
    expect_lse_base(lse_base)
    return lse_base == "e"


def _new_outputs(q_nope: torch.Tensor, q_pe: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, num_heads, ckv_dim = q_nope.shape
    dtype = q_nope.dtype if q_pe is None else q_pe.dtype
    return (
        q_nope.new_empty((tokens, num_heads, ckv_dim), dtype=torch.bfloat16 if dtype is FP8 else dtype),
        q_nope.new_empty((tokens, num_heads), dtype=torch.float32),
    )


# Options of the ops that shapes follow from or are held to.
_SHAPED = ("kv_last_page_len", "topk_lens", "sink", "ckv_scale_arr", "out", "lse")


def _fake_attention(*args: Any, form: Form, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The checks of check.py, without what reads addresses or keeps sizes: those of a graph may be symbols."""
    call = call_of(form, *args, **{name: options[name] for name in _SHAPED if name in options})
    q_nope, q_pe, (ckv_cache, kpe_cache, _, _, ckv_scale_arr), pages, _, out, lse, _, _, sink = call
    ckv_dim = expect_channels("q_nope", q_nope, (None, None), "tokens, H", CKV_DIMS)
    tokens, num_heads, _ = q_nope.shape
    device = q_nope.device
    expect_not_alone("q_pe", q_pe, "kpe_cache")
    kpe_dim = expect_channels("q_pe", q_pe, (tokens, num_heads), "tokens, H", KPE_DIMS)
    expect_channels("ckv_cache", ckv_cache, (None, None), "num_pages, page_size", (ckv_dim,), "q_nope")
    num_pages, page_size, _ = ckv_cache.shape
    expect_not_alone("kpe_cache", kpe_cache, "q_pe")
    expect_channels("kpe_cache", kpe_cache, (num_pages, page_size), "num_pages, page_size", (kpe_dim,), "q_pe")
    for name, x in (("q_pe", q_pe), ("ckv_cache", ckv_cache), ("kpe_cache", kpe_cache)):
        expect_device(name, x, device)
    if ckv_scale_arr is not None:
        expect_no_array(HeadDims(ckv_dim, kpe_dim), ckv_scale_arr)
        sizes = (num_pages, page_size, None)
        expect_shape("ckv_scale_arr", ckv_scale_arr, sizes, f"[num_pages, page_size, 1 or {CKV_DIM // GROUP_DIM}]")
    batch = expect_indptr("qo_indptr", pages.queries, device) if form.op == "prefill" else tokens
    expect_pages(pages, batch, device)
    if sink is not None:
        expect_shape("sink", sink, (num_heads,), "[H]")
        expect_device("sink", sink, device)
    if out is not None and lse is not None:
        expect_shape("out", out, (tokens, num_heads, ckv_dim), "")
        expect_shape("lse", lse, (tokens, num_heads), "")
    return _new_outputs(q_nope, q_pe)


# ------------------------------------------------------------------------------------------------ the others


def _fake_append(
    ckv: torch.Tensor,
    kpe: Any,
    ckv_cache: torch.Tensor,
    kpe_cache: Any,
    slot_mapping: torch.Tensor,
    **options: Any,
) -> None:
    del options
    if kpe is None and kpe_cache is None:
        kpe, kpe_cache = no_channels(ckv), no_channels(ckv_cache)
    expect_not_alone("kpe", kpe, "kpe_cache")
    expect_not_alone("kpe_cache", kpe_cache, "kpe")
    ckv_dim = expect_channels("ckv", ckv, (None,), "n", CKV_DIMS)
    tokens = ckv.shape[0]
    kpe_dim = expect_channels("kpe", kpe, (tokens,), "n", KPE_DIMS)
    expect_channels("ckv_cache", ckv_cache, (None, None), "num_pages, page_size", (ckv_dim,), "ckv")
    expect_channels("kpe_cache", kpe_cache, (*ckv_cache.shape[:2],), "num_pages, page_size", (kpe_dim,), "kpe")
    expect_shape("slot_mapping", slot_mapping, (tokens,), "")


def _run_append(*args: Any, **options: Any) -> None:
    append.append_to_cache(*args, **options)


_append_op = _define(
    "append_to_cache",
    "(Tensor ckv, Tensor? kpe, Tensor(a!) ckv_cache, Tensor(b!)? kpe_cache, Tensor slot_mapping, *, "
    "Scalar ckv_scale=1.0, Scalar kpe_scale=1.0, Tensor(c!)? ckv_scale_arr=None) -> ()",
    _run_append,
    _fake_append,
)


@functools.wraps(append.append_to_cache)
def append_to_cache(*args: Any, **options: Any) -> None:
    _append_op(*args, **options)


def _fake_merge(
    o_a: torch.Tensor,
    lse_a: torch.Tensor,
    o_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    natural_lse: bool = False,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    for name, x in (("o_b", o_b), ("out", out)):
        if x is not None:
            expect_shape(name, x, tuple(o_a.shape), "")
    for name, x in (("lse_a", lse_a), ("lse_b", lse_b), ("lse", lse)):
        if x is not None:
            expect_shape(name, x, tuple(o_a.shape[:-1]), "")
    return _new_states(o_a, lse_a)


def _new_states(o_a: torch.Tensor, lse_a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return o_a.new_empty(o_a.shape), lse_a.new_empty(lse_a.shape)


def _run_merge(*states: torch.Tensor, natural_lse: bool = False, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _merge_states(*states, lse_base="e" if natural_lse else 2, **options)


_STATES = "Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b, *, bool natural_lse=False"
_merge_op = _define("merge_states", f"({_STATES}) -> (Tensor o, Tensor lse)", _run_merge, _fake_merge)
_merge_out_op = _define(
    "merge_states.out",
    f"({_STATES}, Tensor(a!) out, Tensor(b!) lse) -> ()",
    _without_result(_run_merge),
    _without_result(_fake_merge),
)


@functools.wraps(_merge_states)
def merge_states(
    o_a: torch.Tensor,
    lse_a: torch.Tensor,
    o_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    lse_base: int | str = 2,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    natural_lse = _is_natural(lse_base)
    if out is None and lse is None:
        return _merge_op(o_a, lse_a, o_b, lse_b, natural_lse=natural_lse)
    if out is None or lse is None:
        new_out, new_lse = _new_states(o_a, lse_a)
        out, lse = new_out if out is None else out, new_lse if lse is None else lse
    _merge_out_op(o_a, lse_a, o_b, lse_b, natural_lse=natural_lse, out=out, lse=lse)
    return out, lse


mla_paged_decode = _define_attention(api.mla_paged_decode, DECODE)
mla_paged_decode_block_table = _define_attention(api.mla_paged_decode_block_table, DECODE_TABLE)
mla_paged_prefill = _define_attention(api.mla_paged_prefill, PREFILL)
mla_paged_prefill_block_table = _define_attention(api.mla_paged_prefill_block_table, PREFILL_TABLE)
mla_sparse = _define_attention(sparse.mla_sparse, SPARSE)

_THROUGH: dict[str, Callable[..., Any]] = {
    "decode": mla_paged_decode,
    "decode_block_table": mla_paged_decode_block_table,
    "prefill": mla_paged_prefill,
    "prefill_block_table": mla_paged_prefill_block_table,
    "sparse": mla_sparse,
}


def _attend(
    call: Call, plan: Plan | None, config: KernelConfig | None, batch_invariant: bool, return_lse: bool = True
) -> Any:
    """`attend.attend` through the op of the call's form: for the interfaces of engines, which make a Call."""
    args, options = arguments_of(call)
    options |= {"plan": plan, "config": config, "batch_invariant": batch_invariant, "return_lse": return_lse}
    return _THROUGH[call.pages.form.name](*args, **options)


# What torch.compile traces instead of these functions. They are not asked at run time (an `is_compiling()` in each
# would cost every eager call 0.1 us), and registering with the compiler would import it (2 s).
for _direct, _compiled in (
    (api.mla_paged_decode, mla_paged_decode),
    (api.mla_paged_decode_block_table, mla_paged_decode_block_table),
    (api.mla_paged_prefill, mla_paged_prefill),
    (api.mla_paged_prefill_block_table, mla_paged_prefill_block_table),
    (sparse.mla_sparse, mla_sparse),
    (append.append_to_cache, append_to_cache),
    (_merge_states, merge_states),
    (attend.attend, _attend),
):
    vars(_direct)["_torchdynamo_inline"] = _compiled
