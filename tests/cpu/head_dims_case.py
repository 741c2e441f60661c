"""Cases of every pair of head dimensions on the CPU."""

import dataclasses

import pytest
import torch

from mla_cute.dims import HEAD_DIMS
from mla_cute.testing.cases import make_case
from mla_cute.testing.prefill import make_prefill_case

OTHERS = HEAD_DIMS[1:]
EVERY_PAIR = pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
OTHER_PAIR = pytest.mark.parametrize("dims", OTHERS, ids=str)
WITHOUT_ROPE = pytest.mark.parametrize("dims", [dims for dims in OTHERS if not dims.kpe], ids=str)
BF16, FP16 = torch.bfloat16, torch.float16
LENGTHS = [0, 1, 30, 17, 16, 70]
REQUESTS = [(1, 30), (5, 5), (0, 7), (9, 40), (3, 1), (2, 0)]


def decode_case(dims, **options):
    return make_case(LENGTHS, **{"num_heads": 3, "page_size": 16, "dims": dims} | options)


def prefill_case(dims, **options):
    return make_prefill_case(REQUESTS, **{"num_heads": 3, "page_size": 16, "dims": dims} | options)


def as_none(case):
    """The case with None in the place of the rope part."""
    return dataclasses.replace(case, q_pe=None, kpe_cache=None)
