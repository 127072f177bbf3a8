"""GSM8K rows as s1K rows: python benchmarks/gsm8k_to_s1.py GSM8K.jsonl OUT.jsonl [COUNT]

The worked solution, less its calculator annotations, becomes the trace, and the number after "####" the answer.
"""

import itertools
import json
import re
import sys
from pathlib import Path


def main(source: str, target: str, count: str | None = None) -> None:
    with Path(source).open(encoding="utf-8") as lines, Path(target).open("w", encoding="utf-8") as out:
        for line in itertools.islice(lines, int(count) if count else None):
            row = json.loads(line)
            solution, _, answer = row["answer"].partition("####")
            trace = re.sub(r"<<.*?>>", "", solution).strip()
            s1_row = {"question": row["question"], "thinking_trajectories": [trace], "attempt": answer.strip()}
            out.write(json.dumps(s1_row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
