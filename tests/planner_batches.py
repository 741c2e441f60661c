"""Batches that plans are tried on: the model's properties on the CPU, the planner against the model on the GPU."""

import dataclasses
import random

from mla_cute.config import KernelConfig, default_config
from mla_cute.gpu_speed import H200


@dataclasses.dataclass(frozen=True)
class Batch:
    lengths: tuple[int, ...]
    num_heads: int
    config: KernelConfig
    batch_invariant: bool

    @property
    def num_tiles(self) -> int:
        return -(-self.num_heads // 64)


def random_batches(count: int, seed: int) -> list[Batch]:
    """Ragged and uniform, from empty to more requests than parts, lengths from 0 to 200 000 tokens."""
    rng = random.Random(seed)
    batches = []
    for _ in range(count):
        size = rng.choice([1, 1, 2, 3, 7, 16, 40, 100, 131, 132, 133, 200, 600])
        longest = rng.choice([1, 64, 130, 1000, 8192, 40000, 200000])
        kind = rng.choice(["uniform", "ragged", "log", "one_long", "many_empty"])
        if kind == "uniform":
            lengths = [longest] * size
        elif kind == "ragged":
            lengths = [rng.randint(0, longest) for _ in range(size)]
        elif kind == "log":
            lengths = [int(longest ** rng.random()) for _ in range(size)]
        elif kind == "one_long":
            lengths = [rng.randint(1, 200) for _ in range(size)]
            lengths[rng.randrange(size)] = longest
        else:
            lengths = [rng.choice([0, 0, 0, rng.randint(1, longest)]) for _ in range(size)]
        num_heads = rng.choice([1, 8, 16, 64, 65, 128])
        config = rng.choice(
            [
                default_config(num_heads, H200),
                KernelConfig(min_blocks=2, item_overhead=0, split_penalty=0),
                KernelConfig(min_blocks=8, item_overhead=9, split_penalty=3),
                KernelConfig(min_blocks=64, item_overhead=1, split_penalty=1000),
                KernelConfig(cut_unit=1, min_blocks=1, item_overhead=2, split_penalty=0),
                KernelConfig(cut_unit=1, min_blocks=3, item_overhead=4, split_penalty=6),
            ]
        )
        batches.append(Batch(tuple(lengths), num_heads, config, rng.random() < 0.25))
    return batches
