"""Memory and time of a compiled program on hardware that is not here, by the roofline of what it does."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass

from s1jax.device_memory import GPU_MEMORY_FRACTION
from s1jax.planning.hardware import Hardware, Target
from s1jax.planning.hlo import Collective, Computation, Instruction, Program
from s1jax.planning.traffic import host_traffic, launches, memory_traffic, operation_traffic


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: int
    optimizer: int
    batch: int
    """What else goes into the program: a step's rows, or a decoder's cache."""
    temporaries: int
    """Activations, gradients and whatever else lives only while the program runs, and results that reuse no input."""
    on_host: int = 0
    """In the memory of the host, not of the device."""

    @property
    def total(self) -> int:
        """All of it at once that is on the device."""
        return self.parameters + self.optimizer + self.batch + self.temporaries


@dataclass(frozen=True)
class Estimate:
    """Seconds of one run of a program on one device."""

    compute: float
    """All matrix products and attention kernels at the stated share of the peak."""
    memory: float
    """All traffic to and from the device's memory at its full bandwidth."""
    exchange: float
    """All collectives at the full bandwidth of their links."""
    exposed: float
    """What is waited for: collectives that take longer than what is scheduled between their start and the use of their
    results, and what of `host` takes longer than the arithmetic beside it."""
    host: float
    """All transfers between the device and its host's memory at their full bandwidth."""
    latency: float = 0.0
    """Of launches and of collectives however small, where it is counted."""

    @property
    def total(self) -> float:
        """The longer of arithmetic and memory traffic, and the exposed exchange and latency."""
        return max(self.compute, self.memory) + self.exposed + self.latency

    def of_one(self, steps: int) -> "Estimate":
        """Of one of the steps that the program takes in one run."""
        return Estimate(*(seconds / steps for seconds in astuple(self)))


def usable_bytes(hardware: Hardware) -> int:
    """What a program may take of a device: on GPU some is left to the driver and to NCCL."""
    return int(hardware.memory_bytes * (GPU_MEMORY_FRACTION if hardware.platform == "cuda" else 1.0))


def estimate(
    program: Program, target: Target, *, efficiency: float, kernel_flops: Mapping[str, float] | None = None
) -> Estimate:
    """The roofline of one run; `kernel_flops` are those of one run of each kernel, which the HLO does not show.

    What is moved to the host is what a training step's forward pass keeps, a third of the arithmetic, and its backward
    pass fetches. Latency is not counted: `latency` says it.
    """
    hardware, kernel_flops = target.hardware, kernel_flops or {}
    flops_per_second = hardware.peak_flops * efficiency

    def seconds(instruction: Instruction, computation: Computation) -> float:
        flops = program.flops(instruction, computation) + kernel_flops.get(program.target(instruction) or "", 0.0)
        moved = operation_traffic(program, instruction, computation)
        return max(flops / flops_per_second, moved / hardware.memory_bandwidth)

    flops = program.dot_flops + sum(program.kernels[name] * flops for name, flops in kernel_flops.items())
    compute = flops / flops_per_second
    written, read = (num_bytes / hardware.host_bandwidth for num_bytes in host_traffic(program))
    waited = max(0.0, written - compute / 3) + max(0.0, read - 2 * compute / 3)
    return Estimate(
        compute=compute,
        memory=memory_traffic(program).num_bytes / hardware.memory_bandwidth,
        exchange=sum(_exchange_seconds(collective, target) for collective in program.collectives),
        exposed=program.waited(seconds, lambda collective: _exchange_seconds(collective, target)) + waited,
        host=written + read,
    )


def latency(program: Program, target: Target) -> float:
    """Seconds that one run spends on starting operations and on collectives however small."""
    hardware = target.hardware
    seconds = launches(program) * hardware.launch_latency
    for collective in program.collectives:
        size = max(len(collective.group), 2)
        passes = 2 if collective.kind == "all-reduce" else 1
        hops = passes * (size - 1) * hardware.hop_latency
        seconds += collective.runs * (hardware.collective_latency + hops)
    return seconds


def _exchange_seconds(collective: Collective, target: Target) -> float:
    """Time of the collectives on a ring, which no algorithm needs less than for large arrays."""
    group = collective.group
    size = max(len(group), 2)
    hosts = {device // target.devices_per_host for device in group}
    bandwidth = target.hardware.link_bandwidth
    if len(hosts) > 1:
        # Every device has an adapter of its own, and those of a group in one host share what leaves it.
        bandwidth = min(bandwidth, target.hardware.network_bandwidth * len(group) / len(hosts))
    passes = 2 if collective.kind == "all-reduce" else 1
    return passes * collective.num_bytes * (size - 1) / size / bandwidth
