"""What this project's programs do on the device at hand, with verdicts: `python -m benchmarks.device [--minutes 9]`.

Needs no network, no weights and no torch. (1) Attention kernels at real sizes against plain attention, a small model's
loss, gradients and budgets against the CPU's and the reference's; (2) training steps of as many layers of the 7B and
the 32B as fit; (3) decoding of the 7B and of a slice of the 32B; (4) memory; where transformers runs on the GPU, its
`generate` beside. After each case everything so far is in OUTPUT/device.json and OUTPUT/device.md; what there was no
time or memory for is named. `--smoke` does all of it at toy sizes.
"""

import argparse
import os
import sys
import time
from importlib import import_module
from pathlib import Path

from s1jax.device_memory import use_most_of_memory

SECTIONS = ("peer", "correctness", "training", "decoding")
"""Modules of this package; transformers comes first, as long as nobody else holds the memory."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="stop by then with what there is")
    parser.add_argument("--output", type=Path, default=Path("device-report"))
    parser.add_argument("--smoke", action="store_true", help="toy sizes, for a CPU")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="parts of it")
    words = parser.parse_args()
    ends = time.monotonic() + 60 * words.minutes
    # Before jax is imported. Memory is taken as it is needed, so that its peak says something.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    use_most_of_memory()
    from benchmarks.device.report import Report
    from benchmarks.device.sizes import REAL, TOY

    sizes = TOY if words.smoke else REAL
    report = Report(words.output, ends)
    for section in SECTIONS:
        if section in words.only:
            import_module(f"benchmarks.device.{section}").run(report, sizes)
    report.write()
    print(report.path.read_text(encoding="utf-8"))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
