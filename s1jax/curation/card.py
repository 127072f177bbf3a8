"""The data card: what each stage left and dropped, as card.json, and from it card.md and a picture of the funnel."""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from matplotlib.figure import Figure
from pydantic import Field, TypeAdapter, ValidationError

from s1jax.evaluation.charts import as_svg
from s1jax.jsonl import InputError
from s1jax.paths import AnyPath, write_whole

STAGES = ("collect", "distill", "attempt", "grade", "filter", "domains", "select", "format")
"""In the order in which they are run."""

_MOST = 2**53
"""A figure beyond it is damage: up to here a float holds every integer."""
_Count = Annotated[int, Field(ge=0, le=_MOST)]
_Figure = Annotated[int | float, Field(ge=-_MOST, le=_MOST)]


@dataclass(frozen=True)
class Entry:
    """What a stage adds to the card."""

    funnel: list[tuple[str, _Count]] = field(default_factory=list)
    """What was left, and how many questions, step by step."""
    tables: dict[str, Mapping[str, _Figure]] = field(default_factory=dict)
    """Further figures by title."""


@dataclass(frozen=True)
class _Written(Entry):
    """An entry as it stands in card.json."""

    settings: dict[str, Any] = field(default_factory=dict)


def add_to_card(output_dir: AnyPath, stage: str, entry: Entry, settings: dict[str, Any]) -> None:
    """Enter the stage in card.json in place of its entry before, and draw card.md, card.svg and card.png anew.

    Entries of later stages are removed, since they were about what was there before. Raises InputError if card.json
    cannot be read, WriteError if a file cannot be written.
    """
    entries = _read(output_dir / "card.json")
    entries = {name: entries[name] for name in STAGES[: STAGES.index(stage)] if name in entries}
    entries[stage] = {**asdict(entry), "settings": settings}
    funnel = [(label, count) for name in entries for label, count in entries[name]["funnel"]]
    if funnel:
        chart = _chart(funnel)
        png = io.BytesIO()
        chart.savefig(png, format="png", dpi=150)
        write_whole(output_dir / "card.svg", as_svg(chart).encode())
        write_whole(output_dir / "card.png", png.getvalue())
    write_whole(output_dir / "card.md", _markdown(output_dir.name, entries, funnel).encode())
    write_whole(output_dir / "card.json", (json.dumps(entries, indent=2, ensure_ascii=False) + "\n").encode())


def _read(path: AnyPath) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        entries = TypeAdapter(dict[str, _Written]).validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {place:.100}: {first['msg']:.200}; move it away") from None
    except OSError as error:
        raise InputError(f"{path}: not readable: {error}; move it away") from None
    return {name: asdict(entry) for name, entry in entries.items()}


def _chart(funnel: list[tuple[str, int]]) -> Figure:
    """A bar for each step of the funnel, with its count."""
    figure = Figure(figsize=(7, 0.8 + 0.35 * len(funnel)), layout="constrained")
    axes = figure.add_subplot()
    labels, counts = zip(*funnel, strict=True)
    bars = axes.barh(range(len(funnel)), counts, color="tab:blue")
    axes.bar_label(bars, [f"{count:,}" for count in counts], padding=3)
    axes.set_yticks(range(len(funnel)), labels, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(right=1.12 * max(*counts, 1))
    axes.set_xlabel("questions")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _markdown(title: str, entries: dict[str, Any], funnel: list[tuple[str, int]]) -> str:
    lines = [f"# {title}", "", "| stage | left | questions | dropped |", "|---|---|---:|---:|"]
    before = None
    for stage, entry in entries.items():
        for label, count in entry["funnel"]:
            dropped = "" if before is None else f"{before - count:,}"
            lines.append(f"| {stage} | {_cell(label)} | {count:,} | {dropped} |")
            before = count
    if funnel:
        lines += ["", "![Questions left after each step](card.svg)"]
    for stage, entry in entries.items():
        lines += ["", f"## {stage}"]
        for name, table in entry["tables"].items():
            if table:
                lines += ["", f"| {_cell(name)} | |", "|---|---:|"]
                lines += [f"| {_cell(key)} | {_number(value)} |" for key, value in table.items()]
        if entry["settings"]:
            lines += ["", "```json", json.dumps(entry["settings"], indent=2, ensure_ascii=False), "```"]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _number(value: int | float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
