"""One run of a vLLM engine whose model has sparse attention, over the backend of mla_cute, in a process of its own
(tests/gpu/test_vllm_sparse_engine.py).

    python tests/vllm_sparse_engine.py RUN REPORT.json

The model has DeepSeek-V3.2's attention and indexer, two layers, and weights drawn here. The indexer's scores are of
deep_gemm_in_torch.py, which vLLM finds as the package deep_gemm; its choice among them is by vLLM's kernels. Every call
of the backend is compared with attention in float32 over the chosen tokens, also those that a CUDA graph replays: a
graph leaves copies of what a call was given and returned.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any, NamedTuple

import deep_gemm_in_torch
import torch
from engine_case import LONG, SHORT
from vllm_engine import Calls, Run, rows_of, run_engine

TOPK = 128  # most of LONG are longer, and all of SHORT shorter
TOKENS_AT_ONCE = 128  # whose lists are gathered together

SPARSE = {
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "num_hidden_layers": 2,
    "index_topk": TOPK, "index_n_heads": 32, "index_head_dim": 128,
}  # fmt: skip
WIDE = SPARSE | {"index_topk": 512}  # for which vLLM has another kernel of choice than for 128
SHARED = SPARSE | {"index_topk_pattern": "FS"}  # the second layer has no indexer and takes the first one's lists
# Steps with prompts in graphs that break at attention, as vLLM has them for this model unless told otherwise.
MIXED_GRAPHS = {
    "compilation_config": {
        "mode": 0, "cudagraph_mode": "FULL_AND_PIECEWISE", "cudagraph_capture_sizes": [1, 2, 4, 8, 1024],
    },
}  # fmt: skip

RUNS = {
    "eager": Run(prompts=LONG, model=SPARSE),
    "graphs": Run(prompts=LONG, model=SPARSE, graphs=True),
    "fp8_ds_mla": Run(prompts=LONG, model=SPARSE, kv_cache_dtype="fp8_ds_mla"),
    "fp8_ds_mla_graphs": Run(prompts=LONG, model=SPARSE, kv_cache_dtype="fp8_ds_mla", graphs=True),
    "mixed_graphs": Run(prompts=LONG, model=SPARSE, graphs=True, llm=MIXED_GRAPHS),
    # vLLM's own prefill, if it has one for the model, then decoding up to 168 keys.
    "short": Run(prompts=SHORT, model=SPARSE),
    "wide": Run(prompts=(1100, 5, 600, 33), model=WIDE, graphs=True),
    "shared": Run(prompts=LONG, model=SHARED),
    "shared_graphs": Run(prompts=LONG, model=SHARED, graphs=True),
    # The indexer takes a token with one draft as they are, with two as three requests.
    "drafts": Run(prompts=LONG, model=SPARSE, drafts=1),
    "drafts_graphs": Run(prompts=LONG, model=SPARSE, drafts=2, graphs=True),
    "warmed": Run(prompts=LONG, model=SPARSE, graphs=True, llm={"kernel_config": {}}),
}


class Call(NamedTuple):
    """What a call of the backend was given and returned, of `tokens` query tokens with padding.

    Attributes:
        layer: name. scale: of the scores. k_scale: of an FP8 cache.
        cache: [blocks, block_size, 576 or 656], the layer's own.
        queries: [tokens, H, 576]. lists: [tokens, topk] positions in the request, -1 at the end. out: [tokens, H, 512].
        owner: [tokens], the request of each. table: [requests, pages]. lengths: [requests]. starts: [requests + 1].
    """

    layer: str
    scale: float
    k_scale: float
    cache: torch.Tensor
    queries: torch.Tensor
    lists: torch.Tensor
    out: torch.Tensor
    owner: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor

    def copied(self) -> Call:
        """With copies of all tensors but the cache, whose rows a step does not write twice."""
        tensors = {name: value for name, value in self._asdict().items() if isinstance(value, torch.Tensor)}
        return self._replace(**{name: value.clone() for name, value in tensors.items() if name != "cache"})

    def attention(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[n, H, 512] float32: attention of `tokens` [n] to the keys at `positions` [n, k] of their requests, -1 for
        none."""
        block_size = self.cache.shape[1]
        at = positions.long().clamp(0, self.table.shape[1] * block_size - 1)
        pages = self.table[self.owner[tokens].long()].long().gather(1, at // block_size)
        keys = rows_of(self.cache[pages, at % block_size].flatten(0, 1), self.k_scale).unflatten(0, at.shape)
        scores = torch.einsum("thd,tkd->thk", self.queries[tokens].float(), keys) * self.scale
        scores = scores.masked_fill((positions < 0)[:, None], -torch.inf)
        return torch.einsum("thk,tkd->thd", scores.softmax(-1), keys[..., :512])


def distances(found: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """[n, H], of a token's head in the Frobenius norm."""
    return (found.float() - want).norm(dim=-1) / want.norm(dim=-1)


class SparseCalls(Calls):
    """Calls of MlaCuteSparseImpl.forward_mqa, each compared with attention in float32 over the tokens that the indexer
    chose.

    Attributes:
        kinds: checked calls of requests with one token each, and with several of some; of these, those with several
            after a prefix; those that a graph replayed.
        chosen: checked query tokens with more keys than lists have columns.
        wrong_lists: checked query tokens whose list is not of min(keys, columns) different keys that they see.
        from_all_keys: the smallest distance of an output from attention to all keys, of tokens with twice as many keys
            as columns or more.
    """

    def __init__(self) -> None:
        self.layers: Counter[str] = Counter()
        self.kinds = dict.fromkeys(("decode", "several", "prefix", "replayed"), 0)
        self.errors = {"output": (-1.0, "")}
        self.chosen = self.wrong_lists = 0
        self.from_all_keys = float("inf")
        self._begun = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured: dict[int, list[Call]] = {}

    @classmethod
    def of_engine(cls) -> SparseCalls:
        """Those of this process's engine from the first request on, in graphs after each replay."""
        from mla_cute.integrations.vllm_sparse import MlaCuteSparseImpl

        calls, inner = cls(), MlaCuteSparseImpl.forward_mqa

        def forward_mqa(impl: Any, q: Any, cache: torch.Tensor, metadata: Any, layer: Any) -> Any:
            calls.layers[layer.layer_name] += 1
            out, lse = inner(impl, q, cache, metadata, layer)
            calls._see(impl, q, cache, metadata, layer, out)
            return out, lse

        MlaCuteSparseImpl.forward_mqa = forward_mqa
        calls._watch_graphs()
        return calls

    def begin(self) -> None:
        super().begin()
        self._begun = True

    def report(self) -> dict[str, Any]:
        return super().report() | {
            "chosen": self.chosen, "wrong_lists": self.wrong_lists, "from_all_keys": self.from_all_keys,
        }  # fmt: skip

    def _watch_graphs(self) -> None:
        begin, replay = torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.replay

        def capture_begin(graph: torch.cuda.CUDAGraph, *args: Any, **kwargs: Any) -> None:
            self._graph = graph
            self._captured[id(graph)] = []  # vLLM drops the graphs of its memory profile, and another gets the number
            begin(graph, *args, **kwargs)

        def replay_and_check(graph: torch.cuda.CUDAGraph) -> None:
            replay(graph)
            for call in self._captured.get(id(graph), ()) if self._begun else ():
                self.kinds["replayed"] += 1
                self.check(call)

        torch.cuda.CUDAGraph.capture_begin = capture_begin
        torch.cuda.CUDAGraph.replay = replay_and_check

    def _see(self, impl: Any, q: Any, cache: torch.Tensor, metadata: Any, layer: Any, out: torch.Tensor) -> None:
        captures = cache.is_cuda and torch.cuda.is_current_stream_capturing()
        if not captures and not self._begun:
            return
        queries = torch.cat(q, -1) if isinstance(q, tuple) else q
        tokens = len(queries)
        assert out.shape == (*queries.shape[:2], 512), out.shape
        assert metadata.block_size == cache.shape[1]
        call = Call(
            layer.layer_name, impl.scale, layer._k_scale_float, cache, queries, impl.topk_indices_buffer[:tokens], out,
            metadata.req_id_per_token[:tokens], metadata.block_table, metadata.seq_lens, metadata.query_start_loc,
        )  # fmt: skip
        if captures:
            self._captured[id(self._graph)].append(call.copied())
        else:
            self.check(call)

    def check(self, call: Call) -> None:
        lists, tokens = call.lists, torch.arange(len(call.lists), device=call.lists.device)
        owner, topk = call.owner.long(), call.lists.shape[1]
        begins, ends, lengths = call.starts[owner], call.starts[owner + 1], call.lengths[owner]
        seen = lengths - ends + tokens + 1
        is_token = (begins <= tokens) & (tokens < ends) & (seen > 0)  # the others are padding
        if not is_token.any():
            return
        order = lists.sort(-1, descending=True).values
        repeated = ((order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0)).any(-1)
        is_wrong = repeated | (order[:, 0] >= seen) | ((lists >= 0).sum(-1) != seen.clamp(max=topk))
        self.wrong_lists += int((is_wrong & is_token).sum())
        self.chosen += int((is_token & (seen > topk)).sum())
        several = is_token & (ends - begins > 1)
        kind = "several" if several.any() else "decode"
        self.kinds[kind] += 1
        self.kinds["prefix"] += int((several & (ends - begins < lengths)).any())
        what = f"{kind}, {call.layer}, {int(is_token.sum())} query tokens with up to {int(lengths.max())} keys"
        for some in tokens[is_token].split(TOKENS_AT_ONCE):
            self._note("output", distances(call.out[some], call.attention(some, lists[some])), what)
        for last in tokens[is_token & (seen >= 2 * topk)][-1:].tolist():
            one, every = tokens[last : last + 1], torch.arange(int(seen[last]), device=lists.device)[None]
            apart = float(distances(call.out[one], call.attention(one, every)).max())
            self.from_all_keys = min(self.from_all_keys, apart)


def main(name: str, path: str) -> None:
    sys.modules["deep_gemm"] = deep_gemm_in_torch  # vLLM prefers a package of this name to its own copy
    run_engine(RUNS[name], path, SparseCalls.of_engine)


if __name__ == "__main__":
    main(*sys.argv[1:])
