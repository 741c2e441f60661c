"""A watchdog for a GPU that hangs; needs nothing that is not installed with the library."""

import argparse
import faulthandler
import os
import sys
import threading

_LONGEST_S = 1e9  # threading's timers end at 292 years


def check_seconds(value: float) -> float:
    """`value`, seconds of a timeout. Raises ValueError for one that no timer can have."""
    if not 0 < value <= _LONGEST_S:  # NaN compares with nothing
        raise ValueError(f"expected seconds, more than 0 and at most {_LONGEST_S:g}, got {value:g}")
    return value


def parse_seconds(text: str) -> float:
    """`check_seconds` of an option's text, for argparse."""
    try:
        return check_seconds(float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Watchdog:
    """Ends the process when `feed` is not called for `seconds`: a hung kernel cannot be interrupted from Python."""

    # A launch that hangs may hold the GIL, and then only faulthandler's own thread still runs.
    _grace = 10

    def __init__(self, seconds: float, enabled: bool):
        self._seconds, self._enabled = seconds, enabled
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def feed(self, what: str) -> None:
        """`what` runs now, and has `seconds` to finish."""
        if not self._enabled:
            return
        self._stop()
        faulthandler.dump_traceback_later(self._seconds + self._grace, exit=True, file=2)
        self._timer = threading.Timer(self._seconds, self._end, (what,))
        self._timer.daemon = True
        self._timer.start()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            faulthandler.cancel_dump_traceback_later()

    def _end(self, what: str) -> None:
        message = f"mla-cute: {what} did not finish within {self._seconds:g} s; the GPU hangs"
        print(message, file=sys.__stderr__, flush=True)
        os._exit(3)
