"""Which process of how many this is, as launchers tell it: SLURM, Open MPI, GKE, Cloud TPU and others.

Nothing here starts anything or asks jax: what is found follows from the environment's variables, from /sys, /proc and
/dev below `root`, and on a Cloud TPU from its metadata server.
"""

import re
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Environment = Mapping[str, str]

_TPU_PORT = 8482
"""Where the first process listens on TPUs, and elsewhere if the launcher has no job number to make a port from."""
_GOOGLE_VENDOR = "0x1ae0"
_TPU_DEVICE_IDS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
"""PCI ids of TPU v2 to v7x, as jax lists them (jax/_src/hardware_utils.py); Google's network cards have others."""
_METADATA_SECONDS = 5


class LaunchError(ValueError):
    """A launcher's environment from which no run can be started; the message says what to change."""


@dataclass(frozen=True)
class Place:
    """A process among those that a launcher started."""

    launcher: str
    index: int
    count: int
    coordinator: str | None = None
    """host:port of the first process; None where the launcher does not tell."""
    local_index: int | None = None
    """Among the processes on the same host, as is the next; None where the launcher does not tell."""
    local_count: int | None = None
    tpu: bool = False


@dataclass(frozen=True)
class _Names:
    """The variables in which a launcher tells what it knows; of several names the first one that is set counts."""

    launcher: str
    count: tuple[str, ...]
    index: tuple[str, ...]
    coordinator: Callable[[Environment], str | None]
    local_index: tuple[str, ...] = ()
    local_count: tuple[str, ...] = ()
    needs: str | None = None
    """A variable without which the others are somebody else's."""


def find_place(environment: Environment, root: Path = Path("/")) -> Place | None:
    """What the launcher says of this process; None if there is no launcher.

    Raises LaunchError for variables that contradict each other.
    """
    for names in _LAUNCHERS:
        if place := _named(names, environment):
            return place
    wanted = environment.get("JAX_PLATFORMS") or "tpu"
    if "tpu" in wanted and tpu_chips(root):
        return _tpu_place(environment)
    for names in _SCRIPTED:
        if place := _named(names, environment):
            return place
    return None


def local_device_ids(place: Place, environment: Environment, root: Path = Path("/")) -> list[int]:
    """The devices that this process takes among those it sees; an empty list: all of them.

    JAX_LOCAL_DEVICE_IDS wins. One process on a host takes all; several divide the host's GPUs among them, unless their
    launcher has shown each its own already. (jax by itself gives each process one GPU under SLURM and Open MPI.)
    Raises LaunchError if the GPUs cannot be divided.
    """
    if chosen := environment.get("JAX_LOCAL_DEVICE_IDS"):
        return [int(number) for number in chosen.split(",")]
    gpus = visible_gpus(environment, root)
    if place.tpu or place.local_index is None or place.local_count in (None, 1) or gpus <= 1:
        return []
    if gpus % place.local_count:
        raise LaunchError(
            f"{place.launcher} started {place.local_count} processes on this host, which sees {gpus} GPUs: start one "
            "process for the host, one for each GPU, or set JAX_LOCAL_DEVICE_IDS"
        )
    share = gpus // place.local_count
    return list(range(place.local_index * share, (place.local_index + 1) * share))


def visible_gpus(environment: Environment, root: Path = Path("/")) -> int:
    """How many NVIDIA GPUs this process sees: as CUDA_VISIBLE_DEVICES says, else as many as the driver has."""
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return len([number for number in shown.split(",") if number.strip() not in ("", "-1")])
    listed = len(list(root.glob("proc/driver/nvidia/gpus/*")))
    return listed or len(list(root.glob("dev/nvidia[0-9]*")))


def tpu_chips(root: Path = Path("/")) -> int:
    """How many TPU chips are on this machine's PCI bus."""
    chips = 0
    for vendor in root.glob("sys/bus/pci/devices/*/vendor"):
        if vendor.read_text(encoding="ascii").strip() == _GOOGLE_VENDOR:
            chips += vendor.with_name("device").read_text(encoding="ascii").strip() in _TPU_DEVICE_IDS
    return chips


def _named(names: _Names, environment: Environment) -> Place | None:
    if names.needs and names.needs not in environment:
        return None
    count, index = _number(names.count, environment), _number(names.index, environment)
    if count is None or index is None:
        return None
    if not 0 <= index < count:
        raise LaunchError(f"{names.launcher}: process {index} of {count} ({names.index[0]}, {names.count[0]})")
    return Place(
        names.launcher,
        index,
        count,
        names.coordinator(environment),
        _number(names.local_index, environment),
        _slurm_local_count(environment) if names.launcher == "SLURM" else _number(names.local_count, environment),
    )


def _number(names: tuple[str, ...], environment: Environment) -> int | None:
    found = next(((name, environment[name]) for name in names if environment.get(name)), None)
    if found is None:
        return None
    if not found[1].isdecimal():
        raise LaunchError(f"{found[0]} is {found[1]!r}, expected a number")
    return int(found[1])


def _address(host: str, environment: Environment, port: int = _TPU_PORT) -> str:
    return f"{host}:{environment.get('JAX_COORDINATOR_PORT') or port}"


def _job_port(job: int) -> int:
    """A port of the highest 4,096, so that two jobs on one host seldom want the same (as jax chooses it)."""
    return 65536 - 4096 + job % 4096


def _jax_coordinator(environment: Environment) -> str | None:
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    return address if address is None or ":" in address else _address(address, environment)


def _slurm_coordinator(environment: Environment) -> str | None:
    """The step's first host, from lists like `node7`, `gpu-[003-004,9].local` or `a1,b2`."""
    nodes = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,\[]*))?", environment.get("SLURM_STEP_NODELIST", ""))
    if nodes is None:
        return None
    host = "".join(part or "" for part in nodes.groups())
    return _address(host, environment, _job_port(int(environment.get("SLURM_JOB_ID", "0"))))


def _slurm_local_count(environment: Environment) -> int | None:
    """Tasks on this node, from lists like `1(x2)` or `8(x3),4`."""
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(tasks)] * int(times or 1)
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else None


def _open_mpi_coordinator(environment: Environment) -> str | None:
    """The host of mpirun, which Open MPI 4 tells; 5 does not, and there `mesh.coordinator` must."""
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    host = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
    if host is None:
        return None
    name = host[1] or f"[{host[2]}]"
    return _address(name, environment, _job_port(int(uri.partition(".")[0]) // 4096))


def _torchrun_coordinator(environment: Environment) -> str | None:
    # Its own port is taken by torchrun itself; one higher is not.
    port = int(environment["MASTER_PORT"]) + 1 if environment.get("MASTER_PORT", "").isdecimal() else _TPU_PORT
    return _address(environment["MASTER_ADDR"], environment, port)


def _sky_coordinator(environment: Environment) -> str | None:
    hosts = environment.get("SKYPILOT_NODE_IPS", "").split()
    return _address(hosts[0], environment) if hosts else None


def _untold(environment: Environment) -> str | None:
    return None


_LAUNCHERS = (
    _Names(
        "JAX_* variables",  # Also those of xpk's GPU workloads.
        ("JAX_NUM_PROCESSES", "JAX_PROCESS_COUNT", "NNODES"),
        ("JAX_PROCESS_ID", "JAX_PROCESS_INDEX", "NODE_RANK"),
        _jax_coordinator,
        needs="JAX_COORDINATOR_ADDRESS",
    ),
    _Names(
        "Open MPI",
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_RANK",),
        _open_mpi_coordinator,
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    # Only inside srun: a batch script's own shell has SLURM_NTASKS and SLURM_PROCID too, and is alone.
    _Names("SLURM", ("SLURM_STEP_NUM_TASKS",), ("SLURM_PROCID",), _slurm_coordinator, ("SLURM_LOCALID",)),
)
_SCRIPTED = (
    _Names(
        "torchrun's variables",
        ("WORLD_SIZE",),
        ("RANK",),
        _torchrun_coordinator,
        ("LOCAL_RANK",),
        ("LOCAL_WORLD_SIZE",),
        needs="MASTER_ADDR",
    ),
    _Names("SkyPilot", ("SKYPILOT_NUM_NODES",), ("SKYPILOT_NODE_RANK",), _sky_coordinator),
    _Names("PMI", ("PMI_SIZE",), ("PMI_RANK",), _untold, ("MPI_LOCALRANKID",), ("MPI_LOCALNRANKS",)),
)
"""Asked last: such variables are also set by hand, or for something else."""


def _tpu_place(environment: Environment) -> Place:
    """This host among those of a TPU slice, or of several slices: from GKE's variables, else from the metadata."""
    metadata = "" if environment.get("TPU_SKIP_MDS_QUERY") else None
    listed = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if listed:
        launcher, worker = "TPU_WORKER_HOSTNAMES", environment.get("TPU_WORKER_ID", "0")
    else:
        launcher, worker = "Cloud TPU", _metadata("agent-worker-number", environment) if metadata is None else ""
        listed = _metadata("worker-network-endpoints", environment) if worker else ""
    # An entry is a host, a host with its port, or name:number:address.
    hosts = [parts[2] if len(parts) == 3 else parts[0] for parts in (e.split(":") for e in (listed or "").split(","))]
    if not worker or not hosts[0]:
        return Place("TPU without a launcher", 0, 1, tpu=True)

    def told(name: str) -> str | None:
        if name in environment or launcher != "Cloud TPU":
            return environment.get(name)
        found = re.search(rf"^{name}:\s*'?([^'\n]*)'?\s*$", _metadata("tpu-env", environment), re.MULTILINE)
        return found[1] if found else None

    slices, slice_id = int(told("MEGASCALE_NUM_SLICES") or 1), int(told("MEGASCALE_SLICE_ID") or 0)
    coordinator = (told("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    return Place(
        launcher,
        slice_id * len(hosts) + int(worker),
        slices * len(hosts),
        _address(coordinator, environment),
        tpu=True,
    )


def _metadata(key: str, environment: Environment) -> str:
    """An attribute that Compute Engine's metadata server has of this machine; empty if there is none."""
    server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as answer:
            return str(answer.read().decode("utf-8"))
    except OSError:
        return ""
