"""The pictures of a report: accuracy against thinking tokens and waits, and how long runs thought."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_HISTOGRAM_BINS = 24


def accuracy_chart(task: str, figures: dict[str, Any]) -> Figure:
    """Accuracy of each method's runs against their average thinking tokens, with intervals."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    for method, of_method in figures["methods"].items():
        runs = [figures["runs"][name] for name in of_method["runs"]]
        runs.sort(key=lambda run: run["thinking_tokens"])
        _with_intervals(axes, [run["thinking_tokens"] for run in runs], [run["accuracy"] for run in runs], method)
    # Linear below one token, so that a run without thinking has a place.
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    most = max(run["thinking_tokens"] for run in figures["runs"].values())
    axes.set_xlim(-0.3, 1.3 * max(most, 1))
    axes.set(xlabel="average thinking tokens", ylabel="accuracy (%)", title=task)
    axes.legend(frameon=False)
    return figure


def wait_chart(task: str, figures: dict[str, Any]) -> Figure:
    """Accuracy of the runs with forced waits, in their order."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    names = figures["methods"]["wait"]["runs"]
    _with_intervals(axes, range(len(names)), [figures["runs"][name]["accuracy"] for name in names], "wait")
    axes.set_xticks(range(len(names)), names)
    axes.set(xlabel="ends of thinking that are replaced", ylabel="accuracy (%)", title=task)
    return figure


def length_chart(task: str, lengths: Mapping[str, Sequence[int]]) -> Figure:
    """A histogram of thinking tokens for each run, all on one scale."""
    figure = Figure(figsize=(6.4, 0.6 + 0.7 * len(lengths)), layout="constrained")
    longest = max((max(of_run, default=0) for of_run in lengths.values()), default=0)
    for row, (name, of_run) in enumerate(lengths.items()):
        axes = figure.add_subplot(len(lengths), 1, row + 1)
        axes.hist(of_run, bins=_HISTOGRAM_BINS, range=(0, max(longest, 1)), color="tab:blue")
        axes.set_yticks([])
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        if row < len(lengths) - 1:
            axes.set_xticklabels([])
    figure.suptitle(f"{task}: thinking tokens of each answer")
    return figure


def as_svg(figure: Figure) -> str:
    """The figure as an svg element, to stand in a page."""
    # Text stays text, and ids are the same for the same figure.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "s1jax"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _with_intervals(axes: Axes, x: Sequence[float], accuracies: Sequence[dict[str, float]], label: str) -> None:
    values = [100 * accuracy["value"] for accuracy in accuracies]
    ends = [
        [100 * (accuracy[end] if accuracy[end] is not None else accuracy["value"]) for accuracy in accuracies]
        for end in ("low", "high")
    ]
    errors = [
        [v - low for v, low in zip(values, ends[0], strict=True)],
        [high - v for v, high in zip(values, ends[1], strict=True)],
    ]
    axes.errorbar(list(x), values, yerr=errors, marker="o", capsize=3, label=label.replace("_", " "))
    axes.set_ylim(-3, 103)
