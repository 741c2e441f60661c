"""What the driver says of GPUs: those that torch would see, and attributes of one.

`visible` is for a process that must not initialise CUDA, and is run as a script by another one: a driver that
is initialised before a fork is lost to the forked process. As a script this file imports nothing of the package and no
torch, so it takes the driver's own time and little more.
"""

import ctypes
import json
import sys
from typing import Any

_NO_DEVICE = 100
_MULTIPROCESSOR_COUNT = 16
# CU_DEVICE_ATTRIBUTE_*: kHz, kHz, bits.
CLOCK_RATE, MEMORY_CLOCK_RATE, GLOBAL_MEMORY_BUS_WIDTH = 13, 36, 37


def driver() -> Any:
    """libcuda, None where the machine has no driver."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def visible(cuda: Any) -> list[tuple[str, int]]:
    """Name and number of SMs of each GPU, in order, from a loaded libcuda. RuntimeError when a call of it fails."""

    def call(function: str, *arguments: Any) -> int:
        return getattr(cuda, function)(*arguments)

    def check(function: str, *arguments: Any) -> None:
        if status := call(function, *arguments):
            raise RuntimeError(f"{function} returned CUDA error {status}")

    if call("cuInit", 0) == _NO_DEVICE:
        return []
    check("cuInit", 0)
    number = ctypes.c_int(0)
    check("cuDeviceGetCount", ctypes.byref(number))
    found = []
    for index in range(number.value):
        device, sm_count = ctypes.c_int(0), ctypes.c_int(0)
        name = ctypes.create_string_buffer(256)
        check("cuDeviceGet", ctypes.byref(device), index)
        check("cuDeviceGetName", name, len(name), device)
        check("cuDeviceGetAttribute", ctypes.byref(sm_count), _MULTIPROCESSOR_COUNT, device)
        found.append((name.value.decode(errors="replace"), sm_count.value))
    return found


def attribute(cuda: Any, index: int, number: int) -> int | None:
    """An attribute of GPU `index` from a loaded libcuda, in a process that has initialised it; None where the driver
    does not say, or says 0."""
    device, value = ctypes.c_int(0), ctypes.c_int(0)
    if cuda.cuDeviceGet(ctypes.byref(device), index):
        return None
    if cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device):
        return None
    return value.value if value.value > 0 else None


def main() -> None:
    """Print the GPUs as JSON, [] where the machine has no driver."""
    cuda = driver()
    if cuda is None:
        print("[]")
        return
    try:
        print(json.dumps(visible(cuda)))
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
