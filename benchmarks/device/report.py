"""Figures and verdicts as they come, in JSON and as a page."""

import datetime
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from s1jax.device_memory import limit_bytes

Row = dict[str, Any]
_LEAST_SECONDS = 5.0
"""That the first case of a table is given; the others as long as the slowest before took."""


class Report:
    """Tables of rows, verdicts, and what was left out; written to a directory after each case."""

    def __init__(self, directory: Path, ends: float):
        self._directory, self._ends = directory, ends
        self._started = time.monotonic()
        self._slowest: dict[str, float] = {}
        self._tables: dict[str, list[Row]] = {}
        self._verdicts: list[Row] = []
        self._left_out: list[str] = []
        device = jax.local_devices()[0]
        self._facts = {
            "date": datetime.date.today().isoformat(),
            "device": device.device_kind,
            "platform": device.client.platform_version.splitlines()[0],
            "jax": jax.__version__,
            "memory_bytes": limit_bytes(device),
        }

    @property
    def path(self) -> Path:
        """The page."""
        return self._directory / "device.md"

    @property
    def passed(self) -> bool:
        """Whether no verdict is against the device's programs."""
        return all(verdict["passed"] for verdict in self._verdicts)

    def case(self, table: str, name: str, measure: Callable[[], Row]) -> Row | None:
        """Measure one case, unless too little time is left for it; a case that fails is a row that says why."""
        started = time.monotonic()
        if started + self._slowest.get(table, _LEAST_SECONDS) > self._ends:
            self.leave_out(table, name, "no time was left")
            return None
        try:
            row: Row | None = measure()
        except Exception as error:
            traceback.print_exc()
            found = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.verdict(f"{table}: {name}", passed=False, found=found)
            row = None
        if row is not None:
            self._tables.setdefault(table, []).append({"case": name, **row})
        self._slowest[table] = max(self._slowest.get(table, 0.0), time.monotonic() - started)
        print(f"{time.monotonic() - self._started:6.1f} s  {table}: {name}: {row}", flush=True)
        self.write()
        return row

    def leave_out(self, table: str, name: str, why: str) -> None:
        """A case that is not measured."""
        self._left_out.append(f"{table}: {name} ({why})")
        self.write()

    def verdict(self, claim: str, *, passed: bool, found: str) -> None:
        """Something that holds on this device or does not."""
        self._verdicts.append({"claim": claim, "passed": passed, "found": found})

    def write(self) -> None:
        """All there is so far."""
        self._directory.mkdir(parents=True, exist_ok=True)
        content = {
            **self._facts,
            "seconds": time.monotonic() - self._started,
            "verdicts": self._verdicts,
            "tables": self._tables,
            "left_out": self._left_out,
        }
        (self._directory / "device.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        self.path.write_text(self._page(), encoding="utf-8")

    def _page(self) -> str:
        facts = self._facts
        lines = [
            f"# {facts['device']}, {facts['date']}",
            "",
            f"jax {facts['jax']}, {facts['platform']}; {time.monotonic() - self._started:.0f} s in all.",
            "",
            "| claim | holds | found |",
            "|---|---|---|",
            *(f"| {v['claim']} | {'yes' if v['passed'] else '**no**'} | {v['found']} |" for v in self._verdicts),
        ]
        for title, rows in self._tables.items():
            columns = list(dict.fromkeys(key for row in rows for key in row))
            lines += ["", f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows]
        if self._left_out:
            lines += ["", "Left out: " + "; ".join(self._left_out) + "."]
        return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
