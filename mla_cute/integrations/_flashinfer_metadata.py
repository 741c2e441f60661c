"""Metadata of the FlashInfer wrapper: which form there is, whether it is right, and the calls that take it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from ..call import DECODE, DECODE_TABLE, PREFILL, PREFILL_TABLE, Pages
from ..expect import expect_indptr, expect_metadata
from ..launch import table_stride
from ..plan_decode import DecodePlan, plan_decode, plan_decode_block_table
from ..plan_prefill import PrefillPlan, plan_prefill, plan_prefill_block_table

CSR_FIELDS = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
DENSE_FIELDS = ("cum_seq_lens_q", "block_tables", "seq_lens")
# Page ids are the bulk of the metadata: they are read where the caller has them.
_PAGE_IDS = ("kv_indices", "block_tables")


@dataclass(frozen=True)
class MLAPlanMetadata:
    """Which query tokens and pages each request has, in CSR form, as a block table, or both.

    All are int32: qo_indptr, kv_indptr [batch + 1], kv_indices [num_kv_indices] page ids, kv_len_arr [batch] tokens;
    cum_seq_lens_q [batch + 1], block_tables [batch, max_pages] page ids, seq_lens [batch] tokens. max_q_len is not
    used. `plan` takes FlashInfer's class of this name as well.
    """

    qo_indptr: torch.Tensor | None = None
    kv_indptr: torch.Tensor | None = None
    kv_indices: torch.Tensor | None = None
    kv_len_arr: torch.Tensor | None = None
    cum_seq_lens_q: torch.Tensor | None = None
    block_tables: torch.Tensor | None = None
    seq_lens: torch.Tensor | None = None
    max_q_len: int | None = None

    @classmethod
    def csr(
        cls, qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, kv_indices: torch.Tensor, kv_len_arr: torch.Tensor
    ) -> MLAPlanMetadata:
        return cls(qo_indptr, kv_indptr, kv_indices, kv_len_arr)

    @classmethod
    def dense(
        cls,
        cum_seq_lens_q: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        max_q_len: int | None = None,
    ) -> MLAPlanMetadata:
        return cls(None, None, None, None, cum_seq_lens_q, block_tables, seq_lens, max_q_len)

    @classmethod
    def dual(
        cls,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        *,
        cum_seq_lens_q: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        max_q_len: int | None = None,
    ) -> MLAPlanMetadata:
        """Both forms of the same requests; the CSR form is the one that is read."""
        return cls(qo_indptr, kv_indptr, kv_indices, kv_len_arr, cum_seq_lens_q, block_tables, seq_lens, max_q_len)


@dataclass(frozen=True)
class Shape:
    """What plan objects are made for. A wrapper for CUDA graphs keeps the one of its first plan."""

    form: str
    batch: int
    num_heads: int
    page_size: int
    causal: bool

    @property
    def sizes(self) -> dict[str, Any]:
        return {"num_heads": self.num_heads, "page_size": self.page_size}


def as_decode(pages: Pages) -> Pages:
    """The same where every request has one query token."""
    return pages._replace(form=DECODE_TABLE if pages.form.by_table else DECODE, queries=None, causal=False)


def plan_of(
    pages: Pages, shape: Shape, total_q: int, one_query_each: bool, hints: dict[str, Any]
) -> DecodePlan | PrefillPlan:
    """`hints`: kv_format and q_fp8 of the calls."""
    sizes = shape.sizes | hints
    prefill: dict[str, Any] = {"total_q": total_q, "causal": pages.causal}
    queries, lengths = pages.queries, pages.lengths
    assert queries is not None
    if pages.form.by_table:
        sizes |= {"max_pages": pages.ids.shape[1], "table_stride": table_stride(pages.ids)}
        if one_query_each:
            return plan_decode_block_table(lengths, **sizes)
        return plan_prefill_block_table(queries, lengths, **sizes, **prefill)
    sizes["kv_last_page_len"] = pages.last_len
    made: DecodePlan | PrefillPlan
    made = plan_decode(lengths, **sizes) if one_query_each else plan_prefill(queries, lengths, **sizes, **prefill)
    made._spare_pages = True  # kv_indptr may own more pages than keys fill
    return made


def one_form(metadata: Any, flat: MLAPlanMetadata) -> dict[str, torch.Tensor]:
    """The fields of the form there is, from `metadata` or the flat arguments of `plan`; CSR, where there are both."""
    names = [f.name for f in fields(MLAPlanMetadata)]
    flat_names = {name for name in names if getattr(flat, name) is not None}
    if metadata is None:
        if not flat_names:
            raise TypeError(f"metadata: expected an MLAPlanMetadata, or {', '.join(CSR_FIELDS)}, got None")
        if flat_names & set(CSR_FIELDS) and flat_names - set(CSR_FIELDS):
            raise ValueError(f"metadata: expected flat arguments of one form, got {', '.join(sorted(flat_names))}")
        metadata = flat
    elif flat_names:
        raise ValueError(f"metadata: expected None beside {', '.join(sorted(flat_names))}")
    elif not all(hasattr(metadata, name) for name in names):
        raise TypeError(f"metadata: expected an MLAPlanMetadata, got {type(metadata).__name__}")
    present = {name: getattr(metadata, name) for name in names if getattr(metadata, name) is not None}
    forms = [form for form in (CSR_FIELDS, DENSE_FIELDS) if not present.keys().isdisjoint(form)] or [CSR_FIELDS]
    for form in forms:
        for name in form:
            if name not in present:
                raise ValueError(f"{name}: expected a tensor ({', '.join(form)} go together), got None")
    return {name: present[name] for name in forms[0]}


def check_metadata(known: dict[str, torch.Tensor], page_size: int, device: torch.device) -> int:
    """Returns batch. Of tensors on the CPU the values are checked too, of those on the device the shapes alone."""
    q_name = next(iter(known))
    batch = expect_indptr(q_name, known[q_name], None)
    shapes: dict[str, tuple[int | None, ...]] = {
        "kv_indptr": (batch + 1,),
        "kv_indices": (None,),
        "kv_len_arr": (batch,),
        "block_tables": (batch, None),
        "seq_lens": (batch,),
    }
    for name, x in known.items():
        if name in shapes:
            expect_metadata(name, x, shapes[name], "[batch, max_pages]" if name == "block_tables" else "[n]", None)
        if x.device.type != "cpu" and x.device != device:
            raise ValueError(
                f"{name}: expected a tensor on the cpu or on {device} (where float_workspace_buffer is), got {x.device}"
            )
    host = {name: x for name, x in known.items() if x.device.type == "cpu"}
    for name in host.keys() & {q_name, "kv_indptr"}:
        values = host[name]
        if values[0] != 0 or bool((values.long().diff() < 0).any()):  # a difference of int32 may wrap round
            raise ValueError(f"{name}: expected values that start at 0 and never decrease, got {values.tolist()!s:.80}")
    if "seq_lens" in host:
        _check_lengths("seq_lens", host["seq_lens"], known["block_tables"].shape[1], page_size)
    if "kv_len_arr" in host and "kv_indptr" in host:
        _check_lengths("kv_len_arr", host["kv_len_arr"], host["kv_indptr"].diff().long(), page_size)
    if "kv_indptr" in host:
        end, size = int(host["kv_indptr"][-1]), known["kv_indices"].shape[0]
        if end > size:
            raise ValueError(f"kv_indptr: expected values <= {size} (the length of kv_indices), got {end}")
    return batch


def _check_lengths(name: str, lengths: torch.Tensor, num_pages: torch.Tensor | int, page_size: int) -> None:
    wrong = (lengths < 0) | (lengths > num_pages * page_size)
    if bool(wrong.any()):
        at = int(wrong.int().argmax())
        raise ValueError(
            f"{name}: expected lengths from 0 to what a request's pages hold (page_size {page_size}), got "
            f"{int(lengths[at])} at position {at}"
        )


def on_device(known: dict[str, torch.Tensor], shape: Shape, device: torch.device) -> Pages:
    """Metadata as the calls want them. What is small is copied: its tensors may be refilled before `run`."""
    moved = {name: x.to(device, non_blocking=True, copy=name not in _PAGE_IDS) for name, x in known.items()}
    if "kv_indptr" not in moved:
        return table_pages(moved, shape)
    return list_pages(moved, last_page_len(moved["kv_indptr"], moved["kv_len_arr"], shape.page_size), shape)


def table_pages(known: dict[str, torch.Tensor], shape: Shape) -> Pages:
    queries, table, lengths = (known[name] for name in DENSE_FIELDS)
    return Pages(PREFILL_TABLE, lengths, table, None, queries, shape.causal)


def list_pages(known: dict[str, torch.Tensor], last_len: torch.Tensor, shape: Shape) -> Pages:
    return Pages(PREFILL, known["kv_indptr"], known["kv_indices"], last_len, known["qo_indptr"], shape.causal)


def last_page_len(
    kv_indptr: torch.Tensor, kv_len_arr: torch.Tensor, page_size: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """kv_len - (pages - 1) * page_size: what planner and reference turn into kv_len again, also where a request has
    more pages than kv_len needs and this is not positive."""
    return torch.sub(kv_len_arr, kv_indptr.diff() - 1, alpha=page_size, out=out)
