"""FP8 twins of the adversarial cases of cases.py and prefill.py, and the verdict on their results.

`make_fp8` quantises the cache of a 16-bit case, and its queries if asked. What a kernel must not read stays poison:
e4m3 NaN in unused rows and in the gaps of strided tensors, NaN in their 16-bit rope and in their scales. The reference
runs in float32 on the dequantised cache and on the queries given: an error is the kernel's and not the format's.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import quant, reference
from ..dims import CKV_DIM
from .cases import DecodeCase, guard_failures, not_as_given
from .prefill import PrefillCase
from .verdict import Expected, Verdict, form_failures, kind, over, worst

E4M3 = torch.float8_e4m3fn
# "group656" is the format "group" in rows of 656 bytes.
LAYOUTS = ("tensor", "token", "group", "group656")

# Of standard normal data; the largest q and k of a drift of 60 nats fit in what they cover (7.7, 40 and 31).
CKV_SCALE, KPE_SCALE, Q_SCALE = 0.0171875, 0.09, 0.07

# An output may be off by this share of its Frobenius norm, a row by that of its own, an lse by that in its own base. Of
# the first, rounding the output to bf16 takes 1.7e-3.
OUTPUT_LIMIT, ROW_LIMIT, LSE_LIMIT = 3e-3, 1e-2, 1e-2

# e4m3 wgmma adds products and accumulator up with 13 bits below the largest of them, and a 16-bit query enters it with
# 8 significant bits: a score is off by about 2^-10 of the root of the sum of its squared terms, and of itself. Large
# scores lose more than the limits above that way, and then this is the limit. 16-bit rope is added up in float32.
E4M3_NOISE, FLOAT32_NOISE = 2.0**-10, 2.0**-20
# What accuracy "fast" costs of the output's norm on standard normal data (`make_fp8` with spread 1) where requests have
# 64 keys and more: rounding Q to one e4m3 part in exact attention cost 3.2e-2 to 4.0e-2 in 36 cases of three formats.
# A kernel below the first has not rounded Q, one above the second has lost more.
FAST_ERROR = (3e-2, 4.5e-2)
# Elements of the score matrices that the noise is computed from, at a time.
_SCORES_AT_ONCE = 1 << 25


@dataclass
class Fp8Case:
    """`case` with the tensors of an FP8 call in place of the 16-bit ones, and the scale keywords of the call."""

    case: DecodeCase
    layout: str
    q_fp8: bool
    scales: dict[str, Any] = field(repr=False)

    @property
    def kv_format(self) -> str:
        return self.layout.removesuffix("656")

    @property
    def dtype(self) -> torch.dtype:
        """Of the output."""
        return self.case.out.dtype

    def call(self, entry: str = "csr", **kwargs: Any) -> Any:
        """The public call, as `DecodeCase.call`."""
        return self.case.call(entry, **self.scales | kwargs)

    def reset(self) -> None:
        self.case.guarded_out.reset()
        self.case.guarded_lse.reset()

    def real(self, accuracy: str = "high") -> DecodeCase:
        """The case in float32: what its tensors stand for now. With `accuracy` "fast" 16-bit queries are what row tiles
        make of them, the rope part only where it is multiplied in e4m3."""
        case, scales = self.case, self.scales
        if accuracy == "fast" and not self.q_fp8:
            rope = one_e4m3_part(case.q_pe) if self.kv_format == "tensor" else case.q_pe
            case = dataclasses.replace(case, q_nope=one_e4m3_part(case.q_nope), q_pe=rope)
        q_scale = scales.get("q_scale", 1.0)
        ckv, kpe = case.ckv_cache.float(), case.kpe_cache.float()
        if self.kv_format == "tensor":
            ckv, kpe = ckv * scales["ckv_scale"], kpe * scales["kpe_scale"]
        else:
            array = scales["ckv_scale_arr"]
            ckv = ckv * array.repeat_interleave(CKV_DIM // array.shape[-1], dim=-1)
        return dataclasses.replace(
            case,
            q_nope=case.q_nope.float() * q_scale,
            q_pe=case.q_pe.float() * (q_scale if case.q_pe.dtype is E4M3 else 1.0),
            ckv_cache=ckv,
            kpe_cache=kpe,
        )

    def slots(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(page, row in the page) of each token of request b."""
        case = self.case
        token = torch.arange(case.lengths[b], device=case.kv_indices.device)
        return case.kv_indices[case.kv_indptr[b] + token // case.page_size].long(), token % case.page_size

    def load(self, other: Fp8Case) -> None:
        """Overwrite the inputs in place, as `DecodeCase.load`; scales of a whole tensor have to be the same."""
        self.case.load(other.case)
        for name, value in self.scales.items():
            if isinstance(value, torch.Tensor):
                value.copy_(other.scales[name])
            else:
                assert value == other.scales[name]


def make_fp8(
    case: DecodeCase,
    layout: str,
    q_fp8: bool = False,
    *,
    spread: float = 8.0,
    ckv_scale: float = CKV_SCALE,
    kpe_scale: float = KPE_SCALE,
    q_scale: float = Q_SCALE,
) -> Fp8Case:
    """The FP8 twin of a 16-bit case, which it shares metadata, guarded outputs and whatever stays 16-bit with.

    Args:
        layout: one of LAYOUTS. Tensors keep the strides of the 16-bit ones, in elements; "group656" has its own.
        q_fp8: e4m3 queries, those of the rope only with "tensor". The output keeps the dtype of the case.
        spread: formats "token" and "group": tokens are multiplied by 1 / spread to 1 before they are quantised, so that
            the scales of neighbours differ.
        ckv_scale, kpe_scale: of "tensor"; the second is 1 where there is no rope part.
        q_scale: of e4m3 queries.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
    ckv, kpe, dtype = case.ckv_cache, case.kpe_cache, case.out.dtype
    dead = ckv[..., 0].isnan()
    scales: dict[str, Any] = {}
    if layout == "tensor":
        scales = {"ckv_scale": ckv_scale, "kpe_scale": kpe_scale if kpe.shape[-1] else 1.0}
        ckv, kpe = (
            _with_strides_of(x, values)
            for x, values in zip((ckv, kpe), quant.quantize_tensor(ckv, kpe, **scales), strict=True)
        )
    else:
        generator = torch.Generator(device=ckv.device).manual_seed(dead.numel())
        octaves = torch.rand((*dead.shape, 1), device=ckv.device, generator=generator) * math.log2(spread)
        quantize = quant.quantize_token if layout == "token" else quant.quantize_group
        values, array = quantize(ckv.float() * torch.exp2(-octaves))
        array[dead] = math.nan
        if layout == "group656":
            pool = torch.full((*dead.shape, quant.GROUP_ROW_BYTES), 0xFF, dtype=torch.uint8, device=ckv.device)
            row_ckv, row_scales, row_kpe = quant.group_rows(pool)
            row_kpe = row_kpe.view(dtype)
            for part, source in ((row_ckv, values), (row_scales, array), (row_kpe, kpe)):
                part.copy_(source)
            ckv, array, kpe = row_ckv, row_scales, row_kpe
        else:
            ckv = _with_strides_of(ckv, values)
            array = _poisoned_scales(array)
        scales = {"ckv_scale_arr": array}
    q_nope, q_pe = case.q_nope, case.q_pe
    if q_fp8:
        scales["q_scale"] = q_scale
        q_nope = _with_strides_of(q_nope, quant.to_e4m3(q_nope, q_scale))
        if layout == "tensor":
            q_pe = _with_strides_of(q_pe, quant.to_e4m3(q_pe, q_scale))
    fp8 = dataclasses.replace(case, q_nope=q_nope, q_pe=q_pe, ckv_cache=ckv, kpe_cache=kpe)
    return Fp8Case(fp8, layout, q_fp8, scales)


def one_e4m3_part(q: torch.Tensor) -> torch.Tensor:
    """16-bit rows [..., D] rounded to e4m3 under amax / 448 each, in float32: what accuracy "fast" multiplies.

    The product with 448 / amax, both rounded to float32, is what the kernel rounds. 16-bit values often lie halfway
    between two e4m3, and the quotient by amax / 448 sends others of those to the far side: a row then differs by more
    than ROW_LIMIT."""
    x = q.float()
    if not x.shape[-1]:
        return x
    amax = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
    # torch divides a number by a tensor as the number times the tensor's reciprocal, which rounds twice.
    return (x * (torch.full_like(amax, quant.E4M3_MAX) / amax)).to(E4M3).float() * (amax / quant.E4M3_MAX)


def _with_strides_of(template: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """e4m3 `values` with strides and offset of `template`, in elements; NaN in all else of a buffer as large."""
    elements = template.untyped_storage().nbytes() // template.element_size()
    buffer = torch.full((elements,), 0xFF, dtype=torch.uint8, device=template.device).view(E4M3)
    return buffer.as_strided(template.shape, template.stride(), template.storage_offset()).copy_(values)


def _poisoned_scales(array: torch.Tensor) -> torch.Tensor:
    """The scales in a view with NaN around it and behind every page, aligned to what the interface asks and no more."""
    num_pages, page_size, n = array.shape
    buffer = torch.full((num_pages * (page_size + 1) * n + 2 * n,), math.nan, device=array.device)
    view = buffer[n:-n].view(num_pages, page_size + 1, n)[:, :page_size]
    return view.copy_(array)


# ------------------------------------------------------------------------------------------------ the verdict


@dataclass
class Fp8Expected(Expected):
    """Output and lse of the float32 reference, and what e4m3 products may cost beside the limits.

    `noise` [rows, H] is the relative error of a row that scores off by E4M3_NOISE lead to; `score_rounding` is theirs,
    in units of lse. `in_dtype` is `output`.
    """

    noise: torch.Tensor


def expected_fp8(fp8: Fp8Case, *, lse_base: int | str = 2, accuracy: str = "high") -> Fp8Expected:
    """Run the float32 reference on the dequantised case, with "fast" on what `Fp8Case.real` makes of its queries: a
    result of row tiles with that accuracy is judged by the same limits against it."""
    real = fp8.real(accuracy)
    last: dict[str, Any] = {"kv_last_page_len": real.kv_last_page_len, "lse_base": lse_base}
    if isinstance(real, PrefillCase):
        output, lse = reference.prefill_reference(*real.csr_args, causal=real.causal, **last)
    else:
        output, lse = reference.decode_reference(*real.csr_args, **last)
    pages, lengths = reference.requests_of(real.pages, real.page_size)
    if lengths != real.lengths:
        raise AssertionError(f"the case's metadata say lengths {lengths}, it was made for {real.lengths}")
    queries = list(real.queries)
    rows = queries[-1]
    score_rounding, noise = torch.zeros_like(lse[:rows]), torch.zeros_like(lse[:rows])
    in_e4m3 = CKV_DIM if fp8.kv_format != "tensor" else None
    for (begin, end), page_ids, kv_len in zip(itertools.pairwise(queries), pages, lengths, strict=True):
        if kv_len == 0 or begin == end:
            continue
        keys = torch.cat([x.index_select(0, page_ids).flatten(0, 1)[:kv_len] for x in real.tensors[2:]], dim=-1)
        q = torch.cat([x[begin:end] for x in real.tensors[:2]], dim=-1).flatten(0, 1) * real.sm_scale
        sees = torch.arange(kv_len - (end - begin) + 1, kv_len + 1, device=q.device).repeat_interleave(real.num_heads)
        sees = sees.clamp(min=1) if real.causal else torch.full_like(sees, kv_len)
        step = max(1, _SCORES_AT_ONCE // kv_len)
        parts = [_noise(q[i : i + step], keys, sees[i : i + step], in_e4m3) for i in range(0, q.shape[0], step)]
        nats, moved = (torch.cat(x).view(-1, real.num_heads) for x in zip(*parts, strict=True))
        score_rounding[begin:end] = nats * (math.log2(math.e) if lse_base == 2 else 1.0)
        noise[begin:end] = moved
    output = output[:rows]
    return Fp8Expected(output, lse[:rows], score_rounding, output, fp8.dtype, lengths, queries, noise)


def _noise(
    q: torch.Tensor, keys: torch.Tensor, sees: torch.Tensor, in_e4m3: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows [R, ckv + kpe] that see the first `sees` keys: the error of a score in nats, weighted by P, and what it
    moves of the row: nothing where one key has all the weight."""
    scores = q @ keys.T
    variance = FLOAT32_NOISE**2 * (q.square() @ keys.square().T + scores.square())
    part = slice(0, in_e4m3)
    e4m3_scores = q[:, part] @ keys[:, part].T
    variance += E4M3_NOISE**2 * (q[:, part].square() @ keys[:, part].square().T + e4m3_scores.square())
    scores.masked_fill_(torch.arange(keys.shape[0], device=q.device) >= sees[:, None], -math.inf)
    p = scores.softmax(dim=-1)
    nats = (p * variance).sum(dim=-1).sqrt()
    return nats, nats * (1 - p.amax(dim=-1))


def compare_fp8(output: torch.Tensor, lse: torch.Tensor | None, expected: Fp8Expected) -> Verdict:
    """Judge the rows of a result that requests own; `lse` None leaves lse out.

    Accepted is: inf and NaN where the reference has them and nowhere else; an error of at most OUTPUT_LIMIT of the
    output in the Frobenius norm and of ROW_LIMIT of each row, in norm and in its largest element (a quarter of the norm
    where no element is as large); an lse error of at most LSE_LIMIT; or what the noise of e4m3 products explains, once
    of the output and three times of a row and of its lse. `dtype_error` of the verdict is that noise.
    """
    failures = form_failures(output, lse, expected)
    if failures or output.numel() == 0:
        return Verdict(tuple(failures), 0.0, 0.0, 0.0, 1.0, 0.0)

    want, got = expected.output.double(), output.double()
    masks_differ = (kind(output) != kind(expected.output.to(expected.dtype))).any(-1)
    failures += worst(
        "output: inf or NaN where the reference has none, or the reverse", masks_differ.double(), expected
    )
    finite = want.isfinite() & got.isfinite()
    want, got = (x.where(finite, torch.zeros_like(x)) for x in (want, got))
    error = got - want
    norm, error_norm = want.norm(dim=-1), error.norm(dim=-1)
    noise = expected.noise.double().nan_to_num(0.0, 0.0)

    allowed = norm * (3 * noise).clamp(min=ROW_LIMIT)
    failures += over("output: error norm", error_norm, allowed, expected)
    largest, error_max = want.abs().amax(-1), error.abs().amax(-1)
    share = torch.maximum(largest, norm / 4) / norm.clamp(min=1e-300)
    failures += over("output: largest error", error_max, allowed * share, expected)
    total = norm.norm().clamp(min=1e-300)
    relative, noise_total = float(error_norm.norm() / total), float((noise * norm).norm() / total)
    if not relative <= max(OUTPUT_LIMIT, noise_total):
        failures.append(f"output: relative error {relative:.3e}, allowed {max(OUTPUT_LIMIT, noise_total):.3e}")
    cosine = torch.where(
        norm > 0, (got * want).sum(-1) / (got.norm(dim=-1) * norm).clamp(min=1e-300), torch.ones_like(norm)
    )

    lse_error = torch.zeros_like(norm)
    if lse is not None:
        lse_masks_differ = kind(lse) != kind(expected.lse)
        failures += worst(
            "lse: inf or NaN where the reference has none, or the reverse", lse_masks_differ.double(), expected
        )
        lse_finite = lse.isfinite() & expected.lse.isfinite()
        lse_error = (lse.double() - expected.lse.double()).abs().where(lse_finite, lse_error)
        allowed_lse = (3 * expected.score_rounding.double().nan_to_num(0.0, 0.0)).clamp(min=LSE_LIMIT)
        failures += over("lse: error", lse_error, allowed_lse, expected)
    return Verdict(
        failures=tuple(failures),
        relative_error=relative,
        dtype_error=noise_total,
        max_error=float(error_max.max()),
        cosine=float(cosine.min()),
        lse_error=float(lse_error.max()),
    )


def run_fp8(
    fp8: Fp8Case,
    *,
    entry: str = "csr",
    lse_base: int | str = 2,
    expected: Fp8Expected | None = None,
    **kwargs: Any,
) -> Verdict:
    """Run a case through the public call into its guarded outputs and judge what came out.

    Args:
        entry: as `DecodeCase.call`.
        expected: from `expected_fp8`, with the same `lse_base`, and with the accuracy of row tiles where a `config`
            has "fast"; None computes that of "high".
        kwargs: further keywords of the call, such as `plan` or `batch_invariant`.
    """
    fp8.reset()
    case = fp8.case
    output, lse = fp8.call(entry, out=case.out, lse=case.lse, lse_base=lse_base, **kwargs)
    verdict = judge_fp8(fp8, expected_fp8(fp8, lse_base=lse_base) if expected is None else expected)
    failures = not_as_given(case, output, lse)
    return dataclasses.replace(verdict, failures=(*failures, *verdict.failures))


def judge_fp8(fp8: Fp8Case, expected: Fp8Expected) -> Verdict:
    """Judge what is in the case's guarded outputs now, and that nothing else was written."""
    case, rows = fp8.case, fp8.case.queries[-1]
    verdict = compare_fp8(case.out[:rows], case.lse[:rows], expected)
    return dataclasses.replace(verdict, failures=(*guard_failures(case), *verdict.failures))
