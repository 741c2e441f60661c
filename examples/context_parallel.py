"""One long context over several ranks: each attends to its own pages, and merge_states makes the whole of the parts.

    python examples/context_parallel.py --ranks 3                       # CPU: gloo, the float32 reference
    torchrun --nproc-per-node 4 examples/context_parallel.py            # one GPU per rank: nccl, the kernels
    ... --fp8                                                           # over an e4m3 cache
    ... --time 131072 --heads 128                                       # microseconds of a step, sharded and not

A cache of n tokens is spread over R ranks page by page: page i of a request lies on rank i mod R, so that ranks differ
by at most one page per request and a request that grows adds to every rank in turn. Every rank has the queries of all
requests (after an all-gather, where heads are split otherwise) and R times less of the cache to read. A step exchanges
[batch, H, 512] outputs and [batch, H] log-sum-exps.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import mla_cute
from mla_cute.option import integer

PAGE_SIZE = 64
LENGTHS = (5000, 1, 64, 129, 0, 777)  # the second has pages on one rank only, the fifth on none
NUM_HEADS = 16
SM_SCALE = 192**-0.5


def shard_pages(
    block_table: torch.Tensor, seq_lens: torch.Tensor, page_size: int, rank: int, num_ranks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(block_table, seq_lens) of what `rank` holds: its pages' columns, and the tokens in them.

    Args:
        block_table: [batch, max_pages] int32.
        seq_lens: [batch] int32, tokens of the whole request.
    """
    pages = (seq_lens + page_size - 1) // page_size
    own_pages = (pages - rank + num_ranks - 1).clamp(min=0) // num_ranks
    # The last page of a request may not be full, and one rank has it.
    has_last = (pages > 0) & ((pages - 1) % num_ranks == rank)
    missing = torch.where(has_last, pages * page_size - seq_lens, 0)
    return block_table[:, rank::num_ranks].contiguous(), (own_pages * page_size - missing).to(torch.int32)


def context_parallel_decode(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode over a context of which every rank of the default group holds a part.

    Args:
        q_nope, q_pe: the same on every rank.
        cache: [num_pages, page_size, 576], this rank's pages.
        block_table, seq_lens: of this rank's part, from `shard_pages`.

    Returns:
        (output, lse) over the whole context, the same bits on every rank: all merge in the order of ranks.
    """
    state = mla_cute.mla_paged_decode_block_table(
        q_nope, q_pe, cache[..., :512], cache[..., 512:], block_table, seq_lens, sm_scale
    )
    outputs, lses = ([torch.empty_like(mine) for _ in range(dist.get_world_size())] for mine in state)
    for parts, mine in zip((outputs, lses), state, strict=True):
        dist.all_gather(parts, mine)
    out, lse = outputs[0].float(), lses[0]  # float32 between merges: the parts are rounded once, the whole once
    for other, other_lse in zip(outputs[1:], lses[1:], strict=True):
        mla_cute.merge_states(out, lse, other.float(), other_lse, out=out, lse=lse)
    return out.to(q_nope.dtype), lse


def step(device: torch.device, lengths: tuple[int, ...] = LENGTHS, fp8: bool = False) -> tuple[float, float]:
    """One decode step sharded and unsharded; the largest differences of an output row, relative in the Euclidean norm,
    and of a log-sum-exp. `fp8`: over a cache of the format "tensor" with scale 1."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)  # the same numbers on every rank
    pages = -(-max(lengths) // PAGE_SIZE)
    num_pages = len(lengths) * pages

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    q_nope, q_pe = normal(len(lengths), NUM_HEADS, 512), normal(len(lengths), NUM_HEADS, 64)
    cache = normal(num_pages, PAGE_SIZE, 576)
    if fp8:
        cache = cache.to(torch.float8_e4m3fn)
    block_table = torch.randperm(num_pages, generator=generator).to(device, torch.int32).view(len(lengths), pages)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)

    own_table, own_lens = shard_pages(block_table, seq_lens, PAGE_SIZE, rank, num_ranks)
    # What other ranks hold is not here: NaN would show in the result if it were read.
    own_cache = torch.full(cache.shape, torch.nan, device=device).to(cache.dtype)
    as_bytes, own_pages = torch.uint8, own_table.flatten().long()
    own_cache.view(as_bytes)[own_pages] = cache.view(as_bytes)[own_pages]
    out, lse = context_parallel_decode(q_nope, q_pe, own_cache, own_table, own_lens, SM_SCALE)

    whole, whole_lse = mla_cute.mla_paged_decode_block_table(
        q_nope, q_pe, cache[..., :512], cache[..., 512:], block_table, seq_lens, SM_SCALE
    )
    empty = seq_lens == 0
    if not (out[empty].eq(0).all() and torch.equal(lse.isneginf(), whole_lse.isneginf())):
        raise SystemExit("a request without tokens has to have output 0 and lse -inf")
    difference = (out.float() - whole.float())[~empty].norm(dim=-1) / whole.float()[~empty].norm(dim=-1)
    return difference.max().item(), (lse - whole_lse)[~empty].abs().max().item()


def microseconds(device: torch.device, tokens: int, num_heads: int, fp8: bool) -> tuple[float, float]:
    """Of a step over one request, sharded and whole: CUDA-graph replays, medians; no gathering in the second."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    pages = -(-tokens // PAGE_SIZE)
    cache = torch.randn(pages, PAGE_SIZE, 576, device=device).to(torch.float8_e4m3fn if fp8 else torch.bfloat16)
    q_nope = torch.randn(1, num_heads, 512, device=device).bfloat16()
    q_pe = torch.randn(1, num_heads, 64, device=device).bfloat16()
    table = torch.randperm(pages, device=device).to(torch.int32)[None]
    lens = torch.tensor([tokens], dtype=torch.int32, device=device)
    found = []
    for own_table, own_lens, attend in (
        (*shard_pages(table, lens, PAGE_SIZE, rank, num_ranks), context_parallel_decode),
        (
            table,
            lens,
            lambda q, p, c, *pages: mla_cute.mla_paged_decode_block_table(q, p, c[..., :512], c[..., 512:], *pages),
        ),
    ):

        def once(own_table=own_table, own_lens=own_lens, attend=attend):
            attend(q_nope, q_pe, cache, own_table, own_lens, SM_SCALE)

        once()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(50):
            dist.barrier()
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1000)
        found.append(sorted(times)[len(times) // 2])
    return found[0], found[1]


def run(rank: int, num_ranks: int, options: argparse.Namespace) -> None:
    backend, device = "gloo", torch.device("cpu")
    if torch.cuda.device_count() >= num_ranks:
        backend, device = "nccl", torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(backend, rank=rank, world_size=num_ranks)
    try:
        if options.time:
            sharded, whole = microseconds(device, options.time, options.heads, options.fp8)
            if rank == 0:
                what = f"{options.heads} heads, 1 x {options.time} tokens"
                print(f"{what}: {sharded:.1f} us over {num_ranks} ranks, {whole:.1f} on one")
            return
        errors = [torch.empty(2, dtype=torch.float64, device=device) for _ in range(num_ranks)]
        dist.all_gather(errors, torch.tensor(step(device, fp8=options.fp8), dtype=torch.float64, device=device))
    finally:
        dist.destroy_process_group()
    # The parts are rounded to bfloat16, by at most 2^-9 of a value, and so are the whole and what it is compared with.
    ok = True
    for other, (out_error, lse_error) in enumerate(torch.stack(errors).tolist()):
        ok = ok and out_error <= 3 * 2**-9 and lse_error <= 1e-4
        if rank == 0:  # one process prints, so that lines do not mix
            where = f"rank {other} of {num_ranks} ({device.type})"
            print(f"{where}: output differs by {out_error:.2e}, lse by {lse_error:.2e}")
    if rank == 0:
        print("ok" if ok else "WRONG")
    if not ok:
        raise SystemExit(1)


def spawned(rank: int, options: argparse.Namespace) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(options.port)}
    run(rank, options.ranks, options)


def main() -> None:
    parser = argparse.ArgumentParser(description="decode over a context that is spread over ranks")
    ranks_help = "processes to start; torchrun says how many it started"
    parser.add_argument("--ranks", type=integer(1), default=2, help=ranks_help)
    parser.add_argument("--port", type=integer(1, 65535), default=29513, help="TCP port where the ranks meet")
    parser.add_argument("--fp8", action="store_true", help="an e4m3 cache")
    time_help = "time a step over one request of so many, on GPUs"
    parser.add_argument("--time", type=integer(1), metavar="TOKENS", help=time_help)
    parser.add_argument("--heads", type=integer(1, 128), default=NUM_HEADS, help="with --time")
    options = parser.parse_args()
    num_ranks = int(os.environ.get("WORLD_SIZE", options.ranks))
    if options.time and torch.cuda.device_count() < num_ranks:
        found = torch.cuda.device_count()
        parser.error(f"argument --time: expected a GPU for each of {num_ranks} ranks, got {found}")
    if "RANK" in os.environ:
        run(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), options)
    else:
        mp.spawn(spawned, args=(options,), nprocs=options.ranks)


if __name__ == "__main__":
    main()
