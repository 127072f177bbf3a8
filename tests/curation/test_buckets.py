"""Curation with everything in a bucket: killed while it asks, and in the end as on a disk."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from s1jax.paths import AnyPath, BucketPath, files_below
from tests.curation.conftest import settings
from tests.curation.server import Server, serving
from tests.decoding.conftest import ROOT
from tests.processes import wait_until

COUNT = 120


def words(stage: str, output: AnyPath, source: AnyPath, server: Server) -> list[str]:
    endpoint = [f"distill.endpoint.{key}={value}" for key, value in settings(server, concurrency=2).items()]
    more = ["sources.s.answer=answer", "select.size=10", "format.type=parquet", "format.validation=2"]
    command = [sys.executable, "-m", "s1jax.curate", stage, f"output_dir={output}", f"sources.s.path={source}"]
    return [*command, *endpoint, *more]


def run(*arguments: str) -> None:
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_from_sources_to_training_files(bucket: BucketPath, tmp_path: Path) -> None:
    rows = [{"question": f"question {i}", "answer": str(i)} for i in range(COUNT)]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    for root in (tmp_path, bucket):
        (root / "pool.jsonl").write_text(content, encoding="utf-8")
    with serving() as server:
        for stage in ("collect", "distill", "grade", "filter", "select", "format"):
            run(*words(stage, tmp_path / "run", tmp_path / "pool.jsonl", server))
        server.asked.clear()
        server.delay = 0.2
        output = bucket / "run"
        run(*words("collect", output, bucket / "pool.jsonl", server))
        distill = words("distill", output, bucket / "pool.jsonl", server)
        process = subprocess.Popen(distill, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        journal = output / "responses.jsonl.parts"
        wait_until(lambda: bool(files_below(journal)), [process], seconds=0.1)
        kept = {json.loads(line)["id"] for part in files_below(journal) for line in part.read_text().splitlines()}
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert 0 < len(kept) < COUNT
        server.delay = 0.0
        for stage in ("distill", "grade", "filter", "select", "format"):
            run(*words(stage, output, bucket / "pool.jsonl", server))
        # What had been written was not asked again, and the rest was.
        assert len(server.asked) == COUNT
        assert sum(count == 1 for count in server.asked.values()) >= len(kept)
        assert max(server.asked.values()) <= 2
    for name in ("questions.jsonl", "selected.jsonl", "train.parquet", "validation.parquet", "card.svg"):
        assert (output / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name
    for name in ("traces.jsonl", "grades.jsonl", "filtered.jsonl"):
        ours, expected = ((root / "run" / name).read_text().splitlines() for root in (bucket, tmp_path))
        assert sorted(ours) == sorted(expected), name
    assert (output / "card.png").read_bytes()[1:4] == b"PNG"
