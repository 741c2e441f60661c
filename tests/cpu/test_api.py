"""The public calls on CPU tensors: the float32 reference behind the same arguments, results and errors as on a GPU."""

import inspect
import math
import re
import subprocess
import sys
import types

import pytest
import torch
from check_values import BAD_VALUES, NAMES

import mla_cute
from mla_cute.plan import num_sms
from mla_cute.reference import decode_reference
from mla_cute.testing.cases import expected_of, make_case, run_case
from mla_cute.testing.verdict import compare

ENTRIES = pytest.mark.parametrize("entry", ["csr", "block_table"])


def small_case(lengths=(9, 0, 1, 24), num_heads=16, page_size=8, **kwargs):
    return make_case(lengths, num_heads=num_heads, page_size=page_size, **kwargs)


def decode(case, entry="csr", **kwargs):
    if entry == "csr":
        return mla_cute.mla_paged_decode(*case.csr_args, kv_last_page_len=case.kv_last_page_len, **kwargs)
    return mla_cute.mla_paged_decode_block_table(*case.block_table_args, **kwargs)


def plan_of(case, entry="csr", **kwargs):
    sizes = {"num_heads": case.num_heads, "page_size": case.page_size}
    if entry == "csr":
        return mla_cute.plan_decode(case.kv_indptr, kv_last_page_len=case.kv_last_page_len, **sizes, **kwargs)
    sizes |= {"max_pages": case.block_table.shape[1], "table_stride": case.block_table.stride(0)}
    return mla_cute.plan_decode_block_table(case.seq_lens, **sizes, **kwargs)


def test_exports():
    for name in mla_cute.__all__:
        assert getattr(mla_cute, name) is not None
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", mla_cute.__version__)


@pytest.mark.slow
def test_import_leaves_the_dsl_alone():
    watched = ("cutlass", "tvm_ffi", "rich", "typer", "matplotlib")
    code = f"import sys, mla_cute; print([m for m in {watched} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", "importing cutlass takes 2 s; extras may not be installed"


@ENTRIES
@pytest.mark.parametrize("out_layout", ["contiguous", "batch_strided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_writes_to_the_given_tensors_and_nowhere_else(entry, out_layout, dtype):
    case = small_case(dtype=dtype, out_layout=out_layout, cache_layout="padded", q_layout="batch_strided")
    verdict = run_case(case, entry=entry)
    assert verdict.ok, verdict


@ENTRIES
def test_allocates_when_nothing_is_given(entry):
    case = small_case()
    output, lse = decode(case, entry)
    assert output.dtype is torch.bfloat16
    assert output.is_contiguous()
    verdict = compare(output, lse, expected_of(case))
    assert verdict.ok, verdict


@ENTRIES
def test_return_lse_false_gives_the_output_alone(entry):
    case = small_case()
    output = decode(case, entry, return_lse=False)
    assert isinstance(output, torch.Tensor)
    assert torch.equal(output, decode(case, entry)[0])
    assert decode(case, entry, return_lse=False, out=case.out) is case.out


@ENTRIES
def test_lse_base(entry):
    case = small_case()
    for base in (2, "e"):
        verdict = run_case(case, entry=entry, lse_base=base)
        assert verdict.ok, verdict
    in_2, in_e = (decode(case, entry, lse_base=base)[1] for base in (2, "e"))
    torch.testing.assert_close(in_e, in_2 * math.log(2))
    assert in_e[1].isneginf().all()


@ENTRIES
@pytest.mark.parametrize("num_heads", [1, 2, 3, 8, 16, 37, 64, 65, 127, 128])
def test_any_number_of_heads(entry, num_heads):
    case = small_case(num_heads=num_heads)
    verdict = run_case(case, entry=entry)
    assert verdict.ok, verdict


@ENTRIES
@pytest.mark.parametrize("page_size", [1, 3, 64, 100, 300])
def test_any_page_size(entry, page_size):
    case = small_case(lengths=(0, 1, 101, 300), page_size=page_size)
    verdict = run_case(case, entry=entry)
    assert verdict.ok, verdict


@ENTRIES
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_batches_without_tokens(entry, lengths):
    case = small_case(lengths=lengths)
    verdict = run_case(case, entry=entry)
    assert verdict.ok, verdict
    assert (case.out == 0).all()
    assert case.lse.isneginf().all()


def test_default_last_pages_are_full():
    case = small_case(lengths=(16, 0, 8))
    output, lse = mla_cute.mla_paged_decode(*case.csr_args)
    verdict = compare(output, lse, expected_of(case))
    assert verdict.ok, verdict


@ENTRIES
@pytest.mark.parametrize("option", [{"batch_invariant": True}, {"config": mla_cute.KernelConfig()}])
def test_options_change_no_result(entry, option):
    case = small_case()
    for got, want in zip(decode(case, entry, **option), decode(case, entry), strict=True):
        assert torch.equal(got, want)


def test_every_argument_is_named_as_documented():
    case = small_case()
    names = ("q_nope", "q_pe", "ckv_cache", "kpe_cache", "kv_indptr", "kv_indices", "sm_scale")
    output, _ = mla_cute.mla_paged_decode(
        **dict(zip(names, case.csr_args, strict=True)), kv_last_page_len=case.kv_last_page_len
    )
    names = (*names[:4], "block_table", "seq_lens", "sm_scale")
    from_table, _ = mla_cute.mla_paged_decode_block_table(**dict(zip(names, case.block_table_args, strict=True)))
    assert torch.equal(output, from_table)
    with pytest.raises(TypeError, match="positional"):
        mla_cute.mla_paged_decode(*case.csr_args, case.kv_last_page_len)


@pytest.mark.parametrize(
    "call",
    [
        mla_cute.mla_paged_decode,
        mla_cute.mla_paged_decode_block_table,
        mla_cute.mla_paged_prefill,
        mla_cute.mla_paged_prefill_block_table,
    ],
)
def test_every_call_has_the_scales_of_fp8_caches(call):
    parameters = inspect.signature(call).parameters
    names = list(parameters)
    first = names.index("return_lse") + 1
    assert names[first : first + 4] == ["ckv_scale", "kpe_scale", "ckv_scale_arr", "q_scale"]
    for name in names[first : first + 4]:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == (None if name == "ckv_scale_arr" else 1.0)


@ENTRIES
def test_scales_are_refused_for_a_16_bit_cache(entry):
    case = small_case()
    want = decode(case, entry)
    again = decode(case, entry, ckv_scale=float("1"), kpe_scale=1, q_scale=1.0, ckv_scale_arr=None)
    assert all(map(torch.equal, again, want))
    scales = {"ckv_scale": 2.0, "kpe_scale": 0.5, "q_scale": 3.0, "ckv_scale_arr": torch.ones(9, 8, 1)}
    for name, value in scales.items():
        with pytest.raises(ValueError, match=f"^{name}: expected "):
            decode(case, entry, out=case.out, lse=case.lse, **{name: value})
        assert case.guarded_out.untouched()
        assert case.guarded_lse.untouched()


# ------------------------------------------------------------------------------------------------ plans


@ENTRIES
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_plan_on_the_cpu(entry, batch_invariant):
    case = small_case()
    plan = plan_of(case, entry, batch_invariant=batch_invariant)
    assert isinstance(plan, mla_cute.DecodePlan)
    want, want_lse = decode(case, entry)
    for _ in range(2):
        output, lse = decode(case, entry, plan=plan)
        assert torch.equal(output, want)
        assert torch.equal(lse, want_lse)
        plan.update()


def test_updated_plan_follows_the_metadata():
    sizes = {"num_pages": 20, "num_indices": 30, "max_pages": 15}
    case, other = small_case(seed=1, **sizes), small_case(lengths=(0, 60, 3, 8), seed=2, **sizes)
    plan = plan_of(case)
    decode(case, plan=plan)
    case.load(other)
    plan.update()
    verdict = run_case(case, plan=plan)
    assert verdict.ok, verdict


@ENTRIES
@pytest.mark.parametrize(
    "wrong", [{"lengths": (9, 0, 1)}, {"num_heads": 8}, {"page_size": 16}], ids=lambda w: next(iter(w))
)
def test_plan_for_another_problem_is_refused(entry, wrong):
    case = small_case()
    plan = plan_of(small_case(**wrong), entry)
    with pytest.raises(ValueError, match=r"^plan: expected "):
        decode(case, entry, plan=plan, out=case.out, lse=case.lse)
    assert case.guarded_out.untouched()
    assert case.guarded_lse.untouched()


@ENTRIES
def test_plan_of_the_other_metadata_form_is_refused(entry):
    case = small_case()
    plan = plan_of(case, "block_table" if entry == "csr" else "csr")
    with pytest.raises(ValueError, match=r"^plan: expected "):
        decode(case, entry, plan=plan, out=case.out, lse=case.lse)
    assert case.guarded_out.untouched()
    assert case.guarded_lse.untouched()


INDPTR = torch.zeros(5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "exception", "named"),
    [
        ({"kv_indptr": [0, 1]}, TypeError, "kv_indptr"),
        ({"kv_indptr": INDPTR.long()}, TypeError, "kv_indptr"),
        ({"kv_indptr": INDPTR[:0]}, ValueError, "kv_indptr"),
        ({"kv_indptr": INDPTR[None]}, ValueError, "kv_indptr"),
        ({"num_heads": 0}, ValueError, "num_heads"),
        ({"num_heads": 129}, ValueError, "num_heads"),
        ({"num_heads": 16.0}, TypeError, "num_heads"),
        ({"page_size": 0}, ValueError, "page_size"),
        ({"page_size": -64}, ValueError, "page_size"),
        ({"page_size": "64"}, TypeError, "page_size"),
        ({"kv_last_page_len": INDPTR}, ValueError, "kv_last_page_len"),
        ({"kv_last_page_len": INDPTR[:4].long()}, TypeError, "kv_last_page_len"),
    ],
)
def test_bad_plan_arguments(change, exception, named):
    arguments = {"kv_indptr": INDPTR, "num_heads": 16, "page_size": 64} | change
    with pytest.raises(exception, match=f"^{named}: expected "):
        mla_cute.plan_decode(**arguments)


@pytest.mark.parametrize(
    ("change", "exception", "named"),
    [
        ({"seq_lens": (1, 2)}, TypeError, "seq_lens"),
        ({"seq_lens": INDPTR.long()}, TypeError, "seq_lens"),
        ({"seq_lens": INDPTR[None]}, ValueError, "seq_lens"),
        ({"num_heads": 129}, ValueError, "num_heads"),
        ({"page_size": 0}, ValueError, "page_size"),
        ({"max_pages": -1}, ValueError, "max_pages"),
        ({"max_pages": 2.0}, TypeError, "max_pages"),
    ],
)
def test_bad_block_table_plan_arguments(change, exception, named):
    arguments = {"seq_lens": INDPTR, "num_heads": 16, "page_size": 64, "max_pages": 2} | change
    with pytest.raises(exception, match=f"^{named}: expected "):
        mla_cute.plan_decode_block_table(**arguments)


# ------------------------------------------------------------------------------------------------ errors


@ENTRIES
@pytest.mark.parametrize(
    ("change", "exception", "named"),
    [
        ({"lse_base": 10}, ValueError, "lse_base"),
        ({"out": torch.zeros(4, 16, 512)}, TypeError, "out"),
        ({"lse": torch.zeros(4, 8)}, ValueError, "lse"),
    ],
)
def test_bad_keywords_raise_before_anything_is_written(entry, change, exception, named):
    case = small_case()
    with pytest.raises(exception, match=f"^{named}: expected "):
        decode(case, entry, **{"out": case.out, "lse": case.lse} | change)
    assert case.guarded_out.untouched()
    assert case.guarded_lse.untouched()


@ENTRIES
def test_bad_tensor_raises_before_anything_is_written(entry):
    case = small_case()
    case.q_pe = case.q_pe[..., :48]
    with pytest.raises(ValueError, match=r"^q_pe: expected shape \[4, 16, 64 or 32 or 0\], got \[4, 16, 48\]"):
        decode(case, entry, out=case.out, lse=case.lse)
    assert case.guarded_out.untouched()
    assert case.guarded_lse.untouched()


@pytest.mark.parametrize("with_plan", [False, True], ids=["no_plan", "plan"])
@pytest.mark.parametrize("check", ["0", "1"])
@pytest.mark.parametrize(NAMES, BAD_VALUES)
def test_values_are_verified(monkeypatch, entry, name, position, value, named, check, with_plan):
    """Without MLA_CUTE_CHECK too."""
    case = small_case()
    monkeypatch.setenv("MLA_CUTE_CHECK", check)
    plan = plan_of(case, entry) if with_plan else None
    verdict = run_case(case, entry=entry, plan=plan)
    assert verdict.ok, verdict
    case.guarded_out.reset()
    case.guarded_lse.reset()
    getattr(case, name)[position] = value
    with pytest.raises(ValueError, match=f"^{named}: expected "):
        decode(case, entry, out=case.out, lse=case.lse, plan=plan)
    assert case.guarded_out.untouched()
    assert case.guarded_lse.untouched()


def test_matches_the_reference_bitwise():
    case = small_case()
    output, lse = decode(case)
    want, want_lse = decode_reference(*case.csr_args, kv_last_page_len=case.kv_last_page_len)
    assert torch.equal(output, want)
    assert torch.equal(lse, want_lse)


@pytest.mark.parametrize(("major", "minor", "name"), [(8, 0, "NVIDIA A100"), (10, 0, "NVIDIA B200")])
def test_other_architectures_are_named(monkeypatch, major, minor, name):
    properties = types.SimpleNamespace(major=major, minor=minor, name=name, multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with pytest.raises(
        RuntimeError, match=rf"9\.0 \(sm_90a\); cuda:0 is {name} of compute capability {major}\.{minor}$"
    ):
        num_sms(torch.device("cuda", 0))
