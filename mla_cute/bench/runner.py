"""Time and check cases, and make the record of a run."""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import pathlib
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import gpu as gpu_facts
from ..compile.jit import replace_file
from ..config import KernelConfig, with_kernel
from ..kernels.registry import DECODE_FP8, PREFILL_FP8, converts, step_of, takes_tile16
from ..testing.fp8 import E4M3_NOISE, one_e4m3_part
from . import sustained
from .cases import PUBLIC_BEST_GPU, PUBLIC_BEST_US, ROTATION_BYTES, Case, PrefillCase, case_of
from .inputs import Inputs, KvPool, filling, make_inputs
from .peers import Peer, Unsupported, expect_usual_dims
from .sustained import SETTLE_S, Sustain
from .timing import Replay, Timer, cublas_tflops, empty_graph_us, measure_ceilings, occupy

SCHEMA = 1
PLAN_SHARED_BY = 61
COMPUTE_BOUND_HEADS = 95  # decode: from here on the tensor cores are the limit at bf16, below it the memory

# Frobenius error of output against float32 rounded to the dtype. Rounding P, O and the reference is 2..3 units of
# 2^-9 / sqrt(3) (bf16) or 2^-12 / sqrt(3); a wrong page or a lost token is 1e-1 and more at the lengths timed here.
REL_ERR_LIMIT = {"bfloat16": 8e-3, "float16": 1.5e-3}
LSE_ERR_LIMIT = 5e-3
# The same limits for FP8 caches, against float32 on the dequantised cache. Beside the rounding above, products in e4m3
# change the output by 1e-3 of itself and a score by a few 1e-3, or by E4M3_NOISE of itself where that is more. No score
# exceeds the lse, so an lse may also be off by three times E4M3_NOISE of itself.
FP8_REL_ERR_LIMIT = {"bfloat16": 8e-3, "float16": 5e-3}
FP8_LSE_ERR_LIMIT = 2e-2
# Of a peer's output with an FP8 cache: it tells right from wrong, the record's rel_err how good it is. P in e4m3, as
# FlashMLA's dense FP8 has it, costs 1e-2 and more; a wrong scale or a wrong order of arguments costs 1e-1 to 1.
PEER_FP8_REL_ERR_LIMIT = 5e-2

METHOD = {
    "us": "median of CUDA-graph replays, one call with a plan per graph (main kernel and merge), each replay between "
    "two CUDA events, enqueued behind a spin kernel so that the host is ahead; nothing subtracted",
    "plan_us": "the same with a graph that holds plan.update() only",
    "us_amortised": f"us + plan_us / {PLAN_SHARED_BY}; gbps, tflops, shares and ratios are made from it",
    "us_cold": "as us, but in front of each replay 384 MB are read: what a call shares with the one before, code and "
    "plan, comes from memory too, as in a model whose weights pass through L2 between two layers",
    "us_chained": "one graph of calls back to back over the slots, divided by the number of calls",
    "sustained": f"replays round and round for {SETTLE_S} s that do not count and the seconds that were asked for, "
    "ours before the peers and behind them (the mean of both); us by the host's clock, W between two moves of NVML's "
    "counter of energy, mJ the product, cycles us times the mean SM clock",
    "rotation": f"disjoint page sets, queries and outputs per slot; one pass over the slots reads (prefill: reads and "
    f"writes) the bytes each row names, more than {ROTATION_BYTES}; random page order over the whole pool; standard "
    "normal data",
    "bytes": "KV once, as it is stored and with its scales, + queries + outputs",
    "fp8": "standard normal data in e4m3; formats token and group with scales of 0.5 to 1.5 times that of the data; "
    "checked against float32 on the dequantised cache and the queries given; with accuracy fast, on the queries as it "
    "rounds them",
    "flop": "2 * H * (576 + 512) per (query token, key) pair that the mask lets through; with other head dimensions "
    "ckv + kpe and ckv in their place",
    "ceilings": "measured in this run at its start and end, the larger is used: maximum over 4 GB of random words "
    "(read), torch.mm of bf16 8192^3 on random data (cuBLAS), medians",
    "cublas_beside_tflops": "cuBLAS right after the case, so at the clock the case left the GPU with: under load it "
    "falls from 1980 MHz to 1500..1700 at the power limit; cublas_share_beside is the share of it",
    "host": "perf_counter over chunks of 50 calls of one small case enqueued back to back, median chunk",
    "peers": "the same slots, graphs and events; their planning is left out; outputs are checked like ours, with FP8 "
    f"caches to {PEER_FP8_REL_ERR_LIMIT} of the output's norm",
}


@dataclass(frozen=True)
class Library:
    """The functions under test, and the options every call passes on."""

    decode: Callable[..., Any]
    plan: Callable[..., Any]
    prefill: Callable[..., Any]
    plan_prefill: Callable[..., Any]
    sparse: Callable[..., Any]
    plan_sparse: Callable[..., Any]
    config: KernelConfig | None = None
    batch_invariant: bool = False

    @classmethod
    def installed(cls, config: KernelConfig | None = None, batch_invariant: bool = False) -> "Library":
        from .. import mla_paged_decode, mla_paged_prefill, mla_sparse, plan_decode, plan_prefill, plan_sparse

        calls = mla_paged_decode, plan_decode, mla_paged_prefill, plan_prefill, mla_sparse, plan_sparse
        return cls(*calls, config, batch_invariant)

    def make_plan(self, inputs: Inputs) -> Any:
        """With an accuracy of the case's own, the configuration that is chosen for it, but for that and tile64."""
        case, plan = inputs.case, self._plan(inputs, self.config)
        if not case.accuracy:
            return plan
        config = dataclasses.replace(plan.config, accuracy=case.accuracy)
        if takes_tile16(case.kv_format, case.num_heads, config):
            config = with_kernel(config, case.kv_format, "tile64")
        return self._plan(inputs, config)

    def _plan(self, inputs: Inputs, config: KernelConfig | None) -> Any:
        case = inputs.case
        if isinstance(case, Case) and case.sparse:
            return self.plan_sparse(
                inputs.kv_indices[0],
                num_heads=case.num_heads,
                config=config,
                batch_invariant=self.batch_invariant,
                kv_format=case.kv_format,
                q_fp8=case.q_fp8,
            )
        options = {
            "num_heads": case.num_heads,
            "page_size": case.page_size,
            "kv_last_page_len": inputs.kv_last_page_len,
            "config": config,
            "batch_invariant": self.batch_invariant,
            "num_kv_indices": inputs.kv_indices.shape[1],
            "kv_format": case.kv_format,
            "q_fp8": case.q_fp8,
            "max_kv_len": max(kv for _, kv in case.requests),
        }
        if isinstance(case, PrefillCase):
            options |= {"total_q": case.total_q, "causal": case.causal, "max_q_len": max(q for q, _ in case.requests)}
            return self.plan_prefill(inputs.qo_indptr, inputs.kv_indptr, **options)
        return self.plan(inputs.kv_indptr, **options)

    def calls(self, inputs: Inputs, plan: Any) -> list[Replay]:
        case = inputs.case
        prefill = isinstance(case, PrefillCase)
        sparse = isinstance(case, Case) and case.sparse
        function = self.prefill if prefill else self.sparse if sparse else self.decode

        def make(slot: int) -> Replay:
            args = (
                inputs.q_nope[slot],
                inputs.q_pe[slot],
                inputs.ckv_cache,
                inputs.kpe_cache,
                *((inputs.qo_indptr,) if prefill else ()),
                *(() if sparse else (inputs.kv_indptr,)),
                inputs.kv_indices[slot],
                inputs.sm_scale,
            )
            options = {
                **({"causal": case.causal} if isinstance(case, PrefillCase) else {}),
                **({} if sparse else {"kv_last_page_len": inputs.kv_last_page_len}),
                "out": inputs.out[slot],
                "lse": inputs.lse[slot],
                "plan": plan,
                "config": self.config,
                "batch_invariant": self.batch_invariant,
                **inputs.scales,
            }
            return lambda: function(*args, **options)

        return [make(slot) for slot in range(inputs.num_slots)]


def rounds_queries(case: Case | PrefillCase, config: KernelConfig) -> bool:
    """Whether the kernel makes one e4m3 part of the case's 16-bit queries."""
    if config.accuracy != "fast" or case.q_fp8:
        return False
    op = "prefill" if isinstance(case, PrefillCase) else "decode"
    q_len = -(-sum(q_len for q_len, _ in case.requests) // len(case.requests))
    if converts(op, case.kv_format, case.q_fp8, case.num_heads, q_len, config, case.dtype):
        return False
    return step_of(op, case.kv_format, case.num_heads, config) in (DECODE_FP8, PREFILL_FP8)


def spot_check(
    inputs: Inputs,
    out: Callable[[int], torch.Tensor],
    lse: Callable[[int], torch.Tensor] | None,
    caches: tuple[torch.Tensor, torch.Tensor],
    fp8_limits: dict[str, float] = FP8_REL_ERR_LIMIT,
    one_part: bool = False,
) -> dict[str, Any]:
    """Three requests in three slots against the reference: {"ok", "rel_err", "lse_err", "limit", "requests"}.
    `one_part`: the reference has the queries as accuracy "fast" rounds them."""
    from ..reference import prefill_reference, sparse_reference

    case, batch = inputs.case, len(inputs.case.requests)
    picks = {(0, 0), (inputs.num_slots // 2, batch // 2), (inputs.num_slots - 1, batch - 1)}
    queries, pages = inputs.qo_indptr.tolist(), inputs.kv_indptr.tolist()
    rel_errs, lse_errs, lse_ok = [], [0.0], True
    for slot, b in sorted(picks):
        tokens = slice(queries[b], queries[b + 1])
        q_nope, q_pe = inputs.q_nope[slot, tokens], inputs.q_pe[slot, tokens]
        if one_part:
            q_nope, q_pe = one_e4m3_part(q_nope), one_e4m3_part(q_pe) if case.rope_is_fp8 else q_pe
        queried = (q_nope, q_pe, *caches)
        if isinstance(case, Case) and case.sparse:
            lists = inputs.kv_indices[slot, b : b + 1]
            want, want_lse = sparse_reference(*queried, lists, inputs.sm_scale, **inputs.scales)
        else:
            want, want_lse = prefill_reference(
                *queried,
                inputs.qo_indptr[b : b + 2] - queries[b],
                inputs.kv_indptr[b : b + 2] - pages[b],
                inputs.kv_indices[slot, pages[b] : pages[b + 1]],
                inputs.sm_scale,
                causal=not isinstance(case, PrefillCase) or case.causal,
                kv_last_page_len=None if inputs.kv_last_page_len is None else inputs.kv_last_page_len[b : b + 1],
                **inputs.scales,
            )
        want, got = want.float(), out(slot)[tokens].float()
        rel_errs.append(((got - want).norm() / want.norm()).item())
        if lse is not None:
            allowed = torch.full_like(want_lse, LSE_ERR_LIMIT)
            if case.kv_format:
                allowed = (3 * E4M3_NOISE * want_lse.abs()).clamp(min=FP8_LSE_ERR_LIMIT)
            errors = (lse(slot)[tokens] - want_lse).abs()
            lse_errs.append(errors.max().item())
            lse_ok = lse_ok and bool((errors <= allowed).all())
    limit = (fp8_limits if case.kv_format else REL_ERR_LIMIT)[case.dtype]
    # `max` passes over a NaN that is not first; `all` of comparisons does not.
    ok = all(err <= limit for err in rel_errs) and lse_ok
    return {
        "ok": ok,
        "rel_err": _finite_max(rel_errs),
        "lse_err": _finite_max(lse_errs) if lse is not None else None,
        "limit": limit,
        "requests": len(picks),
    }


def _finite_max(values: Sequence[float]) -> float | None:
    return max(values) if all(map(math.isfinite, values)) else None


def _percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def run_case(
    case: Case | PrefillCase,
    pool: KvPool,
    timer: Timer,
    library: Library,
    peers: Iterable[Peer] = (),
    seed: int = 0,
    sustain: Sustain | None = None,
) -> dict[str, Any]:
    """Time and check one case; the row for the record, without what needs the ceilings. With `sustain` each
    implementation is replayed for seconds too, ours before the peers and behind them."""
    inputs = make_inputs(case, pool, timer.device, seed)
    plan = library.make_plan(inputs)
    calls = library.calls(inputs, plan)
    calls[0]()  # compiles or loads the kernels: not allowed under capture
    timer.synchronize()
    inputs.out.fill_(float("nan"))
    inputs.lse.fill_(float("nan"))
    replays = [timer.capture(call) for call in calls]
    samples = timer.samples(replays, 0.2)
    cold = timer.samples(replays, 0.02, cold=True)
    caches, one_part = (inputs.ckv_cache, inputs.kpe_cache), rounds_queries(case, plan.config)
    check = spot_check(inputs, inputs.out.__getitem__, inputs.lse.__getitem__, caches, one_part=one_part)

    plan_us = statistics.median(timer.samples([timer.capture(plan.update)], 0.02))
    repeats = -(-4 // len(calls))
    chain = timer.capture(lambda: [call() for _ in range(repeats) for call in calls])
    chained = statistics.median(timer.samples([chain], 0.1, at_least=8)) / (repeats * len(calls))

    us = statistics.median(samples)
    amortised = us + plan_us / PLAN_SHARED_BY
    row: dict[str, Any] = {
        "case": dataclasses.asdict(case),
        "us": us,
        "us_min": min(samples),
        "us_p90": _percentile(samples, 0.9),
        "samples": len(samples),
        "plan_us": plan_us,
        "us_amortised": amortised,
        "us_cold": statistics.median(cold),
        "us_chained": chained,
        "gbps": case.bytes_moved / amortised * 1e-3,
        "tflops": case.flop / amortised * 1e-6,
        "rotation": {"slots": inputs.num_slots, "bytes": inputs.num_slots * case.turnover},
        "check": check,
    }
    if sustain is not None:
        row["sustained"] = sustained.measure(timer, replays, us, sustain).to_dict()
    row["peers"] = {peer.name: _time_peer(peer, inputs, timer, sustain) for peer in peers}
    if sustain is not None and row["peers"]:
        again = sustained.measure(timer, replays, us, sustain).to_dict()
        row["sustained"] = sustained.mean(row["sustained"], again)
    return row


def _time_peer(peer: Peer, inputs: Inputs, timer: Timer, sustain: Sustain | None = None) -> dict[str, Any]:
    try:
        expect_usual_dims(inputs.case)
        return _timed(peer, inputs, timer, sustain)
    except Unsupported as reason:
        return {"unsupported": str(reason)}
    except Exception as error:  # what a peer raises belongs in the record, not in our way
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    finally:
        peer.outputs = {}
        timer.free_graphs()


def _timed(peer: Peer, inputs: Inputs, timer: Timer, sustain: Sustain | None) -> dict[str, Any]:
    calls = peer.calls(inputs)
    calls[0]()
    timer.synchronize()
    replays = [timer.capture(call) for call in calls]
    samples = timer.samples(replays, 0.2)
    cold = timer.samples(replays, 0.02, cold=True)
    limits = dict.fromkeys(REL_ERR_LIMIT, PEER_FP8_REL_ERR_LIMIT)
    check = spot_check(inputs, peer.outputs.__getitem__, None, peer.caches(inputs), limits)
    us = statistics.median(samples)
    row = {
        "us": us,
        "us_cold": statistics.median(cold),
        "us_min": min(samples),
        "samples": len(samples),
        "check": check,
    }
    if sustain is not None:
        row["sustained"] = sustained.measure(timer, replays, us, sustain).to_dict()
    return row


def measure_host(case: Case | PrefillCase, pool: KvPool, timer: Timer, library: Library) -> dict[str, Any]:
    """Host time of one call, with and without a plan, on a case whose kernels are shorter than the call."""
    inputs = make_inputs(case, pool, timer.device)
    results: dict[str, Any] = {"case": dataclasses.asdict(case)}
    for key, plan in (("call_us", library.make_plan(inputs)), ("call_without_plan_us", None)):
        call = library.calls(inputs, plan)[0]
        call()
        results[key] = timer.host_us(call)
    return results


def apply_ceilings(row: dict[str, Any], ceilings: dict[str, float], gpu_name: str | None) -> None:
    """Fill in the shares of the ceilings and, on the GPU it was measured on, the ratio to the public best."""
    if "error" in row:
        return
    case = case_of(row)
    row["read_share"] = row["gbps"] / ceilings["read_gbps"]
    row["cublas_share"] = row["tflops"] / ceilings["cublas_bf16_tflops"]
    if "cublas_beside_tflops" in row:
        row["cublas_share_beside"] = row["tflops"] / row["cublas_beside_tflops"]
    if isinstance(case, PrefillCase):
        return
    best = PUBLIC_BEST_US.get((case.num_heads, case.batch, case.kv_len))
    if best is not None and case == Case(case.num_heads, case.batch, case.kv_len, layout=case.layout):
        row["public_best_us"] = best
        if gpu_name == PUBLIC_BEST_GPU:
            row["public_best_ratio"] = best / row["us_amortised"]


def source_digest() -> str:
    """sha256 over the package's source: names the code measured where there is no git."""
    root = pathlib.Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, in the main thread, where alone a handler can be set."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(
    cases: Sequence[Case | PrefillCase],
    *,
    timer: Timer,
    library: Library,
    peers: tuple[Sequence[Peer], dict[str, Any]] = ((), {}),
    ceilings: Callable[[Timer], dict[str, float]] = measure_ceilings,
    cublas: Callable[[Timer], float] = cublas_tflops,
    gpu: gpu_facts.GpuFacts | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
    preset: str | None = None,
    sustain: Sustain | None = None,
) -> dict[str, Any]:
    """Measure `cases` and return the record. A case that fails is a row with "error"; Ctrl-C, or a SIGTERM as `timeout`
    sends it, ends the run early."""
    begin = time.monotonic()
    say = progress or (lambda done, total, label: None)
    name = gpu.name if gpu is not None else None
    rows: list[dict[str, Any]] = []
    any_prefill = any(isinstance(case, PrefillCase) for case in cases)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "mla_cute.bench.prefill" if any_prefill else "mla_cute.bench.decode",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "preset": preset,
        "gpu": gpu.to_dict() if gpu is not None else None,
        "versions": gpu_facts.versions(),
        "git": gpu_facts.git_state(),
        "source_sha256": source_digest(),
        "method": METHOD,
        "config": library.config.to_dict() if library.config is not None else None,
        "batch_invariant": library.batch_invariant,
        "peers": peers[1],
        "complete": False,
        "rows": rows,
    }
    total = len(cases) + 2
    say(0, total, "ceilings: read bandwidth, cuBLAS")
    start = ceilings(timer)
    record["ceilings"] = {"start": start, "end": None, "used": dict(start)}
    host_cases: dict[str, Case | PrefillCase] = {"": Case(16, 1, 64)}
    if any_prefill:
        host_cases["prefill_"] = PrefillCase(16, ((1, 2, 64),))
    if any(case.kv_format for case in cases):
        host_cases["fp8_"] = Case(16, 1, 64, kv_format="tensor")
    pool = KvPool.of([*cases, *host_cases.values()], timer.device)
    with _sigterm_interrupts(), contextlib.suppress(KeyboardInterrupt):
        say(1, total, "host time of a call")
        record["ceilings"]["empty_graph_us"] = empty_graph_us(timer)
        try:
            record["host"] = {}
            for prefix, case in host_cases.items():
                host = measure_host(case, pool, timer, library)
                record["host"] |= {f"{prefix}{key}": value for key, value in host.items()}
        except Exception as error:  # as for a case below
            record["host"] = {"error": f"{type(error).__name__}: {error}"}
        # The pool is refilled when its types change.
        for done, case in enumerate(sorted(cases, key=filling)):
            say(done + 1, total, case.label)
            try:
                row = run_case(case, pool, timer, library, peers[0], sustain=sustain)
                if isinstance(case, PrefillCase) or case.num_heads >= COMPUTE_BOUND_HEADS:
                    row["cublas_beside_tflops"] = cublas(timer)
            except Exception as error:  # one failing case must not lose the others
                row = {"case": dataclasses.asdict(case), "error": f"{type(error).__name__}: {error}"}
            apply_ceilings(row, start, name)
            rows.append(row)
            if on_row is not None:
                on_row(row)
        del pool
        say(total - 1, total, "ceilings again")
        end = ceilings(timer)
        record["ceilings"].update(end=end, used={key: max(start[key], end[key]) for key in start})
        record["complete"] = True
    if gpu is not None:
        occupy(timer.device)
        record["gpu"]["clocks_under_load"] = gpu_facts.clocks(gpu)
        timer.synchronize()
    for row in rows:
        apply_ceilings(row, record["ceilings"]["used"], name)
    record["failed"] = sum(not row_ok(row) for row in rows) + ("error" in record.get("host", {}))
    record["seconds"] = round(time.monotonic() - begin, 1)
    say(total, total, "done")
    return record


def row_ok(row: dict[str, Any]) -> bool:
    return "error" not in row and row["check"]["ok"]


def write_json(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Write atomically: a reader sees the old file or the whole new one."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
    os.chmod(path, 0o644)
