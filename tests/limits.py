"""Limits on the wall clock that end what hangs. A loaded machine must not reach them: with eight busy processes on two
cores a compile of 14 s took 85 s, and waits for another worker's come on top."""

#: Of a process that a test starts, in seconds; below pytest's limit of a test, so that its error is the one reported.
PROCESS_S = 600
