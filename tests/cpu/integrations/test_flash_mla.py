"""FlashMLA's functions on CPU tensors: signatures against the recorded ones, dense attention against plain torch.
test_flash_mla_sparse.py has sparse attention.

FlashMLA is built with nvcc and cannot be installed where there is no GPU, so its signatures are held against records
made from sources (tests/recorded_signatures.py): tests/data/flash_mla_9241ae3.json of a commit of FlashMLA, the other
two of the copies that vLLM and sgl-flash-mla ship.
"""

import pytest
import torch
from integration_case import SM_SCALE, Case, rows_of_656
from recorded_signatures import load, of

from mla_cute import quant
from mla_cute.integrations import flash_mla
from mla_cute.integrations.flash_mla import (
    FlashMLASchedMeta,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
)

RECORD = load("flash_mla_9241ae3.json")
(RECORDED,) = RECORD["files"].values()
COPIES = [load("flash_mla_vllm_0.33.0.json"), load("flash_mla_sgl_1.0.0.json")]
OURS = {
    "get_mla_metadata": get_mla_metadata, "flash_mla_with_kvcache": flash_mla_with_kvcache,
    "FlashMLASchedMeta": FlashMLASchedMeta, "FlashMLASchedMeta.Config": FlashMLASchedMeta.Config,
    "flash_mla_sparse_fwd": flash_mla_sparse_fwd,
}  # fmt: skip
E4M3 = torch.float8_e4m3fn
KV_LENS = (17, 64, 0, 3, 8)
OUT_TOLERANCE = {"rtol": 2**-7, "atol": 2**-8}  # the output is rounded to bf16; values are around 1


def make(tokens=1, **kwargs):
    return Case([(tokens, n) for n in KV_LENS], **kwargs)


def args_of(case, meta=None, **changed):
    """Keyword arguments of a call."""
    return {
        "q": case.q.view(len(KV_LENS), -1, *case.q.shape[1:]), "k_cache": case.cache[:, :, None],
        "block_table": case.block_table, "cache_seqlens": case.kv_len_arr, "head_dim_v": 512,
        "tile_scheduler_metadata": meta or get_mla_metadata()[0], "softmax_scale": SM_SCALE,
    } | changed  # fmt: skip


def check(case, result, causal=True, sm_scale=SM_SCALE, cache=None, rtol=1e-5):
    """`result` in FlashMLA's shapes: out [b, s_q, h, 512], lse [b, h, s_q]."""
    out, lse = case.expected(causal, sm_scale, cache)
    batch, (rows, heads) = len(KV_LENS), lse.shape
    tokens = rows // batch
    got, got_lse = result
    assert got.shape == (batch, tokens, heads, 512)
    assert got_lse.shape == (batch, heads, tokens)
    torch.testing.assert_close(got.float(), out.view(got.shape), **OUT_TOLERANCE)
    torch.testing.assert_close(got_lse, lse.view(batch, tokens, heads).transpose(1, 2), rtol=rtol, atol=rtol)


# ------------------------------------------------------------------------------------------------ signatures


def test_signatures_are_the_recorded_ones():
    """Fields and keyword-only parameters of this library may follow."""
    assert RECORD["version"] in flash_mla.__doc__
    assert OURS.keys() == RECORDED.keys()
    for name, recorded in RECORDED.items():
        parameters = of(OURS[name])
        assert parameters[: len(recorded)] == recorded, name
        assert all(p["kind"] == "KEYWORD_ONLY" or p["kind"] == "FIELD" for p in parameters[len(recorded) :]), name


@pytest.mark.parametrize("copy", COPIES, ids=lambda copy: copy["package"])
def test_what_copies_add_is_taken_by_keyword(copy):
    """Fields too, with a default where the copy has none: FlashMLA's own constructor calls stay valid."""
    (recorded,) = copy["files"].values()
    assert copy["version"] in flash_mla.__doc__
    assert recorded.keys() == OURS.keys()
    for name, parameters in recorded.items():
        ours = {p["name"]: p for p in of(OURS[name])}
        own = [p["name"] for p in RECORDED[name]]
        assert [p["name"] for p in parameters[: len(own)]] == own, name
        for p in parameters[len(own) :]:
            assert ours[p["name"]]["default"] == p.get("default", False), (name, p)


def test_metadata_takes_the_older_arguments():
    meta, nothing = get_mla_metadata(torch.ones(2), 16, 1, num_heads_q=16)
    assert nothing is None
    assert meta == FlashMLASchedMeta()


# ------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_result_is_attention(tokens, causal, dtype):
    case = make(tokens, dtype=dtype)
    check(case, flash_mla_with_kvcache(**args_of(case, causal=causal)), causal)


@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_page_sizes(page_size):
    case = make(2, page_size=page_size, num_pages=200, num_indices=200)
    check(case, flash_mla_with_kvcache(**args_of(case, causal=True)))


def test_default_scale_is_that_of_576_channels():
    case = make()
    check(case, flash_mla_with_kvcache(**args_of(case, softmax_scale=None)), sm_scale=576**-0.5)


@pytest.mark.parametrize("tokens", [1, 2])
def test_q_of_any_strides(tokens):
    """Views: of a wider buffer, and with heads before tokens, which cannot become one dimension without a copy."""
    case = make(tokens)
    q = args_of(case)["q"]
    wide = torch.full((*q.shape[:-1], 600), torch.nan, dtype=q.dtype)
    wide[..., :576] = q
    for view in (wide[..., :576], q.transpose(1, 2).contiguous().transpose(1, 2)):
        check(case, flash_mla_with_kvcache(**args_of(case, q=view, causal=True)))


@pytest.mark.parametrize(("batch", "tokens"), [(0, 1), (0, 3), (3, 0)])
@pytest.mark.parametrize("columns", [0, 2])
def test_steps_without_queries(batch, tokens, columns):
    case, meta = make(), get_mla_metadata()[0]
    table = torch.full((batch, columns), -1, dtype=torch.int32)
    given = {
        "q": case.q.new_empty(batch, tokens, 3, 576),
        "block_table": table,
        "cache_seqlens": table.new_zeros(batch),
    }
    for _ in range(2):
        out, lse = flash_mla_with_kvcache(**args_of(case, meta) | given)
        assert out.shape == (batch, tokens, 3, 512)
        assert lse.shape == (batch, 3, tokens)


@pytest.mark.parametrize("tokens", [1, 2])
def test_requests_without_keys_need_no_columns(tokens):
    case = make(tokens)
    given = {"block_table": case.block_table[:, :0], "cache_seqlens": torch.zeros_like(case.kv_len_arr)}
    out, lse = flash_mla_with_kvcache(**args_of(case) | given)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("tokens", [1, 3])
def test_layers_share_the_metadata(tokens):
    case = make(tokens)
    meta, _ = get_mla_metadata()
    check(case, flash_mla_with_kvcache(**args_of(case, meta, causal=True)))
    plan = meta.plan
    assert meta.have_initialized
    case.q.neg_()
    check(case, flash_mla_with_kvcache(**args_of(case, meta, causal=True)))
    assert meta.plan is plan


@pytest.mark.parametrize("tokens", [1, 3])
def test_out_is_written_and_returned(tokens):
    case = make(tokens)
    out = torch.full((len(KV_LENS), tokens, case.q.shape[1], 512), torch.nan, dtype=torch.bfloat16)
    result = flash_mla_with_kvcache(**args_of(case, out=out, causal=True))
    assert result[0] is out
    check(case, result)


@pytest.mark.parametrize("tokens", [1, 3])
def test_batch_invariance_goes_to_the_plan(tokens):
    """Whose bits are the business of tests of plans."""
    case = make(tokens)
    meta, _ = get_mla_metadata()
    given = args_of(case, meta, enable_batch_invariant=True, use_legacy=True, causal=True)
    check(case, flash_mla_with_kvcache(**given))
    assert meta.plan.batch_invariant
    with pytest.raises(ValueError, match=r"expected one for .*enable_batch_invariant=False"):
        flash_mla_with_kvcache(**given | {"enable_batch_invariant": False})


# ------------------------------------------------------------------------------------------------ FP8


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("dtype", [torch.uint8, E4M3])
def test_rows_of_656_bytes(tokens, dtype):
    case = make(tokens)
    pool, real = rows_of_656(case)
    given = args_of(case, k_cache=pool[:, :, None].view(dtype), is_fp8_kvcache=True, causal=True)
    check(case, flash_mla_with_kvcache(**given), cache=real)


@pytest.mark.parametrize("q_fp8", [False, True])
@pytest.mark.parametrize("shape", [None, (), (1,)])
def test_cache_with_one_scale(q_fp8, shape):
    """Scales are numbers, or tensors as sgl-flash-mla takes them, which says is_fp8_kvcache=True then."""
    case = make(2)
    stored = quant.to_e4m3(case.cache, 0.02)
    scale = (lambda x: x) if shape is None else (lambda x: torch.full(shape, x))
    given = {"k_cache": stored[:, :, None], "descale_k": scale(0.02), "is_fp8_kvcache": shape is not None}
    if q_fp8:
        case.q = quant.to_e4m3(case.q, 0.25)
        given["descale_q"] = scale(0.25)
    result = flash_mla_with_kvcache(**args_of(case, causal=True, **given))
    if q_fp8:
        assert result[0].dtype is torch.bfloat16
        case.q = case.q.float() * 0.25
    check(case, result, cache=stored.float() * 0.02)


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"attn_sink": torch.zeros(1)}, ValueError, "attn_sink: expected None without indices"),
        ({"extra_k_cache": torch.zeros(1)}, NotImplementedError, "extra_k_cache: .*a second cache is not supported"),
        ({"extra_topk_length": torch.zeros(1)}, NotImplementedError, "extra_topk_length: .*a second cache"),
        ({"topk_length": torch.zeros(1)}, ValueError, "topk_length: expected None without indices"),
        ({"tile_scheduler_metadata": torch.zeros(1)}, TypeError, "tile_scheduler_metadata: expected the FlashMLASch"),
        ({"num_splits": torch.zeros(1)}, ValueError, "num_splits: expected None"),
        ({"head_dim_v": 576}, ValueError, "head_dim_v: expected 512, got 576"),
        ({"causal": None}, TypeError, "causal: expected True or False"),
        ({"q": torch.zeros(5, 3, 576)}, ValueError, r"q: expected shape \[batch, s_q, heads, 576\]"),
        ({"q": torch.zeros(5, 1, 3, 320)}, ValueError, r"q: expected shape \[batch, s_q, heads, 576\]"),
        ({"q": torch.zeros(5, 1, 3, 512)}, ValueError, r"q: expected shape \[batch, s_q, heads, 576\]"),
        ({"q": torch.zeros(5, 1, 129, 576)}, ValueError, "q: expected 1 to 128 heads"),
        ({"k_cache": torch.zeros(9, 8, 1, 512)}, ValueError, "k_cache: expected shape .*576"),
        ({"k_cache": torch.zeros(9, 8, 2, 576)}, ValueError, "k_cache: expected shape"),
        ({"k_cache": torch.zeros(9, 8, 1, 576)}, TypeError, "ckv_cache: expected dtype"),
        ({"is_fp8_kvcache": True}, ValueError, "k_cache: expected shape .*656"),
        ({"block_table": None}, TypeError, "block_table: expected a torch.Tensor"),
        ({"cache_seqlens": None}, TypeError, "cache_seqlens: expected a torch.Tensor"),
        ({"block_table": torch.ones(4, 2, dtype=torch.int32)}, ValueError, r"block_table: .*\[5, max_num_blocks\]"),
        ({"cache_seqlens": torch.ones(4, dtype=torch.int32)}, ValueError, "cache_seqlens: expected shape"),
        ({"softmax_scale": 0.0}, ValueError, "sm_scale"),
        ({"descale_q": 2.0}, ValueError, "descale_q: expected None"),
        ({"descale_k": 2.0}, ValueError, "descale_k: expected None"),
        ({"kv_format": "V32"}, ValueError, "kv_format: expected None without indices"),
        ({"use_legacy": None}, TypeError, "use_legacy: expected True or False"),
        ({"enable_batch_invariant": 1}, TypeError, "enable_batch_invariant: expected True or False"),
        ({"out": 1}, TypeError, "out: expected a torch.Tensor"),
        ({"out": torch.zeros(5, 3, 512)}, ValueError, r"out: expected shape \[5, 1, 3, 512\], got \[5, 3, 512\]"),
        ({"out": torch.zeros(5, 1, 3, 1024)[..., ::2]}, ValueError, "out: expected a contiguous tensor"),
        ({"out": torch.zeros(5, 1, 3, 512)}, TypeError, "out: expected dtype"),
    ],
)
def test_refuses(changed, error, message):
    case, meta = make(), get_mla_metadata()[0]
    with pytest.raises(error, match=message):
        flash_mla_with_kvcache(**args_of(case, meta) | changed)
    assert meta == FlashMLASchedMeta()


def test_fp8_refuses():
    case = make()
    stored = {"k_cache": case.cache.to(E4M3)[:, :, None]}
    for descale_k, error in ((torch.ones(2), ValueError), (torch.ones(1).int(), TypeError), (-1.0, ValueError)):
        with pytest.raises(error, match="descale_k: expected"):
            flash_mla_with_kvcache(**args_of(case, **stored, descale_k=descale_k))
    pool, _ = rows_of_656(case)
    with pytest.raises(ValueError, match="descale_k: expected None with rows of 656 bytes"):
        flash_mla_with_kvcache(**args_of(case, k_cache=pool[:, :, None], is_fp8_kvcache=True, descale_k=1.0))
    wide = torch.zeros(*case.cache.shape[:2], 1, 656, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="k_cache: expected a dtype of one byte"):
        flash_mla_with_kvcache(**args_of(case, k_cache=wide, is_fp8_kvcache=True))


def test_metadata_of_another_step_is_refused():
    meta, _ = get_mla_metadata()
    flash_mla_with_kvcache(**args_of(make(), meta))
    for case, changed in ((make(2), {}), (make(num_heads=4), {}), (make(page_size=4), {}), (make(), {"causal": True})):
        with pytest.raises(ValueError, match="tile_scheduler_metadata: expected one for"):
            flash_mla_with_kvcache(**args_of(case, meta, **changed))
