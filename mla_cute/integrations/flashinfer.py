"""FlashInfer's `BatchMLAPagedAttentionWrapper` over the kernels of this library: a user changes one import.

    from mla_cute.integrations.flashinfer import BatchMLAPagedAttentionWrapper

Signatures are those of flashinfer-python 0.7.4 (flashinfer/mla/_batch_mla/_wrapper.py, _contracts.py); FlashInfer
need not be installed. What differs:

* Nothing reads device memory from the host: metadata that are CUDA tensors are not validated (MLA_CUTE_CHECK=1 does
  it), those that are CPU tensors are validated and copied to the device without waiting.
* `run` takes the decode kernels when `plan` was given a **CPU** qo_indptr that is 0, 1, ..., batch, and `run` gets
  exactly `batch` query tokens; otherwise the prefill kernels, which take queries of one token too. That a CUDA
  qo_indptr means one token per request could only be learned by synchronising: as many query tokens as requests may
  also be lengths 2 and 0.
* kv_indptr may own more pages than ceil(kv_len / page_size); the rest are not read.
* Packed and split queries and caches are taken by every plan, and log-sum-exps in either base by plans with lse_mode
  "none". A query that sees no key gives output 0 and log-sum-exp -inf.
* FP8 queries, caches with a scale per tensor, and `bmm1_scale`, `bmm2_scale` work on Hopper. Scales of tensors may be
  numbers, or float32 tensors of one element, which the kernels read; "bmm-tensor" takes one division on the device.
  `ckv_scale_arr` needs a 16-bit kpe_cache, and may be [num_pages, page_size, 1] too.
* float_workspace_buffer only names the device; plans have memory of their own. `backend`, `max_q_len` and `enable_pdl`
  are accepted and change nothing.
* SGLang's fast plan (`fast_mla_decode_plan`) works with use_cuda_graph: `_cached_module.plan` is a `plan` of the three
  tensors that it gets, on the page ids that its caller has written to the buffer. The workspaces it passes on are None.

Not supported: sinks, skip_softmax, the profiler, FP8 outputs (o_scale), head dimensions
other than 512 and 64, and kv_len and page_table of `run` (of the CUTLASS backend; `plan` takes dense metadata).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..attend import attend
from ..call import UNSCALED, Cache, Call, Pages
from ..check import DTYPES, FP8
from ..dims import CKV_DIM, KPE_DIM, MAX_HEADS
from ..expect import (
    Scale,
    describe,
    expect_bool,
    expect_int,
    expect_metadata,
    expect_one,
    expect_scale,
    expect_shape,
    expect_tensor,
)
from ..plan_decode import DecodePlan
from ..plan_prefill import PrefillPlan
from ._flashinfer_metadata import (
    CSR_FIELDS,
    MLAPlanMetadata,
    Shape,
    as_decode,
    check_metadata,
    last_page_len,
    list_pages,
    on_device,
    one_form,
    plan_of,
    table_pages,
)

__all__ = ["BatchMLAPagedAttentionWrapper", "MLAPlanMetadata"]

_BACKENDS = (
    "auto", "autotune", "cute-dsl", "cute-dsl-modular", "cute-dsl-monolithic", "cute-dsl-rubin-mtp", "cutile",
    "cutlass", "fa2", "fa3", "trtllm-gen", "xqa",
)  # fmt: skip
_LSE_MODES = ("none", "base2", "basee")
_SCALE_MODES = ("default", "kv-per-tensor", "bmm-scalar", "bmm-tensor")
_LAYOUTS = (None, "packed", "split")


@dataclass(frozen=True)
class _Contract:
    """What `plan` was told of the tensors and scales of `run`."""

    sm_scale: float
    q_data_type: torch.dtype
    kv_data_type: torch.dtype
    output_dtype: torch.dtype
    lse_mode: str
    scale_mode: str

    @property
    def hints(self) -> dict[str, Any]:
        """What plans choose a configuration by. An FP8 cache with scales in an array is only known in `run`, and close
        to one with a scale per tensor."""
        return {"kv_format": "tensor" if self.kv_data_type is FP8 else "", "q_fp8": self.q_data_type is FP8}

    def check_tensors(
        self,
        shape: Shape,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        ckv_cache: torch.Tensor,
        kpe_cache: torch.Tensor,
        out: torch.Tensor | None,
        has_scale_arr: bool,
    ) -> None:
        """Sizes and dtypes against the plan; the calls check the rest."""
        kpe_dtype = self.q_data_type if has_scale_arr and kpe_cache.dtype in DTYPES else self.kv_data_type
        _expect_planned("q_nope", q_nope, "q_data_type", self.q_data_type)
        _expect_planned("q_pe", q_pe, "q_data_type", self.q_data_type)
        _expect_planned("ckv_cache", ckv_cache, "kv_data_type", self.kv_data_type)
        _expect_planned("kpe_cache", kpe_cache, "kv_data_type", kpe_dtype)
        if out is not None:
            expect_tensor("out", out)
            _expect_planned("out", out, "output_dtype", self.output_dtype)
        for name, size, what, planned in (
            ("q_nope", q_nope.shape[1], "heads", shape.num_heads),
            ("ckv_cache", ckv_cache.shape[1], "tokens a page", shape.page_size),
        ):
            if size != planned:
                raise ValueError(f"{name}: expected {planned} {what} as planned, got {size}")

    def lse_base(self, wanted: bool, on_e: bool) -> int | str:
        expect_bool("return_lse_base_on_e", on_e)
        if wanted and self.lse_mode != "none" and on_e != (self.lse_mode == "basee"):
            raise ValueError(
                f"return_lse_base_on_e: expected {not on_e}, plan() had lse_mode {self.lse_mode!r}, got {on_e}"
            )
        return "e" if on_e else 2

    def scales(
        self,
        kpe_dtype: torch.dtype,
        ckv_scale: Any,
        ckv_scale_arr: Any,
        kpe_scale: Any,
        bmm1_scale: Any,
        bmm2_scale: Any,
    ) -> dict[str, Any]:
        """sm_scale and the scale keywords of this library's calls."""
        kv = {"ckv_scale": ckv_scale, "ckv_scale_arr": ckv_scale_arr, "kpe_scale": kpe_scale}
        bmm = {"bmm1_scale": bmm1_scale, "bmm2_scale": bmm2_scale}
        taken: dict[str, Any] = {"default": {}, "kv-per-tensor": kv, "bmm-scalar": bmm, "bmm-tensor": bmm}[
            self.scale_mode
        ]
        for name, value in (kv | bmm).items():
            if value is not None and name not in taken:
                got = describe(value)
                raise ValueError(f"{name}: expected None, plan() had scale_mode {self.scale_mode!r}, got {got}")
        if self.scale_mode == "default":
            return {"sm_scale": self.sm_scale}
        if self.scale_mode == "bmm-scalar":
            return _bmm_scales(bmm1_scale, bmm2_scale, self.kv_data_type is FP8)
        if self.scale_mode == "bmm-tensor":
            return _bmm_tensors(bmm1_scale, bmm2_scale)
        if (ckv_scale is None) == (ckv_scale_arr is None):
            raise ValueError("ckv_scale: expected either it or ckv_scale_arr with an FP8 cache, got both or neither")
        if ckv_scale_arr is None:
            if kpe_scale is None:
                raise ValueError("kpe_scale: expected a number with an FP8 kpe_cache, got None")
            return {"sm_scale": self.sm_scale, "ckv_scale": ckv_scale, "kpe_scale": kpe_scale}
        if kpe_dtype is FP8:
            raise NotImplementedError(f"ckv_scale_arr: expected None with a kpe_cache of {FP8}, not supported together")
        if kpe_scale is not None:
            expect_one("kpe_scale", kpe_scale, "a 16-bit kpe_cache")
        return {"sm_scale": self.sm_scale, "ckv_scale_arr": ckv_scale_arr}


class BatchMLAPagedAttentionWrapper:
    """MLA decode and incremental prefill (absorbed form) over a paged latent cache, planned once for all layers.

    Args:
        float_workspace_buffer: its device is the device of the calls.
        use_cuda_graph: every `plan` writes to the same memory, so that a graph captured from `run` follows it: the
            metadata are copied into the four buffers below, and the work items are made again, both on the current
            stream. Batch, heads, page size, mask and form of the metadata stay those of the first plan.
        qo_indptr, kv_indptr: int32 buffers [batch + 1], on the device, contiguous. The four are needed for CSR metadata
            with use_cuda_graph, else not used. Plans from dense metadata need none: the first plan's tensors have to
            be on the device, are read where they are, and every later plan has to be given the same ones.
        kv_indices: int32 buffer [at least as many as any plan has], likewise.
        kv_len_arr: int32 buffer [batch], likewise.
        backend: one of FlashInfer's names, those of 0.7.4 included; there is one implementation.

    With use_cuda_graph, call `run` once before it is captured: kernels are compiled or loaded at first use. Once a
    `run` took decode kernels, every later `plan` needs a CPU qo_indptr of 0, 1, ..., batch too.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """

    # What SGLang's fast plan passes on to `_cached_module`.
    _float_workspace_buffer = _int_workspace_buffer = _pin_memory_int_workspace_buffer = None

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: torch.Tensor | None = None,
        kv_indptr: torch.Tensor | None = None,
        kv_indices: torch.Tensor | None = None,
        kv_len_arr: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        expect_tensor("float_workspace_buffer", float_workspace_buffer)
        expect_bool("use_cuda_graph", use_cuda_graph)
        _expect_one_of("backend", backend, _BACKENDS)
        self.device = float_workspace_buffer.device
        self._use_cuda_graph = use_cuda_graph
        self._buffers = dict(zip(CSR_FIELDS, (qo_indptr, kv_indptr, kv_indices, kv_len_arr), strict=True))
        # Under FlashInfer's names for SGLang's fast plan of drafts, which writes to them itself.
        self._qo_indptr_buf, self._kv_indptr_buf = qo_indptr, kv_indptr
        self._kv_indices_buf, self._kv_len_arr_buf = kv_indices, kv_len_arr
        self._pages: Pages | None = None
        # by the number of query tokens that `run` is given
        self._plans: dict[int, DecodePlan | PrefillPlan] = {}

    def plan(
        self,
        qo_indptr: torch.Tensor | None = None,
        kv_indptr: torch.Tensor | None = None,
        kv_indices: torch.Tensor | None = None,
        kv_len_arr: torch.Tensor | None = None,
        num_heads: int | None = None,
        head_dim_ckv: int | None = None,
        head_dim_kpe: int | None = None,
        page_size: int | None = None,
        causal: bool | None = None,
        sm_scale: float | None = None,
        q_data_type: torch.dtype | None = None,
        kv_data_type: torch.dtype | None = None,
        use_profiler: bool = False,
        *,
        metadata: MLAPlanMetadata | None = None,
        cum_seq_lens_q: torch.Tensor | None = None,
        block_tables: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        max_q_len: int | None = None,
        query_layout: str | None = None,
        kv_cache_layout: str | None = None,
        lse_mode: str = "none",
        output_dtype: torch.dtype | None = None,
        output_scale: str = "none",
        scale_mode: str = "default",
        skip_softmax: bool = False,
        enable_pdl: bool | None = None,
        use_sinks: bool = False,
    ) -> None:
        """Take the metadata of the following `run` calls, and what they will be given.

        Args:
            qo_indptr, kv_indptr, kv_indices, kv_len_arr: CSR metadata, as :class:`MLAPlanMetadata` has them; on the
                CPU or the wrapper's device, contiguous. Request b owns kv_indices[kv_indptr[b]:kv_indptr[b + 1]], of
                which it uses kv_len_arr[b] tokens. kv_indices may be longer than kv_indptr[-1]; it is read where it is
                (the others are copied) unless the wrapper has buffers for CUDA graphs.
            cum_seq_lens_q, block_tables, seq_lens: dense metadata instead.
            metadata: an MLAPlanMetadata instead.
            num_heads: 1..128.
            head_dim_ckv: 512.
            head_dim_kpe: 64.
            page_size: >= 1.
            causal: query i of n sees keys 0 .. kv_len - n + i.
            sm_scale: factor of the scores, > 0.
            q_data_type: torch.bfloat16, torch.float16, or with FP8 caches torch.float8_e4m3fn.
            kv_data_type: that of the queries, or torch.float8_e4m3fn.
            lse_mode: "base2" or "basee" hold `run` to that base; "none" does not.
            output_dtype: q_data_type (the default); torch.bfloat16 or torch.float16 with e4m3 queries, for which it has
                to be given.
            scale_mode: "default", which with an FP8 cache and 16-bit queries is "kv-per-tensor"; "bmm-scalar"; and, of
                e4m3 queries and caches, "bmm-tensor".
            query_layout, kv_cache_layout, max_q_len, enable_pdl: change nothing.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it. NotImplementedError: an argument asks
                for what is not supported; the message names it. The wrapper keeps its previous plan.
        """
        required = {
            "num_heads": num_heads, "head_dim_ckv": head_dim_ckv, "head_dim_kpe": head_dim_kpe,
            "page_size": page_size, "causal": causal, "sm_scale": sm_scale, "q_data_type": q_data_type,
            "kv_data_type": kv_data_type,
        }  # fmt: skip
        missing = [name for name, value in required.items() if value is None]
        if missing or num_heads is None or page_size is None or causal is None or sm_scale is None:
            raise TypeError(f"plan() is missing required arguments: {', '.join(missing)}")
        for name, value, expected in (
            ("head_dim_ckv", head_dim_ckv, CKV_DIM), ("head_dim_kpe", head_dim_kpe, KPE_DIM),
            ("use_profiler", use_profiler, False), ("skip_softmax", skip_softmax, False),
            ("use_sinks", use_sinks, False), ("output_scale", output_scale, "none"),
        ):  # fmt: skip
            if expected is False:
                expect_bool(name, value)
            if value != expected:
                raise NotImplementedError(
                    f"{name}: expected {expected!r}, other values are not supported, got {value!r}"
                )
        _expect_one_of("scale_mode", scale_mode, _SCALE_MODES)
        _expect_one_of("lse_mode", lse_mode, _LSE_MODES)
        _expect_one_of("query_layout", query_layout, _LAYOUTS)
        _expect_one_of("kv_cache_layout", kv_cache_layout, _LAYOUTS)
        expect_int("num_heads", num_heads, 1, MAX_HEADS)
        expect_int("page_size", page_size, 1)
        expect_bool("causal", causal)
        expect_scale("sm_scale", sm_scale)
        contract = _contract(float(sm_scale), q_data_type, kv_data_type, output_dtype, lse_mode, scale_mode)
        known = one_form(
            metadata,
            MLAPlanMetadata(
                qo_indptr, kv_indptr, kv_indices, kv_len_arr, cum_seq_lens_q, block_tables, seq_lens, max_q_len
            ),
        )
        batch = check_metadata(known, page_size, self.device)
        shape = Shape("csr" if "kv_indptr" in known else "dense", batch, num_heads, page_size, causal)

        queries = next(iter(known.values()))
        on_host = queries.device.type == "cpu"
        one_query_each = _is_one_query_each(queries, batch)
        if self._use_cuda_graph:
            self._stage(known, shape, one_query_each)
        else:
            self._pages, self._plans = on_device(known, shape, self.device), {}
        self._shape, self._contract, self._one_query_each = shape, contract, one_query_each
        if on_host and not self._use_cuda_graph:
            self._plan_of(int(queries[-1]))

    def run(
        self,
        q_nope: torch.Tensor | None = None,
        q_pe: torch.Tensor | None = None,
        ckv_cache: torch.Tensor | None = None,
        kpe_cache: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        profiler_buffer: torch.Tensor | None = None,
        kv_len: torch.Tensor | None = None,
        page_table: torch.Tensor | None = None,
        return_lse_base_on_e: bool = False,
        o_scale: float | None = None,
        *,
        query: Any = None,
        kv_cache: Any = None,
        ckv_scale: Scale | None = None,
        ckv_scale_arr: torch.Tensor | None = None,
        kpe_scale: Scale | None = None,
        sinks: torch.Tensor | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        bmm1_scale: Scale | None = None,
        bmm2_scale: Scale | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of one layer, on the metadata of the last `plan`.

        Args:
            query: [total_q, H, 576], or (q_nope [total_q, H, 512], q_pe [total_q, H, 64]); or q_nope and q_pe.
            kv_cache: [num_pages, page_size, 576], or (ckv_cache [num_pages, page_size, 512], kpe_cache
                [num_pages, page_size, 64]); or ckv_cache and kpe_cache. Packed tensors are read as two views.
            out: [total_q, H, 512] to write to; None allocates.
            lse: [total_q, H] float32 to write to; None allocates.
            return_lse: return (out, lse) instead of out.
            return_lse_base_on_e: log-sum-exp in base e instead of 2.
            ckv_scale, kpe_scale: numbers, or float32 tensors of one element on the device, that multiply the FP8
                caches of a "kv-per-tensor" plan.
            ckv_scale_arr: [num_pages, page_size, 4 or 1] float32 instead of ckv_scale, then with kpe_cache in the
                dtype of q_pe and kpe_scale None or 1.
            bmm1_scale, bmm2_scale: numbers, factors of the scores (instead of the plan's sm_scale) and of the output,
                of a "bmm-scalar" plan; bmm2_scale is 1 with 16-bit caches. Tensors of one element with "bmm-tensor".

        Returns:
            out [total_q, H, 512] in the plan's output_dtype, or (out, lse [total_q, H]). Rows from qo_indptr[-1] on are
            not written.

        Raises:
            TypeError, ValueError: an argument is wrong or not what `plan` was told; the message names it.
            NotImplementedError: an argument of what is not supported is not None. RuntimeError: no plan, or a CUDA
                device that is not Hopper.
        """
        if self._pages is None:
            raise RuntimeError("run() called before plan()")
        for name, value in (
            ("profiler_buffer", profiler_buffer), ("kv_len", kv_len), ("page_table", page_table), ("o_scale", o_scale),
            ("sinks", sinks), ("skip_softmax_threshold_scale_factor", skip_softmax_threshold_scale_factor),
        ):  # fmt: skip
            if value is not None:
                raise NotImplementedError(f"{name}: expected None, it is not supported, got {describe(value)}")
        q_nope, q_pe = _pair("query", query, {"q_nope": q_nope, "q_pe": q_pe})
        ckv_cache, kpe_cache = _pair("kv_cache", kv_cache, {"ckv_cache": ckv_cache, "kpe_cache": kpe_cache})
        contract, shape, tensors = self._contract, self._shape, (q_nope, q_pe, ckv_cache, kpe_cache)
        contract.check_tensors(shape, *tensors, out, ckv_scale_arr is not None)
        options = contract.scales(kpe_cache.dtype, ckv_scale, ckv_scale_arr, kpe_scale, bmm1_scale, bmm2_scale)
        options["lse_base"] = contract.lse_base(return_lse or lse is not None, return_lse_base_on_e)
        if out is None and contract.output_dtype is not q_nope.dtype:
            out = torch.empty(q_nope.shape, dtype=contract.output_dtype, device=q_nope.device)
        plan = self._plan_of(q_nope.shape[0])
        scale = options.get
        cache = Cache(
            ckv_cache, kpe_cache, scale("ckv_scale", UNSCALED), scale("kpe_scale", UNSCALED),
            scale("ckv_scale_arr"),
        )  # fmt: skip
        pages = as_decode(self._pages) if isinstance(plan, DecodePlan) else self._pages
        call = Call(
            q_nope, q_pe, cache, pages, options["sm_scale"], out, lse, options["lse_base"], scale("q_scale", UNSCALED)
        )
        return attend(call, plan, None, False, return_lse)

    @property
    def _cached_module(self) -> _FastPlan:
        return _FastPlan(self)

    def _plan_again(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_heads: int,
        causal: bool,
    ) -> None:
        """A `plan` with use_cuda_graph on the page ids that are in the buffer."""
        kv_indices = self._buffers["kv_indices"]
        if self._pages is None or not self._use_cuda_graph or self._shape.form != "csr" or kv_indices is None:
            raise RuntimeError("_cached_module.plan: expected use_cuda_graph and an earlier plan() with kv_indptr")
        # The caller may write to pinned memory again as soon as this returns, before a copy from it has run.
        mine = [x.clone() if x.is_pinned() else x for x in (qo_indptr, kv_indptr, kv_len_arr)]
        known = dict(zip(CSR_FIELDS, (*mine[:2], kv_indices, mine[2]), strict=True))
        batch = check_metadata(known, self._shape.page_size, self.device)
        one_query_each = _is_one_query_each(qo_indptr, batch)
        self._stage(known, Shape("csr", batch, num_heads, self._shape.page_size, causal), one_query_each)
        self._one_query_each = one_query_each

    def _plan_of(self, total_q: int) -> DecodePlan | PrefillPlan:
        plan = self._plans.get(total_q)
        if plan is None:
            assert self._pages is not None
            decode = self._one_query_each and total_q == self._shape.batch
            plan = self._plans[total_q] = plan_of(self._pages, self._shape, total_q, decode, self._contract.hints)
        return plan

    def _stage(self, known: dict[str, torch.Tensor], shape: Shape, one_query_each: bool) -> None:
        """Bring the memory that captured graphs read to the new metadata."""
        if self._pages is not None and shape != self._shape:
            now, first = asdict(shape), asdict(self._shape)
            name = next(name for name in now if now[name] != first[name])
            raise ValueError(
                f"{name}: expected {first[name]!r} as in the first plan with use_cuda_graph, got {now[name]!r}"
            )
        if not one_query_each and any(isinstance(plan, DecodePlan) for plan in self._plans.values()):
            raise ValueError(
                f"{next(iter(known))}: expected 0, 1, ..., batch on the cpu as in earlier plans with use_cuda_graph, "
                "whose graphs run decode kernels, got other values or a CUDA tensor"
            )
        if shape.form == "csr":
            self._copy_to_buffers(known, shape)
        else:
            self._keep_tensors(known, shape)
        for plan in self._plans.values():
            plan.update()

    def _copy_to_buffers(self, known: dict[str, torch.Tensor], shape: Shape) -> None:
        buffers: dict[str, torch.Tensor] = {}
        for name, source in known.items():
            buffer, size = self._buffers[name], source.shape[0]
            if buffer is None:
                raise ValueError(f"{name}: expected a buffer in the constructor with use_cuda_graph, got None")
            expect_metadata(name, buffer, (None,), "[n]", None)
            if buffer.device != self.device:
                raise ValueError(f"{name}: expected a buffer on {self.device}, got one on {buffer.device}")
            if buffer.shape[0] < size or (buffer.shape[0] > size and name != "kv_indices"):
                raise ValueError(f"{name}: expected metadata for the buffer of {buffer.shape[0]} elements, got {size}")
            buffers[name] = buffer
        for name, source in known.items():
            if source is not buffers[name]:
                buffers[name][: source.shape[0]].copy_(source, non_blocking=True)
        kv_len_arr = buffers["kv_len_arr"]
        last = None if self._pages is None else self._pages.last_len
        last = last_page_len(buffers["kv_indptr"], kv_len_arr, shape.page_size, last)
        self._pages = list_pages(buffers, last, shape)

    def _keep_tensors(self, known: dict[str, torch.Tensor], shape: Shape) -> None:
        for name, x in known.items():
            if x.device != self.device:
                raise ValueError(f"{name}: expected a tensor on {self.device} with use_cuda_graph, got {x.device}")
        if self._pages is None:
            self._pages = table_pages(known, shape)
            return
        kept = (self._pages.queries, self._pages.ids, self._pages.lengths)
        for (name, x), y in zip(known.items(), kept, strict=True):
            if (x.data_ptr(), x.shape, x.stride()) != (y.data_ptr(), y.shape, y.stride()):
                raise ValueError(
                    f"{name}: expected the tensor of the first plan with use_cuda_graph, whose memory its graphs read, "
                    "got another one"
                )


def _is_one_query_each(queries: torch.Tensor, batch: int) -> bool:
    """Whether offsets on the CPU are 0, 1, ..., batch; those of CUDA tensors are not read."""
    on_host = queries.device.type == "cpu"
    return on_host and torch.equal(queries, torch.arange(batch + 1, dtype=torch.int32, device="cpu"))


class _FastPlan:
    """`_cached_module` of a wrapper: FlashInfer's has the planner in C++, which SGLang calls in place of `plan`."""

    def __init__(self, wrapper: BatchMLAPagedAttentionWrapper):
        self._wrapper = wrapper

    def plan(
        self,
        float_workspace: None,
        int_workspace: None,
        pinned_workspace: None,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_heads: int,
        head_dim_ckv: int,
        causal: bool,
    ) -> None:
        if head_dim_ckv != CKV_DIM:
            raise NotImplementedError(f"head_dim_ckv: expected {CKV_DIM}, got {head_dim_ckv!r}")
        self._wrapper._plan_again(qo_indptr, kv_indptr, kv_len_arr, num_heads, causal)


def _bmm_scales(bmm1_scale: Any, bmm2_scale: Any, kv_is_fp8: bool) -> dict[str, float]:
    """Scores are multiplied by sm_scale * ckv_scale, outputs by ckv_scale: bmm1 and bmm2."""
    for name, value in (("bmm1_scale", bmm1_scale), ("bmm2_scale", bmm2_scale)):
        if isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: expected a number, plan() had scale_mode 'bmm-scalar', got {describe(value)}")
        expect_scale(name, value)
    if kv_is_fp8:
        scale = float(bmm2_scale)
        return {"sm_scale": bmm1_scale / scale, "ckv_scale": scale, "kpe_scale": scale}
    if bmm2_scale != 1:
        raise NotImplementedError(f"bmm2_scale: expected 1 with a 16-bit kv_data_type, got {bmm2_scale}")
    return {"sm_scale": float(bmm1_scale)}


def _bmm_tensors(bmm1_scale: Any, bmm2_scale: Any) -> dict[str, Any]:
    """The same of tensors, and of e4m3 queries, whose scale makes up for what the cache's is in the scores."""
    for name, value in (("bmm1_scale", bmm1_scale), ("bmm2_scale", bmm2_scale)):
        expect_tensor(name, value)
    return {"sm_scale": 1.0, "q_scale": bmm1_scale / bmm2_scale, "ckv_scale": bmm2_scale, "kpe_scale": bmm2_scale}


def _contract(sm_scale: float, q: Any, kv: Any, output: Any, lse_mode: str, scale_mode: str) -> _Contract:
    for name, dtype in (("q_data_type", q), ("kv_data_type", kv)):
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{name}: expected a torch.dtype, got {dtype!r}")
    if q not in (*DTYPES, FP8):
        raise NotImplementedError(f"q_data_type: expected {DTYPES[0]}, {DTYPES[1]} or {FP8}, got {q}")
    if kv not in (q, FP8):
        raise NotImplementedError(f"kv_data_type: expected that of the queries ({q}) or {FP8}, got {kv}")
    output = q if output is None else output
    if output not in DTYPES or (q is not FP8 and output is not q):
        expected = f"{DTYPES[0]} or {DTYPES[1]} with queries of {FP8}" if q is FP8 else f"that of the queries ({q})"
        raise NotImplementedError(f"output_dtype: expected {expected}, got {output}")
    if kv is FP8 and q is not FP8 and scale_mode == "default":
        scale_mode = "kv-per-tensor"
    if scale_mode == "bmm-tensor" and not (q is FP8 and kv is FP8):
        raise NotImplementedError(
            f"scale_mode: expected 'bmm-tensor' with queries and a cache of {FP8} only, got it with {q} and {kv}"
        )
    if kv is not FP8 and scale_mode == "kv-per-tensor":
        raise ValueError(f"scale_mode: expected 'default' or 'bmm-scalar' with kv_data_type {kv}, got {scale_mode!r}")
    return _Contract(sm_scale, q, kv, output, lse_mode, scale_mode)


def _pair(name: str, value: Any, parts: dict[str, torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """The 512 and the 64 wide part, of `value` or of the separate arguments `parts`."""
    given = [part for part, x in parts.items() if x is not None]
    if value is None:
        if len(given) != len(parts):
            raise TypeError(f"{name}: expected it, or {' and '.join(parts)}, got {given[0] if given else 'neither'}")
        value = tuple(parts.values())
    elif given:
        raise TypeError(f"{name}: expected None beside {given[0]}")
    if type(value) is tuple and len(value) == 2:
        # (packed, (left, right)) and ((left, right), packed) name the same memory twice
        value = next((x for x in value if type(x) is tuple), value)
    if type(value) is tuple and len(value) == 2:
        for part, x, width in zip(parts, value, (CKV_DIM, KPE_DIM), strict=True):
            expect_tensor(part, x)
            expect_shape(part, x, (None, None, width), f"[n, m, {width}]")
        return value
    expect_tensor(name, value)
    expect_shape(name, value, (None, None, CKV_DIM + KPE_DIM), f"[n, m, {CKV_DIM + KPE_DIM}]")
    return value[..., :CKV_DIM], value[..., CKV_DIM:]


def _expect_planned(name: str, x: torch.Tensor, argument: str, dtype: torch.dtype | None) -> None:
    expect_tensor(name, x)
    if x.dtype is not dtype:
        raise ValueError(f"{name}: expected dtype {dtype} ({argument} of plan()), got {x.dtype}")


def _expect_one_of(name: str, value: Any, names: Sequence[Any]) -> None:
    if value not in names:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, names))}, got {value!r}")
