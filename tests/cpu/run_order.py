"""The order of the CPU tests that keeps several workers busy."""

import collections
import itertools


def dealt(items, workers):
    """The tests in an order for `--dist worksteal`, which gives every worker an equal run of consecutive ones to begin
    with: each run begins with its share of what compiles, the costliest first, then of what else is slow. So the whole
    does not end with one worker at a pile of compiles.

    Tests with the same group in their marker `compiles` stay together: of two workers with one test each, one would
    compile while the other waits for it, and each would disassemble the code.
    """
    groups, slow, rest = collections.defaultdict(list), [], []
    for item in items:
        if compiles := item.get_closest_marker("compiles"):
            groups[compiles.args or (item.nodeid, 1)].append(item)
        else:
            (slow if item.get_closest_marker("slow") else rest).append(item)
    queues, load = [[] for _ in range(workers)], [0.0] * workers
    for (_, seconds), together in sorted(groups.items(), key=lambda group: -group[0][1]):
        least = load.index(min(load))
        queues[least] += together
        load[least] += seconds
    for at, item in enumerate(slow):
        queues[at % workers].append(item)
    left, ordered = iter(rest), []
    for at, queue in enumerate(queues):
        share = (len(items) - len(ordered)) // (workers - at)
        ordered += queue
        ordered += itertools.islice(left, max(0, share - len(queue)))
    return ordered
