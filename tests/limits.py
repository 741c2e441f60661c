"""Limits that end what hangs or is slow, on a loaded machine too: with eight busy processes on two cores a compile of
14 s took 85 s, and waits for another worker's come on top."""

import sys

#: Of a process that a test starts, in seconds; below pytest's limit of a test, so that its error is the one reported.
PROCESS_S = 600


def functions_run(call):
    """How many functions a call runs, Python's and C's: what a quick one costs, on a busy machine too."""
    call()
    run = 0

    def count(frame, event, argument):
        nonlocal run
        run += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return run
