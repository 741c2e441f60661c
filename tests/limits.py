"""Limits that end what hangs or is slow, on a loaded machine too: with eight busy processes on two cores a compile of
14 s took 85 s, and waits for another worker's come on top."""

import time
import timeit

#: Of a process that a test starts, in seconds; below pytest's limit of a test, so that its error is the one reported.
PROCESS_S = 600


def seconds_of(call):
    """CPU time of a quick call in seconds, the least of 100 means of 200: too short to be interrupted in each."""
    return min(timeit.repeat(call, timer=time.process_time, number=200, repeat=100)) / 200
