"""Tables and a chart of the comparisons that were written."""

import json
import platform
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.throughput.contest import OURS, Comparison


def describe(comparison: Comparison) -> str:
    """A line: the medians, the ratio and the goal."""
    medians = ", ".join(f"{name} {1e3 * statistics.median(s):.4g} ms" for name, s in comparison.seconds.items())
    return (
        f"{comparison.suite}: {comparison.case}: {medians}; {comparison.ratio:.2f} x {comparison.best_peer} "
        f"(goal {comparison.goal}); {json.dumps(comparison.notes)}"
    )


def write_report(directory: Path, page: Path) -> None:
    """Write the part of `page` that follows its marker, and a chart beside it. Raises ValueError without marker."""
    marker = "<!-- written by python -m benchmarks.throughput report -->"
    head, found, _ = page.read_text(encoding="utf-8").partition(marker)
    if not found:
        raise ValueError(f"{page} has no line {marker!r}")
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))]
    comparisons = [Comparison(**entry) for report in reports for entry in report["comparisons"]]
    today = datetime.now(UTC).date().isoformat()
    lines = [
        "",
        f"Written on {today}; {_machine()}, {reports[0]['threads']} threads.",
        "",
        *(f"    {report['command']}" for report in reports),
        "",
        "| suite | case | median of each | ratio | goal | |",
        "|---|---|---|---|---|---|",
        *map(_row, comparisons),
        "",
        *_versions(comparisons),
        "",
        "![Ratios](benchmarks.png)",
        "",
    ]
    page.write_text(head + marker + "\n" + "\n".join(lines), encoding="utf-8")
    _plot(comparisons, page.with_suffix(".png"))


def _row(comparison: Comparison) -> str:
    medians = ", ".join(f"{name} {_duration(statistics.median(s))}" for name, s in comparison.seconds.items())
    verdict = "reached" if comparison.ratio >= comparison.goal else "missed"
    ratio = f"{comparison.ratio:.2f} | {comparison.goal} | {verdict}"
    row = f"| {comparison.suite} | {comparison.case} | {medians} | {ratio} |"
    reads = comparison.notes.get("seconds to read the weights")
    if reads:
        shares = [read / step for read, step in zip(reads, comparison.seconds[OURS], strict=True)]
        share = statistics.median(shares)
        verdict = "reached" if share >= 0.8 else "missed"
        row += f"\n| | its share of the bandwidth of reading the weights | | {share:.2f} | 0.8 | {verdict} |"
    return row


def _duration(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _versions(comparisons: list[Comparison]) -> list[str]:
    seen: dict[str, Any] = {}
    for comparison in comparisons:
        seen |= comparison.versions
    return [f"- {name}: " + ", ".join(f"{key} {value}" for key, value in seen[name].items()) for name in seen]


def _machine() -> str:
    linux = Path("/proc/cpuinfo")
    lines = linux.read_text(encoding="utf-8").splitlines() if linux.exists() else []
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    model = known.get("model name") or platform.processor()
    # Virtual machines may name several generations alike.
    if "cpu family" in known:
        model += f" (family {known['cpu family']}, model {known['model']})"
    return f"{model}, {platform.system()}, Python {platform.python_version()}"


def _plot(comparisons: list[Comparison], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(comparisons) + 1.2), layout="constrained")
    names = [f"{c.suite}: {c.case}" for c in comparisons]
    axes.barh(names, [c.ratio for c in comparisons], color="tab:blue", label="measured")
    axes.plot([c.goal for c in comparisons], names, "k|", markersize=14, markeredgewidth=2, label="goal")
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("time of the better peer / time of s1jax")
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
