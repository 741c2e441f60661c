"""Plans that outlive the steps of an engine, and queries in e4m3, on the GPU."""

import pytest
import torch
from gpu_helpers import capture
from integration_case import SM_SCALE, Case, ListCase, rows_of_656

from mla_cute.compile import jit
from mla_cute.dims import PART_ROW
from mla_cute.integrations._engine_steps import StepPlans, most_partial_rows, paged_cache
from mla_cute.integrations._queries import to_e4m3
from mla_cute.kernels.registry import step_variant
from mla_cute.plan import num_sms
from mla_cute.tuned import select


@pytest.mark.parametrize("heads", [1, 16, 128])
@pytest.mark.parametrize("tokens", [0, 1, 7, 130])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_in_e4m3(dtype, tokens, heads):
    """As on the CPU, where it is torch's rounding; of rows that lie head by head."""
    pytest.importorskip("triton")
    q_nope = (torch.randn(heads, tokens, 512) * 200).to(dtype).transpose(0, 1)
    wide = (torch.randn(tokens, heads, 192) * 200).to(dtype)
    q_pe = wide[..., 128:]
    if tokens:
        q_nope[0, 0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    on_gpu = torch.empty(heads, tokens, 512, dtype=dtype, device="cuda").transpose(0, 1).copy_(q_nope)
    found = to_e4m3(on_gpu, wide.cuda()[..., 128:])
    for part, wanted in zip(found, to_e4m3(q_nope, q_pe), strict=True):
        assert torch.equal(part.cpu().float().nan_to_num(7.0), wanted.float().nan_to_num(7.0))


@pytest.mark.parametrize("num_heads", [16, 128])
def test_plans_share_partials(num_heads):
    """A decode and a prefill step that both cut requests, in turns, over one buffer that suffices for all."""
    device = torch.device("cuda")
    partials = torch.full((most_partial_rows(num_sms(device)), PART_ROW), torch.nan, device=device)
    plans = StepPlans(num_heads=num_heads, page_size=8, partials=partials)
    cases = [
        Case([(q, 3000), (q, 17)], num_heads=num_heads, num_pages=512, num_indices=512, device="cuda") for q in (1, 3)
    ]
    steps = []
    for case, queries in zip(cases, ((None, 0), (cases[1].qo_indptr, 6)), strict=True):
        steps.append(plans.step(case.block_table, case.kv_len_arr, *queries))
    assert all(step.plan.part is partials for step in steps)
    for _ in range(2):
        for case, step in zip(cases, steps, strict=True):
            step.plan.update()
            out, lse = step.attend(case.q[..., :512], case.q[..., 512:], paged_cache(case.cache), SM_SCALE)
            expected, expected_lse = case.expected(True)
            torch.testing.assert_close(out.float().cpu(), expected, rtol=2**-7, atol=2**-8)
            torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kv_format", ["", "group"])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_steps_over_lists_in_a_graph(num_heads, kv_format):
    """Two layers with lists of their own; each replay plans from the lengths of its step."""
    lens = [700, 64, 0, 1, 65, 333]
    sizes = {"topk": 1024, "num_heads": num_heads, "page_size": 64, "num_pages": 40, "device": "cuda"}
    first = ListCase(lens, **sizes)
    plans = StepPlans(num_heads=num_heads, page_size=64, kv_format=kv_format)
    pool, _ = rows_of_656(first)
    cache = paged_cache(pool if kv_format else first.cache)
    indices, counts = first.indices.clone(), first.topk_lens.clone()
    step = plans.list_step(*indices.shape, indices.device, keep=True)

    def layers():
        step.update(counts)
        q = first.q
        return [step.attend(q[..., :512], q[..., 512:], cache, lists, SM_SCALE) for lists in (first.indices, indices)]

    graph, results = capture(layers)
    for seed, of_step in enumerate((lens, lens[::-1])):
        case = ListCase(of_step, seed=seed, **sizes)
        packed, real = rows_of_656(case)
        pool.copy_(packed)
        for name in ("q", "cache", "indices"):
            getattr(first, name).copy_(getattr(case, name))
        indices.copy_(case.indices)
        counts.copy_(case.topk_lens)
        graph.replay()
        expected, expected_lse = case.expected(cache=real if kv_format else None)
        for out, lse in results:
            assert (out.float().cpu() - expected).norm() < 1e-2 * expected.norm()
            torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("kv_format", "q_fp8"), [("", False), ("tensor", True)])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_variants_are_all_that_steps_run(monkeypatch, num_heads, kv_format, q_fp8):
    """Sizes between the powers of two that the list was made from."""
    monkeypatch.delenv("MLA_CUTE_TUNED", raising=False)
    select.clear()
    device = torch.device("cuda")
    plans = StepPlans(num_heads=num_heads, page_size=64, kv_format=kv_format, q_fp8=q_fp8)
    listed, asked, get = set(plans.variants("bfloat16", device)), set(), jit.get
    monkeypatch.setattr(jit, "get", lambda *variant: asked.add(variant) or get(*variant))
    for batch, kv_len in ((1, 900), (3, 5000), (17, 1000), (100, 70), (1, 100000)):
        lens = torch.full((batch,), kv_len, dtype=torch.int32, device=device)
        table = torch.zeros(batch, -(-kv_len // 64), dtype=torch.int32, device=device)
        indptr = torch.arange(batch + 1, dtype=torch.int32, device=device) * 3
        for queries in ((None, 0), (indptr, 3 * batch)):
            plan = plans.step(table, lens, *queries, max_kv_len=kv_len).plan
            asked.add(step_variant(plan.form.op, kv_format, q_fp8, num_heads, 64, "bfloat16", plan.config))
    assert asked
    assert asked <= listed
