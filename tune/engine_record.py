"""What tune/engine_bench.py measures, and the record and the table that it makes of it. Needs neither torch nor vLLM.

python tune/engine_record.py RECORD.json...        # the table of docs/engines.md, of one record per head count
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LAYERS = 61  # of DeepSeek-V3
MEASURED_LAYERS = 2
HIDDEN = 7168
BLOCK = 64
PROMPT = 2048  # tokens of the prompt in a mixed step
OURS = "CUSTOM"

# By query heads: a rank of tensor parallelism of 8, and one of data parallelism.
INTERMEDIATE = {16: 2304, 128: 18432}
VOCABULARY = {16: 16160, 128: 129280}


@dataclass(frozen=True)
class Engine:
    """One engine, in a process of its own."""

    backend: str
    kv_cache_dtype: str

    @property
    def name(self) -> str:
        return f"{self.backend} {self.kv_cache_dtype}"


# FLASH_ATTN_MLA takes no fp8 cache.
ENGINES = (
    Engine("CUSTOM", "bf16"),
    Engine("FLASH_ATTN_MLA", "bf16"),
    Engine("FLASHMLA", "bf16"),
    Engine("CUSTOM", "fp8"),
    Engine("FLASHMLA", "fp8"),
)


@dataclass(frozen=True)
class Cell:
    """What all engines do at once: `batch` decodes of `tokens` keys each, with `mixed` a new prompt in every step."""

    batch: int
    tokens: int
    mixed: bool = False

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.tokens // 1024}k" + (" + prompt" if self.mixed else "")


CELLS = (
    *(Cell(batch, tokens) for tokens in (1024, 8192, 32768) for batch in (1, 16, 64, 128)),
    Cell(64, 8192, mixed=True),
)

METHOD = {
    "model": (
        f"DeepSeek-V3's shapes, hidden size {HIDDEN}, {MEASURED_LAYERS} dense layers, random weights; 16 heads stand "
        "for a rank of tensor parallelism of 8 (intermediate size and vocabulary divided by 8, no all-reduce), 128 for "
        "one of data parallelism"
    ),
    "context": (
        "vLLM's DecodeBenchConnector: the cache is filled with normal values once, and every request's tokens but the "
        "last count as computed. A context grows by one token a step, from the cell's tokens on"
    ),
    "turns": (
        "all engines on one GPU, one at work at a time: windows of steps go round; before each, steps that are not "
        "timed"
    ),
    "tpot_us": (
        "wall time of a step, median over the windows: scheduling, inputs, model, logits, greedy sampling, outputs; no "
        "tokenizer and no network. Two layers take the GPU less time than a step takes the host, so that it is mostly "
        "the host's"
    ),
    "tokens_per_s": "batch / tpot; in a mixed step the decodes' tokens alone",
    "gpu_us": "time of a step in which a kernel or a copy runs, of a profiled window",
    "attention_us": (
        "per layer, of a profiled window: time in which nothing but kernels of attention and of its combination runs; "
        "in a mixed step the prompt's too. What the engine does to queries is not in it"
    ),
    "plan_us": "per step, likewise: kernels that share out the step's work, for all its layers at once",
    "tpot_61_us": (
        "projected GPU time of a step: r + 59 L + plan_us + 61 attention_us. L, the rest of a layer, is the time from "
        "the first layer's attention to the second's less attention_us; r = gpu_us - plan_us - 2 attention_us. L and "
        "r are medians over the cell's engines, so that these differ by attention alone. All layers are dense; no "
        "all-reduce, no host time"
    ),
    "ratio": "attention_us of the fastest of vLLM's backends over the same cache dtype / attention_us of CUSTOM",
    "ratio_gpu, ratio_tpot, ratio_61": "gpu_us, tpot_us and tpot_61_us of the same two",
}

# Of FlashMLA, FlashAttention 3 and this library's kernels; not what writes the cache or joins queries.
ATTENTION = re.compile(
    r"flash::|flash_fwd|splitkv_mla|mla_metadata|mla_decoding|mla_combine|prepare_varlen|FlashAttn|kernel_cutlass|mla_cute"
)
NOT_ATTENTION = re.compile(r"concat|reshape_and_cache|fused_rope")
PLAN = re.compile(r"mla_metadata|mla_decoding_metadata|prepare_varlen|planner")


def kind_of(kernel: str) -> str:
    """ "plan", "attention" or "other", of a kernel's name."""
    if NOT_ATTENTION.search(kernel) or not ATTENTION.search(kernel):
        return "other"
    return "plan" if PLAN.search(kernel) else "attention"


@dataclass(frozen=True)
class Event:
    """A kernel or a copy of a profile: begin and end in us."""

    name: str
    begin: float
    end: float


def union(events: Iterable[Event]) -> float:
    """us in which at least one of the events runs."""
    total, reached = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.begin):
        total += max(0.0, event.end - max(event.begin, reached))
        reached = max(reached, event.end)
    return total


def profile_figures(events: Sequence[Event], steps: int, layers: int = MEASURED_LAYERS) -> dict[str, Any]:
    """gpu_us, plan_us and attention_us of METHOD, layer_us (from one layer's attention to the next's), kernels' times.

    A kernel that begins before the last one ended (programmatic dependent launch) waits then: that time is the last
    one's.
    """
    if not events or steps < 1:
        raise ValueError("events: expected kernels of at least one step, got none")
    kinds = {name: kind_of(name) for name in {event.name for event in events}}
    all_but_attention = union(event for event in events if kinds[event.name] != "attention")
    others = union(event for event in events if kinds[event.name] == "other")
    gpu = union(events)
    times: dict[str, float] = {}
    for event in events:
        name = f"{kinds[event.name]}: {event.name[:120]}"
        times[name] = times.get(name, 0.0) + (event.end - event.begin) / steps
    return {
        "gpu_us": gpu / steps,
        "plan_us": (all_but_attention - others) / steps,
        "attention_us": (gpu - all_but_attention) / steps / layers,
        "layer_us": layer_us([event for event in events if kinds[event.name] == "attention"], steps, layers),
        "kernels": dict(sorted(times.items(), key=lambda item: -item[1])),
    }


def layer_us(attention: Sequence[Event], steps: int, layers: int = MEASURED_LAYERS) -> float | None:
    """Median time from the attention of one layer to that of the next one in a step; None where it cannot be told.

    The kernel of each layer is the one of those launched once a layer and step that takes longest.
    """
    names: dict[str, list[Event]] = {}
    for event in attention:
        names.setdefault(event.name, []).append(event)
    layered = [found for found in names.values() if len(found) == steps * layers]
    if not layered or layers < 2:
        return None
    chosen = max(layered, key=lambda found: sum(event.end - event.begin for event in found))
    begins = sorted(event.begin for event in chosen)
    return statistics.median(
        begins[step * layers + layer + 1] - begins[step * layers + layer]
        for step in range(steps)
        for layer in range(layers - 1)
    )


def summarize(cell: Cell, windows: dict[str, list[float]], profiles: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A row of the record. `windows`: of each engine, by name, us of a step in each window; `profiles`: its figures."""
    rows: dict[str, dict[str, Any]] = {}
    for name, times in windows.items():
        tpot = statistics.median(times)
        rows[name] = {
            "tpot_us": tpot, "tpot_us_windows": times, "tokens_per_s": cell.batch / tpot * 1e6,
            **{key: value for key, value in profiles.get(name, {}).items() if key != "kernels"},
        }  # fmt: skip
    project(rows)
    row = {"cell": asdict(cell), "name": cell.name, "engines": rows, "best": {}}
    for dtype in ("bf16", "fp8"):
        if compared := compare(rows, dtype):
            row["best"][dtype] = compared
    return row


def project(rows: dict[str, dict[str, Any]]) -> None:
    """Adds tpot_61_us to the rows of a cell, where they were profiled."""
    profiled = [row for row in rows.values() if "gpu_us" in row]
    layers = [row["layer_us"] - row["attention_us"] for row in profiled if row.get("layer_us") is not None]
    if not layers:
        return
    rest_of_layer = statistics.median(layers)
    rest = statistics.median(row["gpu_us"] - row["plan_us"] - MEASURED_LAYERS * row["attention_us"] for row in profiled)
    for row in profiled:
        common = rest + (LAYERS - MEASURED_LAYERS) * rest_of_layer
        row["tpot_61_us"] = common + row["plan_us"] + LAYERS * row["attention_us"]


def compare(rows: dict[str, dict[str, Any]], dtype: str) -> dict[str, Any] | None:
    """The fastest of vLLM's backends over this cache dtype, and how much slower than CUSTOM it is."""
    ours = rows.get(f"{OURS} {dtype}", {})
    others = {
        name: row
        for name, row in rows.items()
        if name.endswith(f" {dtype}") and not name.startswith(f"{OURS} ") and "attention_us" in row
    }
    if "attention_us" not in ours or not others:
        return None
    name = min(others, key=lambda name: others[name]["attention_us"])
    found: dict[str, Any] = {
        "backend": name.split()[0],
        "ratio": others[name]["attention_us"] / ours["attention_us"],
        "ratio_gpu": others[name]["gpu_us"] / ours["gpu_us"],
        "ratio_tpot": others[name]["tpot_us"] / ours["tpot_us"],
    }
    if "tpot_61_us" in ours:
        found["ratio_61"] = others[name]["tpot_61_us"] / ours["tpot_61_us"]
    return found


SHORT = {"FLASH_ATTN_MLA": "FA", "FLASHMLA": "FM"}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: attention us per layer of CUSTOM / of vLLM's fastest, in bold the ratio, then projected TPOT in ms."""
    head, lines = ["requests x keys"], []
    for record in records:
        head += [f"{record['heads']} heads, {dtype}" for dtype in ("bf16", "fp8")]
    lines.append(f"| {' | '.join(head)} |")
    lines.append("|---" * len(head) + "|")
    for cell in records[0]["rows"]:
        cells = [cell["name"]]
        for record in records:
            row = next((row for row in record["rows"] if row["name"] == cell["name"]), None)
            cells += [entry(row, dtype) for dtype in ("bf16", "fp8")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def entry(row: dict[str, Any] | None, dtype: str) -> str:
    best = row and row["best"].get(dtype)
    if not row or not best:
        return "–"
    ours = row["engines"][f"{OURS} {dtype}"]
    theirs = row["engines"][f"{best['backend']} {dtype}"]
    text = (
        f"{ours['attention_us']:.1f} / {theirs['attention_us']:.1f} {SHORT[best['backend']]}, **{best['ratio']:.2f}**"
    )
    if "ratio_61" in best:
        text += f"; {ours['tpot_61_us'] / 1e3:.1f} / {theirs['tpot_61_us'] / 1e3:.1f} ms"
    return text


if __name__ == "__main__":
    print(table([json.loads(Path(path).read_text(encoding="utf-8")) for path in sys.argv[1:]]), end="")
