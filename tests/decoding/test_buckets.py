"""decode.py on gs:// and s3://: kills, second runs, faults and refusals, with real processes and servers."""

import json
import os
import signal
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest

from s1jax.paths import AnyPath, BucketPath, files_below
from tests.decoding.conftest import ROOT, environment
from tests.faults import Fault, faulty
from tests.processes import wait_until

ENDPOINT = {"gs": "STORAGE_EMULATOR_HOST", "s3": "AWS_ENDPOINT_URL"}
QUESTIONS = [f"What is {i} + {i}?" for i in range(40)]


def start(mode: str, *words: str, **variables: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "decode.py", mode, "model.dtype=float32", "mesh.fsdp=1", *words],
        cwd=ROOT,
        env={**environment(), **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(mode: str, *words: str, **variables: str) -> tuple[int, str]:
    """Status and errors."""
    process = start(mode, *words, **variables)
    _, errors = process.communicate(timeout=500)
    return process.returncode, errors


def succeed(mode: str, *words: str, **variables: str) -> None:
    status, errors = run(mode, *words, **variables)
    assert status == 0, errors


def write_rows(path: AnyPath, rows: list[dict]) -> AnyPath:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path: AnyPath) -> list[bytes]:
    """In a fixed order; bytes, since texts may hold what ends a line elsewhere."""
    return sorted(path.read_bytes().splitlines())


def stop_within(process: "subprocess.Popen[str]", output: AnyPath) -> None:
    """Stop the process when a part of its output is there."""
    wait_until(lambda: bool(files_below(output.with_name(output.name + ".parts"))), [process], seconds=0.05)
    process.send_signal(signal.SIGSTOP)
    assert not output.is_file(), "it was done before it could be stopped"


def kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


# Long tests take one store each; that every operation is the same in both is tested for itself in tests/test_paths.py.
@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_scoring_killed_and_started_again_is_as_on_a_disk(bucket: BucketPath, directory: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [{"id": f"row {i}", "input_ids": rng.integers(0, 368, rng.integers(100, 120)).tolist()} for i in range(3000)]
    model, more = f"model.path={directory}", "batch_size=1"
    local = write_rows(tmp_path / "in.jsonl", rows)
    succeed("score", model, more, f"input={local}", f"output={tmp_path}/out.jsonl")
    source, output = write_rows(bucket / "in.jsonl", rows), bucket / "out.jsonl"
    words = [model, more, f"input={source}", f"output={output}"]
    process = start("score", *words)
    stop_within(process, output)
    status, errors = run("score", *words)
    assert status == 1
    assert errors.splitlines()[-1].startswith(f"error: {output}: another run is writing here")
    kill(process)
    succeed("score", *words)
    assert output.read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    assert [str(path.relative_to(bucket)) for path in files_below(bucket)] == [  # type: ignore[arg-type]
        *[".out.jsonl.lock/2", "in.jsonl", "out.jsonl", "out.jsonl.config.json"]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_generating_with_everything_in_a_bucket(bucket: BucketPath, directory: Path, tmp_path: Path) -> None:
    """Configuration, what it extends, profile, prompts and output; killed, and started again."""
    write_rows(bucket / "prompts.jsonl", [{"id": i, "prompt": text} for i, text in enumerate(QUESTIONS)])
    profile = {"eos": ["<|im_end|>"], "start": "<|im_start|>think\n", "end_tokens": ["<|im_start|>"]}
    profile |= {"end": "<|im_start|>answer\n", "budget_end": "<|im_start|>answer\nFinal Answer:"}
    (bucket / "profile.yaml").write_text(json.dumps(profile))
    base = {"model": {"path": str(directory)}, "max_total_tokens": 150, "batch_size": 1, "output": "overridden"}
    (bucket / "configs" / "base.yaml").write_text(json.dumps(base))
    budget = {"max_thinking_tokens": 60, "min_thinking_tokens": 50, "max_answer_tokens": 40}
    budget |= {"profile": f"{bucket}/profile.yaml"}
    config = {"extends": "../configs/base.yaml", "prompts": f"{bucket}/prompts.jsonl", "budget": budget}
    (bucket / "configs" / "run.yaml").write_text(json.dumps(config))
    words = [f"{bucket}/configs/run.yaml", "sampling.num_samples=8", "sampling.temperature=1"]
    succeed("generate", *words, f"output={tmp_path}/out.jsonl")
    output = bucket / "out.jsonl"
    process = start("generate", *words, f"output={output}")
    stop_within(process, output)
    kill(process)
    succeed("generate", *words, f"output={output}")
    assert lines(output) == lines(tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert [(row["id"], row["sample"]) for row in rows] == [(i, s) for i in range(len(QUESTIONS)) for s in range(8)]
    # Started once more, it finds nothing to do.
    succeed("generate", *words, f"output={output}")
    assert len(lines(output)) == 8 * len(QUESTIONS)
    status, errors = run("generate", *words, f"output={output}", "sampling.seed=3")
    assert (status, errors) == (
        1,
        f"error: {output}: it was written with other values of sampling: move it away\n",
    )


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_evaluating_killed_and_started_again_is_as_on_a_disk(
    bucket: BucketPath, directory: Path, tmp_path: Path
) -> None:
    rows = [{"problem": f"What is {i} + 3?", "answer": str(i + 3)} for i in range(10)]
    words = [f"model.path={directory}", f"tasks={write_rows(bucket / 'sums.jsonl', rows)}", "max_total_tokens=150"]
    words += ["sweep.max_thinking_tokens=0,60", "budget.min_thinking_tokens=50", "batch_size=1"]
    words += ["budget.max_answer_tokens=40", "sampling.num_samples=48", "sampling.temperature=1"]
    succeed("evaluate", *words, f"output_dir={tmp_path}/run")
    output = bucket / "run"
    process = start("evaluate", *words, f"output_dir={output}")
    stop_within(process, output / "samples.jsonl")
    status, errors = run("evaluate", *words, f"output_dir={output}")
    assert status == 1
    assert errors.splitlines()[-1].startswith(f"error: {output}/samples.jsonl: another run is writing here")
    kill(process)
    succeed("evaluate", *words, f"output_dir={output}")
    assert lines(output / "samples.jsonl") == lines(tmp_path / "run" / "samples.jsonl")
    ours, expected = (json.loads((path / "summary.json").read_text()) for path in (output, tmp_path / "run"))
    assert ours["tasks"] == expected["tasks"]
    names = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert {path.name for path in output.iterdir()} - {".lock"} == names
    assert (output / "accuracy-sums.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "bucket"),
    [((None, None, 503), "gs"), (("lost", None, None), "s3"), (("unheard", None), "gs"), (("unheard", None), "s3")],
    indirect=["bucket"],
)
def test_faults_that_pass_are_not_noticed(
    bucket: BucketPath, directory: Path, tmp_path: Path, faults: tuple[Fault, ...]
) -> None:
    rows = [{"id": i, "text": text} for i, text in enumerate(QUESTIONS)]
    words = [f"model.path={directory}", f"input={write_rows(bucket / 'in.jsonl', rows)}"]
    succeed("score", *words, f"output={tmp_path}/out.jsonl")
    in_turn, made = cycle(faults), []

    def fault(number: int, method: str, path: str) -> Fault:
        found = next(in_turn)
        made.append(found)
        return found

    name = ENDPOINT[bucket.scheme]
    with faulty(os.environ[name], fault) as address:
        for _ in range(2):
            succeed("score", *words, f"output={bucket}/out.jsonl", **{name: address})
    assert sum(found is not None for found in made) > 5
    assert (bucket / "out.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "bucket"), [("score", "gs"), ("generate", "s3")], indirect=["bucket"])
@pytest.mark.parametrize("what", ["reading", "writing", "no bucket"])
def test_what_cannot_be_is_said_in_one_line(bucket: BucketPath, directory: Path, mode: str, what: str) -> None:
    text, key, more = {
        "score": ("text", "input", []),
        "generate": ("prompt", "prompts", ["max_total_tokens=150", "budget.max_answer_tokens=8"]),
    }[mode]
    source = write_rows(bucket / "in.jsonl", [{"id": 1, text: "a"}])
    output: AnyPath = bucket / "out.jsonl"
    if what == "no bucket":
        output = BucketPath(bucket.scheme, "no-such-bucket/out.jsonl")
    name = ENDPOINT[bucket.scheme]

    def fault(number: int, method: str, path: str) -> Fault:
        if what == "no bucket":
            return None
        return 403 if what == "reading" or method not in ("GET", "HEAD") else None

    words = [f"model.path={directory}", f"{key}={source}", f"output={output}", *more]
    with faulty(os.environ[name], fault) as address:
        status, errors = run(mode, *words, **{name: address})
    assert status == 1
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    assert {"reading": "not permitted", "writing": "not permitted", "no bucket": "no such"}[what] in line
    assert str(source if what == "reading" else output.parent) in line
