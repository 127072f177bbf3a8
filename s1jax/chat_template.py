"""Chat templates: programs that come with a model, rendered in a process of their own and in bounded time.

Whoever made the model wrote them. One may loop, or ask for more memory than there is, in the middle of an operation
that nothing in this process can interrupt.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from s1jax.tokenizer import template_file

SECONDS = 10.0
"""Of a processor, for one rendering; they take a thousandth of one."""
_ADDED_CHARACTERS = 2**20
"""What a template may add to a conversation, and the conversation itself it may write four times."""


class TemplateError(ValueError):
    """A conversation that the chat template does not render; the message names its file and quotes the template."""


def render_chat(
    messages: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
) -> str:
    """The text of a conversation, as transformers renders it; with the opening of the next turn if so asked.

    Raises TemplateError, also when there is no template.
    """
    file = template_file(tokenizer)
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise TemplateError(
            f"{file}: there is no chat template (for prompts as they stand: chat_template=false)"
        ) from None
    characters = sum(len(text) for message in messages for text in message.values())
    answer = _process().ask(
        template,
        {
            "arguments": {
                **tokenizer.special_tokens_map,
                "conversations": [list(map(dict, messages))],
                "chat_template": template,
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
            },
            "most_characters": 4 * characters + _ADDED_CHARACTERS,
            "seconds": SECONDS,
        },
    )
    problem = answer.get("problem")
    if problem is None:
        try:
            answer["text"].encode()
        except UnicodeEncodeError as error:
            problem = f"it writes a lone surrogate, {error.object[error.start]!r}"
    if problem is not None:
        raise TemplateError(f"the chat template of {file} fails: {' '.join(problem.split()):.300}")
    return answer["text"]


class _Process:
    """Started at the first rendering, and again after one that ended it."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._one_at_a_time = threading.Lock()
        self._fatal: dict[str, str] = {}
        """Templates that ended the process once, and how: they are not given another ten seconds for each row."""

    def ask(self, template: str, request: dict[str, Any]) -> dict[str, str]:
        with self._one_at_a_time:
            if template in self._fatal:
                return {"problem": self._fatal[template]}
            child = self._child = self._child or _start()
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                child.stdin.write(json.dumps(request, default=str).encode() + b"\n")
                child.stdin.flush()
                line = child.stdout.readline()
            except BrokenPipeError:
                line = b""
            if line:
                answer: dict[str, str] = json.loads(line)
                return answer
            self._child = None
            self._fatal[template] = _ending(child)
            return {"problem": self._fatal[template]}


@cache
def _process() -> _Process:
    return _Process()


def _start() -> "subprocess.Popen[bytes]":
    # Not by multiprocessing, which would run the caller's own program again; in a session of its own, so that Ctrl-C
    # is for this process to handle. It ends when its input does, with this process at the latest.
    return subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("template_process.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,
    )


def _ending(child: "subprocess.Popen[bytes]") -> str:
    """Why there was no answer."""
    _, errors = child.communicate()
    if child.returncode == -signal.SIGPROF:
        return f"it takes more than {SECONDS:g} s"
    last = errors.decode(errors="replace").strip().rpartition("\n")[2]
    return f"the process that renders it ended with status {child.returncode} ({last})"
