"""Runs whose model, data and output are in a bucket: killed at the worst moments, and on a store that refuses."""

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from s1jax.model.export import is_exported
from s1jax.paths import AnyPath, BucketPath, any_path, files_below, write_whole
from tests.buckets import BUCKET
from tests.faulty_store import Rule, refusing
from tests.processes import free_port, wait_until
from tests.training.conftest import Command, metrics, run, start

WEIGHTS = "model/model.safetensors"
STORES = pytest.mark.parametrize("scheme", ["gs", "s3"])


def moved(command: Command, model: Path, traces: Path, bucket: BucketPath, *more: str) -> list[str]:
    """The run of `command` with all that it reads and writes in the bucket."""
    for file in [*model.iterdir(), traces]:
        write_whole(bucket / "in" / file.name, file.read_bytes())
    words = (f"model.path={bucket}/in", f"data.path={bucket}/in/{traces.name}")
    return command(bucket / "run", *words, *more)


def assert_same_end(output: AnyPath, undisturbed: Path) -> None:
    assert metrics(output) == metrics(undisturbed)
    assert (output / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()


def writing(output: AnyPath) -> bool:
    step = output / "checkpoints" / "4"
    return (step / "default" / "params.embedding.weight" / "zarr.json").exists() and not (
        step / "commit_success.txt"
    ).exists()


def exporting(output: AnyPath) -> bool:
    return (output / WEIGHTS).exists() and not is_exported(output / "model")


# Long tests take one store each; that every operation is the same in both is tested for itself in tests/test_paths.py.
@pytest.mark.slow
@pytest.mark.parametrize(("moment", "bucket"), [(writing, "gs"), (exporting, "s3")], indirect=["bucket"])
def test_killed_while_it_writes_to_a_bucket(
    moment: Callable[[AnyPath], bool],
    command: Command,
    model: Path,
    traces: Path,
    undisturbed: Path,
    bucket: BucketPath,
) -> None:
    words = moved(command, model, traces, bucket)
    output = bucket / "run"
    process = start(words)
    wait_until(lambda: moment(output), [process], seconds=0)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert moment(output)
    status, text = run(words)
    assert status == 0, text
    # The fourth step's checkpoint was not complete, or is the last one.
    assert f"going on from the checkpoint of step {2 if moment is writing else 4}" in text
    assert_same_end(output, undisturbed)
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"2", "4"}
    status, text = run(words)
    assert status == 0
    assert "this run is finished" in text


def behind(scheme: str, request: pytest.FixtureRequest) -> dict[str, str]:
    """The environment of a store that is running, for another server to stand before it."""
    request.getfixturevalue(f"{scheme}_bucket")
    names = {
        "gs": ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"),
        "s3": ("AWS_ENDPOINT_URL",),
    }[scheme]
    return {name: os.environ[name] for name in names}


def run_behind(words: list[str], settings: Mapping[str, str], rule: Rule) -> tuple[int, str]:
    with refusing(settings, rule) as variables:
        process = start(words, variables=variables)
        text, _ = process.communicate(timeout=500)
        return process.returncode, text


@pytest.mark.slow
def test_a_store_that_is_busy_now_and_then_changes_nothing(
    command: Command, undisturbed: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    settings = behind("gs", request)
    output = any_path(f"gs://{BUCKET}/{tmp_path.name}")
    refused: list[str] = []
    seen = 0

    def rule(method: str, path: str) -> int | None:
        nonlocal seen
        seen += 1
        if seen % 9:
            return None
        refused.append(f"{method} {path}")
        return 503

    status, text = run_behind(command(output), settings, rule)
    assert status == 0, text
    assert any("checkpoints" in line for line in refused)
    assert any("model" in line for line in refused)
    assert_same_end(output, undisturbed)


@pytest.mark.slow
@STORES
def test_what_may_not_be_written_is_said_in_one_line(
    scheme: str, command: Command, undisturbed: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    settings = behind(scheme, request)
    output = any_path(f"{scheme}://{BUCKET}/{tmp_path.name}")

    def no_step_4(method: str, path: str) -> int | None:
        return 403 if method in ("PUT", "POST") and "checkpoints/4" in path else None

    status, text = run_behind(command(output), settings, no_step_4)
    assert status == 1, text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert f"checkpoint of step 4 could not be written to {output}/checkpoints (step 2 is intact): " in line
    assert "Traceback" not in text, text

    def no_model(method: str, path: str) -> int | None:
        return 403 if method in ("PUT", "POST") and "model.safetensors" in path else None

    status, text = run_behind(command(output), settings, no_model)
    assert status == 1, text
    assert f"{output}/model:" in text
    assert "could not be written" in text
    assert "Traceback" not in text, text
    assert not is_exported(output / "model")
    status, text = run(command(output))
    assert status == 0, text
    assert "going on from the checkpoint of step 4" in text
    assert_same_end(output, undisturbed)


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_said_in_one_line(command: Command, bucket: BucketPath) -> None:
    status, text = run(command(any_path(f"{bucket.scheme}://no-such-bucket/run")))
    assert status == 1, text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert f"{bucket.scheme}://no-such-bucket/run" in line
    assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_two_processes_save_by_the_clock_of_the_first_and_one_goes_on(command: Command, bucket: BucketPath) -> None:
    """Saved after every step; what two processes have written, one restores onto its devices."""
    settings = ["mesh.fsdp=8", "mesh.tensor=2", "checkpoint.every_steps=null"]
    words = command(bucket / "run", *settings, "checkpoint.every_minutes=0.0001", "training.num_epochs=400")
    meeting = [f"mesh.coordinator=127.0.0.1:{free_port()}", "mesh.num_processes=2"]
    processes = [start([*words, *meeting, f"mesh.process_id={i}"], devices=8) for i in range(2)]
    step = bucket / "run" / "checkpoints" / "2"
    wait_until(lambda: (step / "commit_success.txt").exists(), processes, seconds=0.05)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()
    latest = max(int(p.name) for p in (bucket / "run" / "checkpoints").iterdir() if (p / "commit_success.txt").exists())
    manifests = [p.name for p in files_below(bucket / "run" / "checkpoints" / str(latest)) if "manifest" in p.name]
    assert manifests == ["manifest.0.json", "manifest.1.json"]
    one = start(words, devices=16)
    step = bucket / "run" / "checkpoints" / str(latest + 1)
    wait_until(lambda: (step / "commit_success.txt").exists(), [one], seconds=0.05)
    one.send_signal(signal.SIGTERM)
    text, _ = one.communicate(timeout=300)
    assert one.returncode == 143, text
    assert f"going on from the checkpoint of step {latest}" in text
