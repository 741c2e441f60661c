"""An MLA attention block as DeepSeek-V3 has it, over a paged latent cache, checked against plain dense attention.

    python examples/deepseek_decode.py                        # the GPU, or without one the CPU's float32 reference
    python examples/deepseek_decode.py --formats bf16 group   # cache formats: bf16 tensor token group

A few requests are prefilled in chunks and then decoded token by token through a stack of attention layers. What is
added to the residual stream at each step is compared with `dense`: the same weights in float64, keys and values
expanded for every head, one causal softmax over the whole sequence. Exit status 1 if a step is off by more than LIMITS.

Widths that the kernels fix are the model's: 512 latent and 64 rope channels. Hidden size, heads and q's rank are
scaled down, weights are random, and tokens are random vectors. The MLPs between the layers of a model are left out.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

import mla_cute
from mla_cute.option import integer

PAGE_SIZE = 64

# Relative (Frobenius) error of what the layers add. bf16: every tensor between two products is rounded to 8 significant
# bits, in three layers one after another: 1.2e-2. FP8: e4m3 has 4 significant bits, an error of 2.4e-2 of the root mean
# square; it enters through the values, and through the scores, where the softmax makes it one of the weights: 5.6e-2.
LIMITS = {"bf16": 2e-2, "tensor": 8e-2, "token": 8e-2, "group": 8e-2}


@dataclass(frozen=True)
class Config:
    """Names of DeepSeek-V3's config.json; comments are its values where these are smaller."""

    hidden_size: int = 512  # 7168
    num_heads: int = 16  # 128
    num_layers: int = 3  # 61
    q_lora_rank: int = 256  # 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    # rope_scaling, type "yarn"
    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


# ------------------------------------------------------------------------------------------------ rope with YaRN


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature (Peng et al. 2023, equation 22), with DeepSeek's weight `mscale`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_frequencies(config: Config) -> torch.Tensor:
    """Radians per position of each channel pair, [32] float64.

    Pairs that turn more than beta_fast times in the original context keep their frequency, pairs that turn less than
    beta_slow times have it divided by `factor`, in between it is blended linearly in the pair's index.
    """
    dim, base = config.qk_rope_head_dim, config.rope_theta

    def pair_that_turns(times: float) -> float:
        wavelength = config.original_max_position_embeddings / (times * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(config.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(config.beta_slow)), dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float64)
    plain = base ** (-2 * pairs / dim)
    stretched = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
    return plain * (1 - stretched) + plain / config.factor * stretched


def rope_angles(config: Config, positions: torch.Tensor) -> torch.Tensor:
    """cos + i sin of each position and pair, [tokens, 32] complex128. The two mscales cancel in DeepSeek-V3."""
    angles = positions.double()[:, None] * yarn_frequencies(config).to(positions.device)
    scale = yarn_mscale(config.factor, config.mscale) / yarn_mscale(config.factor, config.mscale_all_dim)
    return torch.polar(torch.full_like(angles, scale), angles)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rope on [tokens, heads, 64]: channels 2i and 2i + 1 are a pair, as in DeepSeek's checkpoints."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * angles[:, None]).flatten(-2).to(x.dtype)


def softmax_scale(config: Config) -> float:
    """1 / sqrt(192) times mscale squared: YaRN scales q and k by mscale each, DeepSeek their product instead."""
    head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    return head_dim**-0.5 * yarn_mscale(config.factor, config.mscale_all_dim) ** 2


# ------------------------------------------------------------------------------------------------ the layer


@dataclass
class Layer:
    """Weights of one attention block; `project` is all that its two forms below have in common."""

    config: Config
    norm: torch.Tensor  # [hidden]
    q_down: torch.Tensor  # [q_lora_rank, hidden]
    q_norm: torch.Tensor  # [q_lora_rank]
    q_up: torch.Tensor  # [heads * 192, q_lora_rank]
    kv_down: torch.Tensor  # [512 + 64, hidden]
    kv_norm: torch.Tensor  # [512]
    k_up: torch.Tensor  # [heads, 128, 512], W_UK
    v_up: torch.Tensor  # [heads, 128, 512], W_UV
    o_proj: torch.Tensor  # [hidden, heads * 128]

    @classmethod
    def random(cls, config: Config, generator: torch.Generator, device: torch.device) -> Layer:
        def weight(*shape: int) -> torch.Tensor:
            values = torch.randn(*shape, generator=generator) * shape[-1] ** -0.5
            return values.to(device, torch.bfloat16)

        def norm_weight(size: int) -> torch.Tensor:
            return (1 + 0.1 * torch.randn(size, generator=generator)).to(device, torch.bfloat16)

        c = config
        return cls(
            config=c,
            norm=norm_weight(c.hidden_size),
            q_down=weight(c.q_lora_rank, c.hidden_size),
            q_norm=norm_weight(c.q_lora_rank),
            q_up=weight(c.num_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), c.q_lora_rank),
            kv_down=weight(c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size),
            kv_norm=norm_weight(c.kv_lora_rank),
            k_up=weight(c.num_heads, c.qk_nope_head_dim, c.kv_lora_rank),
            v_up=weight(c.num_heads, c.v_head_dim, c.kv_lora_rank),
            o_proj=weight(c.hidden_size, c.num_heads * c.v_head_dim),
        )

    def double(self) -> Layer:
        return Layer(self.config, **{name: w.double() for name, w in vars(self).items() if name != "config"})

    def project(self, x: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x [tokens, hidden] to q_nope [tokens, heads, 128], q_pe [tokens, heads, 64], ckv [tokens, 512] and kpe
        [tokens, 64]. The last two are all that is cached; one rope key serves every head."""
        c = self.config
        x = rms_norm(x, self.norm, c)
        q = F.linear(rms_norm(F.linear(x, self.q_down), self.q_norm, c), self.q_up).unflatten(-1, (c.num_heads, -1))
        q_nope, q_pe = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        ckv, kpe = F.linear(x, self.kv_down).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        return q_nope, rotate(q_pe, angles), rms_norm(ckv, self.kv_norm, c), rotate(kpe[:, None], angles)[:, 0]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, config: Config) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, config.rms_norm_eps)


def dense(layers: list[Layer], x: torch.Tensor) -> torch.Tensor:
    """A whole sequence [tokens, hidden] through the layers as the paper defines them: k = [W_UK ckv | kpe] and
    v = W_UV ckv of every head, causal softmax. Returns the residual stream."""
    tokens = x.shape[0]
    angles = rope_angles(layers[0].config, torch.arange(tokens, device=x.device))
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
    for layer in layers:
        q_nope, q_pe, ckv, kpe = layer.project(x, angles)
        k_nope = torch.einsum("tc,hdc->thd", ckv, layer.k_up)
        v = torch.einsum("tc,hdc->thd", ckv, layer.v_up)
        scores = torch.einsum("qhd,khd->hqk", q_nope, k_nope) + torch.einsum("qhd,kd->hqk", q_pe, kpe)
        weights = (scores * softmax_scale(layer.config)).masked_fill(future, -torch.inf).softmax(-1)
        x = x + F.linear(torch.einsum("hqk,khd->qhd", weights, v).flatten(1), layer.o_proj)
    return x


# ------------------------------------------------------------------------------------------------ the paged cache


@dataclass
class LatentCache:
    """The pool of one layer in one format. Bytes are 0xff at first, a NaN in each dtype: a row that is read before it
    is written shows in the output."""

    ckv: torch.Tensor
    kpe: torch.Tensor
    scales: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def empty(cls, kv_format: str, num_pages: int, device: torch.device) -> LatentCache:
        def pool(row_bytes: int) -> torch.Tensor:
            return torch.full((num_pages, PAGE_SIZE, row_bytes), 0xFF, dtype=torch.uint8, device=device)

        if kv_format == "group":
            ckv, scale_arr, kpe = mla_cute.quant.group_rows(pool(656))
            return cls(ckv, kpe, {"ckv_scale_arr": scale_arr})
        if kv_format == "token":
            ckv, kpe = pool(512).view(torch.float8_e4m3fn), pool(128).view(torch.bfloat16)
            return cls(ckv, kpe, {"ckv_scale_arr": pool(4).view(torch.float32)})
        if kv_format == "tensor":
            rows = pool(576).view(torch.float8_e4m3fn)
            # e4m3 reaches 448. Latents have a root mean square of 1: 8 of these is beyond what they take.
            return cls(rows[..., :512], rows[..., 512:], {"ckv_scale": 8 / 448, "kpe_scale": 8 / 448})
        rows = pool(1152).view(torch.bfloat16)
        return cls(rows[..., :512], rows[..., 512:])


class PageTable:
    """Which pages of the pools each request has, on the host; pages are handed out in random order."""

    def __init__(self, batch: int, num_pages: int, generator: torch.Generator):
        self._free = torch.randperm(num_pages, generator=generator).tolist()
        self.pages: list[list[int]] = [[] for _ in range(batch)]
        self.kv_lens = [0] * batch

    def grow(self, counts: list[int]) -> tuple[list[int], list[int]]:
        """Make room for counts[b] new tokens of request b; returns positions and slots of the new tokens."""
        positions: list[int] = []
        slots: list[int] = []
        for b, count in enumerate(counts):
            for position in range(self.kv_lens[b], self.kv_lens[b] + count):
                if position % PAGE_SIZE == 0:
                    self.pages[b].append(self._free.pop())
                positions.append(position)
                slots.append(self.pages[b][-1] * PAGE_SIZE + position % PAGE_SIZE)
            self.kv_lens[b] += count
        return positions, slots


# ------------------------------------------------------------------------------------------------ a step of the model


class Step:
    """What all layers of one step share: where its tokens go, which pages its requests have, rope, and one plan."""

    def __init__(self, config: Config, table: PageTable, counts: list[int], kv_format: str, device: torch.device):
        positions, slots = table.grow(counts)

        def int32(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        def running_sum(values: list[int]) -> torch.Tensor:
            return F.pad(int32(values).cumsum(0, dtype=torch.int32), (1, 0))

        self.angles = rope_angles(config, int32(positions))
        self.slots = int32(slots)
        kv_indptr = running_sum([len(pages) for pages in table.pages])
        kv_indices = int32([page for pages in table.pages for page in pages])
        last_page_len = int32([(n - 1) % PAGE_SIZE + 1 for n in table.kv_lens])
        self.is_decode = all(count == 1 for count in counts)
        # max_kv_len and kv_format choose the configuration; the plan is the same without them.
        known: dict[str, Any] = {
            "num_heads": config.num_heads,
            "page_size": PAGE_SIZE,
            "kv_last_page_len": last_page_len,
            "max_kv_len": max(table.kv_lens),
            "kv_format": "" if kv_format == "bf16" else kv_format,
        }
        self.pages: dict[str, Any] = {
            "kv_indptr": kv_indptr,
            "kv_indices": kv_indices,
            "kv_last_page_len": last_page_len,
        }
        if self.is_decode:
            self.pages["plan"] = mla_cute.plan_decode(kv_indptr, **known)
        else:
            self.pages["qo_indptr"] = qo_indptr = running_sum(counts)
            self.pages["plan"] = mla_cute.plan_prefill(qo_indptr, kv_indptr, total_q=sum(counts), **known)

    def attend(self, layer: Layer, x: torch.Tensor, cache: LatentCache) -> torch.Tensor:
        """The layer in absorbed form: W_UK moves from the keys to the queries and W_UV from the values to the output,
        so attention runs on the latent itself, which all heads share."""
        q_nope, q_pe, ckv, kpe = layer.project(x, self.angles)
        mla_cute.append_to_cache(ckv, kpe, cache.ckv, cache.kpe, self.slots, **cache.scales)
        q_nope = torch.einsum("thd,hdc->thc", q_nope, layer.k_up)
        attention: Any = mla_cute.mla_paged_decode if self.is_decode else mla_cute.mla_paged_prefill
        latent, _ = attention(
            q_nope,
            q_pe,
            cache.ckv,
            cache.kpe,
            sm_scale=softmax_scale(layer.config),
            **self.pages,
            **cache.scales,
        )
        out = torch.einsum("thc,hdc->thd", latent, layer.v_up)
        return F.linear(out.flatten(1), layer.o_proj)


def schedule(prompts: list[int], chunk: int, decode_steps: int) -> list[list[int]]:
    """New tokens of each request in each step: prompts in chunks, requests that are done wait; then one each."""
    steps, left = [], list(prompts)
    while any(left):
        steps.append([min(n, chunk) for n in left])
        left = [n - taken for n, taken in zip(left, steps[-1], strict=True)]
    return steps + [[1] * len(prompts) for _ in range(decode_steps)]


@torch.no_grad()
def errors(
    layers: list[Layer], x: list[torch.Tensor], wanted: list[torch.Tensor], steps: list[list[int]], kv_format: str
) -> list[float]:
    """Run the steps over a paged cache of `kv_format`; the relative error of each, of what the layers added to x.

    `x` and `wanted`: a [tokens, hidden] residual stream per request, before the layers and after them (float64).
    """
    config, device = layers[0].config, x[0].device
    num_pages = sum(-(-len(sequence) // PAGE_SIZE) for sequence in x)
    table = PageTable(len(x), num_pages, torch.Generator().manual_seed(0))
    caches = [LatentCache.empty(kv_format, num_pages, device) for _ in layers]
    found = []
    for counts in steps:
        spans = [slice(begin, begin + count) for begin, count in zip(table.kv_lens, counts, strict=True)]
        before = torch.cat([sequence[span] for sequence, span in zip(x, spans, strict=True)])
        after = torch.cat([sequence[span] for sequence, span in zip(wanted, spans, strict=True)])
        step = Step(config, table, counts, kv_format, device)
        hidden = before
        for layer, cache in zip(layers, caches, strict=True):
            hidden = hidden + step.attend(layer, hidden, cache)
        found.append(float((hidden.double() - after).norm() / (after - before.double()).norm()))
    return found


def device_of(text: str) -> torch.device:
    """Of an option's text the device, for argparse, where this torch and this machine have it."""
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:  # torch asserts that it is built with CUDA
        why = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"expected cpu or a device of this machine, got {text!r}: {why}") from None
    return device


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="DeepSeek-V3's attention over a paged latent cache, checked")
    parser.add_argument("--formats", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="FORMAT")
    parser.add_argument("--device", type=device_of, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--heads", type=integer(1, 128), default=Config.num_heads)
    parser.add_argument("--layers", type=integer(1), default=Config.num_layers)
    parser.add_argument("--prompts", type=integer(1), nargs="+", default=[300, 64, 1, 130], metavar="TOKENS")
    parser.add_argument("--chunk", type=integer(1), default=128, help="tokens of a prompt per prefill step")
    parser.add_argument("--decode-steps", type=integer(0), default=4)
    options = parser.parse_args(argv)

    config = Config(num_heads=options.heads, num_layers=options.layers)
    device, generator = options.device, torch.Generator().manual_seed(0)
    layers = [Layer.random(config, generator, device) for _ in range(config.num_layers)]
    x = [
        torch.randn(n + options.decode_steps, config.hidden_size, generator=generator).to(device, torch.bfloat16)
        for n in options.prompts
    ]
    with torch.no_grad():
        exact = [layer.double() for layer in layers]
        wanted = [dense(exact, sequence.double()) for sequence in x]
    steps = schedule(options.prompts, options.chunk, options.decode_steps)
    by_format = {name: errors(layers, x, wanted, steps, name) for name in options.formats}

    print(f"{config.num_layers} layers of {config.num_heads} heads on {device}; error relative to float64, by cache")
    print(f"{'step':<6}{'new tokens':<24}" + "".join(f"{name:>10}" for name in by_format))
    for i, counts in enumerate(steps):
        cells = "".join(f"{by_format[name][i]:>10.1e}" for name in by_format)
        print(f"{i:<6}{' '.join(map(str, counts)):<24}{cells}")
    print(f"{'limit':<30}" + "".join(f"{LIMITS[name]:>10.1e}" for name in by_format))
    wrong = [name for name, values in by_format.items() if not all(error <= LIMITS[name] for error in values)]
    print(f"WRONG: {', '.join(wrong)}" if wrong else "ok")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
