"""Two tuned files compared."""

import pytest
from tuned_case import entry, tuned_file

from mla_cute.config import KernelConfig
from mla_cute.tuned import diff

OTHER = KernelConfig(evict_first=False, min_blocks=8)


def test_files_that_choose_the_same_are_the_same():
    a, b = tuned_file(entry(), entry(OTHER, batch=4)), tuned_file(entry(OTHER, batch=4, us=20.0), entry(us=41.0))
    for found in (diff.compare(a, a), diff.compare(a, b)):
        assert found.is_none, "other times, in another order, by another version"
        assert (found.rows(), found.only_a, found.only_b, found.changed) == ([], (), (), ())
        assert [(x.when, y.when) for x, y in found.kept] == [(e.when, e.when) for e in a.entries]
    assert diff.compare(tuned_file(), tuned_file()).is_none
    assert diff.compare(tuned_file(), tuned_file()).lines() == [
        "0 shapes are only in A, 0 only in B; 0 have another configuration, 0 the same."
    ]


def test_what_is_different_is_told_by_shape():
    a = tuned_file(entry(batch=1), entry(batch=2), entry(OTHER, batch=3, us=30.0))
    b = tuned_file(entry(batch=2), entry(KernelConfig(min_blocks=8), batch=3, us=24.0), entry(OTHER, batch=4))
    found = diff.compare(a, b)
    assert not found.is_none
    assert (found.only_a, found.only_b) == (a.entries[:1], b.entries[2:])
    assert found.changed == ((a.entries[2], b.entries[1]),)
    assert found.kept == ((a.entries[1], b.entries[0]),)
    shape = "decode, 16 heads, page size 64, batch {}, length 8192, 16-bit cache".format
    assert found.rows() == [
        ("changed", shape(3), "evict_first False -> True", "30.0", "24.0", "1.250"),
        ("only in A", shape(1), "-", "40.0", "-", "-"),
        ("only in B", shape(4), "evict_first=False, min_blocks=8", "-", "40.0", "-"),
    ]
    assert all(len(row) == len(diff.COLUMNS) for row in found.rows())


def test_speedups_are_geometric_means_of_each_kind():
    """The defaults of `entry` take 44 us in either file."""
    a = tuned_file(*(entry(batch=n, us=us) for n, us in ((1, 40.0), (2, 40.0), (3, 22.0))))
    b = tuned_file(entry(OTHER, batch=1, us=20.0), entry(OTHER, batch=2, us=10.0), entry(batch=3, us=44.0))
    assert diff.compare(a, b).lines() == [
        "0 shapes are only in A, 0 only in B; 2 have another configuration, 1 the same.",
        "Time in A over time in B, geometric mean of what is changed: 2.828x.",
        "Gain over the default in B over that in A, of what is changed: 2.828x.",
        "Time in A over time in B, geometric mean of what is kept: 0.500x.",
        "Gain over the default in B over that in A, of what is kept: 0.500x.",
        "Gain over the default of all entries, geometric mean: A 1.343x.",
        "Gain over the default of all entries, geometric mean: B 2.131x.",
    ]


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ({"name": "NVIDIA Other"}, "NVIDIA Test/1 X (132 SMs) and NVIDIA Other (132 SMs)"),
        ({"sm_count": 114}, "NVIDIA Test/1 X (132 SMs) and NVIDIA Test/1 X (114 SMs)"),
    ],
)
def test_files_of_other_gpus_are_not_the_same(gpu, said):
    found = diff.compare(tuned_file(entry()), tuned_file(entry(), **gpu))
    assert not found.is_none
    assert f"WARNING: of different GPUs, {said}: times compare cards." in found.lines()
