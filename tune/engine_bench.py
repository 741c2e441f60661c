"""Engines of vLLM side by side on one GPU: this library's backend and vLLM's own, with bf16 and fp8 caches.

    python tune/engine_bench.py --heads 16 --out record.json
    python tune/engine_record.py record.json

Each engine is a process; all start at once, stay, and take turns under one coordinator: all prepare a cell (of
engine_record.CELLS), then windows of steps go round, then each runs one window under the profiler. No prompt is
computed: vLLM's DecodeBenchConnector fills the cache. What is measured is in engine_record.METHOD, which the record
repeats. The record is written after every cell. Written for vLLM 0.33.0; five engines need 85 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import engine_record as er

ROOT = Path(__file__).resolve().parents[1]
WINDOWS, STEPS, WARM, PROFILED = 3, 32, 3, 12
SETTLE = 8  # steps of a cell before its first window
START_S, COMMAND_S = 200, 60  # for an engine to start, kernels compiled included; for one command
GRAPHS = (1, 16, 64, 128)
ROOM = 512  # tokens that a request may generate in a cell: twice what windows of the default size take

# ---------------------------------------------------------------------------------------------- an engine's process


def model_changes(heads: int) -> dict[str, Any]:
    """Of the configuration that tests/engine_case.py writes."""
    return {
        "hidden_size": er.HIDDEN, "intermediate_size": er.INTERMEDIATE[heads], "num_hidden_layers": er.MEASURED_LAYERS,
        "num_attention_heads": heads, "num_key_value_heads": heads, "q_lora_rank": 1536,
        "vocab_size": er.VOCABULARY[heads],
    }  # fmt: skip


def llm_arguments(engine: er.Engine, model: str, cells: Sequence[er.Cell]) -> dict[str, Any]:
    """Arguments of vllm.LLM: a cache that holds the largest of the cells, full CUDA graphs of decode steps."""
    tokens = max(cell.batch * (cell.tokens + ROOM) for cell in cells) + 2 * er.PROMPT
    row = er.MEASURED_LAYERS * 576 * (1 if engine.kv_cache_dtype == "fp8" else 2)
    return {
        "model": model, "skip_tokenizer_init": True, "load_format": "dummy", "dtype": "bfloat16", "seed": 0,
        "max_model_len": max(cell.tokens for cell in cells) + ROOM, "max_num_seqs": max(GRAPHS),
        "max_num_batched_tokens": er.PROMPT + 64, "block_size": er.BLOCK, "enable_prefix_caching": False,
        "disable_log_stats": True, "attention_backend": engine.backend,
        "kv_cache_dtype": "fp8" if engine.kv_cache_dtype == "fp8" else "auto",
        "gpu_memory_utilization": 0.03, "kv_cache_memory_bytes": tokens * row,
        "kernel_config": {"enable_jit_warmup": False}, "enforce_eager": False,
        "compilation_config": {
            "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": list(GRAPHS),
        },
        "kv_transfer_config": {
            "kv_connector": "DecodeBenchConnector", "kv_role": "kv_both",
            "kv_connector_extra_config": {"fill_std": 1.0, "startup_fill": True},
        },
    }  # fmt: skip


def draw_weights(loader: Any, model: Any, model_config: Any) -> None:
    """Stands in for DummyModelLoader.load_weights, whose weights are near zero and would take less power."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.dtype.is_floating_point:
                continue
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(0.0, 1.0 if "embed" in name else parameter.shape[-1] ** -0.5)


def compute_prompts_of_mixed_steps() -> None:
    """The connector counts no token of a request whose name begins with "prompt" as computed."""
    from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnectorScheduler

    inner = DecodeBenchConnectorScheduler.get_num_new_matched_tokens

    def get_num_new_matched_tokens(self: Any, request: Any, num_computed_tokens: int) -> Any:
        if request.request_id.startswith("prompt"):
            return 0, False
        return inner(self, request, num_computed_tokens)

    DecodeBenchConnectorScheduler.get_num_new_matched_tokens = get_num_new_matched_tokens


class Worker:
    """One engine and the cell that it is in. Its public methods are the commands of the coordinator."""

    def __init__(self, engine: er.Engine, heads: int, cells: Sequence[er.Cell]):
        sys.path.insert(0, str(ROOT / "tests"))
        sys.path.insert(0, str(ROOT))
        import engine_case
        import vllm_engine

        os.environ.update(vllm_engine.ENVIRONMENT | {"OMP_NUM_THREADS": "1"})
        import torch
        from vllm import LLM
        from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

        vllm_engine.register_backend()
        DummyModelLoader.load_weights = draw_weights
        compute_prompts_of_mixed_steps()
        with tempfile.TemporaryDirectory() as folder:
            engine_case.write_model(Path(folder), **model_changes(heads))
            self._engine = LLM(**llm_arguments(engine, folder, cells)).llm_engine
        self._torch = torch
        self._rows_of = vllm_engine.rows_of
        self._replays = vllm_engine.count_calls(torch.cuda.CUDAGraph, "replay")
        self._cell = cells[0]
        self._names: list[str] = []
        self._made = 0

    def facts(self) -> dict[str, Any]:
        """Versions, the GPU and what the engine made of its arguments."""
        import vllm

        from mla_cute import gpu
        from mla_cute.bench.runner import source_digest

        config = self._engine.vllm_config
        layers = config.compilation_config.static_forward_context.values()
        layer = next(layer for layer in layers if getattr(layer, "attn_backend", None) is not None)
        return {
            "common": {
                "gpu": found.to_dict() if (found := gpu.facts()) is not None else None,
                "versions": gpu.versions() | {"vllm": vllm.__version__}, "git": gpu.git_state(),
                "source_sha256": source_digest(),
            },
            "backend": layer.attn_backend.__module__,
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "v2_model_runner": bool(config.use_v2_model_runner), "blocks": config.cache_config.num_gpu_blocks,
            "cache_std": self._cache_std(layer),
        }  # fmt: skip

    def _cache_std(self, layer: Any) -> float | None:
        """Of the last blocks, which no request has reached: whether the connector could fill a cache of this dtype."""
        cache = layer.kv_cache
        cache = cache[0] if isinstance(cache, list | tuple) else cache
        try:
            return round(float(self._rows_of(cache[-8:].flatten(0, -2), 1.0).std()), 3)
        except (AttributeError, IndexError, RuntimeError):  # of another layout: nothing here depends on it
            return None

    def prepare(self, cell: er.Cell) -> dict[str, int]:
        """Add the cell's requests and step until all of them decode."""
        self._cell = cell
        self._names = [self._add("decode", cell.tokens, ROOM) for _ in range(cell.batch)]
        seen: set[str] = set()
        steps = 0
        while len(seen) < cell.batch:
            seen.update(output.request_id for output in self._engine.step())
            steps += 1
            if steps > 64:
                raise RuntimeError(f"{len(seen)} of {cell.batch} requests decode after {steps} steps")
        self._steps(SETTLE)
        return {"steps": steps}

    def window(self, steps: int) -> dict[str, float]:
        """us of a step, tokens that decoding requests got a step, graphs replayed a step."""
        self._steps(WARM)
        self._replays.clear()
        start = time.perf_counter()
        tokens = self._steps(steps)
        us = (time.perf_counter() - start) / steps * 1e6
        return {"us": us, "tokens": tokens / steps, "replays": self._replays.total() / steps}

    def profile(self, steps: int) -> dict[str, Any]:
        """Figures of steps under the profiler."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        self._steps(WARM)
        with profile(activities=[ProfilerActivity.CUDA]) as made:
            self._steps(steps)
        events = [
            er.Event(event.name(), event.start_ns() / 1e3, (event.start_ns() + event.duration_ns()) / 1e3)
            for event in made.profiler.kineto_results.events()
            if event.device_type() == DeviceType.CUDA and event.duration_ns() > 0 and " Sync" not in event.name()
        ]
        return er.profile_figures(events, steps)

    def end(self) -> None:
        """Abort the requests and let the steps under way finish."""
        self._engine.abort_request(self._names)
        deadline = time.monotonic() + COMMAND_S / 2
        while self._engine.has_unfinished_requests() and time.monotonic() < deadline:
            self._engine.step()
        for _ in range(3):  # with asynchronous scheduling one step is still in the queue
            self._engine.step()
        self._torch.cuda.synchronize()

    def _steps(self, count: int) -> int:
        """Run steps and wait for the GPU; returns the tokens that the decoding requests got."""
        tokens = 0
        for _ in range(count):
            if self._cell.mixed:
                self._add("prompt", er.PROMPT, 1)
            for output in self._engine.step():
                if output.request_id.startswith("decode"):
                    tokens += sum(len(completion.token_ids) for completion in output.outputs)
        self._torch.cuda.synchronize()
        return tokens

    def _add(self, kind: str, tokens: int, generated: int) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._made += 1
        name = f"{kind}-{self._made}"
        params = SamplingParams(
            temperature=0.0, max_tokens=generated, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        self._engine.add_request(name, {"prompt_token_ids": [10 + self._made % 4000] * tokens}, params)
        return name


def serve(connection: Connection, engine: er.Engine, heads: int, cells: Sequence[er.Cell], log: str) -> None:
    """The process of an engine: commands in, ("ok", value) or ("error", text) out. It ends when the pipe is closed."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.dump_traceback_later(START_S, exit=True)
    try:
        worker = Worker(engine, heads, cells)
        connection.send(("ok", worker.facts()))
    except Exception:
        connection.send(("error", traceback.format_exc()[-2000:]))
        os._exit(1)
    while True:
        faulthandler.cancel_dump_traceback_later()
        try:
            command, arguments = connection.recv()
        except EOFError:
            os._exit(0)  # what the engine does when it is torn down is not measured
        faulthandler.dump_traceback_later(COMMAND_S, exit=True)
        try:
            connection.send(("ok", getattr(worker, command)(*arguments)))
        except Exception:
            connection.send(("error", traceback.format_exc()[-2000:]))


# ---------------------------------------------------------------------------------------------- the coordinator


class Peer:
    """An engine's process as the coordinator has it."""

    def __init__(self, engine: er.Engine, heads: int, cells: Sequence[er.Cell], folder: Path, target: Any = serve):
        context = multiprocessing.get_context("spawn")
        self.name = engine.name
        self.log = folder / f"{engine.name.replace(' ', '_')}_{heads}.log"
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, engine, heads, cells, str(self.log)))
        self._process.start()
        theirs.close()

    def send(self, command: str, *arguments: Any) -> None:
        with contextlib.suppress(OSError):  # a process that has ended: receive says so
            self._connection.send((command, arguments))

    def receive(self, timeout: float) -> Any:
        """Raises RuntimeError for what went wrong there, an end of the process and no answer in time."""
        try:
            if not self._connection.poll(timeout):
                raise RuntimeError(f"no answer in {timeout:.0f} s{self._tail()}")
            state, value = self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"the process ended{self._tail()}") from None
        if state != "ok":
            raise RuntimeError(value)
        return value

    def stop(self) -> None:
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(5)

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "".join(f"\n{line[:200]}" for line in lines[-20:])


class Bench:
    """Peers, and the record of what they measured."""

    def __init__(self, peers: Sequence[Peer], record: dict[str, Any], out: Path, windows: int, steps: int):
        self.peers, self.record, self._out = list(peers), record, out
        self._windows, self._steps = windows, steps

    def start(self) -> None:
        deadline = time.monotonic() + START_S + 10
        for peer in list(self.peers):
            facts = self._receive(peer, "start", max(1.0, deadline - time.monotonic()))
            if facts is not None:
                self.record |= facts.pop("common", {})
                self.record["engines"][peer.name] = facts
        self.write()

    def run(self, cell: er.Cell) -> None:
        """Measure one cell with every engine that is left, and write the record."""
        windows: dict[str, list[float]] = {}
        tokens: dict[str, list[float]] = {}
        replays: dict[str, list[float]] = {}
        profiles: dict[str, dict[str, Any]] = {}
        self._all("prepare", cell)
        for turn in range(self._windows):
            first = turn % max(1, len(self.peers))  # another engine begins each round
            for peer in self.peers[first:] + self.peers[:first]:
                found = self._one(peer, "window", self._steps)
                if found is not None:
                    windows.setdefault(peer.name, []).append(found["us"])
                    tokens.setdefault(peer.name, []).append(found["tokens"])
                    replays.setdefault(peer.name, []).append(found["replays"])
        for peer in list(self.peers):
            found = self._one(peer, "profile", PROFILED)
            if found is not None:
                profiles[peer.name] = found
        self._all("end")
        row = er.summarize(cell, windows, profiles)
        for name, engine in row["engines"].items():
            engine["tokens_per_step"], engine["replays_per_step"] = tokens[name], replays[name]
        self.record["rows"].append(row)
        for name, found in profiles.items():
            self.record["kernels"].setdefault(name, {})[cell.name] = dict(list(found["kernels"].items())[:24])
        self.write()

    def write(self) -> None:
        partial = self._out.with_suffix(".partial")
        partial.write_text(json.dumps(rounded(self.record), indent=1) + "\n", encoding="utf-8")
        partial.replace(self._out)

    def _all(self, command: str, *arguments: Any) -> None:
        for peer in self.peers:
            peer.send(command, *arguments)
        for peer in list(self.peers):
            self._receive(peer, command, COMMAND_S + 5)

    def _one(self, peer: Peer, command: str, *arguments: Any) -> Any:
        peer.send(command, *arguments)
        return self._receive(peer, command, COMMAND_S + 5)

    def _receive(self, peer: Peer, command: str, timeout: float) -> Any:
        """None where it failed: such an engine leaves the bench, since its next steps were not those of the others."""
        try:
            return peer.receive(timeout)
        except RuntimeError as error:
            self.record["failures"].append({"engine": peer.name, "command": command, "error": str(error)})
            print(f"{peer.name}: {command}: {error}", file=sys.stderr, flush=True)
            self.peers.remove(peer)
            peer.stop()
            return None


def rounded(value: Any) -> Any:
    """Floats to five digits, which is more than they repeat to."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    return [rounded(x) for x in value] if isinstance(value, list | tuple) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, choices=sorted(er.INTERMEDIATE), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engines", default=".", help="those whose name, as in 'FLASHMLA fp8', this pattern finds")
    parser.add_argument("--cells", default=".", help="those whose name, as in '64 x 8k + prompt', this pattern finds")
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--budget", type=float, default=360, help="seconds after which no further cell begins")
    options = parser.parse_args()
    faulthandler.dump_traceback_later(options.budget + 2 * COMMAND_S, exit=True)  # the engines end with their pipes
    began = time.monotonic()
    engines = [engine for engine in er.ENGINES if re.search(options.engines, engine.name)]
    cells = [cell for cell in er.CELLS if re.search(options.cells, cell.name)]
    if not engines or not cells:
        parser.error("--engines, --cells: expected patterns that find some, got none")
    record: dict[str, Any] = {
        "what": "engines of vLLM side by side on one GPU: tune/engine_bench.py", "heads": options.heads,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "windows": options.windows, "steps": options.steps, "profiled_steps": PROFILED, "method": er.METHOD,
        "engines": {}, "rows": [], "left_out": [], "failures": [], "kernels": {},
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    peers = [Peer(engine, options.heads, cells, options.out.parent) for engine in engines]
    bench = Bench(peers, record, options.out, options.windows, options.steps)
    try:
        bench.start()
        print(f"{len(bench.peers)} of {len(peers)} engines after {time.monotonic() - began:.0f} s", flush=True)
        for cell in cells:
            if time.monotonic() - began > options.budget or not bench.peers:
                record["left_out"].append(cell.name)
                continue
            bench.run(cell)
            print(summary(record["rows"][-1]), f"[{time.monotonic() - began:.0f} s]", flush=True)
        record["seconds"] = time.monotonic() - began
        bench.write()
    finally:
        for peer in bench.peers:
            peer.stop()
    print(er.table([record]), end="")


def summary(row: dict[str, Any]) -> str:
    """One line per cell for the terminal: attention us per layer, GPU and wall us of a step of each engine."""
    parts = [
        f"{name} {engine.get('attention_us', float('nan')):.1f}/{engine.get('gpu_us', float('nan')):.0f}"
        f"/{engine['tpot_us']:.0f}"
        for name, engine in row["engines"].items()
    ]
    return f"{row['name']}: {', '.join(parts)}"


if __name__ == "__main__":
    main()
