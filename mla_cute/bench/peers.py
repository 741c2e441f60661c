"""Other people's MLA decode kernels behind the interface `bench` times ours through.

Only public interfaces are used. A peer that is not installed says so; one that cannot run a case says why.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..compile import toolchain
from .cases import PrefillCase

if TYPE_CHECKING:
    from .inputs import Inputs


class Unsupported(Exception):
    """The peer does not offer this case: a page size, a cache format."""


def _first_of(*modules: str) -> tuple[str, Any]:
    """The first module that can be imported, with its name; else the error of the first."""
    errors = []
    for name in modules:
        try:
            return name, importlib.import_module(name)
        except ImportError as error:
            errors.append(error)
    raise errors[0]


class Peer(ABC):
    """`calls(inputs)` gives one callable per rotation slot; each fills `outputs[slot]` with [total_q, H, 512]."""

    name: str
    # Modules to try in turn: the package itself, then those of other packages that bundle it.
    modules: tuple[str, ...]

    def __init__(self) -> None:
        self._found_as, self._package = _first_of(*self.modules)
        self.outputs: dict[int, torch.Tensor] = {}

    @property
    def version(self) -> str | None:
        if self._found_as == self.modules[0]:
            return getattr(self._package, "__version__", None)
        bundle = self._found_as.partition(".")[0]
        return f"of {bundle} {toolchain.version(bundle)}"

    def caches(self, inputs: "Inputs") -> tuple[torch.Tensor, torch.Tensor]:
        """ckv and kpe as this peer reads them."""
        return inputs.ckv_cache, inputs.kpe_cache

    @abstractmethod
    def calls(self, inputs: "Inputs") -> list[Callable[[], Any]]: ...


class FlashInfer(Peer):
    """BatchMLAPagedAttentionWrapper. Its plan runs on the host and is left out of its time."""

    name, modules = "flashinfer", ("flashinfer",)

    def calls(self, inputs: "Inputs") -> list[Callable[[], Any]]:
        case = inputs.case
        wrapper_class = importlib.import_module("flashinfer.mla").BatchMLAPagedAttentionWrapper
        device = inputs.q_nope.device
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device=device)
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
                causal=isinstance(case, PrefillCase) and case.causal,
                sm_scale=inputs.sm_scale,
                q_data_type=inputs.q_nope.dtype,
                kv_data_type=inputs.q_nope.dtype,
            )
            out = self.outputs[slot] = torch.full_like(inputs.q_nope[slot], float("nan"))
            q_nope, q_pe = inputs.q_nope[slot], inputs.q_pe[slot]
            return lambda: wrapper.run(q_nope, q_pe, inputs.ckv_cache, inputs.kpe_cache, out=out)

        return [make(slot) for slot in range(inputs.num_slots)]


class FlashMLA(Peer):
    """flash_mla_with_kvcache. Its scheduling metadata is made once, before the first timed call.

    It has fused caches only, so it always reads the pool as one 576-wide buffer: the same bytes, other values.
    """

    name, modules = "flash_mla", ("flash_mla", "vllm.third_party.flashmla.flash_mla_interface")

    def caches(self, inputs: "Inputs") -> tuple[torch.Tensor, torch.Tensor]:
        return inputs.fused_cache[..., :512], inputs.fused_cache[..., 512:]

    def calls(self, inputs: "Inputs") -> list[Callable[[], Any]]:
        case = inputs.case
        if case.page_size != 64:
            raise Unsupported(f"page size {case.page_size}: FlashMLA has 64 only")
        if len(set(case.requests)) > 1:
            raise Unsupported("requests of several lengths: FlashMLA has one number of query tokens per call")
        batch, q_len = len(case.requests), case.requests[0][0]
        causal = isinstance(case, PrefillCase) and case.causal
        # Before 2026 the metadata was two tensors made from the lengths; since then an object filled by the first call.
        metadata, num_splits = self._package.get_mla_metadata(inputs.kv_lens, q_len * case.num_heads, 1)
        cache = inputs.fused_cache.unsqueeze(2)
        self.outputs = {}

        def make(slot: int) -> Callable[[], Any]:
            q = torch.cat([inputs.q_nope[slot], inputs.q_pe[slot]], dim=-1).unflatten(0, (batch, q_len))
            block_table = inputs.kv_indices[slot].view(batch, -1)

            def call() -> None:
                out, _ = self._package.flash_mla_with_kvcache(
                    q, cache, block_table, inputs.kv_lens, 512, metadata, num_splits, inputs.sm_scale, causal
                )
                self.outputs[slot] = out.flatten(0, 1)

            return call

        return [make(slot) for slot in range(inputs.num_slots)]


PEERS: tuple[type[Peer], ...] = (FlashInfer, FlashMLA)


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
