"""Multi-head Latent Attention over a paged cache for Hopper GPUs, in the CuTe Python DSL.

>>> import mla_cute
>>> plan = mla_cute.plan_decode(kv_indptr, num_heads=16, page_size=64)              # once per step
>>> out, lse = mla_cute.mla_paged_decode(q_nope, q_pe, ckv_cache, kpe_cache,        # every layer
...                                      kv_indptr, kv_indices, sm_scale, plan=plan)
"""

from . import ops, quant
from .api import mla_paged_decode, mla_paged_decode_block_table, mla_paged_prefill, mla_paged_prefill_block_table
from .append import append_to_cache
from .compile.jit import cache_dir
from .compile.warmup import warmup
from .config import KernelConfig
from .merge_states import merge_states
from .plan_decode import DecodePlan, plan_decode, plan_decode_block_table
from .plan_prefill import PrefillPlan, plan_prefill, plan_prefill_block_table
from .sparse import SparsePlan, mla_sparse, plan_sparse
from .tuned.explain import explain

__version__ = "0.1.0"
__all__ = [
    "DecodePlan",
    "KernelConfig",
    "PrefillPlan",
    "SparsePlan",
    "append_to_cache",
    "cache_dir",
    "explain",
    "merge_states",
    "mla_paged_decode",
    "mla_paged_decode_block_table",
    "mla_paged_prefill",
    "mla_paged_prefill_block_table",
    "mla_sparse",
    "ops",
    "plan_decode",
    "plan_decode_block_table",
    "plan_prefill",
    "plan_prefill_block_table",
    "plan_sparse",
    "quant",
    "warmup",
]
