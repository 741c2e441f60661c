"""FlashMLA's sparse attention on CPU tensors, against attention in plain torch: values, conventions, errors."""

import re

import pytest
import torch
from integration_case import SM_SCALE, ListCase, rows_of_656

import mla_cute
from mla_cute import quant
from mla_cute.integrations.flash_mla import (
    FlashMLASchedMeta,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
)

BATCH = 4
LENS = (40, 17, 0, 1)
E4M3 = torch.float8_e4m3fn
OUT_TOLERANCE = {"rtol": 2**-7, "atol": 2**-8}
SINK = torch.tensor([-torch.inf, 1.5, torch.inf])


def make(tokens=1, **kwargs):
    """Lists as long as a request's topk_length."""
    return ListCase([n for n in LENS for _ in range(tokens)], **kwargs)


def of_requests(x):
    return x.view(BATCH, -1, *x.shape[1:])


def args_of(case, meta=None, **changed):
    """Keyword arguments of a call over a 16-bit cache."""
    return {
        "q": of_requests(case.q), "k_cache": case.cache[:, :, None], "block_table": None, "cache_seqlens": None,
        "head_dim_v": 512, "tile_scheduler_metadata": meta or get_mla_metadata()[0], "softmax_scale": SM_SCALE,
        "indices": of_requests(case.indices), "topk_length": of_requests(case.topk_lens)[:, 0].contiguous(),
    } | changed  # fmt: skip


def check(case, result, **expected):
    """`result` in FlashMLA's shapes: out [b, s_q, h, 512], lse [b, h, s_q], +inf where there is nothing to see."""
    out, lse = case.expected(**expected)
    got, got_lse = result
    heads = lse.shape[1]
    assert got.shape == (BATCH, len(lse) // BATCH, heads, 512)
    assert got_lse.shape == (BATCH, heads, len(lse) // BATCH)
    torch.testing.assert_close(got.float(), out.view(got.shape), **OUT_TOLERANCE)
    want = lse.masked_fill(lse == -torch.inf, torch.inf).view(BATCH, -1, heads).transpose(1, 2)
    torch.testing.assert_close(got_lse, want, rtol=1e-5, atol=1e-5)
    assert (got_lse == torch.inf).any()


# ------------------------------------------------------------------------------------------------ with_kvcache


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_result_is_attention_to_the_lists(tokens, dtype):
    case = make(tokens, dtype=dtype)
    check(case, flash_mla_with_kvcache(**args_of(case)))


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("dtype", [torch.uint8, E4M3])
@pytest.mark.parametrize("as_copy", [{"is_fp8_kvcache": True}, {"is_fp8_kvcache": None, "kv_format": "V32"}, {}])
def test_rows_of_656_bytes(tokens, dtype, as_copy):
    """As FlashMLA's callers have them, sgl-flash-mla's, and those who leave its default."""
    case = make(tokens)
    pool, real = rows_of_656(case)
    given = args_of(case, k_cache=pool[:, :, None].view(dtype), use_legacy=True, **as_copy)
    check(case, flash_mla_with_kvcache(**given), cache=real)


@pytest.mark.parametrize("q_fp8", [False, True])
def test_cache_with_one_scale(q_fp8):
    case = make(2)
    stored = quant.to_e4m3(case.cache, 0.02)
    given = {"k_cache": stored[:, :, None], "descale_k": torch.full((1,), 0.02)}
    if q_fp8:
        case.q = quant.to_e4m3(case.q, 0.25)
        given["descale_q"] = 0.25
    result = flash_mla_with_kvcache(**args_of(case, **given))
    if q_fp8:
        case.q = case.q.float() * 0.25
    check(case, result, cache=stored.float() * 0.02)


@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_page_sizes(page_size):
    case = make(page_size=page_size, num_pages=90)
    check(case, flash_mla_with_kvcache(**args_of(case)))


def test_what_is_said_of_pages_is_not_looked_at():
    case = make(2)
    nonsense = {"block_table": torch.full((1, 1), -7), "cache_seqlens": torch.full((2, 2), torch.nan)}
    check(case, flash_mla_with_kvcache(**args_of(case, **nonsense)))


@pytest.mark.parametrize("tokens", [1, 2])
def test_whole_lists(tokens):
    case = ListCase([24] * BATCH * tokens, topk=24)
    case.indices[-1] = -1
    check(case, flash_mla_with_kvcache(**args_of(case, topk_length=None)))


@pytest.mark.parametrize("tokens", [1, 2])
def test_q_and_indices_of_any_strides(tokens):
    case = make(tokens)
    given = args_of(case)
    wide = torch.full((BATCH, tokens, 3, 600), torch.nan, dtype=case.q.dtype)
    wide[..., :576] = given["q"]
    lists = torch.full((BATCH, tokens, 51), -(2**31), dtype=torch.int32)
    lists[..., :40] = given["indices"]
    check(case, flash_mla_with_kvcache(**given | {"q": wide[..., :576], "indices": lists[..., :40]}))
    tokens_first = given["indices"].transpose(0, 1).contiguous().transpose(0, 1)
    check(case, flash_mla_with_kvcache(**args_of(case, indices=tokens_first)))


@pytest.mark.parametrize("tokens", [1, 3])
def test_layers_share_the_metadata_and_have_lists_of_their_own(tokens):
    case, (meta, _) = make(tokens), get_mla_metadata()
    given = args_of(case, meta)
    check(case, flash_mla_with_kvcache(**given))
    plan = meta.plan
    assert isinstance(plan, mla_cute.SparsePlan)
    assert meta.config.topk == 40
    other = make(tokens, seed=1)
    given |= {"indices": args_of(other)["indices"], "q": args_of(other)["q"], "k_cache": other.cache[:, :, None]}
    check(other, flash_mla_with_kvcache(**given))
    assert meta.plan is plan
    for topk_length in (None, given["topk_length"].clone()):
        with pytest.raises(
            ValueError, match=r"topk_length: expected the tensor, or None, that tile_scheduler_metadata"
        ):
            flash_mla_with_kvcache(**given | {"topk_length": topk_length})


@pytest.mark.parametrize("tokens", [1, 3])
def test_out_and_batch_invariance(tokens):
    case, (meta, _) = make(tokens), get_mla_metadata()
    out = torch.full((BATCH, tokens, 3, 512), torch.nan, dtype=torch.bfloat16)
    result = flash_mla_with_kvcache(**args_of(case, meta, out=out, enable_batch_invariant=True))
    assert result[0] is out
    assert meta.plan.batch_invariant
    check(case, result)


def test_default_scale_is_that_of_576_channels():
    case = make()
    check(case, flash_mla_with_kvcache(**args_of(case, softmax_scale=None)), sm_scale=576**-0.5)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 1), (0, 3), (3, 0)])
def test_steps_without_queries(batch, tokens):
    case = make()
    given = {
        "q": case.q.new_empty(batch, tokens, 3, 576), "topk_length": torch.ones(batch, dtype=torch.int32),
        "indices": torch.full((batch, tokens, 4), -1, dtype=torch.int32),
    }  # fmt: skip
    out, lse = flash_mla_with_kvcache(**args_of(case) | given)
    assert out.shape == (batch, tokens, 3, 512)
    assert lse.shape == (batch, 3, tokens)


@pytest.mark.parametrize("tokens", [1, 2])
def test_sink(tokens):
    """-inf changes nothing, +inf leaves nothing of the output; the log-sum-exp is without it."""
    case = make(tokens)
    out, lse = flash_mla_with_kvcache(**args_of(case, attn_sink=SINK))
    check(case, (out, lse), sink=SINK)
    assert not out[:, :, 2].any()
    assert not out[2].any()


INT = torch.int32


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"indices": [1]}, TypeError, "indices: expected a torch.Tensor, got list"),
        ({"indices": torch.zeros(4, 1, 3)}, TypeError, "indices: expected dtype torch.int32"),
        ({"indices": torch.zeros(4, 3, dtype=INT)}, ValueError, "indices: expected shape [4, 1, topk], got [4, 3]"),
        ({"indices": torch.zeros(4, 2, 3, dtype=INT)}, ValueError, "indices: expected shape [4, 1, topk]"),
        ({"indices": torch.full((4, 1, 40), 128, dtype=INT)}, ValueError, "indices: expected -1 or tokens in [0, 128)"),
        ({"topk_length": 3}, TypeError, "topk_length: expected a torch.Tensor"),
        ({"topk_length": torch.zeros(4, 1, dtype=INT)}, ValueError, "topk_length: expected shape [4], got [4, 1]"),
        ({"topk_length": torch.full((4,), 41, dtype=INT)}, ValueError, "topk_lens: expected values in [0, 40]"),
        ({"attn_sink": 1.0}, TypeError, "attn_sink: expected a torch.Tensor"),
        ({"attn_sink": torch.zeros(3).double()}, TypeError, "attn_sink: expected dtype torch.float32"),
        ({"attn_sink": torch.zeros(6)[::2]}, ValueError, "attn_sink: expected a contiguous tensor, got strides [2]"),
        ({"attn_sink": torch.zeros(2)}, ValueError, "attn_sink: expected shape [3], got [2]"),
        ({"causal": True}, ValueError, "causal: expected False with indices"),
        ({"is_fp8_kvcache": True}, ValueError, "k_cache: expected shape [num_blocks, page_block_size, 1, 656]"),
        ({"kv_format": "V32"}, ValueError, "kv_format: expected None with this k_cache, got 'V32'"),
        ({"extra_k_cache": torch.zeros(1)}, NotImplementedError, "extra_k_cache: expected None"),
        ({"extra_indices_in_kvcache": torch.zeros(1)}, NotImplementedError, "extra_indices_in_kvcache: expected None"),
        ({"q": torch.zeros(4, 1, 3, 512)}, ValueError, "q: expected shape [batch, s_q, heads, 576]"),
    ],
)
def test_refuses(changed, error, message):
    case, meta = make(), get_mla_metadata()[0]
    with pytest.raises(error, match=re.escape(message)):
        flash_mla_with_kvcache(**args_of(case, meta) | changed)
    if "indices: expected -1" not in message and "topk_lens" not in message:  # values are looked at after the plan
        assert meta == FlashMLASchedMeta()


def test_other_formats_of_rows_are_refused():
    case = make()
    pool, _ = rows_of_656(case)
    with pytest.raises(ValueError, match="kv_format: expected None or 'V32' with rows of 656 bytes, got 'V32_NO_ROPE'"):
        flash_mla_with_kvcache(**args_of(case, k_cache=pool[:, :, None], kv_format="V32_NO_ROPE"))


def test_metadata_of_another_step_is_refused():
    meta, _ = get_mla_metadata()
    flash_mla_with_kvcache(**args_of(make(), meta))
    for case in (make(2), make(num_heads=4), make(page_size=4, num_pages=32), make(topk=44)):
        with pytest.raises(ValueError, match="tile_scheduler_metadata: expected one for"):
            flash_mla_with_kvcache(**args_of(case, meta))
    dense = {
        "indices": None, "topk_length": None, "block_table": torch.zeros(4, 1, dtype=INT),
        "cache_seqlens": torch.zeros(4, dtype=INT),
    }  # fmt: skip
    with pytest.raises(ValueError, match="tile_scheduler_metadata: expected one for"):
        flash_mla_with_kvcache(**args_of(make(), meta, **dense))


# ------------------------------------------------------------------------------------------------ sparse_fwd


def prompt_of(case, **changed):
    """Arguments of `flash_mla_sparse_fwd`."""
    return {
        "q": case.q, "kv": case.cache.view(-1, 1, 576), "indices": case.indices[:, None], "sm_scale": SM_SCALE,
        "topk_length": case.topk_lens,
    } | changed  # fmt: skip


def check_prompt(case, result, base=1.0, **expected):
    out, lse = case.expected(**expected)
    got, max_logits, got_lse = result
    assert max_logits is None
    torch.testing.assert_close(got.float(), out, **OUT_TOLERANCE)
    want = (lse * base).masked_fill(lse == -torch.inf, torch.inf)
    torch.testing.assert_close(got_lse, want, rtol=1e-5, atol=1e-5)
    assert (got_lse == torch.inf).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prompt(dtype):
    case = make(3, dtype=dtype)
    given = prompt_of(case)
    check_prompt(case, flash_mla_sparse_fwd(**given))
    check_prompt(case, flash_mla_sparse_fwd(**given, return_log2_lse=True), base=torch.tensor(2.0).log().reciprocal())
    out, *nothing = flash_mla_sparse_fwd(**given, return_log2_lse=False, use_legacy=True)
    assert nothing == [None, None]
    assert torch.equal(out, flash_mla_sparse_fwd(**given)[0])
    room = torch.full((len(case.q), 5, 512), torch.nan, dtype=dtype)
    result = flash_mla_sparse_fwd(**given, out=room[:, 1:4])
    check_prompt(case, result)
    assert result[0].data_ptr() == room[:, 1:].data_ptr()
    assert room[:, [0, 4]].isnan().all()


def test_max_logits_are_the_largest_scores():
    case = make(3)
    given = prompt_of(case)
    rows = case.cache.float().flatten(0, 1)
    want = torch.full(case.q.shape[:2], -torch.inf)
    for i, (ids, n) in enumerate(zip(case.indices.tolist(), case.topk_lens.tolist(), strict=True)):
        for j in ids[:n]:
            if j >= 0:
                want[i] = torch.maximum(want[i], case.q[i].float() @ rows[j] * SM_SCALE)
    assert (want == -torch.inf).any()
    plain = flash_mla_sparse_fwd(**given)
    out, largest, lse = flash_mla_sparse_fwd(**given, return_max_logits=True)
    assert torch.equal(out, plain[0])
    assert torch.equal(lse, plain[2])
    torch.testing.assert_close(largest, want, rtol=1e-5, atol=1e-5)
    in_base_2 = flash_mla_sparse_fwd(**given, return_max_logits=True, return_log2_lse=True)[1]
    torch.testing.assert_close(in_base_2, want / torch.tensor(2.0).log(), rtol=1e-5, atol=1e-5)
    assert flash_mla_sparse_fwd(**given, return_max_logits=True, return_log2_lse=False)[1] is None
    none = given | {"indices": given["indices"][..., :0], "topk_length": None}
    assert (flash_mla_sparse_fwd(**none, return_max_logits=True)[1] == -torch.inf).all()


def test_max_logits_of_many_query_tokens_are_made_in_pieces(monkeypatch):
    case = make(7)
    whole = flash_mla_sparse_fwd(**prompt_of(case), return_max_logits=True)[1]
    monkeypatch.setattr("mla_cute.integrations.flash_mla._GATHERED", 2 * 40 * 576 + 1)
    assert torch.equal(flash_mla_sparse_fwd(**prompt_of(case), return_max_logits=True)[1], whole)


def test_tokens_past_the_end_of_kv_are_none():
    case = make(3)
    for absurd in (len(case.cache.flatten(0, 1)), 2**31 - 1):
        given = prompt_of(case, indices=case.indices.where(case.indices >= 0, absurd)[:, None], topk_length=None)
        case.topk_lens.fill_(40)
        case.indices[case.indices == 2**30] = -1
        check_prompt(case, flash_mla_sparse_fwd(**given))


def test_rows_of_any_stride():
    case = make()
    wide = torch.full((128, 2, 640), torch.nan, dtype=case.q.dtype)
    wide[:, :1, :576] = case.cache.view(-1, 1, 576)
    check_prompt(case, flash_mla_sparse_fwd(**prompt_of(case, kv=wide[:, :1, :576])))


def test_sink_of_a_prompt():
    case = make(2)
    check_prompt(case, flash_mla_sparse_fwd(**prompt_of(case, attn_sink=SINK)), sink=SINK)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"d_v": 256}, ValueError, "d_v: expected 512, got 256"),
        ({"q": None}, TypeError, "q: expected a torch.Tensor"),
        ({"q": torch.zeros(4, 3, 512)}, ValueError, "q: expected shape [s_q, heads, 576]"),
        ({"q": torch.zeros(4, 3, 576)}, TypeError, "q: expected dtype torch."),
        ({"kv": None}, TypeError, "kv: expected a torch.Tensor"),
        ({"kv": torch.zeros(9, 2, 576)}, ValueError, "kv: expected shape [s_kv, 1, 576], got [9, 2, 576]"),
        ({"kv": torch.zeros(9, 1, 576)}, TypeError, "kv: expected dtype torch.bfloat16 (that of q)"),
        ({"indices": torch.zeros(4, 3, dtype=INT)}, ValueError, "indices: expected shape [4, 1, topk]"),
        ({"indices": torch.zeros(4, 1, 3)}, TypeError, "indices: expected dtype torch.int32"),
        ({"topk_length": torch.zeros(3, dtype=INT)}, ValueError, "topk_length: expected shape [4]"),
        ({"attn_sink": torch.zeros(4)}, ValueError, "attn_sink: expected shape [3]"),
        ({"sm_scale": -1.0}, ValueError, "sm_scale: expected a positive number"),
        ({"use_legacy": None}, TypeError, "use_legacy: expected True or False"),
        ({"return_log2_lse": 2}, TypeError, "return_log2_lse: expected True or False"),
        ({"out": torch.zeros(4, 3, 512)}, TypeError, "out: expected dtype"),
        ({"out": torch.zeros(4, 3, 576).bfloat16()}, ValueError, "out: expected shape"),
    ],
)
def test_prompt_refuses(changed, error, message):
    with pytest.raises(error, match=re.escape(message)):
        flash_mla_sparse_fwd(**prompt_of(make()) | changed)
