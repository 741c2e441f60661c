"""merge_states on CPU tensors against the formula in float64, and its checks."""

import inspect
import math

import pytest
import torch

import mla_cute
from mla_cute.testing.cases import make_case

NAN, INF = math.nan, math.inf
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BASES = pytest.mark.parametrize("lse_base", [2, "e"])


def states(*shape, dtype=torch.float32, seed=0):
    """(o_a, lse_a, o_b, lse_b), log-sum-exps up to 40 apart."""
    generator = torch.Generator().manual_seed(seed)

    def state():
        o = torch.randn(*shape, generator=generator).to(dtype)
        return o, 10 * torch.randn(*shape[:-1], generator=generator)

    return (*state(), *state())


def in_float64(o_a, lse_a, o_b, lse_b, lse_base):
    """Without the shift, which float64 does not need here."""
    base = 2.0 if lse_base == 2 else math.e
    a, b = (base ** lse.double() for lse in (lse_a, lse_b))
    o = (a.unsqueeze(-1) * o_a.double() + b.unsqueeze(-1) * o_b.double()) / (a + b).unsqueeze(-1)
    return o, (a + b).log() / math.log(base)


@BASES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 4, 512), (4, 24), (2, 3, 5, 8), (0, 4, 512), (1, 1, 1)], ids=str)
def test_equals_the_formula(shape, dtype, lse_base):
    args = states(*shape, dtype=dtype)
    o, lse = mla_cute.merge_states(*args, lse_base=lse_base)
    want_o, want_lse = in_float64(*args, lse_base)
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(o.double(), want_o, rtol=eps / 2 + 1e-6, atol=2e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)


@BASES
def test_states_without_keys_have_no_say(lse_base):
    o_a, lse_a, o_b, lse_b = states(6, 2, 16)
    lse_a[0], lse_b[1] = -INF, -INF
    lse_a[2], lse_b[2] = -INF, -INF
    o_a[0], o_b[1], o_a[2], o_b[2] = NAN, NAN, NAN, INF
    o, lse = mla_cute.merge_states(o_a, lse_a, o_b, lse_b, lse_base=lse_base)
    assert torch.equal(o[0], o_b[0])
    assert torch.equal(o[1], o_a[1])
    assert torch.equal(lse[:2], torch.stack([lse_b[0], lse_a[1]]))
    assert (o[2] == 0).all()
    assert lse[2].isneginf().all()
    assert o[3:].isfinite().all()


@BASES
def test_large_log_sum_exps_do_not_overflow(lse_base):
    o_a, _, o_b, _ = states(2, 1, 8)
    lse_a, lse_b = torch.tensor([[3000.0], [-3000.0]]), torch.tensor([[3000.0], [-3001.0]])
    o, lse = mla_cute.merge_states(o_a, lse_a, o_b, lse_b, lse_base=lse_base)
    base = 2.0 if lse_base == 2 else math.e
    w = 1 / (1 + 1 / base)
    torch.testing.assert_close(o[0], (o_a[0] + o_b[0]) / 2)
    torch.testing.assert_close(o[1], w * o_a[1] + (1 - w) * o_b[1])
    torch.testing.assert_close(lse.flatten(), torch.tensor([3000 + math.log(2, base), -3000 - math.log(w, base)]))


def test_nan_is_not_hidden():
    o_a, lse_a, o_b, lse_b = states(3, 1, 8)
    lse_a[0] = NAN
    o_b[1, 0, 3] = NAN
    o, lse = mla_cute.merge_states(o_a, lse_a, o_b, lse_b)
    assert o[0].isnan().all()
    assert lse.isnan().flatten().tolist() == [True, False, False]
    assert o[1].isnan().nonzero().flatten().tolist() == [0, 3]
    assert o[2].isfinite().all()


@pytest.mark.parametrize("into", ["a", "b", "new"])
def test_writes_where_it_is_told(into):
    args = states(4, 3, 16, dtype=torch.bfloat16)
    want, want_lse = mla_cute.merge_states(*args)
    pool = torch.full((4, 5, 32), 7.0).bfloat16()
    fresh = (pool[:, 1:4, 8:24], torch.empty(4, 3))
    out, lse = {"a": args[:2], "b": args[2:], "new": fresh}[into]
    got, got_lse = mla_cute.merge_states(*args, out=out, lse=lse)
    assert got is out
    assert got_lse is lse
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    pool[:, 1:4, 8:24] = 7
    assert (pool == 7).all()


@pytest.mark.parametrize("lse_base", [2, "e"])
def test_two_parts_of_the_keys_make_the_whole(lse_base):
    """Against attention itself: the first pages and the rest of them."""
    case = make_case((33, 9, 0, 64), num_heads=3, page_size=8, dtype=torch.float16)
    q_nope, q_pe, ckv, kpe, table, lengths, scale = case.block_table_args

    def attend(table, lengths):
        return mla_cute.mla_paged_decode_block_table(q_nope, q_pe, ckv, kpe, table, lengths, scale, lse_base=lse_base)

    first = lengths.clamp(max=16)
    whole, whole_lse = attend(table, lengths)
    o, lse = mla_cute.merge_states(*attend(table, first), *attend(table[:, 2:], lengths - first), lse_base=lse_base)
    assert torch.equal(o[2], whole[2])
    torch.testing.assert_close(lse, whole_lse)
    torch.testing.assert_close(
        o.float(), whole.float(), rtol=0, atol=3 * 2**-11 * ckv[ckv.isfinite()].abs().max().item()
    )


GOOD = {"o_a": (3, 2, 8), "lse_a": (3, 2), "o_b": (3, 2, 8), "lse_b": (3, 2), "out": (3, 2, 8), "lse": (3, 2)}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("o_a", None, TypeError, "expected a torch.Tensor, got NoneType"),
        ("o_a", torch.zeros(3, 2, 8, dtype=torch.int32), TypeError, "expected dtype torch.bfloat16, torch.float16"),
        ("o_a", torch.zeros(8), ValueError, r"expected shape \[..., H, D\], got \[8\]"),
        ("o_a", torch.zeros(3, 2, 8, device="meta"), ValueError, "expected a tensor on a cuda device or the cpu"),
        ("lse_a", torch.zeros(3, 1), ValueError, r"expected shape \[3, 2\], got \[3, 1\]"),
        ("lse_a", torch.zeros(3, 2).double(), TypeError, "expected dtype torch.float32, got torch.float64"),
        ("o_b", torch.zeros(3, 2, 8).half(), TypeError, r"expected dtype torch.float32 \(that of o_a\)"),
        ("o_b", torch.zeros(3, 2, 9), ValueError, r"expected shape \[3, 2, 8\], got \[3, 2, 9\]"),
        ("lse_b", torch.zeros(2, 3), ValueError, r"expected shape \[3, 2\], got \[2, 3\]"),
        ("lse_b", torch.zeros(3, 2, device="meta"), ValueError, r"expected device cpu \(that of o_a\), got meta"),
        ("lse_base", 10, ValueError, "expected 2 or 'e', got 10"),
        ("lse_base", True, TypeError, "expected 2 or 'e', got bool True"),
        ("lse_base", 2.0, TypeError, "expected 2 or 'e', got float 2.0"),
        ("out", torch.zeros(3, 2, 4), ValueError, r"expected shape \[3, 2, 8\], got \[3, 2, 4\]"),
        ("out", torch.zeros(1, 2, 8).expand(3, 2, 8), ValueError, "expected memory for every element"),
        ("lse", torch.zeros(3, 2).half(), TypeError, "expected dtype torch.float32"),
        ("lse", torch.zeros(1).expand(3, 2), ValueError, "expected memory for every element"),
    ],
)
def test_errors_name_the_argument(name, value, error, message):
    good = {key: torch.zeros(shape) for key, shape in GOOD.items()}
    mla_cute.merge_states(**good)
    kept = [torch.full_like(good[key], 5) for key in ("out", "lse")]
    bad = good | dict(zip(("out", "lse"), kept, strict=True)) | {name: value}
    with pytest.raises(error, match=f"^{name}: {message}"):
        mla_cute.merge_states(**bad)
    assert all((x == 5).all() for x in kept), "nothing is written"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2**31, 1, 8), r"o_a: expected at most 2147483644 rows \(\[..., H\] together\), got 2147483648"),
        ((2**16, 2**15, 8), r"o_a: expected at most 2147483644 rows \(\[..., H\] together\), got 2147483648"),
        ((3, 2**16, 2**15, 8), r"o_a: expected at most 2147483644 rows \(\[..., H\] together\), got 6442450944"),
        ((1, 1, 2**31), "o_a: expected a last dimension of at most 2147483644, got 2147483648"),
    ],
    ids=str,
)
def test_more_than_32_bits_of_rows_are_refused(shape, message):
    o, lse = torch.zeros(()).expand(shape), torch.zeros(()).expand(shape[:-1])
    with pytest.raises(ValueError, match=f"^{message}$"):
        mla_cute.merge_states(o, lse, o, lse)


def test_signature():
    parameters = inspect.signature(mla_cute.merge_states).parameters
    assert list(parameters) == ["o_a", "lse_a", "o_b", "lse_b", "lse_base", "out", "lse"]
