"""decode.py evaluate in several processes, with copies of a model and with one together, against one process alone."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.decoding.conftest import ROOT, environment
from tests.decoding.test_hosts import COUNTS, WAYS, alone, left_over, lines
from tests.processes import finish, free_port, start_hosts, wait_until

pytestmark = pytest.mark.slow


def sums(path: Path, count: int) -> Path:
    rows = [{"problem": f"What is {i} + 3?", "answer": str(i + 3)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sums(tmp_path_factory.mktemp("tasks") / "sums.jsonl", 5)


def evaluating(directory: Path, task: Path, output: Path) -> list[str]:
    return [
        *[sys.executable, "decode.py", "evaluate", f"model.path={directory}", "model.dtype=float32", f"tasks={task}"],
        *[f"output_dir={output}", "max_total_tokens=120", "budget.max_answer_tokens=4", "sampling.temperature=1"],
        *["sweep.max_thinking_tokens=0,12", "sweep.num_ignore=1", "sampling.num_samples=2"],
        *["sweep.baselines=rejection", "sweep.max_tries=3"],
    ]


def in_order(output: Path) -> list[dict[str, Any]]:
    return sorted(lines(output / "samples.jsonl"), key=lambda row: (row["run"], row["id"], row["sample"]))


@pytest.fixture(scope="module")
def evaluated(directory: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evaluated") / "run"
    alone(evaluating(directory, task, output))
    # Some draws were rejected, of which each process must know those before.
    assert max(row["sample"] for row in in_order(output)) == 2
    return output


def check_same(output: Path, expected: Path) -> None:
    assert in_order(output) == in_order(expected)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (output, expected)]
    assert summaries[0]["tasks"] == summaries[1]["tasks"]
    assert (output / "report.html").is_file()
    assert left_over(output / "samples.jsonl") == []


@COUNTS
@WAYS
def test_evaluate_is_what_one_process_gives(
    directory: Path, task: Path, evaluated: Path, copies: bool, count: int, tmp_path: Path
) -> None:
    finish(start_hosts(evaluating(directory, task, tmp_path / "run"), count, copies=copies))
    check_same(tmp_path / "run", evaluated)


def test_what_killed_processes_left_one_goes_on_with(directory: Path, tmp_path: Path) -> None:
    # After its first row a run of five problems has 60 ms to live, of two hundred 2 seconds: time to kill it in.
    task, output = sums(tmp_path / "sums.jsonl", 200), tmp_path / "run"
    alone(evaluating(directory, task, tmp_path / "evaluated"))
    processes = start_hosts([*evaluating(directory, task, output), "batch_size=1"], 2, copies=True)
    parts = [output / "samples.jsonl.parts" / f"{process}.jsonl" for process in range(2)]
    wait_until(lambda: all(part.exists() and b"\n" in part.read_bytes() for part in parts), processes)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (output / "summary.json").exists()
    alone(evaluating(directory, task, output))
    check_same(output, tmp_path / "evaluated")


def test_the_recipe_of_32b_runs_on_two_hosts_of_eight_devices(directory: Path, task: Path, tmp_path: Path) -> None:
    command = [sys.executable, "decode.py", "evaluate", "configs/eval/s1-32b.yaml", f"model.path={directory}"]
    command += [f"tasks={task}", f"output_dir={tmp_path / 'run'}", "max_total_tokens=120", "limit=3"]
    command += ["budget.max_answer_tokens=4", "sweep.max_thinking_tokens=4", "sweep.num_ignore=0"]
    processes = start_hosts(command, 2, copies=True, devices=8)
    for index, (_, errors) in enumerate(finish(processes)):
        assert f"process {index} of 2 (mesh.process_id)" in errors
        assert "8 of 8 devices" in errors
        assert "mesh: data 8 (chosen) x fsdp 1 (chosen) x tensor 1 (chosen)" in errors
        assert "evaluating in bfloat16" in errors
    assert len(lines(tmp_path / "run" / "samples.jsonl")) == 6


def test_the_harness_prints_and_writes_once(directory: Path, task: Path, tmp_path: Path) -> None:
    (tmp_path / "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {task}}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{problem}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: [], do_sample: false}\nmetric_list: [{metric: exact_match}]\n"
    )

    def command(output: Path, *arguments: str) -> list[str]:
        words = [
            "--model_args",
            ",".join([f"pretrained={directory},dtype=float32", *arguments]),
            "--tasks",
            "sums",
            "--log_samples",
        ]
        words += ["--include_path", str(tmp_path), "--apply_chat_template", "--output_path", str(output)]
        words += ["--gen_kwargs", "max_gen_toks=40,max_tokens_thinking=8", "--batch_size", "4", "--model", "s1jax"]
        return [sys.executable, "-m", "s1jax.evaluation.harness", "run", *words]

    def samples(output: Path) -> list[Any]:
        [path] = output.rglob("samples_sums_*.jsonl")
        return sorted((row["doc_id"], row["resps"]) for row in lines(path))

    alone(command(tmp_path / "one"))
    port = free_port()
    processes = [
        subprocess.Popen(
            command(tmp_path / "two", f"coordinator=127.0.0.1:{port}", "num_processes=2", f"process_id={index}"),
            cwd=ROOT,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(2)
    ]
    printed = [out for out, _ in finish(processes)]
    assert [bool(re.search("exact_match", text)) for text in printed] == [True, False]
    assert samples(tmp_path / "two") == samples(tmp_path / "one")
    assert len(samples(tmp_path / "two")) == 5
