"""flashinfer-bench's MLA definitions, and datasets of synthetic workloads for them.

tests/data/flashinfer_bench_0.1.2.json holds names, axes, constraints, inputs and outputs of the definitions in release
0.1.2. Their reference code is not in it: where $FIB_DATASET_PATH names a copy of the flashinfer-trace dataset it comes
from there, elsewhere `_REFERENCE` stands in, which was written anew from what the definitions say.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from recorded_signatures import load

from mla_cute.integrations import flashinfer_bench

RECORD = load("flashinfer_bench_0.1.2.json")
NAMES = tuple(RECORD["definitions"])
SM_SCALE = 0.1352337747812271  # DeepSeek-V3's with YaRN, of the dataset's workloads
SMALL = ((3, 70), (1, 64), (5, 5), (2, 129), (1, 1))
WHY_MISSING = 'flashinfer-bench is not installed: pip install ".[test-integrations]"'

_REFERENCE = """\
import math

import torch


def run({arguments}):
    queries, last = {queries}, {last}
    q, cache = torch.cat((q_nope, q_pe), -1).float(), torch.cat((ckv_cache, kpe_cache), -1)
    output, lse = torch.zeros_like(q_nope), torch.full(q_nope.shape[:2], -torch.inf, device=q.device)
    for b in range(len(kv_indptr) - 1):
        rows = slice(queries[b], queries[b + 1])
        keys = cache[kv_indices[kv_indptr[b] : kv_indptr[b + 1]]].flatten(0, 1)
        keys = keys[: len(keys) - cache.shape[1] + last[b]].float()
        scores = torch.einsum("qhd,kd->qhk", q[rows], keys) * sm_scale
        hidden = torch.ones(len(scores), len(keys), device=q.device).triu(len(keys) - len(scores) + 1) > 0
        scores = scores.masked_fill(hidden[:, None], -torch.inf)
        output[rows] = torch.einsum("qhk,kd->qhd", scores.softmax(-1), keys[:, :512]).to(output.dtype)
        lse[rows] = scores.logsumexp(-1) / math.log(2.0)
    return output, lse
"""


_SPARSE_REFERENCE = """\
import math

import torch


def run({arguments}):
    q, cache = torch.cat((q_nope, q_pe), -1).float(), torch.cat((ckv_cache, kpe_cache), -1).flatten(0, 1)
    output, lse = torch.zeros_like(q_nope), torch.full(q_nope.shape[:2], -torch.inf, device=q.device)
    for t, tokens in enumerate(sparse_indices.long()):
        keys = cache[tokens[tokens != -1]].float()
        scores = q[t] @ keys.T * sm_scale
        output[t] = (scores.softmax(-1) @ keys[:, :512]).to(output.dtype)
        lse[t] = scores.logsumexp(-1) / math.log(2.0)
    return output, lse
"""


def dataset() -> pathlib.Path | None:
    """The copy of flashinfer-trace that the environment names."""
    path = os.environ.get("FIB_DATASET_PATH")
    return pathlib.Path(path) if path else None


def dataset_definition(name: str) -> dict[str, Any] | None:
    """The definition as the dataset has it, reference included; None where there is no dataset."""
    root = dataset()
    return json.loads((root / "definitions" / op_type(name) / f"{name}.json").read_text()) if root else None


def definition(name: str) -> dict[str, Any]:
    """The recorded definition with a reference."""
    real = dataset_definition(name)
    return RECORD["definitions"][name] | {"reference": real["reference"] if real else reference(name)}


def op_type(name: str) -> str:
    return RECORD["definitions"][name]["op_type"]


def reference(name: str) -> str:
    inputs = RECORD["definitions"][name]["inputs"]
    if "sparse_indices" in inputs:
        return _SPARSE_REFERENCE.format(arguments=", ".join(inputs))
    return _REFERENCE.format(
        arguments=", ".join(inputs),
        queries="qo_indptr" if "qo_indptr" in inputs else "range(len(kv_indptr))",
        last="kv_last_page_len" if "kv_last_page_len" in inputs else "[ckv_cache.shape[1]] * (len(kv_indptr) - 1)",
    )


def tensors(name: str, requests: Sequence[tuple[int, int]] = SMALL, seed: int = 0) -> dict[str, torch.Tensor]:
    """The inputs that are tensors. `requests` are (query tokens, keys); decode has one query token whatever they say,
    and sparse attention lists that long (or as long as there are columns), with -1 among their tokens.

    Pages that no request owns and rows past a request's keys are NaN.
    """
    spec = RECORD["definitions"][name]
    page_size, heads = spec["axes"]["page_size"]["value"], spec["axes"]["num_qo_heads"]["value"]
    generator = torch.Generator().manual_seed(seed)
    q_lens = [n if "qo_indptr" in spec["inputs"] else 1 for n, _ in requests]
    kv_lens = [n for _, n in requests]
    pages = [-(-n // page_size) for n in kv_lens]
    order = torch.randperm(sum(pages) + 7, generator=generator).to(torch.int32)
    cache = torch.full((len(order), page_size, 576), torch.nan)
    kv_indptr = [0, *itertools.accumulate(pages)]
    for (begin, end), kv_len in zip(itertools.pairwise(kv_indptr), kv_lens, strict=True):
        rows = torch.full(((end - begin) * page_size, 576), torch.nan)
        rows[:kv_len] = torch.randn(kv_len, 576, generator=generator)
        cache[order[begin:end]] = rows.view(-1, page_size, 576)
    q = torch.randn(sum(q_lens), heads, 576, generator=generator).bfloat16()
    cache = cache.bfloat16()
    found = {
        "q_nope": q[..., :512].contiguous(), "q_pe": q[..., 512:].contiguous(),
        "ckv_cache": cache[..., :512].contiguous(), "kpe_cache": cache[..., 512:].contiguous(),
        "qo_indptr": _int32([0, *itertools.accumulate(q_lens)]), "kv_indptr": _int32(kv_indptr),
        "kv_indices": order[: kv_indptr[-1]].clone(),
        "kv_last_page_len": _int32([(n - 1) % page_size + 1 for n in kv_lens]),
    }  # fmt: skip
    if "sparse_indices" in spec["inputs"]:
        columns = spec["axes"]["topk"]["value"]
        own = itertools.starmap(slice, itertools.pairwise(kv_indptr))
        found["sparse_indices"] = _lists([order[ids] for ids in own], kv_lens, page_size, columns, generator)
    return {key: found[key] for key in spec["inputs"] if key != "sm_scale"}


def _lists(
    pages: Sequence[torch.Tensor], kv_lens: Sequence[int], page_size: int, columns: int, generator: torch.Generator
) -> torch.Tensor:
    """[len(pages), columns]: the tokens of each request in a random order, at random places."""
    lists = torch.full((len(pages), columns), -1, dtype=torch.int32)
    for row, ids, kv_len in zip(lists, pages, kv_lens, strict=True):
        tokens = (ids[:, None] * page_size + torch.arange(page_size)).flatten()[:kv_len]
        tokens = tokens[torch.randperm(kv_len, generator=generator)][:columns]
        row[torch.randperm(columns, generator=generator)[: len(tokens)]] = tokens.to(torch.int32)
    return lists


def make_trace_set(root: pathlib.Path, requests: Sequence[tuple[int, int]] = SMALL) -> Any:
    """Write a dataset of the definitions, one workload each and this library's solutions; read it as the package does.

    Queries are drawn by flashinfer-bench, which is needed here; all other tensors lie in a blob.
    """
    from flashinfer_bench import TraceSet
    from safetensors.torch import save_file

    for name in NAMES:
        spec, values = definition(name), tensors(name, requests)
        blob = pathlib.PurePosixPath("blob", "workloads", op_type(name), name, "inputs.safetensors")
        inputs: dict[str, Any] = {"sm_scale": {"type": "scalar", "value": SM_SCALE}}
        for key in values:
            stored = {"type": "safetensors", "path": str(blob), "tensor_key": key}
            inputs[key] = {"type": "random"} if key in ("q_nope", "q_pe") else stored
        workload = {"uuid": f"synthetic-{name}", "axes": _axes(spec, values), "inputs": inputs}
        trace = {"definition": name, "workload": workload, "solution": None, "evaluation": None}
        _write(root / "definitions" / op_type(name) / f"{name}.json", json.dumps(spec))
        _write(root / "workloads" / op_type(name) / f"{name}.jsonl", json.dumps(trace) + "\n")
        (root / blob).parent.mkdir(parents=True)
        save_file({key: x for key, x in values.items() if inputs[key]["type"] == "safetensors"}, root / blob)
    flashinfer_bench.export(root / "solutions")
    return TraceSet.from_path(str(root))


def _axes(spec: dict[str, Any], values: dict[str, torch.Tensor]) -> dict[str, int]:
    """What the variable axes are bound to."""
    sizes = {}
    for key, x in values.items():
        sizes |= dict(zip(spec["inputs"][key]["shape"], x.shape, strict=True))
    return {axis: sizes[axis] for axis, of in spec["axes"].items() if of["type"] == "var"}


def _write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
