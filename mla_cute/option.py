"""The options of a command as one table, which both of its command lines are made from.

`mla-cute bench` and `mla-cute tune` use typer (`cli/parameters.py`); `python -m mla_cute.bench` and tune/autotune.py
use argparse (`parser` here), as they have to run where typer is not installed. The tables are `bench/options.py` and
`tuning/options.py`: who adds an option adds a line there, and finds its value under `Option.dest` in `command.py`
beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

# What is typed for a dtype, beside the dtype's own name.
DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16"}


class UsageError(Exception):
    """What was asked for cannot be; one sentence. The command ends with status 2."""


@dataclasses.dataclass(frozen=True)
class Option:
    """A line of a table.

    Args:
        name: "--kv-len"; without dashes it is an argument of the command, told by its place.
        help: what it does. Default and choices are shown beside it and need no words here.
        metavar: stands for the value in the help: "FILE". With none, and no choices, the option takes no value: it is a
            switch, True where it is given.
        parse: makes the value of a text. Raises argparse.ArgumentTypeError that says what was expected.
        default: the value where the option is not given; a text is parsed like one that is.
        choices: the texts that can be given. argparse refuses others; what gets the value has to do so as well, since
            typer does not.
        count: so many values after the name, which make one value together.
        repeatable: the value is a list, of every time that the option is given.
    """

    name: str
    help: str
    metavar: str = ""
    parse: Callable[[str], Any] = str
    default: Any = None
    choices: tuple[str, ...] = ()
    count: int = 1
    repeatable: bool = False

    @property
    def dest(self) -> str:
        """The name of its value: "kv_len"."""
        return self.name.lstrip("-").replace("-", "_")

    @property
    def is_argument(self) -> bool:
        return not self.name.startswith("-")

    @property
    def is_switch(self) -> bool:
        return not self.metavar and not self.choices

    @property
    def unset(self) -> Any:
        """The value where the option is not given, before a text is parsed."""
        if self.repeatable:
            return []
        return False if self.is_switch else self.default


def parser(
    options: Sequence[Option], prog: str, description: str, epilog: str | None = None
) -> argparse.ArgumentParser:
    """argparse's parser of a table."""
    made = argparse.ArgumentParser(prog=prog, description=description, epilog=epilog)
    for option in options:
        about = option.help.replace("%", "%%")  # argparse formats help texts
        if option.is_switch:
            made.add_argument(option.name, action="store_true", help=about)
            continue
        if option.default is not None:
            about += f" (default: {option.default})"
        metavar: Any = option.metavar or None
        settings: dict[str, Any] = {"help": about, "metavar": metavar, "type": option.parse}
        if option.choices:
            settings["choices"] = option.choices
        if option.count > 1:
            settings |= {"nargs": option.count, "metavar": tuple(option.metavar.split())}
        if option.repeatable:
            settings |= {"nargs": "*"} if option.is_argument else {"action": "append"}
        if option.repeatable or not option.is_argument:
            settings["default"] = option.unset
        made.add_argument(option.name, **settings)
    return made


def given(options: Sequence[Option], values: dict[str, Any]) -> list[str]:
    """What is set of the options, for messages: arguments as they were typed, and the names of the others."""
    found: list[str] = []
    for option in options:
        value = values[option.dest]
        if option.is_argument:
            found += value if option.repeatable else [value]
        elif value != option.unset:
            found.append(option.name)
    return found


def numbers(text: str) -> list[int]:
    """ "1,16,128" -> [1, 16, 128]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers separated by commas, got {text!r}") from None


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """What makes an integer of that range of an option's text: "16" -> 16."""

    def parse(text: str) -> int:
        value = int(text) if text.removeprefix("-").isdecimal() else None
        if value is None or value < least or (most is not None and value > most):
            wanted = f"at least {least}" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"expected an integer, {wanted}, got {text!r}")
        return value

    return parse


def words(text: str) -> list[str]:
    """ "decode,prefill" -> ["decode", "prefill"]."""
    return text.split(",")
