"""`mla_cute.explain`: which configuration a call takes, from where, and the kernel that runs."""

from __future__ import annotations

import dataclasses

import torch

from ..config import KernelConfig, differences
from ..dims import MAX_HEADS
from ..expect import expect_bool, expect_int
from ..plan import expect_hints, num_sms
from . import select
from .file import TUNED_OPS, Entry


@dataclasses.dataclass(frozen=True)
class Explanation:
    """`str` of it is a readable text.

    selection   the :class:`~.select.Selection` that a plan of this shape gets: config, source, entry, when
    device      where the call would run
    distance    between call and entry, the sum of |log2| of num_heads, q_len, batch and kv_len; None without an entry
    kernel      name of the main kernel; "float32 reference" on the CPU
    """

    selection: select.Selection
    device: torch.device
    distance: float | None
    kernel: str

    @property
    def config(self) -> KernelConfig:
        return self.selection.config

    def __str__(self) -> str:
        selection, entry = self.selection, self.selection.entry
        lines = [f"{selection.when}, on {self._device_name()}", f"  from      {selection.source}"]
        if entry is not None:
            runner_up = "" if entry.runner_up_us is None else f", next best {entry.runner_up_us:g} us"
            lines += [
                f"  why       nearest of {selection.among} in its class: {self._apart(entry)}",
                f"  timed     {entry.when}; distance {self.distance:.2f}",
                f"            {entry.us:g} us, default {entry.default_us:g} us{runner_up}: "
                f"{entry.default_us / entry.us:.3f}x",
            ]
            if entry.runner_up is not None:
                changed = differences(entry.runner_up, entry.config).items()
                lines.append(f"  next best {', '.join(f'{name}={value!r}' for name, value in changed)}")
        behind = ", behind one that converts the cache to 16 bits" if selection.converts else ""
        return "\n".join([*lines, f"  config    {selection.config}", f"  kernel    {self.kernel}{behind}"])

    def _apart(self, entry: Entry) -> str:
        """ "batch 64 by 32, length 16384 by 8192": in what the call is not the shape that was timed, the call first."""
        call, timed = self.selection.when, entry.when
        names = {"op": "op", "num_heads": "heads", "page_size": "page size", "q_len": "query tokens", "batch": "batch"}
        if call.kv_len is not None:
            names["kv_len"] = "length"
        pairs = [(text, getattr(call, name), getattr(timed, name)) for name, text in names.items()]
        return ", ".join(f"{text} {own} by {its}" for text, own, its in pairs if own != its) or "the same shape"

    def _device_name(self) -> str:
        gpu = select.gpu_of(self.device)
        return str(self.device) if gpu is None else f"{gpu[0]} ({self.device}, {gpu[1].sm_count} SMs)"


def explain(
    op: str = "decode",
    *,
    num_heads: int,
    page_size: int | None = None,
    batch: int,
    max_kv_len: int | None = None,
    q_len: int = 1,
    kv_format: str = "",
    q_fp8: bool = False,
    batch_invariant: bool = False,
    device: torch.device | str | int | None = None,
) -> Explanation:
    """Which configuration a call or plan of this shape takes, and why. Runs nothing and reads no device memory.

    Args:
        op: "decode", "prefill" or "sparse" (:func:`mla_sparse`).
        num_heads: query heads, 1..128.
        page_size: tokens per page, >= 1; sparse asks for none.
        batch: requests, >= 1; of sparse query tokens.
        max_kv_len: what the plan is told, of a call with a block table max_pages * page_size, of sparse the columns of
            the lists, else None.
        q_len: query tokens per request: 1 for decode and sparse; of prefill ceil(total_q / batch).
        kv_format, q_fp8: "" for a 16-bit cache, else "tensor", "token" or "group"; whether queries are e4m3.
        batch_invariant: what the plan is told.
        device: None is torch's current CUDA device, or the CPU where there is none.

    Raises:
        TypeError, ValueError: naming the argument, or the entry of a broken tuned file. RuntimeError: the device is a
            GPU that is not Hopper.
    """
    if op not in TUNED_OPS:
        raise ValueError(f"op: expected 'decode', 'prefill' or 'sparse', got {op!r}")
    expect_int("num_heads", num_heads, 1, MAX_HEADS)
    if page_size is not None or op != "sparse":
        expect_int("page_size", page_size, 1)
    expect_int("batch", batch, 1)
    expect_int("q_len", q_len, 1)
    if op != "prefill" and q_len != 1:
        raise ValueError(f"q_len: expected 1 for decode and sparse, got {q_len}")
    expect_hints(kv_format, q_fp8, max_kv_len)
    expect_bool("batch_invariant", batch_invariant)
    where = _device(device)
    if where.type == "cuda":
        num_sms(where)
    kv_len = 1 if max_kv_len == 0 else max_kv_len
    # Whatever the pages of its cache, sparse gathers single tokens.
    size = 1 if op == "sparse" or page_size is None else page_size
    when = select.When(op, kv_format, q_fp8, num_heads, size, q_len, batch, kv_len)
    selection = select.select(when, where, batch_invariant)
    apart = None if selection.entry is None else select.distance(when, selection.entry.when)
    return Explanation(selection, where, apart, "float32 reference" if where.type == "cpu" else selection.kernel)


def _device(device: torch.device | str | int | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device, bool) or not isinstance(device, torch.device | str | int):
        raise TypeError(f"device: expected a torch.device, a str, an int or None, got {device!r}")
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"device: expected a device, got {device!r}: {error}") from None
    if found.type == "cuda" and (found.index or 0) >= (visible := torch.cuda.device_count()):
        raise ValueError(f"device: expected one of {visible} visible GPUs or the cpu, got {device!r}")
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())
    return found
