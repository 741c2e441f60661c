"""Engines of vLLM on two GPUs: tensor parallelism and decode context parallelism, beside vLLM's FLASH_ATTN_MLA."""

import pathlib

import pytest
import torch
from engine_case import check_same
from vllm_engine import RUNS_OF_TWO
from vllm_runs import limit_of, reports_of, why_not

WHY_NOT = "needs two GPUs" if torch.cuda.device_count() < 2 else why_not()
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.timeout(limit_of(RUNS_OF_TWO)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm_two_gpus")


@pytest.fixture(scope="module")
def report_of(folder, pytestconfig):
    """The report of a run by its name. Where tests are left out (-k), a run starts when it is asked for."""
    with reports_of(RUNS_OF_TWO, folder, not pytestconfig.option.keyword) as report:
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
    report = report_of(name)
    assert report["backend"] == "mla_cute.integrations.vllm.MlaCuteBackend"
    kernels = report["kernels_of_ranks"]
    print(kernels)
    assert len(kernels) == 2
    assert all(of_rank["compiled"] + of_rank["loaded"] > 0 for of_rank in kernels)
    check_same(report["rounds"][0], report_of(same)["rounds"][0])


def test_both_ranks_share_one_cold_cache(report_of, folder):
    """Each kernel is compiled by one rank and loaded by the other."""
    first, second = report_of("tp2")["kernels_of_ranks"]
    made = len(list(pathlib.Path(folder / "tp2.json.kernels").glob("*.o")))
    assert first["compiled"] + second["compiled"] == made > 0
    assert first["compiled"] + first["loaded"] == second["compiled"] + second["loaded"] == made
