"""The bench's sparse cases without a GPU: arithmetic, lists, record; the timer is a fake."""

import json

import pytest
import torch
from bench_case import FakeLibrary, bench, shrink_rotation

from mla_cute.bench import report
from mla_cute.bench.cases import PRESETS, Case, case_of
from mla_cute.bench.inputs import KvPool, make_inputs
from mla_cute.reference import sparse_reference

SMALL = [
    Case(4, 3, 40, 16, sparse=True),
    Case(2, 5, 33, 64, "float16", "fused", longest=70, sparse=True),
    Case(2, 4, 20, 8, kv_format="group", q_fp8=True, layout="fused", longest=50, sparse=True),
]


def test_figures_of_preset_cases():
    alone, shared = Case(16, 128, 2048, sparse=True), Case(64, 4096, 2048, longest=65536, sparse=True)
    assert alone in PRESETS["sparse"]
    assert shared in PRESETS["sparse"]
    assert alone.flop == 128 * 2048 * 16 * 2 * 1088
    assert alone.kv_bytes == 128 * 2048 * 1152
    assert alone.bytes_moved == Case(16, 128, 2048, page_size=1).bytes_moved
    assert shared.flop == 4096 * 2048 * 64 * 2 * 1088
    assert shared.kv_bytes == 65536 * 1152
    assert Case(16, 1, 2048, longest=65536, sparse=True).kv_bytes == 2048 * 1152
    assert shared.label == "sparse H=64 B=4096 topk=2048 of 65536 page 64 bfloat16"


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.label)
def test_lists(case, monkeypatch):
    shrink_rotation(monkeypatch)
    device = torch.device("cpu")
    pool = KvPool.of([case], device)
    inputs = make_inputs(case, pool, device)
    lists = inputs.kv_indices
    assert lists.shape == (case.num_slots, case.batch, case.kv_len)
    assert lists.dtype is torch.int32
    assert int(lists.min()) >= 0
    assert int(lists.max()) < inputs.ckv_cache.shape[0] * case.page_size
    assert all(len(row.unique()) == case.kv_len for slot in lists for row in slot)
    own = [set(slot.flatten().tolist()) for slot in lists]
    assert all(len(tokens) <= (case.longest or case.visible_pairs) for tokens in own)
    assert len(set.union(*own)) == sum(map(len, own)), "slots share tokens"
    assert torch.equal(lists, make_inputs(case, pool, device).kv_indices)


def test_rows_and_record(monkeypatch):
    shrink_rotation(monkeypatch)
    record = bench(SMALL)
    assert record["failed"] == 0
    rows = {case_of(row): row for row in json.loads(json.dumps(record))["rows"]}
    assert rows.keys() == set(SMALL)
    assert all(row["check"]["ok"] and row["check"]["requests"] == 3 for row in rows.values())
    assert report.cells(rows[SMALL[2]])[4] == "group/e4m3/fused/sparse"


def test_a_kernel_that_takes_the_list_of_another_token_is_wrong(monkeypatch):
    shrink_rotation(monkeypatch)

    def wrong(*args, **options):
        q_nope, q_pe, ckv, kpe, indices, sm_scale = args
        return sparse_reference(q_nope, q_pe, ckv, kpe, indices.roll(1, 0), sm_scale, **options)

    record = bench(SMALL[:1], FakeLibrary.make(sparse=wrong))
    assert not record["rows"][0]["check"]["ok"]
