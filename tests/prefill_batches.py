"""Prefill batches that plans are tried on: properties of the model on the CPU, the planner against it on the GPU."""

import dataclasses
import random

from mla_cute.config import KernelConfig, default_config
from mla_cute.gpu_speed import H200

HEADS = (1, 6, 12, 16, 24, 48, 64, 96, 128)
MOST_TILES = 3000  # of 64 rows: plain Python has to rank them


@dataclasses.dataclass(frozen=True)
class PrefillBatch:
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_heads: int
    causal: bool
    config: KernelConfig
    batch_invariant: bool

    @property
    def num_tiles(self) -> int:
        return sum(-(-n * self.num_heads // 64) for n in self.q_lens)


def random_prefill_batches(count: int, seed: int) -> list[PrefillBatch]:
    """Chunked, whole, ragged and mixed with decode steps; empty requests, and queries longer than their cache."""
    rng = random.Random(seed)
    batches = []
    while len(batches) < count:
        size = rng.choice([1, 1, 2, 3, 7, 16, 40, 131, 132, 133, 300])
        num_heads = rng.choice(HEADS)
        most_q = max(1, min(rng.choice([1, 2, 4, 100, 1000, 9000]), 64 * MOST_TILES // (num_heads * size)))
        most_kv = rng.choice([1, 130, 1000, 8192, 40000, 300000, 1 << 21])
        kind = rng.choice(["uniform", "whole", "ragged", "one_long", "many_empty", "unseen"])
        q_lens = [rng.randint(1, most_q) for _ in range(size)]
        kv_lens = [q + rng.randint(0, most_kv) for q in q_lens]
        if kind == "uniform":
            q_lens, kv_lens = [most_q] * size, [most_q + most_kv] * size
        elif kind == "whole":
            kv_lens = list(q_lens)
        elif kind == "one_long":
            q_lens = [1] * size
            kv_lens = [rng.randint(1, most_kv) for _ in range(size)]
            q_lens[rng.randrange(size)] = min(10 * most_q, 64 * MOST_TILES // num_heads)
        elif kind == "many_empty":
            q_lens = [rng.choice([0, 0, q]) for q in q_lens]
            kv_lens = [rng.choice([0, kv, kv]) for kv in kv_lens]
        elif kind == "unseen":
            kv_lens = [rng.randint(0, 2 * q) for q in q_lens]
        config = rng.choice(
            [
                default_config(num_heads, H200),
                KernelConfig(min_blocks=2, item_overhead=0, split_penalty=0),
                KernelConfig(min_blocks=8, item_overhead=9, split_penalty=3),
                KernelConfig(min_blocks=64, item_overhead=1, split_penalty=1000),
                KernelConfig(cut_unit=1, min_blocks=3, item_overhead=4, split_penalty=6),
            ]
        )
        batches.append(
            PrefillBatch(tuple(q_lens), tuple(kv_lens), num_heads, rng.random() < 0.8, config, rng.random() < 0.35)
        )
    return batches
