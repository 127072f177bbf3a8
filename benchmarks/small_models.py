"""Models for curation in miniature: python benchmarks/small_models.py GSM8K.jsonl OUTPUT [ROWS [EPOCHS [NAME ...]]]

A teacher and two students of about 100,000 parameters each, trained from scratch by train.py on the first rows (500,
twelve times over, unless numbers are given) as s1 rows, in OUTPUT/NAME/run/model: teacher on all of them, student-a on
the first half, student-b on the first quarter. They learn the format, not arithmetic.
"""

import subprocess
import sys
from pathlib import Path

from gsm8k_to_s1 import main as write_s1_rows

from s1jax.demo.__main__ import write_untrained_model

ROOT = Path(__file__).parents[1]
SHARES = {"teacher": 1, "student-a": 2, "student-b": 4}


def main(source: str, output: str, rows: str = "500", epochs: str = "12", *names: str) -> None:
    for name in names or SHARES:
        directory = Path(output) / name
        directory.mkdir(parents=True, exist_ok=True)
        train = directory / "train.jsonl"
        write_s1_rows(source, str(train), str(int(rows) // SHARES[name]))
        write_untrained_model(directory, train, SHARES[name])
        words = [
            f"model.path={directory}/start",
            f"data.path={train}",
            "data.block_size=768",
            "data.overlong=drop",
            f"training.output_dir={directory}/run",
            f"training.num_epochs={epochs}",
        ]
        subprocess.run([sys.executable, ROOT / "train.py", ROOT / "configs/sft/demo.yaml", *words], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
