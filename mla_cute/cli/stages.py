"""What a command says while it works where no bar can be: to a file, a pipe, a log. Needs what the library needs."""

import sys

# Between two lines there is a tenth of the work, or one step of it where there are fewer.
_PARTS = 10


class Stages:
    """Lines on standard error, so that standard output holds results alone: the first step, then one each tenth."""

    def __init__(self, what: str):
        self._what, self._said = what, -1

    def step(self, done: int, total: int, label: str) -> None:
        """`done` of `total` steps are behind, and `label` begins."""
        part = done * _PARTS // total if total else 0
        if part == self._said or done >= total:
            return
        self._said = part
        print(f"{self._what}, {done} of {total} done: {label}", file=sys.stderr, flush=True)
