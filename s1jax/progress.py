"""How far a long command is: a bar on a terminal, a line now and then in a log."""

import sys
from functools import partial
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 60.0
"""Between two lines where there is no terminal; what is done sooner has none."""


def progress(
    unit: str, total: int | None, *, initial: int = 0, name: str | None = None, shown: bool = True
) -> "tqdm[Any]":
    """Progress on stderr to `total` units, None where nobody knows; a context, moved on by its `update`.

    `update(0)` says that the command is still at work, which shows when nothing is finished for long.
    """
    desc = name and f"{name}: "
    show = partial(tqdm, desc=desc, unit=unit, total=total, initial=initial, disable=not shown, miniters=0)
    if sys.stderr.isatty():
        return show(dynamic_ncols=True)
    so_far = "{n_fmt} [{elapsed}" if total is None else "{n_fmt} of {total_fmt} [{elapsed}<{remaining}"
    line = "{desc}" + so_far + ", {rate_fmt}{postfix}]\n"
    return show(bar_format=line, delay=LINE_SECONDS, mininterval=LINE_SECONDS, maxinterval=LINE_SECONDS)
