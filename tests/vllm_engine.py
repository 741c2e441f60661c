"""One run of a vLLM engine over the backend of mla_cute, in a process of its own (tests/gpu/test_vllm_engine.py, and
of two GPUs test_vllm_two_gpus.py; of sparse attention tests/vllm_sparse_engine.py).

    python tests/vllm_engine.py RUN REPORT.json

The model has DeepSeek-V3's attention, four layers, and weights drawn here: nothing is downloaded. The report holds what
was generated, how often the backend was called and graphs were replayed, and, of eager runs, the largest errors of all
calls. vLLM is imported by :func:`main` and what it calls.
"""

from __future__ import annotations

import faulthandler
import importlib.metadata
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from engine_case import LONG, SHORT, TOKENS, TOP, draw_prompts, draw_weights, write_model

RELEASE = "0.33.0"
LIMIT_S = 240  # of one run; most of it is for kernels that compile first
FIRST_LAYER = "model.layers.0.self_attn.attn"
ENTRY_POINT = ("vllm.general_plugins", "mla_cute.integrations._vllm_plugin:register")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's core in this process, where its calls can be seen
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

CACHED_CHUNKS = {"enable_prefix_caching": True, "long_prefill_token_threshold": 128}


@dataclass(frozen=True)
class Run:
    """What one engine does.

    Attributes:
        prompts: tokens of each request's prompt; all requests are generated together, `rounds` times.
        shared: tokens that the last prompt has in common with the first.
        graphs: decode steps in full CUDA graphs, and no check.
        drafts: tokens a step that a layer for multi-token prediction drafts.
        alone: requests that are generated once more, each by itself.
        ranks: of tensor parallelism, each a process with a GPU of its own, where calls are not seen.
        cold: with a cache of kernels of its own, which is empty.
        model: what differs in the model's configuration.
        llm, env: further arguments of vllm.LLM, environment variables.
    """

    prompts: tuple[int, ...] = SHORT
    shared: int = 0
    rounds: int = 1
    backend: str = "CUSTOM"
    kv_cache_dtype: str = "auto"
    graphs: bool = False
    drafts: int = 0
    alone: tuple[int, ...] = ()
    ranks: int = 1
    cold: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    llm: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    @property
    def checks(self) -> bool:
        return self.backend == "CUSTOM" and not self.graphs and self.ranks == 1


RUNS = {
    "eager": Run(),
    "graphs": Run(graphs=True),
    "fp8": Run(kv_cache_dtype="fp8"),
    "fp8_graphs": Run(kv_cache_dtype="fp8", graphs=True),
    "fp8_ds_mla": Run(kv_cache_dtype="fp8_ds_mla"),
    "prefix": Run(prompts=(300, 290, 41, 300), shared=256, rounds=2, llm=CACHED_CHUNKS),
    "long_prompts": Run(prompts=LONG),
    "drafts": Run(drafts=2),
    "drafts_graphs": Run(drafts=2, graphs=True),
    "batch_invariant": Run(alone=(2, 5, 7), env={"VLLM_BATCH_INVARIANT": "1"}),
    # What a server does before it serves: vLLM's own warm-up, after which it reports what compiles.
    "warmed": Run(graphs=True, llm={"kernel_config": {}}),
    "warmed_eager": Run(drafts=2, llm={"kernel_config": {}}),
    "first_runner": Run(graphs=True, env={"VLLM_USE_V2_MODEL_RUNNER": "0"}),
    "first_runner_drafts": Run(drafts=2, graphs=True, env={"VLLM_USE_V2_MODEL_RUNNER": "0"}),
    # Kernels compile in the engine's process there.
    "no_cache": Run(prompts=SHORT[:2], env={"MLA_CUTE_CACHE_DIR": "/proc/mla_cute"}),
    # TRITON_MLA decodes no prompt that is longer: those are prefill, in other arithmetic.
    "one_token": Run(prompts=(1,) * 8),
    "one_token_triton": Run(prompts=(1,) * 8, backend="TRITON_MLA"),
}

DCP = {"decode_context_parallel_size": 2}
RUNS_OF_TWO = {
    "tp2": Run(ranks=2, graphs=True),
    "tp2_cold": Run(ranks=2, cold=True),
    # Longer prompts would be vLLM's own prefill under one of the two and decode over the FP8 cache under the other.
    "tp2_fp8": Run(ranks=2, kv_cache_dtype="fp8", prompts=(1,) * 8),
    "tp2_flash_attn": Run(ranks=2, backend="FLASH_ATTN_MLA"),
    "dcp2": Run(ranks=2, graphs=True, llm=DCP),
    "dcp2_fp8": Run(ranks=2, kv_cache_dtype="fp8", prompts=(1,) * 8, llm=DCP),
    "dcp2_drafts": Run(ranks=2, drafts=2, llm=DCP),
    "dcp2_drafts_graphs": Run(ranks=2, drafts=2, graphs=True, llm=DCP),
    "dcp2_flash_attn": Run(ranks=2, backend="FLASH_ATTN_MLA", llm=DCP),
}
# One process per rank, forked from a parent that has not touched the GPU, so that what is set up here holds there.
ENVIRONMENT_OF_RANKS = {
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for `collective_rpc` of a function
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}


class Calls:
    """The calls of MlaCuteImpl.forward_mqa, counted; with `check` each is compared with attention in float32.

    Attributes:
        layers: calls from Python of each layer, captures included, replays not.
        kinds: checked calls over a plan for decode and over one for prefill; of the latter, those with several query
            tokens after a prefix; those with prompts of vLLM's own beside them.
        errors: the largest of a checked call, and which it was. "output": of a token's head, in the Frobenius norm;
            "lse": absolute.
    """

    def __init__(self, check: bool):
        from mla_cute.integrations.vllm import MlaCuteImpl

        self.layers: Counter[str] = Counter()
        self.kinds = dict.fromkeys(("decode", "prefill", "prefix", "beside_prompts"), 0)
        self.errors: dict[str, tuple[float, str]] = {"output": (-1.0, ""), "lse": (-1.0, "")}
        inner = MlaCuteImpl.forward_mqa

        def forward_mqa(impl: Any, q: Any, cache: torch.Tensor, metadata: Any, layer: Any) -> Any:
            self.layers[layer.layer_name] += 1
            if not check:
                return inner(impl, q, cache, metadata, layer)
            wants_lse, impl.need_to_return_lse_for_decode = impl.need_to_return_lse_for_decode, True
            out, lse = inner(impl, q, cache, metadata, layer)
            impl.need_to_return_lse_for_decode = wants_lse
            self._check(impl, q, cache, metadata, layer, out, lse)
            return out, lse if wants_lse else None

        MlaCuteImpl.forward_mqa = forward_mqa

    def begin(self) -> None:
        """What was called before the first request does not count."""
        self.layers.clear()

    def report(self) -> dict[str, Any]:
        return {"kinds": self.kinds, "errors": self.errors}

    def _check(
        self, impl: Any, q: Any, cache: torch.Tensor, metadata: Any, layer: Any, out: torch.Tensor, lse: torch.Tensor
    ) -> None:
        decode = metadata.decode
        q = torch.cat(q, -1) if isinstance(q, tuple) else q
        queries = q.float() * (layer._q_scale_float if q.dtype is torch.float8_e4m3fn else 1.0)
        assert out.shape == (*queries.shape[:2], 512), out.shape
        starts = metadata.query_start_loc[: metadata.num_decodes + 1].tolist()
        kind = "decode" if decode.step.pages.queries is None else "prefill"
        if kind == "decode":
            assert starts == list(range(len(starts))), starts
        several = False
        for request, length in enumerate(decode.seq_lens.tolist()):
            rows = slice(*starts[request : request + 2])
            n = rows.stop - rows.start
            if n == 0:
                continue
            several |= 1 < n < length
            pages = decode.block_table[request, : -(-length // cache.shape[1])].long()
            keys = rows_of(cache[pages].flatten(0, 1)[:length], layer._k_scale_float)
            scores = torch.einsum("qhd,kd->qhk", queries[rows], keys) * impl.scale
            hidden = torch.ones(n, length, dtype=torch.bool, device=keys.device).triu(length - n + 1)
            scores = scores.masked_fill(hidden[:, None], -torch.inf)
            want = torch.einsum("qhk,kd->qhd", scores.softmax(-1), keys[:, :512])
            what = f"{kind}, {layer.layer_name}, request {request}: {n} query tokens, {length} keys"
            self._note("output", (out[rows].float() - want).norm(dim=-1) / want.norm(dim=-1), what)
            self._note("lse", (lse[rows] - scores.logsumexp(-1)).abs(), what)
        self.kinds[kind] += 1
        self.kinds["prefix"] += several
        self.kinds["beside_prompts"] += metadata.num_prefills > 0

    def _note(self, of: str, errors: torch.Tensor, what: str) -> None:
        error = float(errors.nan_to_num(torch.inf).max())
        self.errors[of] = max(self.errors[of], (error, what))


def rows_of(rows: torch.Tensor, scale: float) -> torch.Tensor:
    """[n, 576] in float32 of rows of a cache, as vLLM has them. Not by quant.group_rows, by which the backend reads."""
    if rows.shape[-1] == 656:  # 512 e4m3 values, 4 float32 scales, 64 bfloat16 values
        values = rows[:, :512].contiguous().view(torch.float8_e4m3fn).float().unflatten(-1, (4, 128))
        scales = rows[:, 512:528].contiguous().view(torch.float32)
        rope = rows[:, 528:].contiguous().view(torch.bfloat16).float()
        return torch.cat(((values * scales[..., None]).flatten(-2), rope), -1)
    if rows.dtype is torch.uint8:
        rows = rows.view(torch.float8_e4m3fn)
    return rows.float() * (scale if rows.dtype is torch.float8_e4m3fn else 1.0)


def make_engine(run: Run, model: str) -> Any:
    from vllm import LLM

    arguments: dict[str, Any] = {
        "model": model, "skip_tokenizer_init": True, "load_format": "dummy", "dtype": "bfloat16", "seed": 0,
        "max_model_len": 2048, "max_num_seqs": 8, "max_num_batched_tokens": 1024, "block_size": 64,
        "enable_prefix_caching": False, "disable_log_stats": True,
        "attention_backend": run.backend, "kv_cache_dtype": run.kv_cache_dtype,
        # several engines share the GPU
        "gpu_memory_utilization": 0.03, "kv_cache_memory_bytes": 256 << 20,
        "kernel_config": {"enable_jit_warmup": False},
    }  # fmt: skip
    if run.graphs:
        sizes = [(1 + run.drafts) * n for n in (1, 2, 4, 8)]
        arguments["compilation_config"] = {
            "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes,
        }  # fmt: skip
    else:
        arguments["enforce_eager"] = True
    if run.ranks > 1:
        arguments |= {
            "tensor_parallel_size": run.ranks, "distributed_executor_backend": "mp", "disable_custom_all_reduce": True,
        }  # fmt: skip
    if run.drafts:
        arguments["speculative_config"] = {"method": "mtp", "num_speculative_tokens": run.drafts}
    return LLM(**arguments | run.llm)


def count_calls(owner: Any, name: str) -> Counter[str]:
    """Counts the calls of a method from now on."""
    calls: Counter[str] = Counter()
    inner = getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return inner(*args, **kwargs)

    setattr(owner, name, counting)
    return calls


def note_compilations() -> list[str]:
    """What vLLM's monitor reports from now on, by compiler."""
    from vllm.utils import jit_monitor

    noted: list[str] = []
    inner = jit_monitor._handle_jit_event

    def handle(*args: Any, **kwargs: Any) -> None:
        noted.append(kwargs["backend"])
        inner(*args, **kwargs)

    jit_monitor._handle_jit_event = handle
    return noted


def generate(llm: Any, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Greedy; of each request its tokens, their and the likeliest tokens' logprobs, and how many tokens were cached."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=TOP, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [{str(i): x.logprob for i, x in top.items()} for top in output.outputs[0].logprobs],
            "cached": output.num_cached_tokens or 0,
        }
        for output in outputs
    ]


def facts_of(worker: Any) -> dict[str, Any]:
    """Of a rank's process: how often kernels were compiled and loaded, and whether vLLM's own NCCL calls work there.
    Where they do not, because NCCL is older than vLLM wants, its reduce_scatter says nothing and returns what lay in
    memory."""
    del worker
    from vllm.distributed.parallel_state import get_tp_group

    from mla_cute.compile import jit

    return jit.counters() | {"pynccl": not get_tp_group().device_communicator.pynccl_comm.disabled}


def register_backend() -> None:
    """Names the backend where mla_cute is on PYTHONPATH and not installed, so that vLLM finds no entry point."""
    from mla_cute.integrations import _vllm_plugin

    group, value = ENTRY_POINT
    if all(found.value != value for found in importlib.metadata.entry_points(group=group)):
        _vllm_plugin.register()


def main(name: str, path: str) -> None:
    run = (RUNS | RUNS_OF_TWO)[name]
    run_engine(run, path, lambda: Calls(check=run.checks))


def run_engine(run: Run, path: str, make_calls: Callable[[], Calls]) -> None:
    """Writes the report of `run`, with what the calls of one rank have seen, and ends the process."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    os.environ.update(ENVIRONMENT | (ENVIRONMENT_OF_RANKS if run.ranks > 1 else {}) | run.env)
    if run.cold:
        os.environ["MLA_CUTE_CACHE_DIR"] = f"{path}.kernels"

    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
    from vllm.utils import jit_monitor
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from mla_cute.compile import jit

    register_backend()
    DummyModelLoader.load_weights = lambda loader, model, model_config: draw_weights(model)
    calls = make_calls() if run.ranks == 1 else None
    noted = note_compilations()
    replays = count_calls(torch.cuda.CUDAGraph, "replay")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), **run.model)
        llm = make_engine(run, folder)
    report = {
        "backend": AttentionBackendEnum[run.backend].get_path(),
        "cudagraph_mode": str(llm.llm_engine.vllm_config.compilation_config.cudagraph_mode),
        "kernels_before": jit.counters(),
    }
    if calls is not None:
        report["calls_before"] = calls.layers.total()
        calls.begin()
    replays.clear()
    steps = count_calls(llm.llm_engine, "step")
    prompts = draw_prompts(run.prompts, run.shared)
    report |= {
        "rounds": [generate(llm, prompts) for _ in range(run.rounds)],
        "steps": steps.total(),
        "replays": replays.total(),
        "alone": {i: generate(llm, [prompts[i]])[0] for i in run.alone},
        "kernels": jit.counters(),
        "monitored": jit_monitor.is_active(),
        "compiled_by": noted,
    }
    if calls is not None:
        report |= {"python_steps": calls.layers[FIRST_LAYER]} | calls.report()
    if run.ranks > 1:
        report["ranks"] = llm.collective_rpc(facts_of)
    Path(path).write_text(json.dumps(report))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # what the engine does when it is torn down is not tested


if __name__ == "__main__":
    main(*sys.argv[1:])
