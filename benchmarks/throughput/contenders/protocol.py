"""How a contest talks to a contender: one JSON object a line, on the standard input and output of a process of its own.

Only the standard library: contenders run in environments that hold nothing of this project's.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


def serve(actions: dict[str, Callable[..., Any]]) -> None:
    """Answer each {"action": name, **arguments} with {"seconds", "peak_bytes", "result"} until the input ends.

    Whatever else the contender prints goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        arguments = json.loads(line)
        action = actions[arguments.pop("action")]
        started = time.perf_counter()
        result = action(**arguments)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        answers.write(json.dumps({"seconds": seconds, "peak_bytes": peak, "result": result}) + "\n")
        answers.flush()
