"""Wrong values for the arguments of public calls, and what a refused call has to look like."""

import decimal
import math
import re

import numpy
import torch

FLOATS_OF_NO_CACHE = (torch.float32, torch.float64, torch.float8_e5m2)
OTHER_DTYPES = (torch.bool, torch.int8, torch.int64, torch.complex64)

NO_TENSORS = ("text", 3.5, 7, True, [1, 2], {}, object(), numpy.zeros(3))
NO_SCALES = (
    math.nan, math.inf, -math.inf, -1.0, 0.0, 0, -3, True, "1", None, 1j, [1.0], torch.tensor(1.0), decimal.Decimal(1),
    2.0**-127, 2.0**127, 10**400,
)  # fmt: skip
# Scales of tensors may be float32 tensors of one element on the device of the call.
NO_TENSOR_SCALES = (
    torch.ones(2), torch.ones(0), torch.tensor(1), torch.tensor(1.0, dtype=torch.float64), torch.ones(1, device="meta"),
)  # fmt: skip
NO_BASES = (True, 2.0, None, 10, -2, "2", "E", "", [2], {}, torch.tensor(2), 1j, math.nan)
NO_BOOLS = (None, 0, 1, "yes", 1.0, [], torch.tensor(True), numpy.bool_(True))
NO_FORMATS = (None, "fp8", "Tensor", 3, [], b"", True, torch.tensor([1, 2]))


def no_ints(least, most=None, optional=False):
    """Wrong values for an int of at least `least`."""
    beyond = () if most is None else (most + 1, 2**63)
    none = () if optional else (None,)
    return (True, 2.0, "4", [1], 1j, torch.tensor(4), math.nan, least - 1, -(2**63), *beyond, *none)


def wrong_tensors(x, *, dtypes=(), widths=True, rows=True, optional=False):
    """(what, value) of tensors unlike x, and of values that are none.

    dtypes    wrong ones beside those that are wrong everywhere
    widths    another size of the last dimension is wrong
    rows      another size of the first dimension is wrong
    """
    for value in NO_TENSORS if optional else (*NO_TENSORS, None):
        yield f"{type(value).__name__}", value
    for dtype in (*OTHER_DTYPES, *dtypes):
        if dtype is not x.dtype:
            yield f"{dtype}", torch.zeros(x.shape, dtype=dtype)
    yield "one more dimension", x[None]
    yield "no dimension", x.new_empty(())
    if x.shape[0]:
        yield "one dimension fewer", x[0]
    if widths and x.shape[-1]:
        yield "narrower", x[..., :-1]
    if widths:
        yield "wider", torch.cat([as_bytes(x), as_bytes(x[..., :1])], dim=-1).view(x.dtype)
    if rows and x.shape[0]:
        yield "fewer rows", x[:-1]
        yield "no rows", x[:0]
        yield "more rows", torch.cat([as_bytes(x), as_bytes(x[:1])]).view(x.dtype)
    yield "on the meta device", x.to("meta")
    # not yet refused, finding "layouts": x.to_sparse(), nested tensors


def as_bytes(x):
    """x in a dtype of its width that every torch concatenates."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def snapshot(args):
    """Copies of the whole storage of every tensor among args that has one."""
    tensors = [x for x in args.values() if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
    return [(x, _storage(x).clone()) for x in tensors]


def _storage(x):
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def written(before):
    """Whether memory differs from a snapshot."""
    return any(not torch.equal(_storage(x), copy) for x, copy in before)


def fault(function, args, names):
    """None if function(**args) is refused as it should be: TypeError or ValueError, not a subclass, whose text begins
    with an argument's name, and nothing written; else what happened."""
    before = snapshot(args)
    try:
        function(**args)
    except Exception as error:
        if type(error) not in (TypeError, ValueError):
            return f"raised {type(error).__name__}: {error}"
        if re.match(rf"({'|'.join(names)}): ", str(error)) is None:
            return f"names no argument: {type(error).__name__}: {error}"
        return "refused, but memory was written" if written(before) else None
    return "was accepted"


def assert_all_refused(function, args, wrong, names=None):
    """`wrong`: (argument, what, value). Each alone in place of the value in args has to be refused."""
    names = names or sorted(args)
    found, count = [], 0
    for name, what, value in wrong:
        count += 1
        if (happened := fault(function, args | {name: value}, names)) is not None:
            found.append(f"{function.__name__}, {name}: {what}: {happened:.300}")
    assert count
    assert not found, "\n".join(found)
