"""What the default configuration on a GPU follows from. Plain Python: the planners' models are, and use it."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class GpuSpeed:
    """What the default configuration on a GPU follows from (config.py). None: not known, which counts as an H200's.

    sm_count       SMs
    memory_gbps    peak of the memory, GB/s (1e9 bytes): twice its clock times the width of its bus
    sm_mhz         the highest clock of the SMs
    tensor_share   products a cycle of an SM's tensor cores, as a share of an H200's
    """

    sm_count: int
    memory_gbps: float | None = None
    sm_mhz: float | None = None
    tensor_share: float = 1.0

    @property
    def gbps_per_sm(self) -> float:
        return _H200_GBPS / _H200_SMS if self.memory_gbps is None else self.memory_gbps / self.sm_count

    @property
    def clock_mhz(self) -> float:
        return _H200_MHZ if self.sm_mhz is None else self.sm_mhz


# As its driver says: 3201 MHz and a bus of 6016 bits, of the 6144 of its six stacks; 2 * 3201 MHz * 752 bytes.
_H200_SMS, _H200_GBPS, _H200_MHZ = 132, 4814.3, 1980.0
H200 = GpuSpeed(_H200_SMS, _H200_GBPS, _H200_MHZ)
