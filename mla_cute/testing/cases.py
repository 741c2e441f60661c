"""Adversarial decode cases, shared by tests/, `mla-cute check` and testing/prefill.py.

`make_case` builds inputs that punish what a kernel must not do: every page, row and gap that a correct kernel does not
read holds NaN, every page id that it must not dereference is absurd, metadata is only 4-byte aligned, pages come in
random order, and the outputs lie between guard regions. `expected_of` is what testing/verdict.py judges a result by.
`sweep` lists the cases every release has to pass, and `run_case` runs one through the public call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mla_cute import reference
from mla_cute.call import DECODE, Cache, Call, Pages
from mla_cute.dims import HeadDims
from mla_cute.testing.verdict import Expected, Verdict, compare

# softmax scale of DeepSeek-V2/V3: 128 + 64 query dimensions before absorption
SM_SCALE = 192**-0.5
ABSURD_PAGE_IDS = (2**30, -5)
# 0x5a5a is 1.5e16 in bf16, 203 in fp16, and 1.5e16 in float32 when doubled up: an element nobody wrote is a wrong one.
SENTINEL = {2: 0x5A5A, 4: 0x5A5A5A5A}

CACHE_LAYOUTS = ("fused", "split", "padded", "slot_major")
Q_LAYOUTS = ("contiguous", "batch_strided", "fused")
OUT_LAYOUTS = ("contiguous", "batch_strided")


class Guarded:
    """A tensor inside a larger buffer of sentinels: `tensor` is handed out, the rest must stay as it is."""

    def __init__(
        self,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        guard: int,
    ) -> None:
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if math.prod(shape) else 0
        int_dtype = torch.int16 if dtype.itemsize == 2 else torch.int32
        self.sentinel = SENTINEL[dtype.itemsize]
        self.buffer = torch.full((extent + 2 * guard,), self.sentinel, dtype=int_dtype, device=device)
        self._geometry = (tuple(shape), tuple(strides), guard)
        self.tensor = self.buffer.view(dtype).as_strided(*self._geometry)

    def reset(self) -> None:
        self.buffer.fill_(self.sentinel)

    def untouched(self) -> bool:
        """True when nothing was written, inside or around."""
        return bool((self.buffer == self.sentinel).all())

    def intact(self, rows: int | None = None) -> bool:
        """True when nothing was written around `tensor`, nor in it from row `rows` on."""
        around = self.buffer.clone()
        around.as_strided(*self._geometry)[:rows].fill_(self.sentinel)
        return bool((around == self.sentinel).all())


@dataclass
class DecodeCase:
    """Inputs of one decode call in both metadata forms, and guarded outputs for it."""

    lengths: list[int]
    page_size: int
    num_heads: int
    sm_scale: float
    q_nope: torch.Tensor
    q_pe: torch.Tensor
    ckv_cache: torch.Tensor
    kpe_cache: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    kv_last_page_len: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    guarded_out: Guarded = field(repr=False)
    guarded_lse: Guarded = field(repr=False)
    causal: bool = field(default=False, kw_only=True)

    @property
    def queries(self) -> Sequence[int]:
        """[batch + 1]: request b owns the rows queries[b]:queries[b + 1] of q, out and lse; later rows nobody."""
        return range(len(self.lengths) + 1)

    @property
    def out(self) -> torch.Tensor:
        return self.guarded_out.tensor

    @property
    def lse(self) -> torch.Tensor:
        return self.guarded_lse.tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q_nope, self.q_pe, self.ckv_cache, self.kpe_cache

    @property
    def pages(self) -> Pages:
        """As page lists."""
        return Pages(DECODE, self.kv_indptr, self.kv_indices, self.kv_last_page_len)

    @property
    def csr_args(self) -> tuple[Any, ...]:
        """Positional arguments of `mla_paged_decode`; pass `kv_last_page_len` as a keyword beside them."""
        return (*self.tensors, self.kv_indptr, self.kv_indices, self.sm_scale)

    @property
    def block_table_args(self) -> tuple[Any, ...]:
        """Positional arguments of `mla_paged_decode_block_table`."""
        return (*self.tensors, self.block_table, self.seq_lens, self.sm_scale)

    def call(self, entry: str = "csr", **kwargs: Any) -> Any:
        """The public call on this case: `mla_paged_decode` ("csr") or its twin for block tables ("block_table")."""
        import mla_cute

        if entry == "csr":
            kwargs = {"kv_last_page_len": self.kv_last_page_len} | kwargs
            return mla_cute.mla_paged_decode(*self.csr_args, **kwargs)
        return mla_cute.mla_paged_decode_block_table(*self.block_table_args, **kwargs)

    def load(self, other: DecodeCase) -> None:
        """Overwrite this case's inputs in place, as a serving engine does between replays of a CUDA graph.

        Both cases need equal shapes: make them with the same `num_pages`, `num_indices` and `max_pages`.
        """
        names = ("kv_indptr", "kv_indices", "kv_last_page_len", "block_table", "seq_lens")
        for name in ("q_nope", "q_pe", "ckv_cache", "kpe_cache", *names):
            getattr(self, name).copy_(getattr(other, name))
        self.lengths = list(other.lengths)


@dataclass(frozen=True)
class CaseOptions:
    """Keywords of `make_case`.

    Attributes:
        cache_layout: "fused" (two views of [num_pages, page_size, ckv + kpe]), "split" (two tensors), "padded" (views
            with rows wider by 64 and one more row in a page, NaN in both gaps), "slot_major" (stride(0) < stride(1)).
        q_layout: "contiguous", "batch_strided" (NaN between requests), "fused" (two views of [batch, H, ckv + kpe]).
        out_layout: "contiguous" or "batch_strided" (guard regions between requests).
        shared_pages: up to this many leading full pages of request 0 are also those of every other request.
        drift: scores rise by this many nats from a request's first token to its last (fall when negative).
        num_pages: pages in the cache, at least those in use; the others are NaN. Default: one in nine, and 3 at least.
        num_indices: length of kv_indices, the rest absurd page ids. Default: 7 of them.
        max_pages: columns of block_table, the rest absurd page ids. Default: 3 of them.
        index_offset: kv_indptr[0]; that many absurd page ids come first.
        dims: channels of a head. Without rope q_pe and kpe_cache are views of width 0, and it is the first channel of
            the latent part that drifts.
    """

    num_heads: int
    page_size: int
    dtype: torch.dtype = torch.bfloat16
    device: torch.device | str = "cpu"
    seed: int = 0
    sm_scale: float = SM_SCALE
    cache_layout: str = "fused"
    q_layout: str = "contiguous"
    out_layout: str = "contiguous"
    shared_pages: int = 0
    drift: float = 0.0
    num_pages: int | None = None
    num_indices: int | None = None
    max_pages: int | None = None
    index_offset: int = 0
    dims: HeadDims = HeadDims()


def make_case(lengths: Sequence[int], **options: Any) -> DecodeCase:
    """Build a case of one request per entry of `lengths` (tokens); deterministic for a seed and a device type.
    `options` are those of `CaseOptions`."""
    of = CaseOptions(**options)
    num_heads, page_size, dtype, sm_scale, drift = of.num_heads, of.page_size, of.dtype, of.sm_scale, of.drift
    shared_pages, index_offset = of.shared_pages, of.index_offset
    generator = torch.Generator().manual_seed(of.seed)
    length = torch.tensor(lengths, dtype=torch.int64)
    batch = len(length)
    pages_of = (length + page_size - 1) // page_size
    indptr = torch.zeros(batch + 1, dtype=torch.int64)
    indptr[1:] = pages_of.cumsum(0)
    used = int(indptr[-1])
    num_pages = used + max(3, used // 8) if of.num_pages is None else of.num_pages
    num_indices = index_offset + used + 7 if of.num_indices is None else of.num_indices
    max_pages = int(pages_of.max() if batch else 0) + 3 if of.max_pages is None else of.max_pages

    ids = torch.randperm(num_pages, generator=generator)[:used]
    full_pages = length // page_size
    for b in range(1, batch if shared_pages else 0):
        n = min(shared_pages, int(full_pages[b]), int(full_pages[0]))
        ids[indptr[b] : indptr[b] + n] = ids[:n]
    request_of = torch.arange(batch).repeat_interleave(pages_of)
    page_of = torch.arange(used) - indptr[request_of]

    all_indices = _absurd(num_indices)
    all_indices[index_offset : index_offset + used] = ids
    # an odd row stride, so that rows are only 4-byte aligned
    table = _absurd(batch * (max_pages | 1)).view(batch, max_pages | 1)[:, :max_pages]
    table[request_of, page_of] = ids.to(torch.int32)
    # what the last page length of an empty request says must not matter
    last_page_len = (torch.arange(batch) % 2) * page_size
    last_page_len[length > 0] = (length - (pages_of - 1) * page_size)[length > 0]

    live_rows = torch.zeros(num_pages, dtype=torch.int64)
    live_rows[ids] = (length[request_of] - page_of * page_size).clamp(max=page_size)

    device = torch.device(of.device)
    values = torch.Generator(device=device).manual_seed(of.seed)
    q_nope, q_pe = make_q(batch, num_heads, of.q_layout, dtype, device, values, of.dims)
    ckv_cache, kpe_cache = _make_caches(num_pages, page_size, of.cache_layout, dtype, device, values, of.dims)
    if drift:
        amplitude = math.sqrt(abs(drift) / sm_scale)
        first_token = torch.zeros(num_pages, dtype=torch.float32)
        first_token[ids] = (page_of * page_size).float()
        last_token = torch.ones(num_pages, dtype=torch.float32)
        last_token[ids] = (length[request_of] - 1).clamp(min=1).float()
        slot = torch.arange(page_size, device=device)
        fraction = (first_token.to(device)[:, None] + slot) / last_token.to(device)[:, None]
        q, cache = q_pe, kpe_cache
        if not of.dims.kpe:
            # What drifts is a channel of the output then. Were it larger than all others together, the output's error
            # would be that of one number, and the in-dtype computation's, which is the measure, may be 0 by chance.
            q, cache, amplitude = q_nope, ckv_cache, min(amplitude, 4.0)
        q[..., 0] = abs(drift) / (sm_scale * amplitude)
        cache[..., 0] = (math.copysign(amplitude, drift) * fraction).to(dtype)
    dead = torch.arange(page_size, device=device) >= live_rows.to(device)[:, None]
    for cache in (ckv_cache, kpe_cache):
        cache.masked_fill_(dead[..., None], math.nan)

    guarded_out, guarded_lse = make_outputs(batch, num_heads, of.out_layout, dtype, device, of.dims)
    return DecodeCase(
        lengths=list(lengths),
        page_size=page_size,
        num_heads=num_heads,
        sm_scale=sm_scale,
        q_nope=q_nope,
        q_pe=q_pe,
        ckv_cache=ckv_cache,
        kpe_cache=kpe_cache,
        kv_indptr=unaligned(indptr + index_offset, device),
        kv_indices=unaligned(all_indices, device),
        kv_last_page_len=unaligned(last_page_len, device),
        block_table=_like_table(table, device),
        seq_lens=unaligned(length, device),
        guarded_out=guarded_out,
        guarded_lse=guarded_lse,
    )


def make_outputs(
    rows: int,
    num_heads: int,
    layout: str,
    dtype: torch.dtype,
    device: torch.device,
    dims: HeadDims = HeadDims(),
) -> tuple[Guarded, Guarded]:
    """out [rows, H, ckv] and lse [rows, H]."""
    gap = 2 if layout == "batch_strided" else 1
    shape, strides = (rows, num_heads, dims.ckv), (gap * num_heads * dims.ckv, dims.ckv, 1)
    return (
        Guarded(shape, strides, dtype, device, guard=4096),
        # 4-byte alignment is all that lse has to have
        Guarded((rows, num_heads), (num_heads, 1), torch.float32, device, guard=1021),
    )


def _absurd(n: int) -> torch.Tensor:
    return torch.tensor(ABSURD_PAGE_IDS, dtype=torch.int32).repeat(n // 2 + 1)[:n]


def unaligned(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The values as int32 on the device, contiguous, 4 bytes past an aligned address, absurd numbers on both sides."""
    buffer = _absurd(len(values) + 2)
    buffer[1:-1] = values
    return buffer.to(device)[1:-1]


def _like_table(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return table
    on_device = torch.empty(table.shape[0], table.stride(0), dtype=torch.int32, device=device)[:, : table.shape[1]]
    return on_device.copy_(table)


def make_q(
    rows: int,
    num_heads: int,
    layout: str,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    dims: HeadDims = HeadDims(),
) -> tuple[torch.Tensor, torch.Tensor]:
    """q_nope [rows, H, ckv] and q_pe [rows, H, kpe]."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    if layout == "contiguous":
        return normal(rows, num_heads, dims.ckv), normal(rows, num_heads, dims.kpe)
    if layout == "fused":
        q = normal(rows, num_heads, sum(dims))
        return q[..., : dims.ckv], q[..., dims.ckv :]
    if layout != "batch_strided":
        raise ValueError(f"q_layout: expected one of {Q_LAYOUTS}, got {layout!r}")
    nope, pe = normal(rows, 3, num_heads, dims.ckv), normal(rows, 3, num_heads, dims.kpe)
    for q in (nope, pe):
        q[:, 0] = q[:, 2] = math.nan
    return nope[:, 1], pe[:, 1]


def _make_caches(
    num_pages: int,
    page_size: int,
    layout: str,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    dims: HeadDims,
) -> tuple[torch.Tensor, torch.Tensor]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    width = sum(dims)
    if layout == "split":
        return normal(num_pages, page_size, dims.ckv), normal(num_pages, page_size, dims.kpe)
    if layout == "fused":
        cache = normal(num_pages, page_size, width)
    elif layout == "slot_major":
        cache = normal(page_size, num_pages, width).transpose(0, 1)
    elif layout == "padded":
        buffer = normal(num_pages, page_size + 1, width + 64)
        buffer[:, page_size:] = math.nan
        buffer[..., width:] = math.nan
        cache = buffer[:, :page_size, :width]
    else:
        raise ValueError(f"cache_layout: expected one of {CACHE_LAYOUTS}, got {layout!r}")
    return cache[..., : dims.ckv], cache[..., dims.ckv :]


# ------------------------------------------------------------------------------------------------ what is expected


def expected_of(case: DecodeCase, *, lse_base: int | str = 2) -> Expected:
    """Run the reference on a case, once in float32 and once with P and the output rounded to the dtype of q."""
    pages, lengths = reference.requests_of(case.pages, case.page_size)
    if lengths != case.lengths:
        raise AssertionError(f"the case's metadata say lengths {lengths}, it was made for {case.lengths}")
    queries = list(case.queries)
    q_nope, q_pe = case.q_nope[: queries[-1]], case.q_pe[: queries[-1]]
    caches = (case.ckv_cache, case.kpe_cache)
    out = torch.empty_like(q_nope, dtype=torch.float32)
    call = Call(q_nope, q_pe, Cache(*caches), case.pages, case.sm_scale, out, None, lse_base)
    output, lse = reference.attention(call)
    in_dtype, _ = reference.attention(call._replace(out=None), p_dtype=q_nope.dtype)
    per_base = math.log2(math.e) if lse_base == 2 else 1.0
    score_rounding = torch.zeros_like(lse)
    for b, (page_ids, kv_len) in enumerate(zip(pages, lengths, strict=True)):
        begin, end = queries[b], queries[b + 1]
        if kv_len > 0 and end > begin:
            squares = torch.zeros(kv_len, device=lse.device)
            for cache in caches:
                squares += cache.index_select(0, page_ids).flatten(0, 1)[:kv_len].float().square().sum(-1)
            largest = squares.cummax(0).values.sqrt()
            last = torch.arange(kv_len - (end - begin), kv_len, device=lse.device).clamp(min=0)
            largest = largest[last][:, None] if case.causal else largest[-1]
            q_norm = torch.cat((q_nope[begin:end], q_pe[begin:end]), dim=-1).float().norm(dim=-1)
            score_rounding[begin:end] = q_norm * largest * (case.sm_scale * per_base * 2.0**-23)
    return Expected(output, lse, score_rounding, in_dtype, case.q_nope.dtype, lengths, queries)


# ------------------------------------------------------------------------------------------------ the sweep

SWEEP_HEADS = (1, 6, 8, 16, 24, 64, 65, 96, 128)
SWEEP_PAGE_SIZES = (1, 3, 8, 16, 24, 32, 48, 64, 100, 128, 192, 256)
SWEEP_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CaseSpec:
    """A case by its parameters; `make` builds it on a device."""

    num_heads: int
    page_size: int
    dtype: torch.dtype
    lengths: tuple[int, ...]
    cache_layout: str = "fused"
    q_layout: str = "contiguous"
    out_layout: str = "contiguous"
    shared_pages: int = 0
    drift: float = 0.0
    seed: int = 0
    dims: HeadDims = HeadDims()

    def __str__(self) -> str:
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        name = f"h{self.num_heads}-page{self.page_size}-{dtype}-b{len(self.lengths)}x{max(self.lengths, default=0)}"
        name += "" if self.dims == HeadDims() else f"-{self.dims.ckv}+{self.dims.kpe}"
        return f"{name}-{self.cache_layout}-q_{self.q_layout}-out_{self.out_layout}-drift{self.drift:g}"

    def make(self, device: torch.device | str) -> DecodeCase:
        return make_case(
            self.lengths,
            num_heads=self.num_heads,
            page_size=self.page_size,
            dtype=self.dtype,
            device=device,
            seed=self.seed,
            cache_layout=self.cache_layout,
            q_layout=self.q_layout,
            out_layout=self.out_layout,
            shared_pages=self.shared_pages,
            drift=self.drift,
            dims=self.dims,
        )


def sweep(heads_per_cell: int = 3) -> list[CaseSpec]:
    """Ragged batches over every page size and dtype, each with `heads_per_cell` of the head counts and of the layouts.

    3 makes 72 cases, in which a head count meets two thirds of the page sizes; 9 is the full product, 216 cases.
    """
    specs: list[CaseSpec] = []
    for page_size in SWEEP_PAGE_SIZES:
        for dtype in SWEEP_DTYPES:
            for _ in range(heads_per_cell):
                i = len(specs)
                edges = (page_size - 1, page_size, page_size + 1, 3 * page_size)
                lengths = [0, 1, 63, 64, 65, 127, 129, 1000, *edges]
                lengths += [20000] if i % 2 == 0 else [4097, 0]
                order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(i)).tolist()
                specs.append(
                    CaseSpec(
                        num_heads=SWEEP_HEADS[(i + i // len(SWEEP_HEADS)) % len(SWEEP_HEADS)],
                        page_size=page_size,
                        dtype=dtype,
                        lengths=tuple(lengths[j] for j in order),
                        cache_layout=CACHE_LAYOUTS[(i + i // 12) % len(CACHE_LAYOUTS)],
                        q_layout=Q_LAYOUTS[(i + i // 6) % len(Q_LAYOUTS)],
                        out_layout=OUT_LAYOUTS[(i // 3) % len(OUT_LAYOUTS)],
                        shared_pages=(0, 1, 1000)[i // 2 % 3],
                        drift=(0.0, 60.0, -60.0)[i // 4 % 3],
                        seed=i,
                    )
                )
    return specs


def run_case(
    case: DecodeCase,
    *,
    entry: str = "csr",
    lse_base: int | str = 2,
    expected: Expected | None = None,
    **kwargs: Any,
) -> Verdict:
    """Run a case through the public call into its guarded outputs and judge what came out.

    Args:
        entry: as `DecodeCase.call`.
        expected: from `expected_of`, with the same `lse_base`; None computes it.
        kwargs: further keywords of the call, such as `plan` or `batch_invariant`.
    """
    case.guarded_out.reset()
    case.guarded_lse.reset()
    output, lse = case.call(entry, out=case.out, lse=case.lse, lse_base=lse_base, **kwargs)
    verdict = judge(case, expected_of(case, lse_base=lse_base) if expected is None else expected)
    return replace(verdict, failures=(*not_as_given(case, output, lse), *verdict.failures))


def judge(case: DecodeCase, expected: Expected) -> Verdict:
    """Judge what is in the case's guarded outputs now, and that nothing else was written."""
    rows = case.queries[-1]
    verdict = compare(case.out[:rows], case.lse[:rows], expected)
    return replace(verdict, failures=(*guard_failures(case), *verdict.failures))


def not_as_given(case: DecodeCase, output: torch.Tensor, lse: torch.Tensor) -> list[str]:
    """What the call returned, if it is not the case's outputs."""
    failures = []
    if output.data_ptr() != case.out.data_ptr() or output.stride() != case.out.stride():
        failures.append("output: expected the tensor given as out")
    if lse.data_ptr() != case.lse.data_ptr():
        failures.append("lse: expected the tensor given as lse")
    return failures


def guard_failures(case: DecodeCase) -> list[str]:
    """What was written beside the rows of the case's outputs that requests own."""
    rows = case.queries[-1]
    failures = []
    if not case.guarded_out.intact(rows):
        failures.append("output: memory around out, or a row that no request owns, was written")
    if not case.guarded_lse.intact(rows):
        failures.append("lse: memory around lse, or a row that no request owns, was written")
    return failures
