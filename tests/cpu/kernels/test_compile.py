"""Every shipped kernel variant compiles for sm_90a without spills, into the instructions its design calls for."""

import collections
import functools
import pathlib
import re

import pytest

import mla_cute
from mla_cute.compile import jit, sass
from mla_cute.config import KernelConfig
from mla_cute.dims import HEAD_DIMS
from mla_cute.kernels import registry
from mla_cute.tuned import select
from mla_cute.tuning import space

MAX_SMEM_BYTES = 232448  # shared memory a CTA can opt in to on sm_90
MAX_REGISTERS_PER_SM = 65536

DEFAULT = KernelConfig()
VARIANTS = registry.variants(config=DEFAULT)
PLANNERS = [v for v in VARIANTS if v[0] in (registry.PLANNER, registry.PREFILL_PLANNER)]
APPENDS = registry.append_variants()
APPENDS_OF_OTHER_DIMS = registry.append_variants(["bfloat16"], head_dims=HEAD_DIMS[1:])
MERGES = registry.merge_states_variants()
# What loads differ in most: whole boxes and the gather; of other head dimensions the first.
CONVERSIONS = [
    *registry.conversion_variants(page_sizes=[64, 1]),
    *registry.conversion_variants(page_sizes=[64], head_dims=HEAD_DIMS[1:]),
]
DECODES_FP8 = (registry.DECODE_FP8, registry.DECODE_TILE32_FP8, registry.DECODE_TILE16_FP8)
PREFILLS_FP8 = (registry.PREFILL_FP8, registry.PREFILL_TILE32_FP8)
TILES32 = (registry.DECODE_TILE32_FP8, registry.PREFILL_TILE32_FP8)
FP8_STEPS = [v for v in registry.variants(kv_formats=registry.KV_FORMATS) if v[0] in (*DECODES_FP8, *PREFILLS_FP8)]


def _covers_16_bit(variant) -> bool:
    """Of the kernels over 16-bit caches float16, which differs from bfloat16 in the types of instructions alone, where
    loads differ most."""
    key = variant[1]
    return getattr(key, "dtype", "") != "float16" or key.box_rows in (64, 0)


COVERED = [*filter(_covers_16_bit, VARIANTS)]
STEPS = [v for v in COVERED if v[0] in (registry.DECODE, registry.PREFILL)]
TILE16_STEPS = [v for v in COVERED if v[0] is registry.DECODE_TILE16]


def _covers(variant) -> bool:
    """A sixth of the 300 FP8 variants, 4 to 8 s of a core each: bfloat16 decode, tiles of 16 heads at every page class
    and row tiles where their producers differ most (boxes of 32 and 16 rows are loaded as those of 8 are), with both
    kinds of query where boxes are whole; prefill and float16 at fewer; tiles of 32 rows in bfloat16, with 16-bit
    queries, both parts of which they multiply at once, and with the others in decode."""
    kernel, key, _ = variant
    if kernel is registry.PREFILL_FP8:
        return key.dtype == "bfloat16" and key.box_rows in (64, 0) and key.q_fp8 == (key.box_rows == 64)
    if kernel is registry.PREFILL_TILE32_FP8:
        return key.dtype == "bfloat16" and key.box_rows == 64 and not key.q_fp8
    if kernel is registry.DECODE_TILE32_FP8:
        return key.dtype == "bfloat16" and key.box_rows in (64, 0) and key.q_fp8 == (key.box_rows == 0)
    if key.dtype == "float16":
        return key.box_rows == 16 and not key.q_fp8
    if kernel is registry.DECODE_FP8 and key.box_rows in (32, 16):
        return False
    return key.box_rows == 64 or key.q_fp8 == (key.box_rows in (32, 0))


# Seconds of a core that a variant takes to compile, where more than 1; tests/cpu/run_order.py goes by it.
COST_S = {
    registry.DECODE_FP8: 14,
    registry.DECODE_TILE32_FP8: 12,
    registry.PREFILL_TILE32_FP8: 12,
    registry.PREFILL_FP8: 14,
    registry.DECODE: 7,
    registry.PREFILL: 7,
    registry.DECODE_TILE16_FP8: 3,
    registry.DECODE_TILE16: 2.5,
}
COVERED_FP8 = [v for v in FP8_STEPS if _covers(v)]
SPARSE = [v for v in registry.sparse_variants() if v[0] is not registry.PLANNER]
# All over 16-bit caches, and of FP8 ones bfloat16 with one kind of query each; of format token's row tiles with both,
# which have no register to spare.
COVERED_SPARSE = [
    (kernel, key, config)
    for kernel, key, config in SPARSE
    if isinstance(key, registry.DecodeKey)
    or (key.dtype == "bfloat16" and key.q_fp8 == (kernel is registry.DECODE_FP8) ^ (key.kv_format == "token"))
    or (key.dtype == "bfloat16" and kernel is registry.DECODE_FP8 and key.kv_format == "token")
]


# Both widths of ckv, and both of kpe that DeepSeek's heads have not.
GATHERED_DIMS = ((512, 32), (256, 0))
# And the one that models have, of the row tiles that take longest to compile.
FP8_ROWS_DIMS = (*GATHERED_DIMS, (256, 64))


def _covers_dims(variant) -> bool:
    """Of other head dimensions bfloat16, by TMA of whole boxes and, of GATHERED_DIMS, by the gathers; over FP8 caches
    one kind of query each; of tiles of 32 rows decode from whole boxes alone, with queries in two parts."""
    kernel, key, _ = variant
    if getattr(key, "box_rows", 64) == 0 and key.dims not in GATHERED_DIMS:
        return False
    if kernel in (registry.DECODE_FP8, registry.PREFILL_FP8, *TILES32) and key.dims not in FP8_ROWS_DIMS:
        return False
    if not isinstance(key, registry.Fp8Key):
        return getattr(key, "dims", HEAD_DIMS[0]) != HEAD_DIMS[0]
    whole_boxes = key.box_rows == 64
    if kernel in TILES32:
        return kernel is registry.DECODE_TILE32_FP8 and whole_boxes and not key.q_fp8
    return key.q_fp8 == (kernel is registry.DECODE_FP8 if key.sparse else whole_boxes)


OTHER_DIMS = [
    *filter(_covers_dims, registry.variants(["bfloat16"], [64, 1], DEFAULT, None, ("", "tensor"), HEAD_DIMS[1:])),
    *filter(_covers_dims, registry.sparse_variants(["bfloat16"], ("", "tensor"), head_dims=HEAD_DIMS[1:])),
]
# Accuracy "native" is other code in row tiles, where the format does not ask for parts of the depth.
NATIVE_FP8 = [
    (kernel, registry.Fp8Key("bfloat16", 64, kv_format, q_fp8), KernelConfig(accuracy="native").launch())
    for kernel, kv_format, q_fp8 in (
        (registry.DECODE_FP8, "tensor", True),
        (registry.DECODE_FP8, "token", False),
        (registry.DECODE_TILE32_FP8, "tensor", False),
        (registry.PREFILL_FP8, "tensor", False),
        (registry.PREFILL_FP8, "token", True),
    )
]
# One e4m3 part of 16-bit queries: where both parts of a key are multiplied in e4m3, and where scales and a gather leave
# the fewest registers.
FAST_FP8 = [
    (kernel, registry.Fp8Key("bfloat16", box_rows, kv_format, False), KernelConfig(accuracy="fast").launch())
    for kernel, box_rows, kv_format in ((registry.DECODE_FP8, 64, "tensor"), (registry.PREFILL_FP8, 0, "group"))
]


def _shipped():
    """What calls with the shipped tuned files' configurations compile, beside the above."""
    found = []
    for path in sorted((pathlib.Path(mla_cute.__file__).parent / "tuned" / "data").glob("*.json")):
        for entry in select.load(path).entries:
            found += space.variants_of(entry.when, entry.config, "bfloat16")
    known = {*VARIANTS, *CONVERSIONS, *COVERED_FP8, *NATIVE_FP8, *FAST_FP8}
    return [v for v in dict.fromkeys(found) if v not in known]


SHIPPED = _shipped()


def name(variant):
    kernel, key, config = variant
    accuracy = [] if config is None or config.accuracy == "high" else [config.accuracy]
    changed = [] if config is None else [f"no_{n}" for n in ("evict_first", "use_pdl") if not getattr(config, n)]
    return "-".join([kernel.name, *(str(value) for value in vars(key).values()), *accuracy, *changed])


def of_variants(variants):
    """A test of each variant, with what tests/cpu/conftest.py orders it by: those of a kernel and key go together."""
    return pytest.mark.parametrize(
        "variant",
        [pytest.param(v, marks=pytest.mark.compiles(v[:2], COST_S.get(v[0], 1)), id=name(v)) for v in variants],
    )


@functools.cache
def compiled(variant):
    """(facts, opcode counts). The tests of a variant run one after the other in one worker, so each is compiled and
    disassembled once and no worker waits for another's; what else compiles it finds it in the session's disk cache."""
    counts = sum(map(sass.opcode_counts, jit.cubins(*variant)), start=collections.Counter())
    return jit.compile_info(*variant), counts


@pytest.fixture(autouse=True)
def nvdisasm():
    if sass.find_nvdisasm() is None:
        pytest.skip("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")


def test_registry_is_complete():
    for kernel in (registry.DECODE, registry.DECODE_TILE16, registry.PREFILL):
        keys = [v[1] for v in VARIANTS if v[0] == kernel]
        assert {(key.dtype, key.box_rows) for key in keys} == {
            (dtype, box) for dtype in ("bfloat16", "float16") for box in (64, 32, 16, 8, 0)
        }
    for kernel in (registry.PLANNER, registry.PREFILL_PLANNER):
        assert len([v for v in PLANNERS if v[0] == kernel]) == 6
    assert len(set(VARIANTS)) == len(VARIANTS)
    assert len(STEPS) + len(TILE16_STEPS) + len(PLANNERS) == len(COVERED) == len(VARIANTS) - 3 * 3
    assert len({repr(v) for v in VARIANTS}) == len(VARIANTS), "keys with equal repr would share a cache entry"


@of_variants(
    [
        *COVERED, *APPENDS, *MERGES, *CONVERSIONS, *COVERED_FP8, *COVERED_SPARSE, *OTHER_DIMS, *NATIVE_FP8, *FAST_FP8,
        *SHIPPED,
    ]
)  # fmt: skip
def test_resources(variant, caplog):
    facts, opcodes = compiled(variant)
    assert facts["spill_bytes"] == 0
    assert not {o: n for o, n in opcodes.items() if o.split(".")[0] in ("LDL", "STL")}
    assert facts["smem_bytes"] <= MAX_SMEM_BYTES
    for kernel in facts["kernels"]:
        assert kernel["threads"], "the launch bound is unknown, so registers are not limited to what fits"
        assert kernel["registers"] * kernel["threads"] <= MAX_REGISTERS_PER_SM
    with caplog.at_level("INFO", logger="mla_cute.jit"):
        jit._load(*jit.exported(*variant))
    assert not caplog.records, "the fast loader does not know this object"


@of_variants(STEPS)
def test_step_instructions(variant):
    _, opcodes = compiled(variant)
    key = variant[1]
    mnemonics = sass.instruction_counts_of(opcodes)
    qk = {o: n for o, n in opcodes.items() if o.startswith("HGMMA.64x64x16.F32")}
    pv = {o: n for o, n in opcodes.items() if o.startswith("HGMMA.64x256x16.F32")}
    assert qk, "S = Q K^T is not a 64x64x16 wgmma with float32 accumulators"
    assert pv, "O = P V is not a 64x256x16 wgmma with float32 accumulators"
    assert sum((*qk.values(), *pv.values())) == mnemonics["HGMMA"]
    assert all(o.endswith(".BF16") == (key.dtype == "bfloat16") for o in (*qk, *pv)), (qk, pv)
    assert mnemonics["USETMAXREG"] >= 2, "producer and consumers do not trade registers"
    assert mnemonics["DEPBAR"] > 0
    assert mnemonics["UTMALDG"] > 0
    if key.box_rows == 0:
        assert mnemonics["LDGSTS"] > 0, "the gather does not use cp.async"
    else:
        assert mnemonics["LDGSTS"] == 0
        # per K tile 9 sub-tiles of 64 columns; each needs 64 / box_rows boxes
        assert mnemonics["UTMALDG"] >= 64 // key.box_rows


@of_variants(TILE16_STEPS)
def test_tile16_instructions(variant):
    """All on mma.sync; nothing is converted, and every K fragment is read once."""
    _, opcodes = compiled(variant)
    key = variant[1]
    mnemonics = sass.instruction_counts_of(opcodes)
    assert mnemonics["HGMMA"] == 0
    hmma = {o: n for o, n in opcodes.items() if o.startswith("HMMA")}
    assert set(hmma) == {"HMMA.16816.F32.BF16" if key.dtype == "bfloat16" else "HMMA.16816.F32"}
    # A tile: 36 for scores, 32 for P V; the first tile's scores and the last one's P V stand outside the loop.
    assert sum(hmma.values()) == 2 * (36 + 32)
    transposed = sum(n for o, n in opcodes.items() if o.startswith("LDSM.16.MT88"))
    assert transposed == 2 * 16
    assert mnemonics["USETMAXREG"] >= 2
    assert (mnemonics["UTMALDG"] == 0) == (key.box_rows == 0)
    assert (mnemonics["LDGSTS"] == 0) == (key.box_rows > 0)


def test_fp8_registry_is_complete():
    for kernel in (*DECODES_FP8, *PREFILLS_FP8):
        keys = [v[1] for v in FP8_STEPS if v[0] == kernel]
        assert len(set(keys)) == len({repr(key) for key in keys}) == len(keys) == 2 * 5 * 3 * 2
    assert len(COVERED_FP8) == 3 * (2 + 4 + 1) + 3 * (2 + 2 + 1) + 3 * 2 + 3 + 3 * 2


@of_variants(COVERED_FP8)
def test_fp8_step_instructions(variant):
    """Row tiles: e4m3 QK and float16 PV on wgmma; few rows: all on mma.sync, and no padding of rows."""
    kernel, key, _ = variant
    _, opcodes = compiled(variant)
    mnemonics = sass.instruction_counts_of(opcodes)
    if kernel is registry.DECODE_TILE16_FP8:
        assert mnemonics["HGMMA"] == mnemonics["QGMMA"] == 0
        assert mnemonics["HMMA"] > 0
    else:
        assert mnemonics["HMMA"] == 0
        assert any(o.startswith("QGMMA.64x64x32.F32.E4M3.E4M3") for o in opcodes)
        rows = 32 if kernel in TILES32 else 64
        assert any(o.startswith(f"HGMMA.64x{rows}x16.F32") for o in opcodes)
    assert mnemonics["LDSM"] > 0, "V^T comes through a transposing ldmatrix"
    assert mnemonics["USETMAXREG"] >= 2
    assert (mnemonics["UTMALDG"] == 0) == (key.box_rows == 0)


def test_sparse_is_complete():
    # Dtypes; kernels over 16-bit caches, and over FP8 ones, formats with both kinds of query.
    assert len(SPARSE) == len(set(SPARSE)) == 2 * (2 + 3 * 3 * 2)
    assert len({repr(key) for _, key, _ in SPARSE}) == 2 * (1 + 3 * 2)
    assert len(COVERED_SPARSE) == 4 + 10
    assert {(kernel, key.kv_format) for kernel, key, _ in COVERED_SPARSE if isinstance(key, registry.Fp8Key)} == {
        (kernel, kv_format) for kernel in DECODES_FP8 for kv_format in registry.KV_FORMATS
    }


@of_variants(COVERED_SPARSE)
def test_sparse_instructions(variant):
    """A gather."""
    kernel = variant[0]
    _, opcodes = compiled(variant)
    mnemonics = sass.instruction_counts_of(opcodes)
    assert mnemonics["LDGSTS"] > 0
    # Q of tile64 over 16-bit caches comes by TMA, nothing else does
    assert (mnemonics["UTMALDG"] > 0) == (kernel is registry.DECODE)


@pytest.mark.usefixtures("nvdisasm")
def test_lists_begin_with_references_that_are_not_chosen():
    """-0.0 is what tells them, and the DSL hands out 0.0 for the number -0.0 where it has had 0.0 before."""
    [variant] = [v for v in COVERED_SPARSE if v[0] is registry.DECODE_FP8 and v[1].kv_format == "group"]
    text = "".join(map(sass.disassemble, jit.cubins(*variant)))
    assert len(re.findall(r"ISETP\.NE\S* P\d, PT, R\d+, -0x80000000", text)) >= 2  # is it chosen?
    assert len(re.findall(r"MOV\S* R\d+, (?:RZ, RZ, )?-0x80000000", text)) >= 2


def test_other_head_dims_are_complete():
    main = (registry.DECODE, registry.DECODE_TILE16, registry.PREFILL)
    fp8 = (registry.DECODE_FP8, registry.DECODE_TILE16_FP8, registry.PREFILL_FP8)
    of_pair = {(kernel, 64, False) for kernel in (*main, registry.DECODE_TILE16_FP8)}
    rows = {(kernel, 64, False) for kernel in (registry.DECODE_FP8, registry.DECODE_TILE32_FP8, registry.PREFILL_FP8)}
    gathers = {(kernel, 0, False) for kernel in (*main, *fp8)} | {(kernel, 0, True) for kernel in (*main[:2], *fp8[:2])}
    wanted = {(dims, *facts) for dims in HEAD_DIMS[1:] for facts in of_pair}
    wanted |= {(dims, *facts) for dims in FP8_ROWS_DIMS for facts in rows}
    wanted |= {(dims, *facts) for dims in GATHERED_DIMS for facts in gathers}
    found = [(key.dims, kernel, key.box_rows, getattr(key, "sparse", False)) for kernel, key, _ in OTHER_DIMS]
    assert len(found) == len(set(found)) == 49
    assert set(found) == wanted


@of_variants(OTHER_DIMS)
def test_products_of_other_head_dims(variant):
    """No channel that is not there is multiplied; P V is half of the channels in each consumer of a row tile."""
    kernel, key, _ = variant
    _, opcodes = compiled(variant)
    ckv, kpe = key.dims

    def count(prefix):
        return sum(n for o, n in opcodes.items() if o.startswith(prefix))

    if kernel is registry.DECODE_TILE16:
        # As of 512 + 64 (test_tile16_instructions).
        assert count("HMMA.16816.F32.BF16") == 2 * ((ckv + kpe) // 16 + ckv // 16)
    elif kernel is registry.DECODE_TILE16_FP8:
        assert count("HMMA.16816.F32") == 2 * ((ckv + kpe) // 16 + ckv // 16)
    elif kernel in TILES32:
        # Both e4m3 parts of Q at once, and always started ahead.
        assert count("QGMMA.64x64x32") == ckv // 32 + kpe // 32 + 4
        assert count("HGMMA.64x32x16") == 2 * (ckv // 128) * 4
    elif kernel in (registry.DECODE_FP8, registry.PREFILL_FP8):
        # A tile's Q K^T and where it is started ahead, in parts of 128 channels, of one e4m3 part of Q or two.
        terms = 1 if key.q_fp8 else 2
        ahead = ckv == 256 or key.q_fp8
        assert count("QGMMA.64x64x32") == terms * (ckv // 32 + kpe // 32 + (4 if ahead else 0))
        assert count("HGMMA.64x64x16") == 2 * (ckv // 128) * 4
    else:
        assert count("HGMMA.64x64x16.F32") == 2 * (ckv + kpe) // 16
        # Of both tiles, by both consumers, and again where references are raised.
        assert count(f"HGMMA.64x{ckv // 2}x16.F32") == 2 * (2 * 2 * 4)
        assert count("HGMMA") == 2 * (ckv + kpe) // 16 + 32


@of_variants(NATIVE_FP8)
def test_high_accuracy_sums_the_depth_in_parts(variant):
    """A wait and a float32 addition for each part, of the same products. With e4m3 queries the code that starts a
    Q K^T stands in two places, where an item begins and a pair ahead: all 16 steps of it natively, else the 4 of the
    first part. 16-bit queries are two e4m3 parts, started in one place; of 32 rows these are multiplied at once."""
    kernel, key, _ = variant
    high = next(v for v in FP8_STEPS if v[:2] == (kernel, key))
    few, many = (compiled(v)[1] for v in (variant, high))
    multiplied, added = (
        [sum(n for o, n in opcodes.items() if o.split(".")[0] == name) for opcodes in (few, many)]
        for name in ("QGMMA", "FADD")
    )
    starts, terms = (2, 1) if key.q_fp8 or kernel in TILES32 else (1, 2)
    rope = 2 if key.kv_format == "tensor" else 0  # of 16-bit values otherwise, which are no QGMMA
    assert multiplied == [terms * (starts * first + 16 - first + rope) for first in (16, 4)]
    assert added[1] > added[0]


@of_variants(FAST_FP8)
def test_fast_multiplies_one_part_of_q(variant):
    """As many products as with e4m3 queries, started in as many places. A thread converts its values of a row in pairs,
    once each: 32 of 128 channels, in a loop, and 16 of the rope."""
    _, opcodes = compiled(variant)
    rope = variant[1].kv_format == "tensor"
    products, conversions = (
        sum(n for opcode, n in opcodes.items() if opcode.startswith(name))
        for name in ("QGMMA", "F2FP.SATFINITE.E4M3.F32")
    )
    assert products == 2 * 4 + 12 + 2 * rope
    assert conversions == 16 + 8 * rope


@of_variants(PLANNERS)
def test_planner_uses_no_tensor_core(variant):
    _, opcodes = compiled(variant)
    mnemonics = sass.instruction_counts_of(opcodes)
    assert mnemonics["HGMMA"] == mnemonics["HMMA"] == mnemonics["UTMALDG"] == 0
    assert mnemonics["total"] > 100


@of_variants([v for v in CONVERSIONS if v[0] is registry.CONVERT])
def test_conversion_instructions(variant):
    facts, opcodes = compiled(variant)
    _, key, _ = variant
    assert facts["registers"] <= 128, "fewer than two CTAs of 256 threads would fit an SM"
    assert facts["threads"] == 256
    chunks = key.dims.ckv // 256  # of a row, that a lane has; four rows of keys, and of e4m3 queries four more
    loads, ropes = 4 * chunks * (1 + key.q_fp8), int(key.dims.kpe > 0)
    rope_fp8 = key.kv_format == "tensor"
    assert opcodes["LDG.E.64"] == loads + ropes * rope_fp8
    assert opcodes["LDG.E.128"] == ropes * (not rope_fp8) + key.q_fp8
    assert opcodes["STG.E.128"] == loads + ropes + key.q_fp8
    conversions = sum(n for opcode, n in opcodes.items() if "E4M3" in opcode)
    assert conversions == 4 * (loads + ropes * rope_fp8)


def test_append_is_complete():
    keys = [key for _, key, _ in APPENDS]
    assert len(set(keys)) == len({repr(key) for key in keys}) == len(keys) == 2 * 4 * 2
    assert registry.append_variants(["float16"], ["group"]) == [
        (registry.APPEND, registry.AppendKey("float16", "group", slots), None) for slots in ("int32", "int64")
    ]
    with pytest.raises(ValueError, match="kv_formats: expected"):
        registry.append_variants(kv_formats=["block"])


@of_variants(APPENDS)
def test_append_instructions(variant):
    facts, opcodes = compiled(variant)
    key = variant[1]
    assert facts["registers"] <= 64, "fewer than 32 warps would fit an SM"
    assert facts["threads"] == 128
    memory = {o: n for o, n in opcodes.items() if o.split(".")[0] in ("LDG", "STG", "LD", "ST", "LDS", "STS")}
    scales = {"STG.E": 1} if key.kv_format in ("token", "group") else {}
    stores = {"": {"STG.E.128": 3}, "tensor": {"STG.E.128": 1, "STG.E.64": 1}}.get(key.kv_format, {"STG.E.128": 2})
    slot = {"LDG.E.64" if key.slots == "int64" else "LDG.E": 1}
    assert memory == {"LDG.E.128": 3, **slot, **stores, **scales}
    conversions = {o: n for o, n in opcodes.items() if "E4M3" in o}
    values = {"": 0, "tensor": 16 + 8}.get(key.kv_format, 16)
    assert sum(conversions.values()) == values // 2
    assert all("SATFINITE" in o for o in conversions)
    if key.kv_format == "group":  # powers of two: exact products, subnormal ones included
        assert opcodes["FMUL"] == values
        assert opcodes["FCHK"] == opcodes["FMUL.FTZ"] == 0
    else:
        # division and not multiplication by a reciprocal: one check for operands out of the short form's range of each
        assert opcodes["FCHK"] == values + len(scales)
    assert opcodes["SHFL.BFLY"] == {"token": 5, "group": 3}.get(key.kv_format, 0)


def test_append_of_other_head_dims_is_complete():
    pairs = {(key.dims, key.kv_format) for _, key, _ in APPENDS_OF_OTHER_DIMS}
    assert pairs == {(dims, kv_format) for dims in HEAD_DIMS[1:] for kv_format in ("", "tensor")}


@of_variants(APPENDS_OF_OTHER_DIMS)
def test_append_instructions_of_other_head_dims(variant):
    facts, opcodes = compiled(variant)
    key = variant[1]
    (ckv, kpe), fp8 = key.dims, key.kv_format == "tensor"
    assert facts["spill_bytes"] == 0
    assert facts["registers"] <= 64, "fewer than 32 warps would fit an SM"
    memory = {o: n for o, n in opcodes.items() if o.split(".")[0] in ("LDG", "STG", "LD", "ST", "LDS", "STS")}
    rope = int(kpe > 0)
    loads = (2 if fp8 or ckv == 512 else 1) + rope
    stores = {"STG.E.128": 1} if fp8 else {"STG.E.128": ckv // 256 + rope}
    if fp8 and rope:
        stores["STG.E.64"] = 1
    slot = {"LDG.E.64" if key.slots == "int64" else "LDG.E": 1}
    assert memory == {"LDG.E.128": loads, **slot, **stores}
    conversions = sum(n for o, n in opcodes.items() if "E4M3" in o)
    assert conversions == (8 + 4 * rope if fp8 else 0)


def test_merge_states_is_complete():
    assert [key.dtype for _, key, _ in MERGES] == ["bfloat16", "float16", "float32"]
    assert registry.merge_states_variants(["float16"]) == [
        (registry.MERGE_STATES, registry.MergeStatesKey("float16"), None)
    ]
    with pytest.raises(ValueError, match="dtypes: expected"):
        registry.merge_states_variants(["float64"])


@of_variants(MERGES)
def test_merge_states_instructions(variant):
    facts, opcodes = compiled(variant)
    assert facts["registers"] <= 32, "fewer than 64 warps would fit an SM"
    assert facts["threads"] == 128
    memory = {o: n for o, n in opcodes.items() if o.split(".")[0] in ("LDG", "STG", "LD", "ST", "LDS", "STS")}
    assert memory == {"LDG.E": 2, "STG.E": 1, "LDG.E.128": 4, "STG.E.128": 2}
