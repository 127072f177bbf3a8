"""Grading against answers of known truth: python -m benchmarks.grading

Prints how many of each kind, right and wrong in truth, got each verdict, then every answer that did not get its own.
"""

import time
from collections import Counter

from s1jax.evaluation.grading import Grader
from tests.evaluation.labelled import labelled_answers

_VERDICTS = ("right", "wrong", "ungraded")


def main() -> None:
    cases = labelled_answers()
    grader = Grader(time_limit=10.0)
    start = time.perf_counter()
    grades = [grader.grade(case.text, case.reference) for case in cases]
    seconds = time.perf_counter() - start
    grader.close()
    counts = Counter((case.kind, case.right, grade.verdict) for case, grade in zip(cases, grades, strict=True))
    print("| kind | right: right | wrong | ungraded | wrong: right | wrong | ungraded |\n|---|---|---|---|---|---|---|")
    for kind in dict.fromkeys(case.kind for case in cases):
        cells = [counts[kind, truth, verdict] for truth in (True, False) for verdict in _VERDICTS]
        print(f"| {kind.replace('_', ' ')} | {' | '.join(map(str, cells))} |")
    totals = [sum(n for (_, *key), n in counts.items() if key == [t, v]) for t in (True, False) for v in _VERDICTS]
    print(f"| **all** | {' | '.join(map(str, totals))} |")
    for case, grade in zip(cases, grades, strict=True):
        if grade.verdict != ("right" if case.right else "wrong"):
            print(f"{grade.verdict}: {case.kind}: {case.text[:150]!r} | {case.reference[:80]!r} | {grade.reason}")
    thousands = len(cases) / 1000
    print(f"per 1,000: {totals[3] / thousands:.1f} falsely right, {totals[1] / thousands:.1f} falsely wrong")
    print(f"{len(cases):,} answers in {seconds:.0f} s")


if __name__ == "__main__":
    main()
