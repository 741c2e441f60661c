"""Engines of vLLM on two GPUs: tensor parallelism and decode context parallelism, beside vLLM's FLASH_ATTN_MLA."""

import pytest
import torch
import vllm_engine
from engine_case import check_same
from engine_runs import asked_for, marks_of, reports_of, why_not, workers_of
from vllm_engine import LIMIT_S, RELEASE, RUNS_OF_TWO

from mla_cute.integrations._vllm_plugin import BACKEND

RANKS = 2
WHY_NOT = "needs two GPUs" if torch.cuda.device_count() < 2 else why_not("vLLM", RELEASE)
pytestmark = marks_of(WHY_NOT, RUNS_OF_TWO, LIMIT_S, RANKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm_two_gpus")


@pytest.fixture(scope="module")
def report_of(folder, request):
    """The report of a run by its name."""
    workers, first = workers_of(RUNS_OF_TWO, RANKS), asked_for(request, RUNS_OF_TWO)
    with reports_of(vllm_engine.__file__, folder, LIMIT_S, workers, first) as report:
        yield report


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("tp2", "tp2_flash_attn"),
        ("dcp2", "dcp2_flash_attn"),
        ("dcp2", "tp2"),
        ("dcp2_fp8", "tp2_fp8"),
        ("dcp2_drafts", "dcp2"),
        ("dcp2_drafts_graphs", "dcp2"),
    ],
)
def test_both_generate_the_same(report_of, name, same):
    reports = report_of(name), report_of(same)
    assert reports[0]["backend"] == BACKEND
    for report in reports:
        print(report["ranks"])
        assert len(report["ranks"]) == 2
        assert all(rank["pynccl"] for rank in report["ranks"]), "NCCL is too old for vLLM"
    assert all(rank["compiled"] + rank["loaded"] > 0 for rank in reports[0]["ranks"])
    check_same(reports[0]["rounds"][0], reports[1]["rounds"][0])


@pytest.mark.parametrize("name", ["tp2_cold"])
def test_both_ranks_share_one_cold_cache(report_of, folder, name):
    """Both have every kernel, and none was made twice."""
    ranks = report_of(name)["ranks"]
    made = len(list((folder / f"{name}.json.kernels").glob("*.o")))
    assert [rank["compiled"] + rank["loaded"] for rank in ranks] == [made, made]
    assert made > 0
    assert sum(rank["compiled"] for rank in ranks) <= made
