"""Paged caches in every format as views of byte pools, and tokens with every kind of value: what append tests share.

The pools begin as random bytes and are compared whole, so that a stray write anywhere shows.
"""

from dataclasses import dataclass

import torch

from mla_cute.append import append_reference

E4M3 = torch.float8_e4m3fn
DTYPES = (torch.bfloat16, torch.float16)
SLOT_DTYPES = (torch.int32, torch.int64)
PAGES, PAGE_SIZE = 5, 7
NUM_SLOTS = PAGES * PAGE_SIZE


@dataclass(frozen=True)
class Layout:
    """`rows`: bytes per row of each pool; `parts`: pool and byte offset in its rows of ckv, kpe and the scales.

    Pools have `spare` unused rows behind each page.
    """

    kv_format: str
    rows: tuple[int, ...]
    parts: tuple[tuple[int, int], ...]
    spare: int = 0


LAYOUTS = {
    "16bit": Layout("", (1024, 128), ((0, 0), (1, 0))),
    "16bit_fused": Layout("", (1152,), ((0, 0), (0, 1024))),
    "16bit_padded": Layout("", (1024 + 16, 128 + 48), ((0, 16), (1, 32)), spare=1),
    "tensor": Layout("tensor", (512, 64), ((0, 0), (1, 0))),
    "tensor_fused": Layout("tensor", (576,), ((0, 0), (0, 512))),
    "tensor_padded": Layout("tensor", (512 + 32, 64 + 16), ((0, 16), (1, 0)), spare=2),
    "token": Layout("token", (512, 128, 4), ((0, 0), (1, 0), (2, 0))),
    "token_fused": Layout("token", (512 + 128 + 16,), ((0, 0), (0, 512), (0, 644)), spare=1),
    "group": Layout("group", (512, 128, 16), ((0, 0), (1, 0), (2, 0))),
    "group_656": Layout("group", (656,), ((0, 0), (0, 528), (0, 512))),
    "group_padded": Layout("group", (512 + 16, 128 + 16, 16 + 16), ((0, 0), (1, 16), (2, 16)), spare=3),
}
# Not round, so that every division rounds.
SCALES = {"tensor": {"ckv_scale": 0.0731, "kpe_scale": 1.7}}


class Cache:
    """A cache of `layout` on `device`; `dtype` is that of its 16-bit parts."""

    def __init__(self, layout: str, dtype: torch.dtype, pages: int = PAGES, page_size: int = PAGE_SIZE, seed: int = 0):
        self.layout, self.dtype, self.page_size = LAYOUTS[layout], dtype, page_size
        generator = torch.Generator().manual_seed(seed)
        self.pools = [
            torch.randint(0, 256, (pages, page_size + self.layout.spare, row), dtype=torch.uint8, generator=generator)
            for row in self.layout.rows
        ]

    def to(self, device: str) -> "Cache":
        other = object.__new__(Cache)
        other.layout, other.dtype, other.page_size = self.layout, self.dtype, self.page_size
        other.pools = [pool.to(device, copy=True) for pool in self.pools]
        return other

    def _part(self, index: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        pool, offset = self.layout.parts[index]
        return self.pools[pool][:, : self.page_size, offset : offset + width * dtype.itemsize].view(dtype)

    @property
    def kv_format(self) -> str:
        return self.layout.kv_format

    @property
    def ckv(self) -> torch.Tensor:
        return self._part(0, 512, E4M3 if self.kv_format else self.dtype)

    @property
    def kpe(self) -> torch.Tensor:
        return self._part(1, 64, E4M3 if self.kv_format == "tensor" else self.dtype)

    @property
    def scales(self) -> torch.Tensor | None:
        width = {"token": 1, "group": 4}.get(self.kv_format)
        return None if width is None else self._part(2, width, torch.float32)

    def keywords(self) -> dict:
        return SCALES.get(self.kv_format, {}) | ({} if self.scales is None else {"ckv_scale_arr": self.scales})

    def args(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ckv, self.kpe

    def appended(self, ckv: torch.Tensor, kpe: torch.Tensor, slots: torch.Tensor, **scales: float) -> "Cache":
        """This cache on the CPU after the tokens, by the torch implementation."""
        other = self.to("cpu")
        keywords = other.keywords() | scales
        append_reference(ckv.cpu(), kpe.cpu(), *other.args(), slots.cpu(), other.kv_format, **keywords)
        return other

    def assert_equal(self, expected: "Cache") -> None:
        """Byte for byte, except that e4m3 has two NaN and either will do."""
        mine, theirs = self.to("cpu"), expected.to("cpu")
        for cache in (mine, theirs):
            for x in cache.args():
                if x.dtype is E4M3:
                    stored = x.view(torch.uint8)
                    stored[stored & 0x7F == 0x7F] = 0x7F
        for name, got, want in zip(("ckv", "kpe"), mine.args(), theirs.args(), strict=True):
            raw = torch.int16 if got.element_size() == 2 else torch.uint8
            wrong = (got.view(raw) != want.view(raw)).nonzero()
            assert not len(wrong), f"{name}: {len(wrong)} values differ, the first at {wrong[0].tolist()}"
        for number, (got, want) in enumerate(zip(mine.pools, theirs.pools, strict=True)):
            wrong = (got != want).nonzero()
            assert not len(wrong), f"pool {number}: {len(wrong)} bytes differ, the first at {wrong[0].tolist()}"


def make_tokens(n: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """ckv [n, 512] and kpe [n, 64] whose sizes vary by 1e4 and more; every eleventh row is special in another way."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(width: int) -> torch.Tensor:
        x = torch.randn(n, width, generator=generator)
        x *= 10 ** (4 * torch.rand(n, 1, generator=generator) - 2)
        x[:, width // 3] *= 30
        x = x.to(dtype)
        tiny = torch.finfo(dtype).smallest_normal
        special = [
            lambda row: row.zero_(),
            lambda row: row.fill_(-0.0),
            lambda row: row[width - 1 :].fill_(float("nan")),
            lambda row: row[5:6].fill_(-float("inf")),
            lambda row: row[::3].fill_(float("inf")),
            lambda row: row.mul_(tiny / 8),  # subnormals, most of them
            lambda row: row.zero_()[width // 2 : width // 2 + 1].fill_(tiny * torch.finfo(dtype).eps),
            lambda row: row.copy_(torch.linspace(-1, 1, width) * torch.finfo(dtype).max),
            lambda row: row.copy_(448 * torch.linspace(-1.2, 1.2, width)),
            lambda row: row.copy_((torch.arange(width) - width // 2) * 2.0**-10),  # on and between e4m3 subnormals
            lambda row: row.zero_()[1::128].fill_(-3.0),
        ]
        for i in range(0, n, 11):
            special[i // 11 % len(special)](x[i])
        return x

    return tokens(512), tokens(64)


def make_slots(n: int, dtype: torch.dtype, num_slots: int = NUM_SLOTS, seed: int = 0) -> torch.Tensor:
    """n different slots, the first and the last among them, in random order, and every fifth token padding."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(num_slots, generator=generator)
    padding = torch.tensor([-1, -64, torch.iinfo(dtype).min])
    assert n <= num_slots
    slots = slots[:n].clone()
    for wanted in (0, num_slots - 1):
        if n > 2 and not (slots == wanted).any():
            slots[1 if wanted else 2] = wanted
    slots[4::5] = padding.repeat(n)[: len(slots[4::5])]
    return slots.to(dtype)
