"""decode.py in several processes, with copies of a model and with one together, against one process alone."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s1jax.decoding import hosts
from s1jax.paths import AnyPath, BucketPath
from s1jax.processes import Processes
from tests.decoding.conftest import CONFIG, ROOT, environment
from tests.processes import finish, start_hosts, wait_until

pytestmark = pytest.mark.slow
WAYS = pytest.mark.parametrize("copies", [True, False], ids=["copies", "one model"])
COUNTS = pytest.mark.parametrize("count", [2, 4])
SAMPLED = ["sampling.temperature=1", "sampling.num_samples=2"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def in_order(path: Path) -> list[dict[str, Any]]:
    return sorted(lines(path), key=lambda row: (row["id"], row.get("sample", 0)))


def alone(words: list[str]) -> None:
    process = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def left_over(output: Path) -> list[str]:
    """What lies beside an output and is neither a lock nor its settings."""
    names = {path.name for path in output.parent.iterdir() if output.name in path.name}
    return sorted(name for name in names - {output.name, f"{output.name}.config.json"} if not name.endswith(".lock"))


def generating(directory: Path, prompts: Path, output: Path | BucketPath, *words: str) -> list[str]:
    settings = [f"model.path={directory}", "model.dtype=float32", "budget.max_answer_tokens=4", "max_total_tokens=90"]
    return [sys.executable, "decode.py", "generate", *settings, f"prompts={prompts}", f"output={output}", *words]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"id": f"p{i:03}", "prompt": f"{i} + 3?", "max_thinking_tokens": i, "num_ignore": i % 2} for i in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def generated(directory: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """What one process gives: greedy, to hold two processes against, and sampled, for four."""
    output = tmp_path_factory.mktemp("generated")
    alone(generating(directory, prompts, output / "2.jsonl"))
    alone(generating(directory, prompts, output / "4.jsonl", *SAMPLED))
    return {count: in_order(output / f"{count}.jsonl") for count in (2, 4)}


def weights_shared(copies: bool, count: int) -> list[str]:
    """Two processes with one model have the mesh that is chosen, each all weights; four have shares of them."""
    return ["mesh.fsdp=-1"] * count if count == 4 and not copies else []


@COUNTS
@WAYS
def test_generate_is_what_one_process_gives(
    directory: Path, prompts: Path, generated: dict[int, list[dict]], copies: bool, count: int, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    words = generating(directory, prompts, output, *(SAMPLED if count == 4 else []))
    outputs = finish(start_hosts(words, count, copies=copies, own=weights_shared(copies, count)))
    rows = lines(output)
    assert in_order(output) == generated[count]
    if copies:  # Made of parts, and so in the order of the prompts.
        assert rows == generated[count]
    assert left_over(output) == []
    assert [bool(re.search(r"\d+ to generate", errors)) for _, errors in outputs] == [
        copies or index == 0 for index in range(count)
    ]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    rows = [{"id": f"row {i}", "input_ids": rng.integers(0, 368, rng.integers(1, 60)).tolist()} for i in range(11)]
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scoring(directory: Path, texts: Path, output: Path) -> list[str]:
    settings = [f"model.path={directory}", "model.dtype=float32", f"input={texts}", f"output={output}", "batch_size=4"]
    return [sys.executable, "decode.py", "score", *settings]


@pytest.fixture(scope="module")
def scored(directory: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    output = tmp_path_factory.mktemp("scored") / "out.jsonl"
    alone(scoring(directory, texts, output))
    return lines(output)


@COUNTS
@WAYS
def test_score_is_what_one_process_gives_in_the_order_of_the_input(
    directory: Path, texts: Path, scored: list[dict], copies: bool, count: int, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    words = scoring(directory, texts, output)
    finish(start_hosts(words, count, copies=copies, own=weights_shared(copies, count)))
    rows = lines(output)
    assert [row["id"] for row in rows] == [f"row {i}" for i in range(11)]
    for row, expected in zip(rows, scored, strict=True):
        assert (row["input_ids"], row["greedy"]) == (expected["input_ids"], expected["greedy"])
        np.testing.assert_allclose(row["logprobs"][1:], expected["logprobs"][1:], rtol=0, atol=1e-4)
        assert row["nll"] == pytest.approx(expected["nll"], abs=1e-3)
    assert left_over(output) == []


@COUNTS
@WAYS
def test_benchmark_has_one_report(copies: bool, count: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    output = tmp_path / "speed.json"
    words = ["benchmark.batch_sizes=4", "benchmark.prompt_length=16", "benchmark.new_tokens=32"]
    words += [f"model.path={tmp_path}", "benchmark.repeats=1", f"benchmark.output={output}"]
    words += ["benchmark.requests=3", "benchmark.lengths=lognormal:20:40"]
    processes = start_hosts([sys.executable, "decode.py", "benchmark", *words], count, copies=copies)
    printed = [out for out, _ in finish(processes)]
    report = json.loads(output.read_text())
    rates = [row["decode_tokens_per_second"] for row in report["results"]]
    if copies:
        assert [host["devices"] for host in report["hosts"]] == [1] * count
        assert [row["batch_size"] for row in report["results"]] == [4 * count]
        of_hosts = [[row["decode_tokens_per_second"] for row in host["results"]] for host in report["hosts"]]
        assert rates == pytest.approx(np.sum(of_hosts, axis=0))
        assert ["ms/step" in text for text in printed] == [True] * count
        assert sum(text.count("all hosts:") for text in printed) == 2
        assert [row["requests"] for row in report["workloads"]] == [3 * count]
        pictures = {f"speed.{process}.png" for process in range(count)}
    else:
        assert report["devices"] == count
        assert [row["batch_size"] for row in report["results"]] == [4]
        assert ["ms/step" in text for text in printed] == [True] + [False] * (count - 1)
        pictures = {"speed.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == pictures
    assert all(rate > 0 for rate in rates)
    assert left_over(output) == []


HURRIED = """
import sys
from s1jax.decoding import hosts
hosts.BEAT_SECONDS = 0.5
import decode
sys.exit(decode.main(sys.argv[1:]))
"""


def test_killed_and_resumed_by_another_number_of_processes_each_request_is_there_once(
    directory: Path, tmp_path: Path
) -> None:
    prompts, whole = tmp_path / "prompts.jsonl", tmp_path / "whole.jsonl"
    rows = [{"id": f"p{i:03}", "prompt": f"What is {i} + 3?", "max_thinking_tokens": 10 + i % 30} for i in range(1500)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone(generating(directory, prompts, whole, "batch_size=64"))
    expected = in_order(whole)
    assert hosts.BEAT_SECONDS * (hosts.GONE_BEATS + 2) < 100
    # Both ways at a time: what takes time is that the others wait for signs of life.
    gangs = {}
    for copies in (True, False):
        output = tmp_path / f"{copies}.jsonl"
        words = generating(directory, prompts, output, "batch_size=1")
        if copies:
            words[1:2] = ["-c", HURRIED]
        gangs[copies] = output, start_hosts(words, 2, copies=copies)
    died = {}
    for copies, (output, processes) in gangs.items():
        files = [output.with_name(output.name + ".parts") / f"{i}.jsonl" for i in range(2)] if copies else [output]
        wait_until(
            lambda files=files: all(f.exists() and len(f.read_bytes().splitlines()) > 3 for f in files), processes
        )
        victim = 0 if copies else 1
        processes[victim].send_signal(signal.SIGKILL)
        died[copies] = time.monotonic(), victim
    for copies, (output, processes) in gangs.items():
        since, victim = died[copies]
        _, errors = processes[1 - victim].communicate(timeout=180)
        processes[victim].communicate()
        assert time.monotonic() - since < 120, errors
        assert processes[1 - victim].returncode not in (0, None), errors
        if copies:
            assert "error: process 0 of 2 is gone: stopped" in errors
        assert not output.exists() or len(lines(output)) < len(rows)
    # What two processes with copies left, one alone goes on with; what two with one model left, three with copies.
    alone(generating(directory, prompts, gangs[True][0], "batch_size=64"))
    three = generating(directory, prompts, gangs[False][0], "batch_size=64")
    finish(start_hosts(three, 3, copies=True))
    for output, _ in gangs.values():
        assert in_order(output) == expected
        assert left_over(output) == []


def test_copies_come_together_in_a_bucket(
    directory: Path, prompts: Path, generated: dict[int, list[dict]], bucket: BucketPath
) -> None:
    output = bucket / "out.jsonl"
    finish(start_hosts(generating(directory, prompts, output), 2, copies=True))
    assert [json.loads(line) for line in output.read_text().splitlines()] == generated[2]
    assert not list((bucket / "out.jsonl.parts").iterdir())


@pytest.mark.parametrize("fails", [False, True])
def test_of_processes_that_end_together_one_makes_the_whole(fails: bool, root: AnyPath) -> None:
    count = 4
    output = root / "out.jsonl"
    written, made = threading.Barrier(count), []

    def process(index: int) -> bool:
        """A process's way, as the commands go it; whether it was the one."""
        with hosts.SharedOutput(output, hosts.Hosts(Processes(index, count), copies=True)) as shared:
            shared.append([{"id": index}])
            written.wait()
            time.sleep(index // 2)  # Two at the same time, and two when these are through.
            with shared.merged(lambda rows: count - len(rows), key=lambda row: row["id"]) as last:
                if last:
                    made.append([row["id"] for row in shared.rows()])
                    if fails and len(made) == 1:
                        raise OSError
                return last

    with ThreadPoolExecutor(count) as pool:
        ends = [pool.submit(process, index) for index in range(count)]
    assert sum(end.exception() is None and end.result() for end in ends) == 1
    assert sum(isinstance(end.exception(), OSError) for end in ends) == fails
    assert [sorted(ids) for ids in made] == [list(range(count))] * (1 + fails)
    assert all(path.name.endswith(".lock") for path in root.iterdir() if path.name != output.name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mesh.copies=hosts", "mesh.num_processes=2", "mesh.process_id=0", "prompt=x"], "mesh.copies: give an output"),
        (["mesh.copies=hosts", "mesh.num_processes=2", "mesh.process_id=2", "prompt=x"], "there are 2 processes"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_line(directory: Path, words: list[str], message: str) -> None:
    command = [sys.executable, "decode.py", "generate", f"model.path={directory}", *words]
    process = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert message in process.stderr


def test_processes_of_one_model_with_other_requests_say_so_and_end(
    directory: Path, prompts: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(prompts.read_text().replace("8 + 3", "9 + 3"))
    words = generating(directory, prompts, tmp_path / "out.jsonl")
    processes = start_hosts(words, 2, copies=False, own=[f"prompts={prompts}", f"prompts={other}"])
    errors = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    for text in errors:
        assert "error: prompts: process 1 has another value than the first process" in text
    assert not (tmp_path / "out.jsonl").exists()
