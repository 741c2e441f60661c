"""What a call is given, in three nouns: `Pages`, `Cache` and `Call`.

Decode is prefill with one query token each, so both are these, over page lists and over block tables. They are
NamedTuples, so that the public calls can make plain tuples of the same fields: the short way (short_way.py) goes by
position, and the names, which cost 0.3 us each, are put on where a call goes the long way (`as_call`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .expect import Scale

# The default of the scales: the early exits know this object from others that equal it without looking inside.
UNSCALED = 1.0


class Form(NamedTuple):
    """Which of the public calls: `mla_paged_<name>`, or `mla_sparse`."""

    op: str  # "decode": one query token per request; "prefill"; "sparse": a list of tokens for each query token
    by_table: bool  # what is attended to is in a table with a row for each request, not in lists one behind the other

    @property
    def name(self) -> str:
        return f"{self.op}_block_table" if self.by_table and self.op != "sparse" else self.op


DECODE, DECODE_TABLE = Form("decode", False), Form("decode", True)
PREFILL, PREFILL_TABLE = Form("prefill", False), Form("prefill", True)
SPARSE = Form("sparse", True)
FORMS = (DECODE, DECODE_TABLE, PREFILL, PREFILL_TABLE)  # of requests that have pages


class Pages(NamedTuple):
    """Which keys each request has and in which pages they lie. All tensors are int32 on the device of the call.

    Attributes:
        form: one of FORMS or SPARSE, itself and no equal of it.
        lengths: of page lists kv_indptr [batch + 1], of a block table seq_lens [batch], of SPARSE topk_lens [total_q].
        ids: page ids, kv_indices [num_kv_indices] or block_table [batch, max_pages]; of SPARSE indices [total_q, topk],
            tokens; None: nobody reads any.
        last_len: kv_last_page_len [batch] of page lists; None: last pages are full.
        queries: qo_indptr [batch + 1] of prefill; None in decode.
        causal: prefill's mask; False in decode, whose query sees all keys.
    """

    form: Form
    lengths: torch.Tensor
    ids: Any = None
    last_len: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    causal: bool = False

    def metadata(self) -> dict[str, Any]:
        """What is planned from, by the names of the public calls."""
        if self.form.op == "sparse":
            return {"topk_lens": self.lengths}
        found = {"qo_indptr": self.queries} if self.form.op == "prefill" else {}
        if self.form.by_table:
            return found | {"seq_lens": self.lengths}
        return found | {"kv_indptr": self.lengths, "kv_last_page_len": self.last_len}

    def with_metadata(self, metadata: dict[str, Any]) -> Pages:
        """These with other tensors in the place of `metadata()`."""
        if self.form.op == "sparse":
            return self._replace(lengths=metadata["topk_lens"])
        lengths = metadata["seq_lens" if self.form.by_table else "kv_indptr"]
        last_len, queries = metadata.get("kv_last_page_len"), metadata.get("qo_indptr")
        return self._replace(lengths=lengths, last_len=last_len, queries=queries)

    def cut(self, begin: int, end: int) -> Pages:
        """Metadata of requests begin .. end - 1. The page ids are all there: page lists are found by kv_indptr."""

        def of_requests(x: torch.Tensor | None, bounds: bool) -> Any:
            return None if x is None else x[begin : end + 1] if bounds else x[begin:end]

        return self._replace(
            lengths=of_requests(self.lengths, not self.form.by_table),
            last_len=of_requests(self.last_len, False),
            queries=of_requests(self.queries, True),
        )


class Cache(NamedTuple):
    """A paged latent cache: tensors, and what e4m3 ones are multiplied by (`mla_paged_decode` has the shapes). A kpe of
    width 0: there is no rope part."""

    ckv: torch.Tensor
    kpe: torch.Tensor
    ckv_scale: Scale = UNSCALED
    kpe_scale: Scale = UNSCALED
    scale_arr: torch.Tensor | None = None


class Call(NamedTuple):
    """One call: queries, the cache, which of its pages, and where results go."""

    q_nope: torch.Tensor
    q_pe: torch.Tensor
    cache: Cache
    pages: Pages
    sm_scale: float
    out: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    lse_base: int | str = 2
    q_scale: Scale = UNSCALED
    sink: torch.Tensor | None = None  # of SPARSE


# A Call, or a tuple of its fields with tuples in the place of its Cache and Pages.
CallFields = Call | tuple[Any, ...]


def without_rope(fields: CallFields) -> CallFields:
    """The fields with views of width 0 in the place of a q_pe and a kpe_cache that are both None: there is no rope
    part. Others as they are: that one of them alone is None is for check.py to say."""
    q_nope, q_pe, (ckv, kpe, *scales), *rest = fields
    if q_pe is not None or kpe is not None:
        return fields
    return (q_nope, no_channels(q_nope), (ckv, no_channels(ckv), *scales), *rest)


def no_channels(x: Any) -> Any:
    """A view of width 0 of a tensor; None where `x` is none."""
    return x[..., :0] if isinstance(x, torch.Tensor) and x.dim() else None


def as_call(fields: CallFields) -> Call:
    q_nope, q_pe, cache, pages, *rest = fields
    return Call(q_nope, q_pe, Cache(*cache), Pages(*pages), *rest)


def topk_lens_of(indices: torch.Tensor, topk_lens: torch.Tensor | None) -> torch.Tensor:
    """`topk_lens`; where there are none, as many as `indices` has columns, for each row."""
    if topk_lens is not None:
        return topk_lens
    rows, topk = indices.shape
    return torch.full((rows,), topk, dtype=torch.int32, device=indices.device)


# The arguments of the public calls between the caches and sm_scale.
METADATA = {
    DECODE: ("kv_indptr", "kv_indices"),
    DECODE_TABLE: ("block_table", "seq_lens"),
    PREFILL: ("qo_indptr", "kv_indptr", "kv_indices"),
    PREFILL_TABLE: ("qo_indptr", "block_table", "seq_lens"),
    SPARSE: ("indices",),
}


def arguments_of(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional arguments and the keywords of the public call of its form."""
    q_nope, q_pe, (ckv, kpe, ckv_scale, kpe_scale, scale_arr), pages, sm_scale, out, lse, lse_base, q_scale, sink = call
    metadata = (pages.ids, pages.lengths) if pages.form.by_table else (pages.lengths, pages.ids)
    options: dict[str, Any] = {"out": out, "lse": lse, "lse_base": lse_base, "ckv_scale_arr": scale_arr}
    options |= {"ckv_scale": ckv_scale, "kpe_scale": kpe_scale, "q_scale": q_scale}
    if pages.form.op == "sparse":
        return (q_nope, q_pe, ckv, kpe, pages.ids, sm_scale), options | {"topk_lens": pages.lengths, "sink": sink}
    if not pages.form.by_table:
        options["kv_last_page_len"] = pages.last_len
    if pages.form.op == "prefill":
        metadata, options["causal"] = (pages.queries, *metadata), pages.causal
    return (q_nope, q_pe, ckv, kpe, *metadata, sm_scale), options


def call_of(form: Form, *args: Any, **options: Any) -> Call:
    """A Call from the arguments of the public call of that form; TypeError as a function of its signature would."""
    name = "mla_sparse()" if form is SPARSE else f"mla_paged_{form.name}()"
    required = ("q_nope", "q_pe", "ckv_cache", "kpe_cache", *METADATA[form], "sm_scale")
    if len(args) > len(required):
        raise TypeError(f"{name} takes {len(required)} positional arguments but {len(args)} were given")
    given = dict(zip(required, args, strict=False))
    if twice := given.keys() & options.keys():
        raise TypeError(f"{name} got multiple values for argument {min(twice)!r}")
    given |= options
    if missing := [argument for argument in required if argument not in given]:
        raise TypeError(f"{name} missing required arguments: {', '.join(missing)}")
    take = given.pop
    cache = Cache(
        take("ckv_cache"), take("kpe_cache"), take("ckv_scale", UNSCALED), take("kpe_scale", UNSCALED),
        take("ckv_scale_arr", None),
    )  # fmt: skip
    queries, causal = (take("qo_indptr"), take("causal", True)) if form.op == "prefill" else (None, False)
    if form is SPARSE:
        indices = take("indices")
        pages = Pages(form, topk_lens_of(indices, take("topk_lens", None)), indices)
    elif form.by_table:
        pages = Pages(form, take("seq_lens"), take("block_table"), None, queries, causal)
    else:
        pages = Pages(form, take("kv_indptr"), take("kv_indices"), take("kv_last_page_len", None), queries, causal)
    call = Call(
        take("q_nope"), take("q_pe"), cache, pages, take("sm_scale"), take("out", None), take("lse", None),
        take("lse_base", 2), take("q_scale", UNSCALED), take("sink", None) if form is SPARSE else None,
    )  # fmt: skip
    if given:
        raise TypeError(f"{name} got an unexpected keyword argument {min(given)!r}")
    return as_call(without_rope(call))
