"""Speed and memory of the stage collect: python benchmarks/decontamination.py [QUESTIONS] [EVALUATION_QUESTIONS]

Synthetic questions of about 60 words each, one in 50 of them with 8 words of an evaluation question; 60,000 against
2,500 unless other numbers are given. Prints seconds and peak memory of the whole command, and checks that it finds the
planted overlaps and no others.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

_PLANTED_EVERY = 50


def _text(rng: random.Random, words: list[str]) -> list[str]:
    return rng.choices(words, k=max(8, round(rng.gauss(60, 20))))


def _write(path: Path, questions: list[list[str]]) -> dict[str, str]:
    path.write_text("".join(json.dumps({"question": " ".join(words)}) + "\n" for words in questions), encoding="utf-8")
    return {"path": str(path)}


def main(questions: str = "60000", evaluation_questions: str = "2500") -> None:
    rng = random.Random(0)
    # So many words that no 8 in a row are shared by chance.
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10))) for _ in range(20_000)]
    evaluation = [_text(rng, words) for _ in range(int(evaluation_questions))]
    pool = [_text(rng, words) for _ in range(int(questions))]
    planted = pool[::_PLANTED_EVERY]
    for question in planted:
        other = rng.choice(evaluation)
        start = rng.randint(0, len(other) - 8)
        at = rng.randint(0, len(question))
        question[at:at] = other[start : start + 8]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = {
            "output_dir": str(directory / "run"),
            "sources": {"pool": _write(directory / "pool.jsonl", pool)},
            "evaluation_sets": {"test": _write(directory / "test.jsonl", evaluation)},
        }
        (directory / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [sys.executable, "-m", "s1jax.curate", "collect", str(directory / "config.yaml")]
        start_time = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start_time
        assert status == 0, status
        lines = (directory / "run" / "contaminated.jsonl").read_text(encoding="utf-8").splitlines()
    found = {json.loads(line)["question"] for line in lines}
    assert found == {" ".join(question) for question in planted}, "planted overlaps and found ones differ"
    processor = usage.ru_utime + usage.ru_stime
    print(
        f"{len(pool):,} questions against {len(evaluation):,}: {seconds:.1f} s ({processor:.1f} s of processor), "
        f"peak {usage.ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10):.0f} MiB; "
        f"all {len(planted):,} planted overlaps found, no other"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
