"""Shapes to tune: recipes, flags, logs, and the order they are tuned in."""

import dataclasses
import itertools
import json
import math
import re

import pytest
from tune_case import DECODE

from mla_cute.bench.cases import RAGGED, Case, PrefillCase
from mla_cute.tuned.select import When
from mla_cute.tuning import recipes

DECODE_GRID = 6 * 5 * 2 + 5 * 4 * 2
COUNTS = {
    "small": 7,
    "deepseek-v3-tp8": DECODE_GRID + 2 * 2 + 2 * 2 * 2,
    "deepseek-v3-dp": DECODE_GRID + 2 * 2 + 2 * 2 * 2,
    # 64 and 128 heads over 16-bit caches, 16 over FP8 ones, 64 and 128 over those, prefill.
    "deepseek-v3-formats": 2 * 5 * 3 + 3 * 2 * 4 + 2 * 3 * 6 + 2 * 6 + 2,
    "deepseek-v3.2": 4 * 10 * 3,
    "kimi-k2-tp8": DECODE_GRID + 2 * 2 * 2,
    # 16-bit caches have no e4m3 queries: 7 kinds of cache and query.
    # One kind of queries over format tensor.
    "ragged": 3 * 3 * 2 * 2 * 2,
    "full": 5 * 5 * 5 * 2 * 7 + 5 * 3 * 3 * 2 * 2 * 7,
}


def test_every_recipe_parses_to_its_number_of_shapes():
    assert {name: len(recipes.load(name)) for name in recipes.names()} == COUNTS


@pytest.mark.parametrize(("name", "heads"), [("deepseek-v3-tp8", 16), ("deepseek-v3-dp", 128), ("kimi-k2-tp8", 8)])
def test_a_deployment_has_its_heads_only(name, heads):
    assert {when.num_heads for when in recipes.load(name)} == {heads}


def test_full_holds_the_whole_grid_in_every_format():
    found = set(recipes.load("full"))
    grid = itertools.product((8, 16, 32, 64, 128), (1, 4, 16, 64, 128), (1024, 4096, 8192, 32768, 131072), (1, 64))
    for heads, batch, kv_len, page_size in grid:
        for kv_format, q_fp8 in [("", False), *itertools.product(("tensor", "token", "group"), (False, True))]:
            assert When("decode", kv_format, q_fp8, heads, page_size, 1, batch, kv_len) in found


def test_every_shape_of_every_recipe_is_a_bench_case():
    for name in recipes.names():
        for when in recipes.load(name):
            case = recipes.case_of(when, "bfloat16")
            if when.lengths == "uniform":
                assert case.requests[0] == (when.q_len, when.kv_len)
            assert len(case.requests) == when.batch
            assert (case.kv_format, case.q_fp8) == (when.kv_format, when.q_fp8)
            if when.op != "sparse":
                assert case.page_size == when.page_size


def test_the_shapes_of_lists():
    found = recipes.load("deepseek-v3.2")
    kinds = (("", False), ("group", False), ("group", True))
    grid = itertools.product(kinds, (16, 32, 64, 128), (2**i for i in range(10)))
    assert set(found) == {When("sparse", *kind, heads, 1, 1, tokens, 2048) for kind, heads, tokens in grid}
    bf16, fp8 = When("sparse", "", False, 16, 1, 1, 4, 2048), When("sparse", "group", True, 16, 1, 1, 4, 2048)
    assert recipes.case_of(bf16, "float16") == Case(16, 4, 2048, dtype="float16", sparse=True)
    rows = Case(16, 4, 2048, sparse=True, kv_format="group", q_fp8=True, layout="fused")
    assert recipes.case_of(fp8, "bfloat16") == rows
    # The page sizes of decode's shapes in one table with them are none of theirs.
    table = {"op": ["decode", "sparse"], "heads": 16, "batch": 4, "kv_len": 2048}
    assert recipes.product(table, "R") == [When("decode", "", False, 16, 64, 1, 4, 2048), bf16]


def test_lists_have_an_order_of_their_own():
    sparse = [When("sparse", "", False, 16, 1, 1, 2**i, 2048) for i in range(5)]
    mixed = recipes.coarse_first([*sparse, *(dataclasses.replace(DECODE, batch=n) for n in (300, 2000))])
    order = [when.batch for when in mixed if when.op == "sparse"]
    assert (set(order[:2]), order[2]) == ({1, 16}, 4)


def test_case_of_both_ops():
    assert recipes.case_of(DECODE, "float16") == Case(16, 16, 8192, dtype="float16")
    prefill = When("prefill", "group", True, 8, 32, 4, 3, 100)
    assert recipes.case_of(prefill, "bfloat16") == PrefillCase(8, ((3, 4, 100),), 32, kv_format="group", q_fp8=True)


def test_ragged_shapes_are_those_of_the_bench():
    """Preset `ragged` has 1024 to 32768 tokens."""
    text = """[[shapes]]
op = "decode"
heads = [16, 64, 128]
batch = [1, 16, 64, 128]
kv_len = 32768
lengths = ["uniform", "ragged"]
"""
    found = recipes.parse(text, "here")
    # One request is as long as itself.
    assert [when.lengths for when in found].count("ragged") == len(found) - 12 == 9
    cases = {recipes.case_of(when, "bfloat16") for when in found if when.lengths == "ragged"}
    assert cases == set(RAGGED)
    short = dataclasses.replace(DECODE, kv_len=33, lengths="ragged")
    assert {2, 3} <= {n for _, n in recipes.case_of(short, "float16").requests}
    assert max(n for _, n in recipes.case_of(short, "float16").requests) <= 33


def test_a_file_beside_the_package_works_and_values_need_no_list(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('about = "x"\n[[shapes]]\nop = "decode"\nheads = 16\nbatch = [2, 2, 3]\nkv_len = 100\n')
    assert recipes.load(str(path)) == [dataclasses.replace(DECODE, batch=b, kv_len=100) for b in (2, 3)]


TABLE = '[[shapes]]\nop = "decode"\nheads = 16\nbatch = 1\nkv_len = 64\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[shapes]", "R: not TOML"),
        ("", r"R: expected at least one table \[\[shapes\]\]"),
        ("shapes = 3", r"R: expected at least one table \[\[shapes\]\]"),
        (TABLE + "[[shape]]\n", r"R: unknown keys \['shape'\]"),
        (TABLE + "page = 3\n", r"R: shapes\[0\]: unknown keys \['page'\]; known are op, heads"),
        (TABLE + '[[shapes]]\nop = "decode"\nheads = 1\nbatch = 1\n', r"R: shapes\[1\]\.kv_len: missing"),
        (TABLE.replace("16", '"16"'), r"R: shapes\[0\]\.heads: expected int, got '16'"),
        (TABLE.replace("16", "true"), r"R: shapes\[0\]\.heads: expected int, got True"),
        (TABLE.replace("16", "129"), r"R: shapes\[0\]\.heads: expected at most 128, got 129"),
        (TABLE.replace("16", "[16, 0]"), r"R: shapes\[0\]\.heads: expected at least 1, got 0"),
        (TABLE.replace("16", "[]"), r"R: shapes\[0\]\.heads: expected at least one value"),
        (
            TABLE.replace('"decode"', '"append"'),
            r"R: shapes\[0\]\.op: expected one of 'decode', 'prefill', 'sparse', got",
        ),
        (
            TABLE.replace("decode", "sparse") + "q_len = 2\n",
            r"R: shapes\[0\]\.q_len: sparse has one query token per re",
        ),
        (
            TABLE.replace("decode", "sparse") + "page_size = 64\n",
            r"R: shapes\[0\]\.page_size: sparse gathers from pages of every size alike, got \[64\]",
        ),
        (TABLE + 'kv_format = "int8"\n', r"R: shapes\[0\]\.kv_format: expected one of '', 'tensor'"),
        (TABLE + "q_fp8 = 1\n", r"R: shapes\[0\]\.q_fp8: expected bool, got 1"),
        (TABLE + "q_len = 2\n", r"R: shapes\[0\]\.q_len: decode has one query token per request, got \[2\]"),
        (TABLE + "q_fp8 = true\n", r"R: shapes\[0\]: no shape is left: q_fp8 needs a kv_format"),
        (TABLE.replace("decode", "prefill") + "q_len = 65\n", r"R: shapes\[0\]: no shape is left"),
    ],
)
def test_errors_name_file_table_and_key(text, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        recipes.parse(text, "R")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('lengths = "long"', "a.toml: shapes[0].lengths: expected one of 'uniform', 'ragged', got 'long'"),
        ('lengths = ["ragged"]\nbatch = 1', "a.toml: shapes[0]: no shape is left: q_fp8 needs a kv_format, q_len at"),
        (
            'lengths = "ragged"\nop = ["decode", "prefill"]',
            "a.toml: shapes[0].lengths: ragged are those of decode, got prefill beside it",
        ),
    ],
)
def test_lengths_that_cannot_be_are_named(lines, message):
    keys = {"op": '"decode"', "heads": "16", "batch": "16", "kv_len": "8192"}
    keys |= dict(line.split(" = ") for line in lines.splitlines())
    text = "\n".join(["[[shapes]]", *(f"{key} = {value}" for key, value in keys.items())])
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        recipes.parse(text, "a.toml")


def test_an_unknown_name_lists_the_recipes_and_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"-formats, deepseek-v3-tp8, deepseek-v3\.2, full, kimi-k2-tp8, ragged, small, got 'deepseek'"
    ):
        recipes.load("deepseek")
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        recipes.load(str(tmp_path / "none.toml"))


def test_shapes_from_a_log_come_by_frequency_and_get_the_lengths_they_lack(tmp_path):
    known, unknown = DECODE, dataclasses.replace(DECODE, batch=3, kv_len=None)
    prefill = dataclasses.replace(DECODE, op="prefill", q_len=512, kv_len=100)
    lines = [(known, 1), (unknown, 7), (prefill, 2), (known, 1)]
    path = tmp_path / "log"
    path.write_text("".join(json.dumps({"when": dataclasses.asdict(w), "count": n}) + "\n" for w, n in lines))
    found = recipes.from_log(path, [1024, 4096])
    assert found[:2] == [dataclasses.replace(unknown, kv_len=n) for n in (1024, 4096)]
    # more query tokens than keys would see nothing
    assert set(found[2:]) == {known, dataclasses.replace(prefill, kv_len=512)}


def test_a_broken_log_names_file_and_line(tmp_path):
    path = tmp_path / "log"
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="log line 1"):
        recipes.from_log(path, [1024])


def test_the_order_is_a_permutation_that_begins_with_the_corners():
    whens = recipes.load("deepseek-v3-tp8")
    ordered = recipes.coarse_first(whens[::-1])
    assert sorted(ordered, key=dataclasses.astuple) == sorted(whens, key=dataclasses.astuple)
    assert ordered == recipes.coarse_first(whens)
    corners = {(when.batch, when.kv_len) for when in ordered[:16] if when.op == "decode"}
    assert corners == set(itertools.product((1, 128), (1024, 131072)))
    # every kind of cache and page is there before any is refined
    first = {(when.kv_format, when.page_size) for when in ordered[:20] if when.op == "decode"}
    assert first == {("", 1), ("", 64), ("tensor", 64), ("group", 64)}


def test_every_beginning_of_the_order_covers_the_range_evenly():
    whens = [dataclasses.replace(DECODE, batch=2**i) for i in range(9)]
    order = [math.log2(when.batch) for when in recipes.coarse_first(whens)]
    assert sorted(order[:2]) == [0, 8]
    assert order[2] == 4
    assert sorted(order[3:5]) == [2, 6]
    assert sorted(order[5:]) == [1, 3, 5, 7]
