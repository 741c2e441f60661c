"""Bad arguments on CUDA tensors raise, launch nothing and leave out and lse alone."""

import pytest
import torch
from check_values import BAD_VALUES, NAMES
from gpu_helpers import ENTRIES, decode, plan_of

import mla_cute
from mla_cute.testing.cases import make_case, run_case

BOTH_ENTRIES = pytest.mark.parametrize("entry", ENTRIES)


def small_case(**kwargs):
    return make_case(**{"lengths": [9, 0, 1, 24], "num_heads": 16, "page_size": 8, "device": "cuda"} | kwargs)


def zeros(*shape, dtype=torch.bfloat16, device="cuda"):
    return torch.zeros(shape, dtype=dtype, device=device)


def assert_refused(case, entry, exception, match, **kwargs):
    with pytest.raises(exception, match=match):
        decode(case, entry, **{"out": case.out, "lse": case.lse} | kwargs)
    torch.cuda.synchronize()
    assert case.guarded_out.untouched()
    assert case.guarded_lse.untouched()


def misaligned(x, elements=4):
    """The same shape at an address `elements` elements past an aligned one."""
    flat = torch.zeros(x.numel() + elements, dtype=x.dtype, device=x.device)
    return flat[elements:].view(x.shape)


def wide(x, width):
    """The same shape with rows `width` elements apart."""
    return torch.zeros(*x.shape[:-1], width, dtype=x.dtype, device=x.device)[..., : x.shape[-1]]


TENSORS = ("q_nope", "q_pe", "ckv_cache", "kpe_cache")
ALIGNMENT = r"expected a base address that is a multiple of 16 bytes, got 0x"
STRIDES = r"expected strides that are multiples of 8 elements \(16 bytes\), got strides \["
LAST_STRIDE = r"expected stride 1 in the last dimension, got strides \["


@BOTH_ENTRIES
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (misaligned, ALIGNMENT),
        (lambda x: misaligned(x, 1), ALIGNMENT),
        (lambda x: wide(x, x.shape[-1] + 4), STRIDES),
        (lambda x: wide(x, x.shape[-1] + 1), STRIDES),
        (lambda x: x.repeat_interleave(2, -1)[..., ::2], LAST_STRIDE),
        (lambda x: x.transpose(0, 2).contiguous().transpose(0, 2), LAST_STRIDE),
        (lambda x: x.cpu(), "expected"),
        (lambda x: x.float(), "expected dtype"),
        (lambda x: x[..., :-8], "expected shape"),
        (lambda x: x[None], "expected shape"),
    ],
    ids=["8_bytes", "2_bytes", "stride_4", "stride_1", "every_other", "transposed", "cpu", "float32", "narrow", "rank"],
)
def test_bad_operand(name, change, says, entry):
    case = small_case()
    setattr(case, name, change(getattr(case, name)))
    named = name
    if name == "q_nope" and says == "expected":
        named = "q_pe"  # the device of q_nope is the one the others are held against
    assert_refused(case, entry, (ValueError, TypeError), f"^{named}: {says}")


@BOTH_ENTRIES
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda case: {"out": misaligned(case.out)}, "out"),
        (lambda case: {"out": wide(case.out, 516)}, "out"),
        (lambda case: {"out": case.out.float()}, "out"),
        (lambda case: {"out": case.out.cpu()}, "out"),
        (lambda case: {"out": case.q_nope}, "out"),
        (lambda case: {"out": zeros(4, 1, 512).expand(4, 16, 512)}, "out"),
        (lambda case: {"lse": zeros(16, 4, dtype=torch.float32).T}, "lse"),
        (lambda case: {"lse": zeros(4, 16, dtype=torch.float64)}, "lse"),
        (lambda case: {"lse": zeros(4, 16, dtype=torch.float32, device="cpu")}, "lse"),
        (lambda case: {"lse_base": 10}, "lse_base"),
    ],
)
def test_bad_keyword(change, named, entry):
    case = small_case()
    assert_refused(case, entry, (ValueError, TypeError), f"^{named}: expected", **change(case))


@pytest.mark.parametrize(
    ("entry", "name", "change"),
    [
        ("csr", "kv_indptr", lambda x: x.long()),
        ("csr", "kv_indptr", lambda x: x.cpu()),
        ("csr", "kv_indptr", lambda x: x[:-1]),
        ("csr", "kv_indptr", lambda x: x.repeat_interleave(2)[::2]),
        ("csr", "kv_indices", lambda x: x.long()),
        ("csr", "kv_indices", lambda x: x.cpu()),
        ("csr", "kv_indices", lambda x: x[None]),
        ("csr", "kv_indices", lambda x: x.repeat_interleave(2)[::2]),
        ("csr", "kv_last_page_len", lambda x: x.long()),
        ("csr", "kv_last_page_len", lambda x: x.cpu()),
        ("csr", "kv_last_page_len", lambda x: x.repeat_interleave(2)[::2]),
        ("block_table", "block_table", lambda x: x.long()),
        ("block_table", "block_table", lambda x: x.cpu()),
        ("block_table", "block_table", lambda x: x[:-1]),
        ("block_table", "block_table", lambda x: x.repeat_interleave(2, -1)[:, ::2]),
        ("block_table", "seq_lens", lambda x: x.long()),
        ("block_table", "seq_lens", lambda x: x.cpu()),
        ("block_table", "seq_lens", lambda x: x.repeat_interleave(2)[::2]),
    ],
)
def test_bad_metadata(entry, name, change):
    case = small_case()
    setattr(case, name, change(getattr(case, name)))
    assert_refused(case, entry, (ValueError, TypeError), f"^{name}: expected")


@pytest.mark.parametrize("scale", [0.0, -0.1, float("nan"), float("inf")])
def test_bad_scale(scale):
    case = small_case()
    case.sm_scale = scale
    assert_refused(case, "csr", ValueError, r"^sm_scale: expected a positive number")


@BOTH_ENTRIES
@pytest.mark.parametrize("wrong", [{"lengths": [9, 0, 1]}, {"num_heads": 8}, {"page_size": 16}, {"device": "cpu"}])
def test_plan_for_another_problem(wrong, entry):
    case = small_case()
    assert_refused(case, entry, ValueError, r"^plan: expected", plan=plan_of(small_case(**wrong), entry))


@BOTH_ENTRIES
def test_plan_of_the_other_metadata_form(entry):
    case = small_case()
    other = plan_of(case, "block_table" if entry == "csr" else "csr")
    assert_refused(case, entry, ValueError, r"^plan: expected", plan=other)


def test_bad_config():
    case = small_case()
    config = mla_cute.KernelConfig(min_blocks=3)
    assert_refused(case, "csr", ValueError, r"^config: min_blocks: expected", config=config)


@pytest.mark.parametrize("with_plan", [False, True], ids=["", "plan"])
@pytest.mark.parametrize(NAMES, BAD_VALUES)
def test_check_mode_verifies_values(monkeypatch, entry, name, position, value, named, with_plan):
    case = small_case()
    monkeypatch.setenv("MLA_CUTE_CHECK", "1")
    plan = plan_of(case, entry) if with_plan else None
    verdict = run_case(case, entry=entry, plan=plan)
    assert verdict.ok, verdict
    case.guarded_out.reset()
    case.guarded_lse.reset()
    getattr(case, name)[position] = value
    assert_refused(case, entry, ValueError, f"^{named}: expected", plan=plan)


@BOTH_ENTRIES
def test_a_good_call_works_after_a_bad_one(entry):
    case = small_case()
    with pytest.raises(ValueError, match=r"^lse_base: expected"):
        decode(case, entry, lse_base=10)
    verdict = run_case(case, entry=entry)
    assert verdict.ok, verdict
