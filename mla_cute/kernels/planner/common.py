"""What the planners of decode and prefill share: request lengths in three forms, block-wide scans, searches."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from ..keys import LaunchConfig
from ..lib.fake import fake_tensor

NUM_THREADS = 512
NUM_WARPS = NUM_THREADS // 32


def fake_ints(n):
    return fake_tensor(Int32, (n,), (1,), 4)


class PlannerBase:
    """One CTA of NUM_THREADS threads. `key` has `lengths` and `batch_invariant`.

    Parameters `p` of the methods have mLengths, mLastLen, page_size and table_stride, as the planners' `__call__`.
    """

    def __init__(self, key, config: LaunchConfig):
        self.key = key
        self.use_pdl = config.use_pdl

    @cute.jit
    def _request(self, p, b):
        """(kv length in tokens, first index) of request b < batch."""
        length = Int32(0)
        first = Int32(0)
        if const_expr(self.key.lengths == "seq_lens"):
            length = p.mLengths[b]
            first = b * p.table_stride
        else:
            first = p.mLengths[b]
            pages = p.mLengths[b + 1] - first
            length = pages * p.page_size
            if const_expr(self.key.lengths == "csr_last"):
                if pages > 0:
                    length = length - p.page_size + p.mLastLen[b]
        return cutlass.max(length, Int32(0)), first

    @cute.jit
    def _scan(self, x, s_warp, t):
        """Block-wide exclusive prefix sum of x; returns (prefix, total)."""
        lane = t % 32
        w = t // 32
        incl = x
        for i in cutlass.range_constexpr(5):
            y = cute.arch.shuffle_sync_up(incl, offset=1 << i, mask_and_clamp=0)
            if lane >= (1 << i):
                incl = incl + y
        if lane == 31:
            s_warp[w] = incl
        cute.arch.sync_threads()
        before = Int32(0)
        total = Int32(0)
        for i in cutlass.range_constexpr(NUM_WARPS):
            v = s_warp[i]
            total = total + v
            if i < w:
                before = before + v
        cute.arch.sync_threads()
        return before + incl - x, total

    @cute.jit
    def _last_at_or_before(self, m, n, x):
        """Largest b in 0..n with m[b] <= x, for a non-decreasing m with m[0] <= x."""
        lo = Int32(0)
        hi = n
        while lo < hi:
            mid = (lo + hi + 1) // 2
            if m[mid] <= x:
                lo = mid
            else:
                hi = mid - 1
        return lo
