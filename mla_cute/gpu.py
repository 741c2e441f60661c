"""Facts about the GPU and the software around it: what a bench record, `info` and error messages quote.

Nothing here initialises CUDA in a process that has no GPU, and nothing raises: a fact that cannot be read is None.
"""

import functools
import json
import pathlib
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from . import _visible_gpus
from .gpu_speed import GpuSpeed

HOPPER = (9, 0)
# The driver's start takes a second or two, more on a machine of many GPUs without persistence mode.
_ASK_TIMEOUT_S = 120.0

_PACKAGES = {
    "torch": "torch",
    "cutlass_dsl": "nvidia-cutlass-dsl",
    "tvm_ffi": "apache-tvm-ffi",
    "cuda_bindings": "cuda-bindings",
}

# No attribute tells how fast tensor cores are. NVIDIA names 148 TFLOP/s of bf16 for the 78 SMs of an H20, 989 for the
# 132 of an H100: a quarter of the products a cycle, at like clocks.
_H20, _H20_TENSOR_SHARE = re.compile(r"\bH20\b"), 0.25


def speed(device: torch.device) -> GpuSpeed:
    """Of a CUDA device, in a process that has initialised CUDA. Asks the driver for attributes and starts nothing: the
    first call of a server does it, perhaps under CUDA-graph capture."""
    properties = torch.cuda.get_device_properties(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    clock, memory_clock, bus = _attributes(
        index, _visible_gpus.CLOCK_RATE, _visible_gpus.MEMORY_CLOCK_RATE, _visible_gpus.GLOBAL_MEMORY_BUS_WIDTH
    )
    return GpuSpeed(
        sm_count=properties.multi_processor_count,
        memory_gbps=None if memory_clock is None or bus is None else round(2 * memory_clock * bus / 8e6, 1),
        sm_mhz=None if clock is None else clock / 1e3,
        tensor_share=_H20_TENSOR_SHARE if _H20.search(properties.name) else 1.0,
    )


def _attributes(index: int, *numbers: int) -> list[int | None]:
    cuda = _visible_gpus.driver()
    if cuda is None:
        return [None for _ in numbers]
    return [_visible_gpus.attribute(cuda, index, number) for number in numbers]


@dataclass(frozen=True)
class GpuFacts:
    """One GPU. Memory and L2 in bytes; clocks in MHz, the maxima of the card and not of the moment."""

    index: int
    name: str
    capability: tuple[int, int]
    sm_count: int
    memory_bytes: int
    l2_bytes: int | None
    driver: str | None
    max_sm_mhz: int | None
    max_memory_mhz: int | None
    uuid: str | None

    @property
    def is_hopper(self) -> bool:
        return self.capability == HOPPER

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"capability": list(self.capability)}


def facts(index: int | None = None) -> GpuFacts | None:
    """Facts of GPU `index` (default: torch's current device), or None when torch sees no GPU."""
    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if index is None else index
    props = torch.cuda.get_device_properties(index)
    uuid = getattr(props, "uuid", None)
    selector = f"GPU-{uuid}" if uuid is not None else str(index)
    smi = _nvidia_smi(selector, "driver_version", "clocks.max.sm", "clocks.max.memory")
    return GpuFacts(
        index=index,
        name=props.name,
        capability=(props.major, props.minor),
        sm_count=props.multi_processor_count,
        memory_bytes=props.total_memory,
        l2_bytes=getattr(props, "L2_cache_size", None),
        driver=smi.get("driver_version") or _driver_from_proc(),
        max_sm_mhz=_int(smi.get("clocks.max.sm")),
        max_memory_mhz=_int(smi.get("clocks.max.memory")),
        uuid=str(uuid) if uuid is not None else None,
    )


def clocks(gpu: GpuFacts) -> dict[str, int | None]:
    """Clocks of this moment in MHz and power in W. Read them while the GPU works: an idle one clocks down."""
    smi = _nvidia_smi(f"GPU-{gpu.uuid}" if gpu.uuid else str(gpu.index), "clocks.sm", "clocks.mem", "power.draw")
    return {
        "sm_mhz": _int(smi.get("clocks.sm")),
        "memory_mhz": _int(smi.get("clocks.mem")),
        "power_w": _int(smi.get("power.draw")),
    }


def visible() -> list[tuple[str, int]]:
    """Name and number of SMs of each GPU that this process could use, from another process, which initialises the
    driver and ends. RuntimeError where it cannot say."""
    command = [sys.executable, "-I", "-S", str(pathlib.Path(_visible_gpus.__file__))]
    try:
        asked = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_ASK_TIMEOUT_S)
        return [(name, sm_count) for name, sm_count in json.loads(asked.stdout)]
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise RuntimeError(str(getattr(error, "stderr", None) or error).strip()) from None


def why_no_gpu() -> str | None:
    """None where there may be a GPU, else one sentence that says why there is none; initialises no CUDA here."""
    if torch.version.cuda is not None:
        try:
            if torch.cuda.is_initialized() or visible():
                return None
        except RuntimeError:  # whoever uses the GPU gets the driver's own error
            return None
    return _no_gpu()


def _no_gpu() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} sees no CUDA GPU"


def why_not_hopper() -> str | None:
    """None when torch's current GPU is a Hopper one, else one sentence that says what was found instead."""
    if not torch.cuda.is_available():
        return _no_gpu()
    props = torch.cuda.get_device_properties(torch.cuda.current_device())
    if (props.major, props.minor) != HOPPER:
        return f"{props.name} has compute capability {props.major}.{props.minor}, the kernels need 9.0 (Hopper)"
    return None


def versions() -> dict[str, str | None]:
    """Versions of mla_cute and of what its kernels are built and launched with; None for what is not installed.

    `cutlass_dsl_toolkit` is the compiler of the DSL that makes the code, "cu12" or "cu13".
    """
    from . import __version__
    from .compile import toolchain

    out: dict[str, str | None] = {"mla_cute": __version__}
    for key, package in _PACKAGES.items():
        try:
            out[key] = metadata.version(package)
        except metadata.PackageNotFoundError:
            out[key] = None
    out["cutlass_dsl_toolkit"] = toolchain.toolkit()
    # The metadata leaves out the local part (+cu130) that tells which build this is.
    out["torch"] = str(torch.__version__)
    out["cuda"] = torch.version.cuda
    return out


def git_state(directory: pathlib.Path | None = None) -> dict[str, Any] | None:
    """{"commit", "dirty"} of the checkout mla_cute runs from, or None when it is installed or git is missing."""
    where = directory or pathlib.Path(__file__).resolve().parent
    try:
        commit = _run("git", "-C", str(where), "rev-parse", "HEAD").strip()
        # Only what the package is made of: a stray note beside it does not make a measurement irreproducible.
        status = _run("git", "-C", str(where), "status", "--porcelain", "--", str(where))
        tracked = _run("git", "-C", str(where), "ls-files", "--", str(where))
    except (OSError, subprocess.SubprocessError):
        return None
    if not tracked.strip():  # a site-packages that happens to lie inside somebody else's repository
        return None
    return {"commit": commit, "dirty": bool(status.strip())}


def commit_of(git: dict[str, Any], digits: int | None = None) -> str:
    """What `git_state` found in words: "1a0c280 with changes". `digits` of the hash, None for all."""
    return git["commit"][:digits] + (" with changes" if git["dirty"] else "")


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout


def _nvidia_smi(selector: str, *fields: str) -> dict[str, str]:
    try:
        text = _run("nvidia-smi", "-i", selector, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = text.strip().splitlines()
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


@functools.cache
def _driver_from_proc() -> str | None:
    try:
        text = pathlib.Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
    return found.group(1) if found else None


def _int(text: str | None) -> int | None:
    try:
        return round(float(text)) if text is not None else None
    except ValueError:  # nvidia-smi answers "[N/A]" for what the card or the virtual machine does not report
        return None
