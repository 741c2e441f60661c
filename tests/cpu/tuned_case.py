"""A GPU that is not there, and tuned files for it: of the tests of selection and explanation."""

import json

import torch

from mla_cute.config import KernelConfig
from mla_cute.gpu_speed import H200
from mla_cute.tuned import select
from mla_cute.tuned.select import Entry, TunedFile, When

# Plans on the meta device allocate as on a GPU; selection is told that it is one.
META = torch.device("meta")
NAME, SMS = "NVIDIA Test/1 X", 132
SPEED = H200
FILE = "NVIDIA_Test_1_X.json"
MADE_WITH = {"mla_cute": "0.1.0", "cutlass_dsl": "4.8.1", "driver": "580.1", "date": "2026-11-24"}


def when(**change) -> When:
    values = {
        "op": "decode", "kv_format": "", "q_fp8": False, "num_heads": 16, "page_size": 64, "q_len": 1, "batch": 8,
        "kv_len": 8192,
    }  # fmt: skip
    return When(**values | change)


def entry(config: KernelConfig | None = None, us: float = 40.0, **change) -> Entry:
    return Entry(when(**change), config or KernelConfig(), us, 44.0, 42.5)


def tuned_file(*entries: Entry, name: str = NAME, sm_count: int = SMS) -> TunedFile:
    gpu = {"name": name, "sm_count": sm_count, "clock_mhz": 1980, "memory_gbps": 4350.5}
    return TunedFile(gpu, dict(MADE_WITH), entries)


def values_of(*entries: Entry) -> dict:
    """Decoded JSON of a file."""
    return json.loads(select.dump(tuned_file(*entries)))


def write(path, *entries: Entry, **gpu):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(select.dump(tuned_file(*entries, **gpu)))
    return path


class Folders:
    """Where tuned files are looked for in a test: `named` is $MLA_CUTE_TUNED_DIR, set by `use_named`."""

    def __init__(self, monkeypatch, tmp_path):
        self._monkeypatch = monkeypatch
        self.named, self.user, self.shipped = (
            path / FILE for path in (tmp_path / "named", tmp_path / "cache" / "tuned", tmp_path / "shipped")
        )
        for variable in ("MLA_CUTE_TUNED_DIR", "MLA_CUTE_TUNED", "MLA_CUTE_LOG"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("MLA_CUTE_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setattr(select, "_SHIPPED", self.shipped.parent)
        monkeypatch.setattr(select, "gpu_of", lambda device: (NAME, SPEED) if device == META else None)
        select.clear()

    def use_named(self) -> None:
        self._monkeypatch.setenv("MLA_CUTE_TUNED_DIR", str(self.named.parent))
