"""Sizes and names that host and kernels share, each told once. Imports no more than typing: kernels' digests cover this
file."""

from typing import NamedTuple

# Absorbed MLA as in DeepSeek-V2/V3 and Kimi-K2: kv_lora_rank and qk_rope_head_dim.
CKV_DIM = 512
KPE_DIM = 64
MAX_HEADS = 128


class HeadDims(NamedTuple):
    """Channels of the latent part, which are also those of the output, and of the rope part, 0 where there is none."""

    ckv: int = CKV_DIM
    kpe: int = KPE_DIM

    def __str__(self) -> str:
        return f"{self.ckv} + {self.kpe}"


# The first are DeepSeek's; 256 + 64 are Mistral Small 4's, 256 + 32 MiniCPM3's.
HEAD_DIMS = tuple(HeadDims(ckv, kpe) for ckv in (512, 256) for kpe in (64, 32, 0))

# 16-bit types of queries, caches and outputs, by the names that torch and the CLI have for them.
DTYPES = ("bfloat16", "float16")

# FP8 caches (quant.py), "" is a 16-bit one; scales of ckv that a token has, of which each is for GROUP_DIM channels in
# format "group".
KV_FORMATS = ("tensor", "token", "group")
NUM_SCALES = {"": 0, "tensor": 0, "token": 1, "group": 4}
GROUP_DIM = CKV_DIM // NUM_SCALES["group"]
# Where in a row of DeepSeek-V3.2's caches, format "group", behind 512 e4m3 its four float32 scales begin, its 64 16-bit
# channels of rope, and the next row: 656 bytes.
GROUP_SCALES_AT = CKV_DIM
GROUP_ROPE_AT = GROUP_SCALES_AT + 4 * NUM_SCALES["group"]
GROUP_ROW_BYTES = GROUP_ROPE_AT + 2 * KPE_DIM

# Query rows of a tile of the tile64 kernels, of those for few rows over FP8 caches, and of the tile16 ones; tokens of a
# K tile, which planners call a block.
TILE_M = 64
TILE32_M = 32
TILE16_M = 16
BLOCK = 64

# A partial row in 32-bit words: 512 outputs as 16-bit integers, the float32 log-sum-exp in base 2, what an integer is
# worth in each half of the row, padding to whole 128-byte lines: rows that straddle sectors made the partial stores of
# 128 heads twice as slow. Integers under a scale keep 2^-15 of the row's largest element. The dtype's own 16 bits
# round once more than an uncut computation does (a few rows in ten thousand then exceed twice its error); float32 is
# twice the bytes, which at 64 heads, batch 16 and 1024 tokens are as many as the cache's.
PART_ROW = 288
PART_LSE = 256
# What a row's largest element becomes: a little under the largest integer, which the product must not exceed, since the
# approximate reciprocal may be off by an ulp. And what the integers are added to in float32 to fill its low bits.
INT16_MOST = 32767.0 * (1 - 2.0**-20)
INT16_BIAS = float(2**23 + 2**15)
