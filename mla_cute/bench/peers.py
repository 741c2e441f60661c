"""Other people's MLA decode kernels behind the interface `bench` times ours through.

Only public interfaces are used. A peer that is not installed says so; one that cannot run a case says why.
"""

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..compile import toolchain
from .cases import DTYPES, Case, PrefillCase

if TYPE_CHECKING:
    from .inputs import Inputs


# Of 64 query rows, of a request in FlashMLA's dense FP8: the SMs of the smallest Hopper GPU, an H20.
MOST_FP8_TILES = 78


class Unsupported(Exception):
    """The peer does not offer this case: a page size, a cache format."""


def expect_usual_dims(case: Case | PrefillCase) -> None:
    if case.dims_label:
        raise Unsupported(f"head dimensions {case.dims}: peers are asked for 512 + 64 only")


class Peer(ABC):
    """`calls(inputs)` gives one callable per rotation slot; each fills `outputs[slot]` with [total_q, H, 512]."""

    name: str
    # What a table calls it, in a word.
    short: str
    # Modules to try in turn: the package itself, then those of other packages that bundle it.
    modules: tuple[str, ...]

    def __init__(self) -> None:
        self._found_as, self._package = self._find()
        self.outputs: dict[int, torch.Tensor] = {}

    @classmethod
    def why_not(cls, name: str, module: Any) -> str | None:
        """Why a module that could be imported is another package than this peer's; None: it is this peer's."""
        return None

    @classmethod
    def _find(cls) -> tuple[str, Any]:
        """The first module that is this peer's, with its name; else the reasons of all."""
        errors = []
        for name in cls.modules:
            try:
                module = importlib.import_module(name)
            except ImportError as error:
                errors.append(error)
                continue
            if reason := cls.why_not(name, module):
                errors.append(ImportError(reason))
                continue
            return name, module
        raise errors[0] if len(errors) == 1 else ImportError("; ".join(map(str, errors)))

    @property
    def version(self) -> str | None:
        bundle, dot, _ = self._found_as.partition(".")
        if dot:
            return f"of {bundle} {toolchain.version(bundle)}"
        return getattr(self._package, "__version__", None)

    def caches(self, inputs: "Inputs") -> tuple[torch.Tensor, torch.Tensor]:
        """ckv and kpe as this peer reads them."""
        return inputs.ckv_cache, inputs.kpe_cache

    @abstractmethod
    def calls(self, inputs: "Inputs") -> list[Callable[[], Any]]: ...


def _block_table(inputs: "Inputs", slot: int) -> torch.Tensor:
    """[batch, most pages of a request] of the slot's pages; behind the pages of a shorter request there is page 0."""
    pages = inputs.case.pages
    table = inputs.kv_indices.new_zeros(len(pages), max(pages))
    for row, ids in zip(table, inputs.kv_indices[slot].split(pages), strict=True):
        row[: len(ids)] = ids
    return table


def _packed_queries(inputs: "Inputs", slot: int) -> torch.Tensor:
    """[total_q, H, 576] in the dtype of the queries, joined as bytes: not every torch concatenates e4m3."""
    parts = (inputs.q_nope[slot], inputs.q_pe[slot])
    return torch.cat([part.view(torch.uint8) for part in parts], dim=-1).view(parts[0].dtype)


def _is_sparse(case: Case | PrefillCase) -> bool:
    return isinstance(case, Case) and case.sparse


def _is_causal(case: Case | PrefillCase) -> bool:
    return isinstance(case, PrefillCase) and case.causal


class FlashInfer(Peer):
    """BatchMLAPagedAttentionWrapper. Its plan runs on the host and is left out of its time.

    On Hopper it takes 16-bit queries only, and (0.7.4) of FP8 caches those that are e4m3 throughout, with bf16 queries.
    """

    name, short, modules = "flashinfer", "FlashInfer", ("flashinfer",)

    def calls(self, inputs: "Inputs") -> list[Callable[[], Any]]:
        case = inputs.case
        if _is_sparse(case):
            raise Unsupported("lists of tokens: FlashInfer has them as pages of one token")
        if case.q_fp8:
            raise Unsupported("e4m3 queries: FlashInfer's kernels for Hopper take 16-bit ones only")
        if case.kv_format and not (case.rope_is_fp8 and case.dtype == "bfloat16"):
            raise Unsupported("this FP8 cache: FlashInfer takes one that is e4m3 throughout, beside bf16 queries, only")
        wrapper_class = importlib.import_module("flashinfer.mla").BatchMLAPagedAttentionWrapper
        device = inputs.q_nope.device
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device=device)
        scales = {name: inputs.scales[name] for name in ("ckv_scale", "kpe_scale") if case.kv_format}
        self.outputs = {}

        def make(slot: int) -> Callable[[], Any]:
            wrapper = wrapper_class(workspace)
            wrapper.plan(
                qo_indptr=inputs.qo_indptr,
                kv_indptr=inputs.kv_indptr,
                kv_indices=inputs.kv_indices[slot],
                kv_len_arr=inputs.kv_lens,
                num_heads=case.num_heads,
                head_dim_ckv=512,
                head_dim_kpe=64,
                page_size=case.page_size,
                causal=_is_causal(case),
                sm_scale=inputs.sm_scale,
                q_data_type=inputs.q_nope.dtype,
                kv_data_type=inputs.ckv_cache.dtype,
            )
            out = self.outputs[slot] = torch.full_like(inputs.q_nope[slot], float("nan"))
            tensors = {
                "q_nope": inputs.q_nope[slot],
                "q_pe": inputs.q_pe[slot],
                "ckv_cache": inputs.ckv_cache,
                "kpe_cache": inputs.kpe_cache,
            }
            return lambda: wrapper.run(**tensors, out=out, **scales)

        return [make(slot) for slot in range(inputs.num_slots)]


class FlashMLA(Peer):
    """flash_mla_with_kvcache. Its scheduling metadata is made once, before the first timed call.

    It has fused caches only, so it always reads the pool as one 576-wide buffer: the same bytes, other values. Dense
    FP8 (e4m3 queries, a cache that is e4m3 throughout, one scale for each) is not in FlashMLA itself, but vLLM has
    functions for it beside its copy. Lists of tokens: 16-bit rows by flash_mla_sparse_fwd, rows of 656 bytes by
    flash_mla_with_kvcache, which has kernels for 64 and 128 heads only, so that fewer are filled up before it is timed.
    """

    name, short = "flash_mla", "FlashMLA"
    modules: tuple[str, ...] = ("flash_mla", "vllm.third_party.flashmla.flash_mla_interface")
    fp8_module = "vllm.v1.attention.ops.flashmla"

    @classmethod
    def why_not(cls, name: str, module: Any) -> str | None:
        return "the flash_mla that is installed is sgl-flash-mla" if _is_sgl(module) else None

    def caches(self, inputs: "Inputs") -> tuple[torch.Tensor, torch.Tensor]:
        if inputs.case.kv_format == "group":
            return inputs.ckv_cache, inputs.kpe_cache
        cache = self._cache(inputs)
        return cache[..., :512], cache[..., 512:]

    @staticmethod
    def _cache(inputs: "Inputs") -> torch.Tensor:
        """[num_pages, page_size, 576]."""
        return inputs.fused_cache.view(inputs.ckv_cache.dtype)

    def calls(self, inputs: "Inputs") -> list[Callable[[], Any]]:
        case = inputs.case
        if _is_sparse(case):
            return self._sparse_calls(inputs)
        if case.page_size != 64:
            raise Unsupported(f"page size {case.page_size}: FlashMLA has 64 only")
        q_lens = {q for q, _ in case.requests}
        if len(q_lens) > 1:
            raise Unsupported("requests of several lengths: FlashMLA has one number of query tokens per call")
        if case.kv_format and not (case.rope_is_fp8 and case.q_fp8):
            raise Unsupported("this FP8 case: FlashMLA's dense FP8 has e4m3 queries on a cache e4m3 throughout only")
        if case.kv_format and case.dtype != "bfloat16":
            raise Unsupported(f"{case.dtype} outputs: FlashMLA's dense FP8 has bfloat16 ones only")
        (q_len,) = q_lens
        if case.kv_format and q_len * case.num_heads > 64 * MOST_FP8_TILES:
            # It shares the SMs among tiles of 64 query rows of a request; with none for each its plan fails an
            # assertion on the GPU, after which the process can launch nothing.
            raise Unsupported(f"{q_len} query tokens: FlashMLA's dense FP8 has at most {MOST_FP8_TILES} tiles of rows")
        attend = self._dense_fp8(inputs, q_len) if case.kv_format else self._dense(inputs, q_len)
        cache = self._cache(inputs).unsqueeze(2)
        self.outputs = {}

        def make(slot: int) -> Callable[[], Any]:
            q = _packed_queries(inputs, slot).unflatten(0, (len(case.requests), q_len))
            block_table = _block_table(inputs, slot)

            def call() -> None:
                self.outputs[slot] = attend(q, cache, block_table).flatten(0, 1)

            return call

        return [make(slot) for slot in range(inputs.num_slots)]

    def _sparse_calls(self, inputs: "Inputs") -> list[Callable[[], Any]]:
        case = inputs.case
        if case.dtype != "bfloat16" or case.q_fp8:
            raise Unsupported("queries that are not bfloat16: FlashMLA's sparse kernels have no others")
        if case.kv_format and not (case.kv_format == "group" and case.layout == "fused" and case.page_size == 64):
            raise Unsupported("this FP8 cache: FlashMLA's sparse kernels have rows of 656 bytes in pages of 64 only")
        attend = self._sparse_fp8(inputs) if case.kv_format else self._sparse(inputs)
        heads = next(n for n in ((64, 128) if case.kv_format else (8, 16, 32, 64, 128)) if n >= case.num_heads)
        self.outputs = {}

        def make(slot: int) -> Callable[[], Any]:
            q = torch.nn.functional.pad(_packed_queries(inputs, slot), (0, 0, 0, heads - case.num_heads))
            indices = inputs.kv_indices[slot].unsqueeze(1)

            def call() -> None:
                self.outputs[slot] = attend(q, indices)[:, : case.num_heads]

            return call

        return [make(slot) for slot in range(inputs.num_slots)]

    def _sparse(self, inputs: "Inputs") -> Callable[..., torch.Tensor]:
        """Attention of (q [tokens, H, 576], indices [tokens, 1, topk]) over a 16-bit cache."""
        rows = self._cache(inputs).flatten(0, 1).unsqueeze(1)
        return lambda q, indices: self._package.flash_mla_sparse_fwd(q, rows, indices, inputs.sm_scale)[0]

    def _sparse_fp8(self, inputs: "Inputs") -> Callable[..., torch.Tensor]:
        """The same over rows of 656 bytes."""
        package, rows = self._package, inputs.fused_cache.unsqueeze(2)
        metadata, num_splits = package.get_mla_metadata()

        def attend(q: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
            out, _ = package.flash_mla_with_kvcache(
                q.unsqueeze(1), rows, None, None, 512, metadata, num_splits, inputs.sm_scale, False, True, indices
            )
            return out.squeeze(1)

        return attend

    def _dense(self, inputs: "Inputs", q_len: int) -> Callable[..., torch.Tensor]:
        """Attention of (q, cache, block_table) over 16-bit caches."""
        case, package = inputs.case, self._package
        # Before 2026 the metadata was two tensors made from the lengths; since then an object filled by the first call.
        metadata, num_splits = package.get_mla_metadata(inputs.kv_lens, q_len * case.num_heads, 1)

        def attend(q: torch.Tensor, cache: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
            return package.flash_mla_with_kvcache(
                q, cache, block_table, inputs.kv_lens, 512, metadata, num_splits, inputs.sm_scale, _is_causal(case)
            )[0]

        return attend

    def _dense_fp8(self, inputs: "Inputs", q_len: int) -> Callable[..., torch.Tensor]:
        """The same over FP8 caches."""
        if self._found_as == self.modules[0]:
            raise Unsupported("an FP8 cache: FlashMLA has dense FP8 in vLLM's copy and in sgl-flash-mla only")
        case, package = inputs.case, importlib.import_module(self.fp8_module)
        metadata, num_splits = package.get_mla_metadata_dense_fp8(inputs.kv_lens, q_len * case.num_heads, 1)
        descale = _descales(inputs)

        def attend(q: torch.Tensor, cache: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
            return package.flash_mla_with_kvcache_fp8(
                q=q,
                k_cache=cache,
                block_table=block_table,
                cache_seqlens=inputs.kv_lens,
                head_dim_v=512,
                tile_scheduler_metadata=metadata,
                num_splits=num_splits,
                softmax_scale=inputs.sm_scale,
                causal=_is_causal(case),
                **descale,
            )[0]

        return attend


def _is_sgl(module: Any) -> bool:
    """Whether a module `flash_mla` is sgl-flash-mla's: that has the kernels for Hopper behind a keyword of its own."""
    return "use_legacy" in inspect.signature(module.flash_mla_with_kvcache).parameters


def _descales(inputs: "Inputs") -> dict[str, torch.Tensor]:
    """Scales of e4m3 queries and of an e4m3 cache, float32 [1] each. There is one for all of the cache, which has the
    same for ckv and kpe."""
    scales, device = inputs.scales, inputs.q_nope.device
    assert scales["ckv_scale"] == scales["kpe_scale"]
    by_name = (("descale_q", "q_scale"), ("descale_k", "ckv_scale"))
    return {name: torch.full((1,), scales[key], dtype=torch.float32, device=device) for name, key in by_name}


class SglFlashMLA(FlashMLA):
    """sgl-flash-mla, which installs as `flash_mla`: FlashMLA's interface and its dense FP8; for Hopper `use_legacy`."""

    name, short, modules = "sgl_flash_mla", "sgl-flash-mla", ("flash_mla",)

    def _sparse_calls(self, inputs: "Inputs") -> list[Callable[[], Any]]:
        raise Unsupported("lists of tokens: asked of FlashMLA as in vLLM")

    @classmethod
    def why_not(cls, name: str, module: Any) -> str | None:
        return None if _is_sgl(module) else "the flash_mla that is installed is not sgl-flash-mla"

    def _attend(self, inputs: "Inputs", metadata: Any, **options: Any) -> Callable[..., torch.Tensor]:
        case, package = inputs.case, self._package

        def attend(q: torch.Tensor, cache: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
            return package.flash_mla_with_kvcache(
                q,
                cache,
                block_table,
                inputs.kv_lens,
                512,
                metadata,
                None,
                inputs.sm_scale,
                _is_causal(case),
                use_legacy=True,
                **options,
            )[0]

        return attend

    def _dense(self, inputs: "Inputs", q_len: int) -> Callable[..., torch.Tensor]:
        metadata, _ = self._package.get_mla_metadata()
        return self._attend(inputs, metadata, is_fp8_kvcache=False)

    def _dense_fp8(self, inputs: "Inputs", q_len: int) -> Callable[..., torch.Tensor]:
        metadata, _ = self._package.get_mla_metadata()
        # The scheduler of dense FP8 is no part of the call: the metadata are to be there before it.
        metadata.tile_scheduler_metadata, metadata.num_splits = self._package.get_mla_decoding_metadata(
            inputs.kv_lens, q_len * inputs.case.num_heads, 1, is_fp8_kvcache=True, use_legacy=True
        )
        return self._attend(inputs, metadata, is_fp8_kvcache=True, **_descales(inputs))


class FlashAttention3(Peer):
    """FlashAttention-3 with the latent part of the queries as q_v, called as by vLLM's FLASH_ATTN_MLA.

    That is vLLM's default for MLA on Hopper. Scheduler metadata is made once per step, so here before the first timed
    call; a request has at most 32 splits, as in CUDA graphs, which take up to 512 query tokens. With more tokens the
    kernel chooses.
    """

    name, short, modules = "flash_attn_3", "FA3", ("vllm.vllm_flash_attn",)
    graph_splits, graph_tokens = 32, 512

    def calls(self, inputs: "Inputs") -> list[Callable[[], Any]]:
        case, package = inputs.case, self._package
        if _is_sparse(case):
            raise Unsupported("lists of tokens: FlashAttention-3 has them as pages of one token")
        if case.kv_format:
            raise Unsupported("an FP8 cache: FlashAttention-3 has q_v with 16-bit caches only")
        if not package.is_fa_version_supported(3):
            raise Unsupported(f"FlashAttention-3: {package.fa_version_unsupported_reason(3)}")
        longest_q, longest_kv = (max(lengths) for lengths in zip(*case.requests, strict=True))
        causal = not isinstance(case, PrefillCase) or case.causal
        num_splits = self.graph_splits if case.total_q <= self.graph_tokens else 0
        metadata = package.get_scheduler_metadata(
            batch_size=len(case.requests),
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_kv,
            num_heads_q=case.num_heads,
            num_heads_kv=1,
            headdim=64,
            cache_seqlens=inputs.kv_lens,
            qkv_dtype=DTYPES[case.dtype],
            headdim_v=512,
            page_size=case.page_size,
            cu_seqlens_q=inputs.qo_indptr,
            causal=causal,
            num_splits=num_splits,
        )
        k, v = inputs.kpe_cache.unsqueeze(2), inputs.ckv_cache.unsqueeze(2)
        self.outputs = {}

        def make(slot: int) -> Callable[[], Any]:
            options = {
                "q": inputs.q_pe[slot],
                "k": k,
                "v": v,
                "q_v": inputs.q_nope[slot],
                "max_seqlen_q": longest_q,
                "cu_seqlens_q": inputs.qo_indptr,
                "max_seqlen_k": longest_kv,
                "seqused_k": inputs.kv_lens,
                "block_table": _block_table(inputs, slot),
                "softmax_scale": inputs.sm_scale,
                "causal": causal,
                "fa_version": 3,
                "scheduler_metadata": metadata,
                "num_splits": num_splits,
            }

            def call() -> None:
                self.outputs[slot] = package.flash_attn_varlen_func(**options)

            return call

        return [make(slot) for slot in range(inputs.num_slots)]


PEERS: tuple[type[Peer], ...] = (FlashInfer, FlashMLA, SglFlashMLA, FlashAttention3)
SHORT_NAMES = {peer.name: peer.short for peer in PEERS}


def installed() -> tuple[list[Peer], dict[str, dict[str, Any]]]:
    """The peers that import here, and for every known peer {"present", "version" or "why"} for the record."""
    found, status = [], {}
    for peer_class in PEERS:
        try:
            peer = peer_class()
        except Exception as error:  # a broken install raises anything, OSError of a missing .so too
            status[peer_class.name] = {"present": False, "why": f"{type(error).__name__}: {error}"}
            continue
        found.append(peer)
        status[peer.name] = {"present": True, "version": peer.version}
    return found, status
