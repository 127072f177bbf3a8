"""The hardware that programs are planned for: what it can do, and devices to compile for without having it.

Figures are the vendors': dense bfloat16 arithmetic, memory, and links in one direction.
"""

import importlib.metadata
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from s1jax.device_memory import GIB
from s1jax.model.flops import PEAK_FLOPS

_CUDNN = 91_000
"""The version of cuDNN that GPUs are planned with, 9.10, as cuDNN writes it."""


class PlanError(ValueError):
    """A plan that cannot be made; the message says what to change or install."""


@dataclass(frozen=True)
class Hardware:
    """One kind of device."""

    name: str
    """As in the target, e.g. h100."""
    kind: str
    """The beginning of jax's `device_kind`."""
    platform: str
    memory_bytes: int
    memory_bandwidth: float
    """Bytes per second between the device and its own memory."""
    link_bandwidth: float
    """Bytes per second, one way, that a device has to the others of its host (GPU) or of its slice (TPU)."""
    network_bandwidth: float
    """Bytes per second, one way, that a device has to other hosts."""
    host_bandwidth: float
    """Bytes per second, one way, that a device has to the memory of its host."""
    launch_latency: float
    """Seconds that an operation takes however small it is."""
    collective_latency: float
    """Seconds that a collective takes however small it is, beside its hops."""
    hop_latency: float
    """Seconds that a device takes to hand on what it got from its neighbour on a ring."""
    gpu: str = ""
    """Of a GPU, what the compiler wants to know, as an XLA `GpuTargetConfigProto` in text form."""
    devices_per_chip: int = 1
    """Of a TPU, whose slices are counted in chips."""

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 operations per second."""
        return next(peak for kind, peak in PEAK_FLOPS.items() if self.kind.startswith(kind))


def _gpu(cores: int, clock: float, memory: int, bandwidth: float, cache: int, shared: int, capability: str) -> str:
    """The target configuration of a data-centre GPU; `shared` is a core's shared memory in bytes."""
    major, minor = capability.split(".")
    return (
        f"gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 "
        f"shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores} "
        f"fpus_per_core: {64 if major == '8' else 128} block_dim_limit_x: 2147483647 "
        f"block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {int(bandwidth)} l2_cache_size: {cache} "
        f"clock_rate_ghz: {clock} device_memory_size: {memory} shared_memory_per_block_optin: {shared - 1024} "
        f"cuda_compute_capability {{ major: {major} minor: {minor} }} "
        "registers_per_core_limit: 65536 registers_per_block_limit: 65536 } "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } '
        "runtime_version { major: 12 minor: 8 patch: 0 } "
    )


_GPU_LATENCIES = (2e-6, 3.6e-6, 0.47e-6)
"""Launch: in a program's chain of tiny kernels each took 1 to 3 microseconds on one H200 (measured, jax 0.11.2).
Collectives: what NCCL reckons with for its low-latency protocol on a ring over NVLink (baseLat, hwLat; tuning.cc)."""
_TPU_LATENCIES = (1e-6, 0.0, 1e-6)
"""Operation: the compiler's own estimate for the smallest, 2,100 cycles. Hop: about a microsecond, according to the
book "How to Scale Your Model"."""

_H100_MEMORY, _H200_MEMORY, _A100_MEMORY = 84_942_979_072, 150_754_820_096, 84_974_239_744
_RTX4090_MEMORY = 25_393_692_672
_B200_MEMORY, _GB200_MEMORY = 191_503_532_032, 197_568_495_616

HARDWARE = {
    hardware.name: hardware
    for hardware in (
        # NVLink 4: 900 GB/s both ways; a 400 Gb/s adapter for each GPU; PCIe 5. A100: NVLink 3, 200 Gb/s, PCIe 4.
        Hardware("h100", "NVIDIA H100", "cuda", _H100_MEMORY, 3.352e12, 450e9, 50e9, 64e9, *_GPU_LATENCIES,
                 _gpu(132, 1.98, _H100_MEMORY, 3.352e12, 52_428_800, 233_472, "9.0")),
        Hardware("h200", "NVIDIA H200", "cuda", _H200_MEMORY, 4.8e12, 450e9, 50e9, 64e9, *_GPU_LATENCIES,
                 _gpu(132, 1.98, _H200_MEMORY, 4.8e12, 52_428_800, 233_472, "9.0")),
        # NVLink 5: 1,800 GB/s both ways. Of a GB200's NVLink domain only the four GPUs of a host are planned with;
        # two share 450 GB/s to their host.
        Hardware("b200", "NVIDIA B200", "cuda", _B200_MEMORY, 8.0e12, 900e9, 50e9, 64e9, *_GPU_LATENCIES,
                 _gpu(148, 1.965, _B200_MEMORY, 8.0e12, 132_644_864, 233_472, "10.0")),
        Hardware("gb200", "NVIDIA GB200", "cuda", _GB200_MEMORY, 8.0e12, 900e9, 50e9, 225e9, *_GPU_LATENCIES,
                 _gpu(152, 1.965, _GB200_MEMORY, 8.0e12, 132_644_864, 233_472, "10.0")),
        Hardware("a100-80g", "NVIDIA A100", "cuda", _A100_MEMORY, 2.039e12, 300e9, 25e9, 32e9, *_GPU_LATENCIES,
                 _gpu(108, 1.41, _A100_MEMORY, 2.039e12, 41_943_040, 167_936, "8.0")),
        # A consumer card alone in its machine.
        Hardware("rtx4090", "NVIDIA GeForce RTX 4090", "cuda", _RTX4090_MEMORY, 1.008e12, 32e9, 1e9, 32e9,
                 *_GPU_LATENCIES,
                 _gpu(128, 2.52, _RTX4090_MEMORY, 1.008e12, 75_497_472, 102_400, "8.9")),
        # TPU: the bandwidth of all of a chip's interconnect links together, one way; a slice has no slower part. To the
        # host, what the book "How to Scale Your Model" reckons with.
        Hardware("v5p", "TPU v5p", "tpu", int(95.74 * GIB), 2.765e12, 300e9, 300e9, 15e9, *_TPU_LATENCIES),
        Hardware("v5e", "TPU v5e", "tpu", int(15.75 * GIB), 0.819e12, 100e9, 100e9, 15e9, *_TPU_LATENCIES),
        # Two devices a chip, each with half of its memory, arithmetic and links.
        Hardware("tpu7x", "TPU7x", "tpu", int(94.75 * GIB), 3.69e12, 300e9, 300e9, 15e9, *_TPU_LATENCIES,
                 devices_per_chip=2),
        Hardware("v6e", "TPU v6e", "tpu", int(31.25 * GIB), 1.638e12, 224e9, 224e9, 15e9, *_TPU_LATENCIES),
    )
}  # fmt: skip
"""Memory is what the compiler may use, a little less than the data sheet's."""

_EXAMPLES = "h100:2x8, h200:1x8, a100-80g:2x8 (hosts x GPUs), tpu:v5p:2x2x4, tpu:v5e:16x16, tpu:v6e:8x8 (chips)"


@dataclass(frozen=True)
class Target:
    """Some number of devices of one kind."""

    hardware: Hardware
    shape: tuple[int, ...]
    """(hosts, GPUs of each) or the slice's chips in each direction."""

    @property
    def num_devices(self) -> int:
        """Devices in all."""
        count = self.hardware.devices_per_chip
        for size in self.shape:
            count *= size
        return count

    @property
    def num_hosts(self) -> int:
        """How many machines the devices are in; those of TPUs have four chips each."""
        return (
            self.num_devices // self.devices_per_host
            if self.hardware.platform == "cuda"
            else -(-self.num_devices // (4 * self.hardware.devices_per_chip))
        )

    @property
    def devices_per_host(self) -> int:
        """Devices that reach each other over the fast links."""
        return self.shape[-1] if self.hardware.platform == "cuda" else self.num_devices

    def __str__(self) -> str:
        prefix = "tpu:" if self.hardware.platform == "tpu" else ""
        return f"{prefix}{self.hardware.name}:{'x'.join(map(str, self.shape))}"

    def devices(self) -> Sequence[Any]:
        """Devices of the target, to compile for; nothing can run on them.

        Raises PlanError if the compiler is not installed, or does not know such a slice.
        """
        check_compiler(self.hardware.platform)
        from jax.experimental import topologies

        try:
            if self.hardware.platform == "tpu":
                topology = topologies.get_topology_desc(platform="tpu", topology_name=str(self)[4:])
            else:
                hosts, per_host = self.shape
                description = f'device_description_str: "{self.hardware.kind}"'
                topology = topologies.get_topology_desc(
                    platform="cuda",
                    topology_name="",
                    target_config=self.hardware.gpu + description,
                    topology=f"1x{hosts}x{per_host}",
                )
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise PlanError(f"{self}: the compiler does not take this target: {error}") from error
        if self.hardware.platform == "cuda":
            _answer_for(self.hardware)
        return topology.devices


def parse_target(text: str) -> Target:
    """Read `h100:2x8` or `tpu:v5p:2x2x4`. Raises PlanError that lists what is known."""
    match = re.fullmatch(r"(tpu:)?([\w-]+):(\d+(?:x\d+)*)", text)
    hardware = HARDWARE.get(match[2]) if match else None
    if match is None or hardware is None or bool(match[1]) != (hardware.platform == "tpu"):
        raise PlanError(f"plan target {text!r}: not known; examples: {_EXAMPLES}")
    shape = tuple(int(size) for size in match[3].split("x"))
    if 0 in shape or (hardware.platform == "cuda" and len(shape) != 2):
        raise PlanError(f"plan target {text!r}: the shape of GPUs is HOSTSxGPUS, as in h100:2x8")
    return Target(hardware, shape)


def _answer_for(hardware: Hardware) -> None:
    """Let jax's questions about cuDNN be answered for this GPU: it asks the one that it finds, and here is none."""
    from jax._src.cudnn import fused_attention_stablehlo

    major, minor = (int(digits) for digits in re.findall(r"(?:major|minor): (\d+)", hardware.gpu)[:2])

    def at_least(capability: str) -> bool:
        return (major, minor) >= tuple(map(int, capability.split(".")))

    fused_attention_stablehlo.check_cudnn_version = lambda: _CUDNN
    fused_attention_stablehlo.check_compute_capability = at_least
    fused_attention_stablehlo.is_cuda_compute_capability_equal = lambda capability: capability == f"{major}.{minor}"


def check_compiler(platform: str) -> None:
    """Raise PlanError with the line that installs the platform's compiler, if it is not there."""
    version = importlib.metadata.version("jax")
    if platform == "tpu" and find_spec("libtpu") is None:
        raise PlanError(f"planning for TPU needs its compiler: pip install 'jax[tpu]=={version}'")
    if platform == "cuda" and find_spec("jax_cuda12_plugin") is None:
        raise PlanError(
            "planning for GPU needs its compiler (no driver, no GPU): "
            f"pip install --no-deps jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}"
        )


def use_compilers_only() -> None:
    """Set the environment so that jax computes on the CPU and libtpu looks for no TPU; before jax is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    # What is compiled for devices that are not here cannot be read back from the cache.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-32",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
