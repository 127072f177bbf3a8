"""The process that renders chat templates: on each line of its input a request in JSON, for each one an answer.

It is run by this file's path and imports nothing of s1jax. The system ends it when a template takes too much time.
"""

import json
import resource
import signal
import sys
import traceback
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

MEMORY_BYTES = 2**30
_TEMPLATE = "<template>"
"""The file name that jinja gives to a template's lines."""


def main() -> None:
    """Answer until the input ends."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # The signal's default is to end the process, also in the middle of one long operation of Python's own. The
        # time is that of the processor, so that a busy machine does not count.
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        answer = _render(request["arguments"], request["most_characters"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _render(arguments: dict[str, Any], most: int) -> dict[str, str]:
    """The text, or in one line what is wrong with the template or its text."""
    try:
        (text,), _ = render_jinja_template(**arguments)
    # A template is another's program, which may raise whatever Python knows.
    except Exception as error:
        return {"problem": _place(error) + _words(error)}
    if len(text) > most:
        return {"problem": f"it writes {len(text):,} characters, more than {most:,}"}
    return {"text": text}


def _words(error: Exception) -> str:
    if isinstance(error, jinja2.TemplateError) and error.message:
        return error.message[:1000]
    if isinstance(error, MemoryError):
        return f"it takes more than {MEMORY_BYTES // 2**20} MiB of memory"
    return f"{type(error).__name__}: {error}"[:1000]


def _place(error: Exception) -> str:
    """The line of the template, if it is known."""
    line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else None
    for frame in traceback.extract_tb(error.__traceback__):
        line = frame.lineno if frame.filename == _TEMPLATE else line
    return f"line {line}: " if line else ""


if __name__ == "__main__":
    main()
