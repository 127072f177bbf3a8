"""How fast this project is beside what a user would pick instead.

    python -m benchmarks.throughput SUITE MODEL_DIR --questions GSM8K.jsonl --vllm-python PYTHON --output DIRECTORY
    python -m benchmarks.throughput report DIRECTORY docs/benchmarks.md

Suites: decode-float32, decode-bfloat16, forced, small, training, start, or all. The contenders (this project,
transformers on torch, and vLLM's CPU build where the interpreter of its environment is given) are processes that take
turns in one run; each case ends with a line and in DIRECTORY/SUITE.json. `report` makes the tables and the chart of
what is there.
"""

import argparse
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.throughput.contest import OURS, THREADS
from benchmarks.throughput.report import describe, write_report
from benchmarks.throughput.suites import SUITES, Arena


def main() -> None:
    if sys.argv[1:2] == ["report"]:
        write_report(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=[*SUITES, "all"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--vllm-python")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    words = parser.parse_args()
    pythons = {OURS: sys.executable, "transformers": sys.executable}
    if words.vllm_python:
        pythons["vllm"] = words.vllm_python
    # So that a run that is ended ends its contenders too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arena = Arena(words.model.resolve(), words.questions, pythons, words.rounds)
    words.output.mkdir(parents=True, exist_ok=True)
    for name in SUITES if words.suite == "all" else [words.suite]:
        comparisons = []
        for comparison in SUITES[name](arena):
            print(describe(comparison), flush=True)
            comparisons.append(asdict(comparison))
            # After each case: the next may take minutes, and this one's figures are not to be lost.
            content = {
                "command": "python -m benchmarks.throughput " + " ".join(sys.argv[1:]),
                "threads": THREADS,
                "comparisons": comparisons,
            }
            (words.output / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
