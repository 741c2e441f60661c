"""Which entry of a tuned file serves a call."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tuned_case import entry, tuned_file, when

from mla_cute.config import KERNELS, KernelConfig, why_infeasible
from mla_cute.kernels.registry import box_rows_of
from mla_cute.tuned import select
from mla_cute.tuned.select import Entry, Grid, When

OTHER = KernelConfig(evict_first=False, min_blocks=8)


def nearest(call: When, *entries: Entry) -> Entry | None:
    index = Grid(tuned_file(*entries)).nearest(call)
    return None if index is None else entries[index]


@pytest.mark.parametrize(
    "other",
    [
        {"op": "prefill"},
        {"kv_format": "tensor"},
        {"page_size": 32},
        {"page_size": 1},
        {"num_heads": 65},
    ],
)
def test_an_entry_of_another_class_serves_no_call(other):
    assert nearest(when(num_heads=64), entry(num_heads=64)) is not None
    assert nearest(when(num_heads=64), entry(**{"num_heads": 64} | other)) is None


@pytest.mark.parametrize(
    ("call", "there", "serves"),
    [
        ({"kv_format": "token"}, {"kv_format": "group"}, False),
        ({"kv_format": "token", "q_fp8": True}, {"kv_format": "token"}, False),
        # Decode has a kernel of its own up to 16 heads, prefill has not.
        ({"kv_format": "token", "num_heads": 17}, {"kv_format": "token", "num_heads": 16}, False),
        ({"kv_format": "token", "num_heads": 16}, {"kv_format": "token", "num_heads": 17}, False),
        ({"kv_format": "token", "num_heads": 9}, {"kv_format": "token", "num_heads": 16}, True),
        ({"num_heads": 17}, {"num_heads": 16}, False),
        ({"num_heads": 16}, {"num_heads": 17}, False),
        ({"num_heads": 9}, {"num_heads": 16}, True),
        ({"num_heads": 17}, {"num_heads": 64}, True),
        ({"op": "prefill", "num_heads": 17}, {"op": "prefill", "num_heads": 16}, True),
        ({"op": "prefill", "kv_format": "token", "num_heads": 17}, {"op": "prefill", "kv_format": "token"}, True),
        ({"op": "prefill", "num_heads": 128}, {"op": "prefill", "num_heads": 64}, True),
        ({"num_heads": 128}, {"num_heads": 64}, False),
        # Page sizes that load alike.
        ({"page_size": 192}, {"page_size": 64}, True),
        ({"page_size": 100}, {"page_size": 1}, True),
        ({"page_size": 24}, {"page_size": 8}, True),
        ({"page_size": 16}, {"page_size": 8}, False),
    ],
)
def test_classes(call, there, serves):
    assert (nearest(when(**call), entry(**there)) is not None) is serves


@pytest.mark.parametrize(
    ("op", "name"),
    [("decode", "batch"), ("decode", "kv_len"), *(("prefill", n) for n in ("batch", "kv_len", "q_len", "num_heads"))],
)
def test_a_factor_of_four_is_the_reach(op, name):
    at = 12
    for value, serves in ((3, True), (48, True), (2, False), (49, False)):
        assert (nearest(when(op=op, **{name: value}), entry(op=op, **{name: at})) is not None) is serves, value


@pytest.mark.parametrize("kv_format", ["", "token"])
def test_a_factor_of_four_is_the_reach_of_few_heads(kv_format):
    """Of decode; the classes of more than 16 heads are no wider than that."""
    for at, value, serves in ((16, 4, True), (16, 3, False), (3, 12, True), (3, 13, False)):
        call, there = when(num_heads=value, kv_format=kv_format), entry(num_heads=at, kv_format=kv_format)
        assert (nearest(call, there) is not None) is serves, (at, value)


def test_every_coordinate_has_to_be_in_reach():
    assert nearest(when(batch=32, kv_len=2048), entry()) is not None
    # Nearer in sum, out of reach in one.
    far, near = entry(batch=40), entry(batch=32, kv_len=2048)
    assert select.distance(when(), far.when) < select.distance(when(), near.when)
    assert nearest(when(), far, near) is near


def test_a_tuned_range_is_continued_beyond_its_ends():
    entries = [entry(batch=b, kv_len=length) for b in (2, 8) for length in (1024, 4096, 16384)]
    for call, taken in (
        ({"batch": 512, "kv_len": 10**6}, (8, 16384)),
        ({"batch": 1, "kv_len": 1}, (2, 1024)),
        ({"batch": 4096, "kv_len": 3000}, (8, 4096)),
    ):
        found = nearest(when(**call), *entries)
        assert (found.when.batch, found.when.kv_len) == taken
    # Half of that range says nothing of where it leads.
    assert nearest(when(batch=512), *(entry(batch=b) for b in (4, 8))) is None


def test_the_distance_counts_octaves():
    assert select.distance(when(batch=8, kv_len=8192), when(batch=2, kv_len=16384)) == 3.0
    assert select.distance(when(kv_len=None), when(batch=2, kv_len=16384)) == 2.0
    entries = [entry(batch=b) for b in (1, 4, 16, 64)]
    assert [nearest(when(batch=b), *entries).when.batch for b in (1, 3, 5, 30, 33, 64)] == [1, 4, 4, 16, 64, 64]


def test_of_equally_near_entries_the_longer_wins():
    entries = [entry(kv_len=length) for length in (1024, 65536, 8192)]
    assert nearest(when(kv_len=None), *entries).when.kv_len == 65536
    assert nearest(when(kv_len=2048), entry(kv_len=1024), entry(kv_len=4096)).when.kv_len == 4096


def test_of_equally_near_entries_the_one_of_the_page_size_wins():
    entries = [entry(page_size=p, kv_len=length) for p in (64, 128, 256) for length in (1024, 8192)]
    for page_size in (64, 128, 256):
        assert nearest(when(page_size=page_size), *entries).when == when(page_size=page_size)
        found = nearest(when(page_size=page_size, kv_len=None), *entries)
        assert (found.when.page_size, found.when.kv_len) == (page_size, 8192)


@pytest.mark.parametrize("kv_format", ["", "tensor"])
def test_the_kernel_of_many_heads_goes_by_the_size_of_the_step(kv_format):
    many = {"num_heads": 128, "kv_format": kv_format}
    few = entry(KernelConfig(kernel="tile16", fp8_kernel="tile16"), batch=2, **many)
    rows = entry(OTHER, batch=8, kv_len=32768, **many)
    for call, taken in (
        ({"batch": 2, "kv_len": 8192}, few),
        ({"batch": 1, "kv_len": 8192}, few),
        ({"batch": 4, "kv_len": 4096}, few),
        ({"batch": 2, "kv_len": 8193}, rows),
        ({"batch": 3, "kv_len": 8192}, rows),
        ({"batch": 2, "kv_len": None}, rows),
    ):
        assert nearest(when(**many | call), few, rows) is taken, call
    assert nearest(when(**many | {"batch": 2, "kv_len": None}), few) is None
    # Row tiles are for steps of any size; where the default is tile16, if they won over it in no larger a step.
    grid = Grid(tuned_file(rows))
    for batch in (2, 8):
        assert grid.nearest(when(**many | {"batch": batch, "kv_len": 32768})) == 0
        assert grid.nearest(when(**many | {"batch": batch, "kv_len": 32768}), small=True) is None
    grid = Grid(tuned_file(entry(OTHER, batch=1, kv_len=1024, **many)))
    for batch, kv_len, serves in ((1, 1024, True), (2, 512, True), (1, 4096, True), (1, 1023, False), (2, 500, False)):
        assert grid.nearest(when(**many | {"batch": batch, "kv_len": kv_len})) == 0
        assert (grid.nearest(when(**many | {"batch": batch, "kv_len": kv_len}), small=True) == 0) is serves
    # Up to 16 heads the kernel reads the keys once.
    assert nearest(when(batch=8, kv_len=32768), entry(batch=2, kv_len=8192)) is not None


OPS = st.sampled_from(["decode", "prefill"])
SIZES = st.integers(1, 20).map(lambda n: n * n)


@st.composite
def whens(draw, lengths=SIZES):
    op, kv_format = draw(OPS), draw(st.sampled_from(["", "tensor"]))
    return When(
        op,
        kv_format,
        bool(kv_format) and draw(st.booleans()),
        draw(st.sampled_from([1, 8, 16, 17, 64, 65, 128])),
        draw(st.sampled_from([1, 16, 64, 128])),
        1 if op == "decode" else draw(SIZES),
        draw(SIZES),
        draw(lengths),
    )


@st.composite
def entry_lists(draw):
    found = []
    for shape in draw(st.lists(whens(), min_size=1, max_size=30, unique=True)):
        kernels = {name: draw(st.sampled_from(KERNELS)) for name in ("kernel", "fp8_kernel")}
        unit = draw(st.sampled_from([1, 2]))
        config = KernelConfig(**kernels, cut_unit=unit, min_blocks=unit * draw(st.sampled_from([1, 4])))
        found.append(Entry(shape, config, 1.0, 1.0, None))
    return found


def in_reach(call: When, at: Entry) -> bool:
    """Of the class, within a factor of 4 without regard to the ends of ranges, and not too large for its kernel."""
    there = at.when
    kernel = at.config.fp8_kernel if there.kv_format else at.config.kernel
    if there.op == "decode" and there.num_heads > 16 and kernel == "tile16":
        tiles = [-(-w.num_heads // 16) for w in (call, there)]
        if call.kv_len is None or call.batch * call.kv_len * tiles[0] > there.batch * there.kv_len * tiles[1]:
            return False
    same = [(w.op, w.kv_format, w.q_fp8, box_rows_of(w.page_size)) for w in (call, there)]
    if call.op == "decode":
        tiles = [(-(-w.num_heads // 64), w.num_heads <= 16) for w in (call, there)]
        if tiles[0] != tiles[1]:
            return False
    pairs = [(call.num_heads, there.num_heads), (call.q_len, there.q_len), (call.batch, there.batch)]
    if call.kv_len is not None:
        pairs.append((call.kv_len, there.kv_len))
    return same[0] == same[1] and all(max(pair) <= 4 * min(pair) for pair in pairs)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(entry_lists(), whens(SIZES | st.none()), st.randoms(use_true_random=False))
def test_the_nearest_entry(entries, call, random):
    grid = Grid(tuned_file(*entries))
    index = grid.nearest(call)
    if index is None:
        assert not any(in_reach(call, at) for at in entries)
    else:
        taken = entries[index]
        assert why_infeasible(taken.config) is None
        assert (taken.when.op, taken.when.kv_format, taken.when.q_fp8) == (call.op, call.kv_format, call.q_fp8)
        for at in entries:
            if in_reach(call, at):
                assert select.distance(call, taken.when) <= select.distance(call, at.when) + 1e-6
    # Whatever the order in the file, and however often.
    shuffled = random.sample(entries, len(entries))
    again = Grid(tuned_file(*shuffled)).nearest(call)
    assert (None if again is None else shuffled[again]) == (None if index is None else entries[index])
    assert grid.nearest(call) == index
    for number, at in enumerate(entries):
        assert grid.nearest(at.when) == number, "a shape that was tuned takes its own entry"
