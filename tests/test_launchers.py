"""What each launcher's environment says of a process; environments, /sys, /proc and the metadata server are faked."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from s1jax.launchers import LaunchError, Place, find_place, local_device_ids, tpu_chips, visible_gpus

SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu-[003-004]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "16",
    "OMPI_COMM_WORLD_RANK": "9",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
}
XPK = {
    "JAX_COORDINATOR_ADDRESS": "run-slice-job-0-0.run",
    "JAX_COORDINATOR_PORT": "6002",
    "NNODES": "2",
    "NODE_RANK": "1",
}
SKYPILOT = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
TORCHRUN = {"MASTER_ADDR": "a", "MASTER_PORT": "29500", "WORLD_SIZE": "4", "RANK": "2"}
TORCHRUN |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
GKE_TPU = {"TPU_WORKER_HOSTNAMES": "w-0.svc,w-1.svc,w-2.svc,w-3.svc", "TPU_WORKER_ID": "2"}


def machine(root: Path, *, gpus: int = 0, pci: tuple[tuple[str, str], ...] = (), accel: bool = False) -> Path:
    """A root directory with a driver's GPUs, and (vendor, device) on the PCI bus."""
    for number in range(gpus):
        (root / f"proc/driver/nvidia/gpus/0000:0{number}:00.0").mkdir(parents=True)
    for number, (vendor, device) in enumerate(pci):
        directory = root / f"sys/bus/pci/devices/0000:00:0{number}.0"
        directory.mkdir(parents=True)
        (directory / "vendor").write_text(vendor + "\n")
        (directory / "device").write_text(device + "\n")
    if accel:
        (root / "dev").mkdir()
        (root / "dev/accel0").touch()
    return root


V5P = (("0x1ae0", "0x0062"),) * 4


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (SLURM, Place("SLURM", 1, 2, "gpu-003:61586", 0, 1)),
        ({**SLURM, "SLURM_STEP_NODELIST": "a1,b2"}, Place("SLURM", 1, 2, "a1:61586", 0, 1)),
        ({**SLURM, "SLURM_STEP_NODELIST": "n[7,9-12].ib,x"}, Place("SLURM", 1, 2, "n7.ib:61586", 0, 1)),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8(x2),4"}, Place("SLURM", 1, 2, "gpu-003:61586", 0, 8)),
        # An allocation of two tasks, in whose batch script nobody has called srun.
        ({k: v for k, v in SLURM.items() if "STEP" not in k}, None),
        (OPEN_MPI, Place("Open MPI", 9, 16, "10.96.0.1:62624", 1, 8)),
        ({**OPEN_MPI, **SLURM}, Place("Open MPI", 9, 16, "10.96.0.1:62624", 1, 8)),
        (
            {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp6://[fe80::1,fe80::2]:1"},
            Place("Open MPI", 9, 16, "[fe80::1]:62624", 1, 8),
        ),
        # Open MPI 5 does not say where it was started.
        ({k: v for k, v in OPEN_MPI.items() if "uri" not in k}, Place("Open MPI", 9, 16, None, 1, 8)),
        (XPK, Place("JAX_* variables", 1, 2, "run-slice-job-0-0.run:6002")),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "0"},
            Place("JAX_* variables", 0, 3, "h:1"),
        ),
        (SKYPILOT, Place("SkyPilot", 1, 2, "10.0.0.1:8482")),
        (TORCHRUN, Place("torchrun's variables", 2, 4, "a:29501", 0, 2)),
        ({"WORLD_SIZE": "4", "RANK": "2"}, None),
        ({"NNODES": "2", "NODE_RANK": "0"}, None),
        ({"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "0"}, Place("PMI", 1, 2, None, 0)),
        # Made for TPU hosts; here there are no chips.
        (GKE_TPU, None),
    ],
)
def test_a_launchers_variables(environment: dict[str, str], expected: Place | None, tmp_path: Path) -> None:
    assert find_place(environment, tmp_path) == expected


@pytest.mark.parametrize(
    "environment",
    [{**SLURM, "SLURM_PROCID": "x"}, {**SLURM, "SLURM_PROCID": "2"}, {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "-1"}],
)
def test_variables_that_cannot_be_are_refused_by_name(environment: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"SLURM|OMPI"):
        find_place(environment, tmp_path)


@pytest.mark.parametrize(
    ("variables", "gpus", "expected"),
    [
        ({}, 8, []),  # One task a node: all eight, where jax alone would take one.
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3"}, 8, [3]),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"}, 8, [4, 5, 6, 7]),
        # --gpus-per-task=1: each task sees its own only.
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "3"}, 8, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3", "JAX_LOCAL_DEVICE_IDS": "6,7"}, 8, [6, 7]),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3"}, 0, []),
    ],
)
def test_the_gpus_of_a_process(variables: dict[str, str], gpus: int, expected: list[int], tmp_path: Path) -> None:
    environment, root = {**SLURM, **variables}, machine(tmp_path, gpus=gpus)
    place = find_place(environment, root)
    assert place is not None
    assert local_device_ids(place, environment, root) == expected


def test_gpus_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    environment, root = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3(x2)"}, machine(tmp_path, gpus=8)
    place = find_place(environment, root)
    assert place is not None
    with pytest.raises(LaunchError, match="3 processes on this host, which sees 8 GPUs"):
        local_device_ids(place, environment, root)


@pytest.mark.parametrize(("shown", "count"), [(None, 4), ("", 0), ("-1", 0), ("0,2", 2), ("GPU-1,GPU-2,GPU-3", 3)])
def test_visible_gpus(shown: str | None, count: int, tmp_path: Path) -> None:
    environment = {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
    assert visible_gpus(environment, machine(tmp_path, gpus=4)) == count


def test_a_gpu_machine_with_accel_devices_and_googles_network_card_is_no_tpu(tmp_path: Path) -> None:
    root = machine(tmp_path, gpus=8, accel=True, pci=(("0x10de", "0x2330"), ("0x1ae0", "0x0042")))
    assert tpu_chips(root) == 0
    assert find_place(GKE_TPU, root) is None


@pytest.mark.parametrize("device", ["0x005e", "0x0062", "0x0063", "0x006f", "0x0076"])
def test_chips_are_found_on_the_pci_bus(device: str, tmp_path: Path) -> None:
    root = machine(tmp_path, pci=(("0x1ae0", device), ("0x1ae0", "0x0042"), ("0x1ae0", device)))
    assert tpu_chips(root) == 2


def test_gke_tells_a_tpu_hosts_neighbours(tmp_path: Path) -> None:
    root = machine(tmp_path, pci=V5P)
    place = find_place(GKE_TPU, root)
    assert place == Place("TPU_WORKER_HOSTNAMES", 2, 4, "w-0.svc:8482", tpu=True)
    assert local_device_ids(place, GKE_TPU, root) == []
    slices = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "m-0.svc"}
    place = find_place({**GKE_TPU, **slices}, root)
    assert place == Place("TPU_WORKER_HOSTNAMES", 6, 8, "m-0.svc:8482", tpu=True)
    assert find_place({**GKE_TPU, "JAX_PLATFORMS": "cpu"}, root) is None


@pytest.fixture
def metadata() -> Iterator[tuple[dict[str, str], str]]:
    """Attributes of a machine, and the address of the server that tells them."""
    attributes: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            value = attributes.get(self.path.rpartition("/")[2])
            known = value is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield attributes, f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "endpoints", ["10.0.0.5,10.0.0.6", "unknown:unknown:10.0.0.5,unknown:unknown:10.0.0.6"], ids=["names", "triples"]
)
def test_cloud_tpus_metadata(endpoints: str, metadata: tuple[dict[str, str], str], tmp_path: Path) -> None:
    attributes, address = metadata
    root, environment = machine(tmp_path, pci=V5P), {"GCE_METADATA_IP": address}
    assert find_place(environment, root) == Place("TPU without a launcher", 0, 1, tpu=True)
    attributes |= {"agent-worker-number": "1", "worker-network-endpoints": endpoints, "tpu-env": "ZONE: 'x'\n"}
    assert find_place(environment, root) == Place("Cloud TPU", 1, 2, "10.0.0.5:8482", tpu=True)
    attributes["tpu-env"] = (
        "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1:8080'\n"
    )
    assert find_place(environment, root) == Place("Cloud TPU", 3, 4, "10.0.0.1:8482", tpu=True)
    skipped = {**environment, "TPU_SKIP_MDS_QUERY": "1"}
    assert find_place(skipped, root) == Place("TPU without a launcher", 0, 1, tpu=True)
