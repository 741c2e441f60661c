"""Speed of paged decode and prefill, against the ceilings of the GPU it runs on. Depends on torch only.

    python -m mla_cute.bench [PRESET ...] [--heads 16,128 --batch 1,128 --kv-len 8192 ...] [--out FILE]

How a case is timed: random KV in pages of random order; as many disjoint sets of pages (slots), queries and outputs as
it takes for one pass over all slots to read 8 GB (prefill: to read and write 8 GB), or 64 of them, and more than 300 MB
in any case (an H200's L2 has 60 MB); one CUDA graph per slot that holds one call with a plan (main kernel and merge);
every replay between two events. `us` is the median replay, with nothing subtracted. `plan_us` is a graph that holds
plan.update() alone, `us_amortised = us + plan_us / 61` (one plan serves the 61 layers of DeepSeek-V3), and rates,
shares and ratios are made from `us_amortised`. `us_cold` is `us` with L2 emptied in front of every replay: in `us` the
KV is cold, but the kernels' code is not. `us_chained` is a graph of calls back to back over the slots, divided by
their number. Outputs are poisoned before and checked after the timed replays. With `--sustained` each implementation
is replayed for seconds as well: what it takes at the power limit, and the energy of a call (sustained.py).
"""
