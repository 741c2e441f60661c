"""typer's parameters from a table of options (`mla_cute/option.py`)."""

import argparse
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from ..option import Option, UsageError
from .screen import usage_error


def takes(options: Sequence[Option]) -> Callable[[Callable[..., int]], Callable[..., None]]:
    """For a command `f(**values)` that gets the parsed values of `options` by their names and returns the exit status.

    The decorated function has a parameter per option where `f` has `**values`: typer makes the command from these. A
    text that does not parse, and a UsageError of `f`, is a usage error of the command.
    """

    def decorate(command: Callable[..., int]) -> Callable[..., None]:
        @functools.wraps(command)
        def typed(**given: Any) -> None:
            try:
                read = {option.dest: _read(option, given.pop(option.dest)) for option in options}
                status = command(**given, **read)
            except UsageError as error:
                usage_error(error)
            if status:
                raise typer.Exit(status)

        of_command = inspect.signature(command).parameters.values()
        own = [parameter for parameter in of_command if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters = [*own, *map(_parameter, options)]
        typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        typed.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return typed

    return decorate


def _type(option: Option) -> Any:
    """What typer converts a text to: int, float or Path. Where `Option.parse` is a function, the text stays one."""
    return option.parse if isinstance(option.parse, type) else str


def _parameter(option: Option) -> inspect.Parameter:
    kind, default = _type(option), option.unset
    metavar = option.metavar or None
    text = option.help + (f" ({', '.join(option.choices)})" if option.choices else "")
    about: Any = typer.Option(option.name, metavar=metavar, help=text)
    if option.is_argument:
        about = typer.Argument(metavar=metavar, help=text)
    if option.is_switch:
        kind = bool
    if option.repeatable:
        kind, default = list[kind], None  # type: ignore[valid-type]
    elif option.count > 1:
        kind = tuple[(kind,) * option.count]  # type: ignore[misc]
    if option.is_argument and not option.repeatable:
        default = inspect.Parameter.empty  # which makes it required
    elif default is None:
        kind = kind | None
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(option.dest, keyword, default=default, annotation=Annotated[kind, about])


def _read(option: Option, value: Any) -> Any:
    """The value of an option, of what typer passes for it."""
    if option.repeatable:
        return [_parsed(option, one) for one in value or []]
    return None if value is None else _parsed(option, value)


def _parsed(option: Option, value: Any) -> Any:
    if _type(option) is option.parse:  # typer has done it
        return value
    try:
        return option.parse(value)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{option.name}: {error}") from None
