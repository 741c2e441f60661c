"""Candidates of a shape, and that pruned ones would have planned the same work as one that stays."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_cute.config import KERNELS, KernelConfig, why_infeasible
from mla_cute.dims import BLOCK
from mla_cute.gpu_speed import H200
from mla_cute.kernels.keys import CONVERT, MAX_PARTS, DecodeKey
from mla_cute.kernels.planner import model, model_prefill
from mla_cute.tuned.select import When, default_for
from mla_cute.tuning import recipes, space

CONFIGS = st.builds(
    KernelConfig,
    cut_unit=st.sampled_from((1, 2)),
    min_blocks=st.sampled_from((*space.MIN_BLOCKS, 3)),
    item_overhead=st.sampled_from((0, *space.ITEM_OVERHEADS)),
    split_penalty=st.sampled_from(space.SPLIT_PENALTIES),
).filter(lambda config: why_infeasible(config) is None)
SMS = st.sampled_from((20, 78, 114, 132))


def tile16(when, config):
    kernel = config.fp8_kernel if when.kv_format else config.kernel
    return kernel == "tile16" or (kernel == "auto" and when.num_heads <= 16)


def decode_plan(when, config, num_sms):
    parts = max(1, min(MAX_PARTS, num_sms // -(-when.num_heads // (16 if tile16(when, config) else 64))))
    plan = model.plan([when.kv_len] * when.batch, [0] * when.batch, parts, when.num_heads, config)
    return plan.items, plan.starts, plan.splits


def prefill_plan(when, config, num_sms):
    request = model_prefill.Request
    requests = [request(b * when.q_len, when.q_len, when.kv_len, 0) for b in range(when.batch)]
    plan = model_prefill.plan(requests, min(MAX_PARTS, num_sms), when.num_heads, True, config)
    return plan.items, plan.merges


@settings(deadline=None, max_examples=300)
@given(
    st.builds(
        When,
        st.just("decode"),
        st.just(""),
        st.just(False),
        st.sampled_from((1, 16, 17, 64, 65, 128)),
        st.just(64),
        st.just(1),
        st.integers(1, 300),
        st.integers(1, 5000),
    ),
    CONFIGS,
    CONFIGS,
    st.sampled_from(KERNELS),
    SMS,
)
def test_equal_signatures_of_decode_are_equal_plans(when, a, b, kernel, num_sms):
    a, b = (dataclasses.replace(config, kernel=kernel) for config in (a, b))
    same = space.plan_signature(when, a, num_sms) == space.plan_signature(when, b, num_sms)
    if same:
        assert decode_plan(when, a, num_sms) == decode_plan(when, b, num_sms)


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(
    st.builds(
        When,
        st.just("prefill"),
        st.just(""),
        st.just(False),
        st.sampled_from((1, 16, 128)),
        st.just(64),
        st.integers(1, 200),
        st.integers(1, 20),
        st.integers(200, 3000),
    ),
    CONFIGS,
    CONFIGS,
    SMS,
)
def test_equal_signatures_of_prefill_are_equal_plans(when, a, b, num_sms):
    same = space.plan_signature(when, a, num_sms) == space.plan_signature(when, b, num_sms)
    assert same == (prefill_plan(when, a, num_sms) == prefill_plan(when, b, num_sms))


@pytest.mark.parametrize("min_blocks", [1, 3, 5, 7, 9, 15])
def test_prefill_rounds_odd_min_blocks_up(min_blocks):
    """A tile of one block more stays whole: from 3 on, the number itself or rounded down to even would cut it."""
    even = min_blocks + 1

    def cut(blocks, **config):
        when = When("prefill", "", False, 16, 64, 4, 1, blocks * BLOCK)
        config = KernelConfig(**config, item_overhead=0, split_penalty=0)
        return space.plan_signature(when, config, 132), prefill_plan(when, config, 132)

    for pieces in (1, 2):
        found = cut(pieces * even, cut_unit=1, min_blocks=min_blocks)
        assert found == cut(pieces * even, cut_unit=1, min_blocks=even) == cut(pieces * even, min_blocks=even)
        signature, (items, _) = found
        assert (signature, len(items)) == ((even,), pieces)


def test_long_prefill_whose_costs_share_classes():
    when = When("prefill", "", False, 128, 64, 130, 1, 200_000)
    for a, b in itertools.combinations((KernelConfig(), KernelConfig(item_overhead=8), KernelConfig(min_blocks=16)), 2):
        same = space.plan_signature(when, a, 132) == space.plan_signature(when, b, 132)
        assert same == (prefill_plan(when, a, 132) == prefill_plan(when, b, 132))


@pytest.mark.parametrize("name", ["small", "deepseek-v3-tp8", "deepseek-v3-dp", "deepseek-v3.2"])
def test_candidates_begin_with_the_default_and_can_run(name):
    for when in recipes.load(name)[::7]:
        found = space.candidates(when, H200)
        default = default_for(when, H200)
        assert found[0] == default
        assert len(found) == len(set(found)) <= 80
        for config in found:
            assert why_infeasible(config) is None
            assert config.accuracy == default.accuracy
            if when.op == "prefill":
                assert config.cut_unit == default.cut_unit == 2
        assert {config.evict_first for config in found} == {True, False}
        assert {config.use_pdl for config in found} == {default.use_pdl}


@pytest.mark.parametrize("kv_format", ["", "group"])
@pytest.mark.parametrize("num_heads", [16, 64, 128])
def test_no_two_candidates_run_the_same(num_heads, kv_format):
    when = When("decode", kv_format, False, num_heads, 64, 1, 4, 1024)
    found = space.candidates(when, H200)
    runs = [(tile16(when, config), config.launch(), str(decode_plan(when, config, 132))) for config in found]
    assert len(set(runs)) == len(runs)
    # 1024 tokens of 4 requests leave several ways to cut on 132 SMs, for either kernel
    for few in (True, False):
        assert len({plan for of, _, plan in runs if of is few}) > 3


def test_the_kernel_is_tuned_where_there_are_two():
    def kernels(op, num_heads, kv_format, batch=16):
        when = When(op, kv_format, False, num_heads, 64, 1, batch, 8192)
        field, other = ("fp8_kernel", "kernel") if kv_format else ("kernel", "fp8_kernel")
        found = space.candidates(when, H200)
        assert {getattr(config, other) for config in found} == {"auto"}
        return {getattr(config, field) for config in found}

    for kv_format in ("", "group"):
        assert kernels("decode", 16, kv_format) == {"auto", "tile64"}
        assert kernels("decode", 17, kv_format, batch=128) == kernels("decode", 128, kv_format) == {"auto", "tile16"}
        # A small step's default names the kernel.
        assert kernels("decode", 32, kv_format, batch=1) == {"tile16", "tile64"}
        converts = {"auto", "convert"} if kv_format else {"auto"}
        assert kernels("prefill", 16, kv_format) == kernels("prefill", 128, kv_format) == converts


@pytest.mark.parametrize(
    ("kv_format", "q_fp8", "q_len", "kernels"),
    [
        ("group", False, 512, {"auto", "tile64"}),  # by default it converts
        ("group", True, 16, {"auto", "convert"}),
        ("token", False, 512, {"auto", "convert"}),
        ("tensor", False, 512, {"auto", "tile64"}),
        ("tensor", True, 512, {"auto"}),
        ("", False, 512, {"auto"}),
    ],
)
def test_whether_prefill_converts_is_tuned(kv_format, q_fp8, q_len, kernels):
    when = When("prefill", kv_format, q_fp8, 16, 64, q_len, 16, 8192)
    found = space.candidates(when, H200)
    assert {config.fp8_kernel for config in found} == kernels
    assert len({space.run_key(when, config, 132) for config in found}) == len(found)
    compiled = {ref for config in found for ref, *_ in space.variants_of(when, config, "bfloat16")}
    assert (CONVERT in compiled) == (len(kernels) == 2)


@pytest.mark.parametrize("kv_format", ["", "group"])
@pytest.mark.parametrize("num_heads", [16, 17, 64, 128])
def test_each_kernel_is_tuned_with_the_pieces_it_takes(num_heads, kv_format):
    # One request: how far it is cut is what min_blocks says.
    when = When("decode", kv_format, False, num_heads, 64, 1, 1, 8192)
    pieces = {True: set(), False: set()}
    for config in space.candidates(when, H200):
        assert why_infeasible(config) is None
        assert config.cut_unit == (1 if tile16(when, config) else 2)
        pieces[tile16(when, config)].add(config.min_blocks)
    assert 1 in pieces[True]
    assert pieces[False] <= set(space.MIN_BLOCKS) - {1}
    assert all(len(found) > 1 for found in pieces.values()), "not only the default's"


@pytest.mark.parametrize(("op", "most"), [("decode", 4), ("prefill", 64)])
def test_no_decode_candidate_cuts_less_than_the_default(op, most):
    """Uniform batches balance when left whole; the ragged ones that an entry also serves would not."""
    when = When(op, "", False, 16, 64, 1 if op == "decode" else 500, 64, 1024)
    assert max(config.split_penalty for config in space.candidates(when, H200)) <= most


RAGGED_DECODE = When("decode", "", False, 64, 64, 1, 64, 32768, "ragged")


@pytest.mark.parametrize("num_heads", [16, 64, 128])
def test_ragged_shapes_are_planned_with_their_lengths(num_heads):
    """Candidates are those that the planner cuts apart there, and not on a uniform batch."""
    ragged = dataclasses.replace(RAGGED_DECODE, num_heads=num_heads)
    lengths = space.kv_lens(ragged)
    assert (len(lengths), len(set(lengths)), max(lengths) <= 32768 < 33 * min(lengths)) == (64, 64, True)
    assert set(space.kv_lens(dataclasses.replace(ragged, lengths="uniform"))) == {32768}
    plans = []
    for config in space.candidates(ragged, H200):
        parts = max(1, min(MAX_PARTS, 132 // -(-num_heads // (16 if tile16(ragged, config) else 64))))
        plan = model.plan(lengths, [0] * 64, parts, num_heads, config)
        plans.append((tile16(ragged, config), config.launch(), str(plan)))
    assert len(set(plans)) == len(plans) > 3


def test_ragged_shapes_may_cut_less_than_the_default():
    """Where that is another plan: 64 requests of up to 32768 tokens are cut whatever it costs."""
    short = dataclasses.replace(RAGGED_DECODE, kv_len=4096)
    default = default_for(short, H200)
    found = space.candidates(short, H200)
    assert found[0] == default
    assert any(config.split_penalty > default.split_penalty for config in found)
    uniform = space.candidates(dataclasses.replace(short, lengths="uniform"), H200)
    assert all(config.split_penalty <= default.split_penalty for config in uniform)


def test_ragged_lengths_that_fill_no_page_are_told_to_the_planner():
    def lengths(when):
        return space.variants_of(when, KernelConfig(), "bfloat16")[1][1].lengths

    assert lengths(RAGGED_DECODE) == "csr_last"
    assert lengths(dataclasses.replace(RAGGED_DECODE, lengths="uniform")) == "csr"
    assert lengths(dataclasses.replace(RAGGED_DECODE, page_size=1)) == "csr"


def test_variants_are_what_a_call_compiles():
    def names(when, config=KernelConfig()):  # noqa: B008 -- frozen
        return [(kernel.name, key) for kernel, key, _ in space.variants_of(when, config, "bfloat16")]

    decode = When("decode", "tensor", True, 16, 32, 1, 1, 64)
    (main, key), (planner, planner_key) = names(decode)
    assert (main, planner) == ("decode_tile16_fp8", "planner")
    assert (key.box_rows, key.kv_format, key.q_fp8, key.dtype) == (32, "tensor", True, "bfloat16")
    assert planner_key.lengths == "csr"
    assert names(dataclasses.replace(decode, kv_len=65))[1][1].lengths == "csr_last"
    assert names(decode, KernelConfig(fp8_kernel="tile64"))[0][0] == "decode_tile32_fp8"
    assert names(dataclasses.replace(decode, num_heads=17))[0][0] == "decode_tile32_fp8"
    assert names(dataclasses.replace(decode, num_heads=33))[0][0] == "decode_tile64_fp8"
    bf16 = dataclasses.replace(decode, kv_format="", q_fp8=False)
    assert names(bf16)[0] == ("decode_tile16", DecodeKey("bfloat16", 32))
    assert names(bf16, KernelConfig(kernel="tile64"))[0] == ("decode_tile64", DecodeKey("bfloat16", 32))
    assert names(bf16, KernelConfig(fp8_kernel="tile64"))[0][0] == "decode_tile16"
    many = dataclasses.replace(bf16, num_heads=17)
    assert names(many)[0][0] == "decode_tile64"
    assert names(many, KernelConfig(kernel="tile16"))[0][0] == "decode_tile16"
    prefill = dataclasses.replace(bf16, op="prefill", q_len=2)
    assert [name for name, _ in names(prefill)] == ["prefill_tile64", "prefill_planner"]
    fp8 = dataclasses.replace(prefill, kv_format="group")
    assert names(fp8)[0][0] == "prefill_tile32_fp8", "what is timed is planned with max_q_len"
    assert names(dataclasses.replace(fp8, q_len=3))[0][0] == "prefill_tile64_fp8"


@pytest.mark.parametrize(("kv_format", "q_fp8"), [("", False), ("group", True)])
@pytest.mark.parametrize("num_heads", [16, 64])
def test_lists_are_tuned_as_decode_over_pages_of_one_token(num_heads, kv_format, q_fp8):
    sparse = When("sparse", kv_format, q_fp8, num_heads, 1, 1, 8, 2048)
    decode = dataclasses.replace(sparse, op="decode")
    found = space.candidates(sparse, H200)
    assert found == space.candidates(decode, H200)
    assert len({tile16(sparse, config) for config in found}) == 2
    for config in found:
        assert space.plan_signature(sparse, config, 132) == space.plan_signature(decode, config, 132)
    [(main, key, _), (planner, planner_key, _)] = space.variants_of(sparse, found[0], "bfloat16")
    assert main.name == ("decode_tile16" if tile16(sparse, found[0]) else "decode_tile64") + ("_fp8" * q_fp8)
    assert (key.box_rows, key.sparse, planner.name, planner_key.lengths) == (0, True, "planner", "seq_lens")


def test_changes_counts_fields():
    default = KernelConfig()
    assert space.changes(default, default) == 0
    assert space.changes(dataclasses.replace(default, use_pdl=False, min_blocks=8), default) == 2
