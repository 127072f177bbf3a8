"""Which modules' tests take the processors' time: their own and that of the processes that they start and wait for.

Unlike durations, it does not depend on what runs beside.
"""

import os
from collections import Counter
from collections.abc import Iterator

import pytest

MODULES = 20
"""How many are shown."""
_SINCE = pytest.StashKey[float]()


def _seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    item.stash[_SINCE] = _seconds()
    yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    yield
    item.user_properties.append(("processor_seconds", _seconds() - item.stash[_SINCE]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    of_modules: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "teardown":
                of_modules[report.location[0]] += dict(report.user_properties).get("processor_seconds", 0)
    terminalreporter.section(f"{of_modules.total() / 60:.1f} minutes of the processors, by module")
    for module, seconds in of_modules.most_common(MODULES):
        terminalreporter.write_line(f"{seconds:7.1f} s  {module}")
