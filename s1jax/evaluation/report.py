"""One self-contained HTML page for an evaluation, and its pictures as files."""

import html
import io
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from s1jax.decoding.profiles import ProfileIds, num_opened
from s1jax.evaluation.charts import accuracy_chart, as_svg, length_chart, wait_chart
from s1jax.evaluation.summary import Line
from s1jax.paths import AnyPath, write_whole

_COLUMNS = {
    "run": "run",
    "accuracy": "accuracy",
    "thinking_tokens": "thinking tokens",
    "longest_thinking": "longest",
    "forced_end": "forced to end",
    "waits": "waits",
    "no_answer": "no answer",
    "ungraded": "ungraded",
    "samples": "answers",
}
_TRANSCRIPT_FIELDS = (
    *("task", "run", "id", "sample", "question", "reference", "verdict", "extracted", "reason"),
    *("num_thinking_tokens", "num_waits", "thinking_end", "finish_reason"),
)


def write_report(
    output: AnyPath,
    summary: dict[str, Any],
    lines: Sequence[Line],
    tokenizer: PreTrainedTokenizerBase,
    profile: ProfileIds,
) -> None:
    """Write report.html, and each picture as .svg and .png, to the directory `output`. Raises WriteError."""
    sections = []
    for task, figures in summary["tasks"].items():
        lengths: dict[str, list[int]] = {name: [] for name in figures["runs"]}
        for line in lines:
            if line["task"] == task:
                lengths[line["run"]].append(line["num_thinking_tokens"])
        charts = {"accuracy": accuracy_chart(task, figures), "lengths": length_chart(task, lengths)}
        if "wait" in figures["methods"]:
            charts["waits"] = wait_chart(task, figures)
        pictures = "".join(
            f"<figure>{_save(chart, output, f'{name}-{task}')}</figure>" for name, chart in charts.items()
        )
        sections.append(
            f"<section><h2>{html.escape(task)}</h2><p>{figures['questions']} questions.</p>{pictures}"
            f"{_runs_table(task, figures)}{_methods_table(task, figures)}</section>"
        )
    page = (files("s1jax.evaluation") / "report.html").read_text(encoding="utf-8")
    data = json.dumps([_transcript(line, tokenizer, profile) for line in lines], ensure_ascii=False)
    # In a script element only "<" can end the data.
    parts = {
        "MODEL": html.escape(summary["model"]),
        "SECTIONS": "".join(sections),
        "SAMPLES": data.replace("<", "\\u003c"),
    }
    for name, text in parts.items():
        before, _, after = page.partition(f"<!--{name}-->")
        page = before + text + after
    write_whole(output / "report.html", page)


def _save(chart: Figure, output: AnyPath, name: str) -> str:
    svg, png = as_svg(chart), io.BytesIO()
    chart.savefig(png, format="png", dpi=150)
    write_whole(output / f"{name}.svg", svg)
    write_whole(output / f"{name}.png", png.getvalue())
    return svg


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _interval(interval: dict[str, float | None], percent: bool = True) -> str:
    shown = [_percent(v) if percent else ("–" if v is None else f"{v:.2f}") for v in interval.values()]
    return f"{shown[0]} <small>({shown[1]} to {shown[2]})</small>"


def _cell(run: str, column: str, value: Any) -> str:
    if column == "accuracy":
        text = _interval(value)
    elif column == "forced_end":
        text = _percent(value)
    else:
        text = html.escape(f"{value:.1f}" if isinstance(value, float) else str(value))
    return f'<td data-run="{html.escape(run)}" data-column="{column}">{text}</td>'


def _runs_table(task: str, figures: dict[str, Any]) -> str:
    head = "".join(f"<th>{title}</th>" for title in _COLUMNS.values())
    rows = []
    for name, run in figures["runs"].items():
        rows.append(
            "<tr>" + "".join(_cell(name, column, {"run": name, **run}[column]) for column in _COLUMNS) + "</tr>"
        )
    return f'<table class="runs" data-task="{html.escape(task)}"><tr>{head}</tr>{"".join(rows)}</table>'


def _methods_table(task: str, figures: dict[str, Any]) -> str:
    rows = []
    for name, method in figures["methods"].items():
        gains = "".join(f"<br>{html.escape(run)}: {_interval(gain)}" for run, gain in method["gains"].items())
        rows.append(
            f'<tr data-method="{name}"><td>{name.replace("_", " ")}</td><td>{_percent(method["control"])}</td>'
            f"<td>{_interval(method['scaling'], percent=False)}</td><td>{_percent(method['performance'])}</td>"
            f"<td>{gains.removeprefix('<br>')}</td></tr>"
        )
    head = "<th>method</th><th>control</th><th>scaling</th><th>performance</th><th>gain over its first run</th>"
    return f'<table class="methods" data-task="{html.escape(task)}"><tr>{head}</tr>{"".join(rows)}</table>'


def _transcript(line: Line, tokenizer: PreTrainedTokenizerBase, profile: ProfileIds) -> dict[str, Any]:
    """What the page shows of an answer: its parts, each with its kind (thinking, wait, end, answer)."""
    before = num_opened(line["prompt_ids"], profile)
    thought = line["num_thinking_tokens"] - before if profile.profile.thinks else 0
    answered = False
    parts: list[tuple[str, list[int]]] = []
    for position, (token, forced) in enumerate(zip(line["output_ids"], line["forced"], strict=True)):
        if position < thought:
            kind = "wait" if forced else "thinking"
        else:
            answered |= not forced
            kind = "answer" if answered else "end"
        if not parts or parts[-1][0] != kind:
            parts.append((kind, []))
        parts[-1][1].append(token)
    texts = [[kind, tokenizer.decode(ids, skip_special_tokens=False)] for kind, ids in parts]
    return {**{key: line[key] for key in _TRANSCRIPT_FIELDS}, "parts": texts}
