"""One run of an SGLang engine over the backend of mla_cute (tests/gpu/test_sglang_engine.py).

    python tests/sglang_engine.py RUN REPORT.json

The model has DeepSeek-V3's attention, four layers, and weights drawn here: nothing is downloaded. The report holds what
was generated, how often the backend was called and graphs were replayed, and, of eager runs, the largest errors of all
calls. SGLang's scheduler is a process of its own: it loads this module as a plugin (:func:`plugin`), which watches the
backend, and writes its part of the report when it is asked to. SGLang is imported by :func:`main` and the plugin.
"""

from __future__ import annotations

import faulthandler
import importlib.metadata
import json
import os
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from engine_case import LAYERS, LONG, SHORT, TOKENS, TOP, draw_prompts, draw_weights, write_model

RELEASE = "0.5.23"
LIMIT_S = 300  # of one run; most of it is for kernels that compile first
ENTRY_POINT = ("sglang.srt.plugins", "mla_cute.integrations._sglang_plugin:register")
# The model of runs on a CPU, where it differs.
SMALL = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 256,
    "intermediate_size": 512, "q_lora_rank": 128,
}  # fmt: skip
RUN_VARIABLE = "MLA_CUTE_SGLANG_RUN"  # says to the scheduler which run it is part of
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1",
    "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
}


@dataclass(frozen=True)
class Run:
    """What one engine does.

    Attributes:
        prompts: tokens of each request's prompt; all requests are generated together, `rounds` times.
        shared: tokens that the last prompt has in common with the first.
        graphs: decode steps in CUDA graphs, and no check.
        drafts: tokens a step that a layer for multi-token prediction drafts.
        alone: requests that are generated once more, each by itself.
        device: "cpu": a small model, with stand-ins for what SGLang runs on a GPU only (sglang_on_cpu.py).
        engine, env: further arguments of sglang.Engine, environment variables.
    """

    prompts: tuple[int, ...] = SHORT
    shared: int = 0
    rounds: int = 1
    tokens: int = TOKENS
    backend: str = "mla_cute"
    kv_cache_dtype: str = "auto"
    graphs: bool = False
    drafts: int = 0
    alone: tuple[int, ...] = ()
    device: str = "cuda"
    engine: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    @property
    def checks(self) -> bool:
        return self.backend == "mla_cute" and not self.graphs

    @property
    def layers(self) -> int:
        return LAYERS if self.device == "cuda" else SMALL["num_hidden_layers"]


# SGLang takes one draft token for accepted, whatever the model says, so that drafts become part of what is attended.
ACCEPTED = {"SGLANG_SIMULATE_ACC_LEN": "2"}
PREFIX: dict[str, Any] = {
    "prompts": (300, 290, 41, 300), "shared": 256, "rounds": 2, "engine": {"disable_radix_cache": False},
}  # fmt: skip
ON_CPU: dict[str, Any] = {"device": "cpu", "prompts": (70, 3, 33), "tokens": 6}

RUNS = {
    "eager": Run(),
    "graphs": Run(graphs=True),
    "fp8": Run(kv_cache_dtype="fp8_e4m3"),
    "fp8_graphs": Run(kv_cache_dtype="fp8_e4m3", graphs=True),
    "page_size_1": Run(engine={"page_size": 1}),
    "page_size_1_graphs": Run(graphs=True, engine={"page_size": 1}),
    "prefix": Run(**PREFIX),
    "chunks": Run(prompts=LONG, engine={"chunked_prefill_size": 128}),
    "drafts": Run(drafts=2),
    "drafts_graphs": Run(drafts=2, graphs=True),
    "drafts_accepted": Run(drafts=2, env=ACCEPTED),
    "drafts_fp8": Run(drafts=4, kv_cache_dtype="fp8_e4m3"),  # 5 tokens of 16 heads: e4m3 queries
    "deterministic": Run(alone=(2, 5, 7), engine={"enable_deterministic_inference": True}),
    # Longer prompts Triton's backend runs in the expanded form, in other arithmetic.
    "one_token": Run(prompts=(1,) * 8),
    "one_token_triton": Run(prompts=(1,) * 8, backend="triton"),
}

CPU_RUNS = {
    "cpu": Run(**ON_CPU),
    "cpu_chunks": Run(**ON_CPU, shared=32, rounds=2, engine={
        "page_size": 1, "chunked_prefill_size": 24, "disable_radix_cache": False,
    }),
}  # fmt: skip


def run_of(name: str) -> Run:
    return (RUNS | CPU_RUNS)[name]


# ---------------------------------------------------------------------------------------- in SGLang's scheduler


class Calls:
    """The calls of MlaCuteAttnBackend, counted; with `check` each is compared with attention in float32.

    What the pools hold before a token is written is NaN then.

    Attributes:
        first_layer: calls from Python of the model's first layer, captures included, replays not.
        kinds: calls by what they were for: "decode", "target_verify", "extend", "draft_extend_v2", those of the draft
            model with "draft model: " before. "prefix": of them, those with several query tokens after a prefix;
            "expanded": prompts that were another backend's.
        errors: the largest of a checked call, in the Frobenius norm of a token's head, and which it was.
    """

    def __init__(self, check: bool):
        from mla_cute.integrations.sglang import MlaCuteAttnBackend

        self.first_layer = 0
        self.kinds: Counter[str] = Counter()
        self.errors: tuple[float, str] = (-1.0, "")
        self.page_size = 0
        make, decode, extend = (
            getattr(MlaCuteAttnBackend, name) for name in ("__init__", "forward_decode", "forward_extend")
        )

        def __init__(backend: Any, *args: Any, **kwargs: Any) -> None:
            make(backend, *args, **kwargs)
            self.page_size = backend.page_size
            if check:
                poison(backend.token_to_kv_pool)

        def forward_decode(
            backend: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, *args: Any, q_rope: Any = None, **kwargs: Any
        ) -> torch.Tensor:
            kind = batch.forward_mode.name.lower()
            self.kinds[("draft model: " if backend._is_draft_runner else "") + kind] += 1
            self.first_layer += layer.layer_id == 0 and not backend._is_draft_runner
            out: torch.Tensor = decode(backend, q, k, v, layer, batch, *args, q_rope=q_rope, **kwargs)
            if check and len(out):
                self._check(backend, q, q_rope, layer, batch, out)
            return out

        def forward_extend(
            backend: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, *args: Any, **kwargs: Any
        ) -> Any:
            before = self.kinds.total()
            result = extend(backend, q, k, v, layer, batch, *args, **kwargs)
            self.kinds["expanded"] += self.kinds.total() == before
            return result

        MlaCuteAttnBackend.__init__ = __init__
        MlaCuteAttnBackend.forward_decode = forward_decode
        MlaCuteAttnBackend.forward_extend = forward_extend

    def _check(self, backend: Any, q: torch.Tensor, q_rope: Any, layer: Any, batch: Any, out: torch.Tensor) -> None:
        """Which keys a token sees follows from its position, by which it was rotated, not from what the backend made
        of the batch."""
        heads, mode = layer.tp_q_head_num, batch.forward_mode
        parts = (q,) if q_rope is None else (q.reshape(-1, heads, 512), q_rope.reshape(-1, heads, 64))
        queries = torch.cat([part.reshape(-1, heads, part.numel() // len(out) // heads) for part in parts], -1).float()
        if backend._q_fp8:
            queries = queries.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        assert out.shape == (len(queries), heads * 512), out.shape
        positions, requests = batch.positions, batch.req_pool_indices.tolist()
        assert positions.shape == (len(queries),), positions.shape
        counts = [len(queries) // len(requests)] * len(requests)
        if mode.is_extend_without_speculative():
            counts = batch.extend_seq_lens_cpu
            lasts = positions[torch.tensor(counts, device=positions.device).cumsum(0) - 1]
            assert torch.equal(lasts + 1, batch.seq_lens.to(lasts.dtype))
        assert sum(counts) == len(queries), (counts, len(queries))
        pool = backend.token_to_kv_pool.get_key_buffer(layer.layer_id).squeeze(1)
        table = backend.req_to_token_pool.req_to_token
        start, several = 0, False
        for request, n in zip(requests, counts, strict=True):
            rows = slice(start, start + n)
            length = int(positions[rows].max()) + 1
            several |= 1 < n < length
            keys = pool[table[request, :length].long()].float()
            scores = torch.einsum("qhd,kd->qhk", queries[rows], keys) * layer.scaling
            hidden = torch.arange(length, device=keys.device) > positions[rows, None]
            want = torch.einsum(
                "qhk,kd->qhd", scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1), keys[:, :512]
            )
            got = out[rows].view(n, heads, 512).float()
            error = float(((got - want).norm(dim=-1) / want.norm(dim=-1)).nan_to_num(torch.inf).max())
            what = f"{mode.name}, layer {layer.layer_id}, request {request}: {n} query tokens, {length} keys"
            self.errors = max(self.errors, (error, what))
            start += n
        self.kinds["prefix"] += several


def poison(pool: Any) -> None:
    """NaN in every slot: ones in all bits, whatever the dtype."""
    for buffer in pool.kv_buffer:
        buffer.view(torch.uint8).fill_(0xFF)
    assert pool.get_key_buffer(pool.start_layer)[:1].float().isnan().all()


def count_calls(owner: Any, name: str) -> Counter[str]:
    """Counts the calls of a method from now on."""
    calls: Counter[str] = Counter()
    inner = getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return inner(*args, **kwargs)

    setattr(owner, name, counting)
    return calls


def plugin() -> None:
    """Entry point of SGLang's plugins, called in every process of the engine."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from mla_cute.integrations import _sglang_plugin

    group, value = ENTRY_POINT
    if all(found.value != value for found in importlib.metadata.entry_points(group=group)):
        _sglang_plugin.register()  # mla_cute is on PYTHONPATH and not installed, so there is nothing SGLang could find
    if run_of(os.environ[RUN_VARIABLE]).device == "cpu":
        import sglang_on_cpu

        sglang_on_cpu.install()
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.__init__", start_scheduler, HookType.AROUND)


def start_scheduler(make: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Stands around Scheduler.__init__, which loads the model and captures the graphs."""
    from sglang.srt.model_loader import loader

    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    loader.initialize_dummy_weights = draw_weights
    calls = Calls(check=run_of(os.environ[RUN_VARIABLE]).checks)
    replays = count_calls(torch.cuda.CUDAGraph, "replay")
    steps = count_calls(type(scheduler), "run_batch")

    def write_calls(path: str) -> None:
        """What was called since the last report. The engine's `collective_rpc` calls this by its name."""
        report = {
            "python_steps": calls.first_layer,
            "kinds": calls.kinds,
            "errors": calls.errors,
            "page_size": calls.page_size,
            "replays": replays.total(),
            "steps": steps.total(),
        }
        Path(path).write_text(json.dumps(report))
        calls.first_layer = 0
        for counter in (calls.kinds, replays, steps):
            counter.clear()

    scheduler.write_calls = write_calls
    make(scheduler, *args, **kwargs)


# ---------------------------------------------------------------------------------------- in the process of the run


def write_plugin(folder: Path, run: Run) -> list[str]:
    """What makes SGLang's processes find this module. Returns the folders for their PYTHONPATH."""
    info = folder / "mla_cute_sglang_engine.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mla-cute-sglang-engine\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINT[0]}]\nmla_cute_sglang_engine = sglang_engine:plugin\n")
    here = Path(__file__).resolve().parent
    paths = [str(folder), str(here), str(here.parent)]
    if run.device == "cpu":
        from cpu.integrations import sglang_on_cpu

        (folder / "sgl_kernel.py").write_text(sglang_on_cpu.SGL_KERNEL)
        paths.append(str(Path(sglang_on_cpu.__file__).parent))
    return paths


def make_engine(run: Run, model: str) -> Any:
    import sglang

    arguments: dict[str, Any] = {
        "model_path": model, "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16",
        "random_seed": 0, "device": run.device, "attention_backend": run.backend, "kv_cache_dtype": run.kv_cache_dtype,
        "context_length": 2048, "max_running_requests": 8, "max_total_tokens": 16384, "chunked_prefill_size": 1024,
        "mem_fraction_static": 0.5,  # of what is free; max_total_tokens is what bounds the pool
        "disable_radix_cache": True, "sampling_backend": "pytorch", "grammar_backend": "none",
        "skip_server_warmup": True, "disable_prefill_cuda_graph": True, "disable_flashinfer_autotune": True,
    }  # fmt: skip
    if run.graphs:
        arguments["cuda_graph_max_bs_decode"] = 8
    else:
        arguments["disable_cuda_graph"] = True
    if run.drafts:
        arguments |= {
            "speculative_algorithm": "EAGLE", "speculative_num_steps": run.drafts, "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": run.drafts + 1,
        }  # fmt: skip
    return sglang.Engine(**arguments | run.engine)


def generate(engine: Any, prompts: list[list[int]], tokens: int) -> list[dict[str, Any]]:
    """Greedy; of each request its tokens, their and the likeliest tokens' logprobs, and how many tokens were cached."""
    params = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
    outputs = engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True, top_logprobs_num=TOP)
    requests = []
    for output in outputs:
        meta = output["meta_info"]
        sampled, top = meta["output_token_logprobs"], meta["output_top_logprobs"]
        logprobs = [
            {str(token): logprob for logprob, token, _ in [*likeliest, own]}
            for own, likeliest in zip(sampled, top, strict=True)
        ]
        requests.append({"tokens": output["output_ids"], "logprobs": logprobs, "cached": meta["cached_tokens"]})
    return requests


def main(name: str, path: str) -> None:
    run = run_of(name)
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    os.environ.update(ENVIRONMENT | run.env | {RUN_VARIABLE: name})
    with tempfile.TemporaryDirectory() as folder:
        paths = write_plugin(Path(folder), run)
        sys.path[:0] = paths
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
        if run.device == "cpu":
            os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        write_model(Path(folder), **SMALL if run.device == "cpu" else {})
        engine = make_engine(run, folder)

        def calls() -> dict[str, Any]:
            file = Path(folder) / "calls.json"
            engine.collective_rpc("write_calls", path=str(file))
            return dict(json.loads(file.read_text()))

        before = calls()
        prompts = draw_prompts(run.prompts, run.shared)
        rounds = [generate(engine, prompts, run.tokens) for _ in range(run.rounds)]
        report = calls() | {"calls_before": before["python_steps"], "rounds": rounds}
        report["alone"] = {i: generate(engine, [prompts[i]], run.tokens)[0] for i in run.alone}
        Path(path).write_text(json.dumps(report))
        engine.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # what is left of the engine when it is torn down is not tested


if __name__ == "__main__":
    main(*sys.argv[1:])
