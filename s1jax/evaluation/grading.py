"""Whether an answer is right: choices by their letter, whole numbers by their digits, all else in a process of its own.

That process is ended when it takes too long, and may use so much memory only: what a model writes is handed to parsers,
to mpmath and to sympy, and any of them may throw or never return.
"""

import multiprocessing
import re
import resource
import sys
from concurrent.futures import Future, TimeoutError
from typing import Literal, NamedTuple

from pebble import ProcessExpired, ProcessPool

from s1jax.evaluation.answer_text import chosen_letter, extract_answer

Kind = Literal["math", "choice"]
Verdict = Literal["right", "wrong", "ungraded"]

_INTEGER = re.compile(r"[+-]?(\d+|\d{1,3}(,\d{3})+)")
_LETTER = re.compile(r"\W*(?:\\(?:text|mathrm|textbf|mathbf)\{)?\W*[A-J]\W*")
_MOST_MEMORY = 2 << 30
_MOST_DIGITS = 200_000
"""More than an answer may have that is read, since sums have more digits than their terms."""


class Grade(NamedTuple):
    """A verdict on one answer."""

    verdict: Verdict
    extracted: str | None
    """The answer as it was found in the text."""
    reason: str | None = None
    """Why there is no verdict, or that no answer was found."""


class Grader:
    """Grades answers, one at a time; to be closed."""

    def __init__(self, time_limit: float):
        """Give one answer at most so many seconds."""
        self._time_limit = time_limit
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPool(max_workers=1, context=context, initializer=_bound)

    def close(self) -> None:
        """End the process."""
        self._pool.stop()
        self._pool.join()

    def grade(self, text: str, reference: str, kind: Kind = "math") -> Grade:
        """Whether the answer in `text` is `reference`; never raises for what a model has written.

        A reference that is a single letter from A to J makes it a choice.
        """
        found = extract_answer(text)
        if found is None:
            return Grade("wrong", None, "no answer found")
        if kind == "choice" or _LETTER.fullmatch(reference):
            return _grade_choice(found, reference)
        expected, given = _integer(reference), _integer(found)
        if expected is not None and given is not None:
            return Grade("right" if expected == given else "wrong", found)
        future: Future[tuple[Verdict, str | None]] = self._pool.schedule(
            _compare, args=(reference, found), timeout=self._time_limit
        )
        try:
            verdict, reason = future.result()
            return Grade(verdict, found, reason)
        except TimeoutError:
            return Grade("ungraded", found, f"it took more than {self._time_limit:g} s")
        except MemoryError:
            return Grade("ungraded", found, f"it took more than {_MOST_MEMORY >> 30} GiB of memory")
        except (RecursionError, ProcessExpired) as error:
            return Grade("ungraded", found, f"{type(error).__name__}: {error}"[:200])


def _compare(reference: str, found: str) -> tuple[Verdict, str | None]:
    """Runs in the grader's process, the only one that needs sympy."""
    from s1jax.evaluation.equivalence import equivalent
    from s1jax.evaluation.values import UndecidedError

    try:
        return "right" if equivalent(reference, found) else "wrong", None
    except UndecidedError as error:
        return "ungraded", str(error)[:200]


def _bound() -> None:
    """Limit what the grader's process can take; macOS knows no such limit of memory."""
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (_MOST_MEMORY, _MOST_MEMORY))
    sys.set_int_max_str_digits(_MOST_DIGITS)


def _grade_choice(found: str, reference: str) -> Grade:
    expected, _ = chosen_letter(reference)
    given, reason = chosen_letter(found)
    if expected is None:
        return Grade("ungraded", found, f"the reference {reference[:40]!r} is no letter from A to J")
    if reason and reason.startswith("more"):
        return Grade("ungraded", found, reason)
    return Grade("right" if given == expected else "wrong", found, reason)


def _integer(text: str) -> str | None:
    """Sign and digits of the integer that the text is: "023", "1,024", "$7$", "42."; None if it is anything else."""
    bare = re.sub(r"\\[()]|\$", "", text).strip().removesuffix(".").strip()
    bare = bare.replace("\\!", "").replace("\\,", "").replace("{,}", ",")
    if not _INTEGER.fullmatch(bare):
        return None
    digits = bare.replace(",", "").lstrip("+-0") or "0"
    return f"-{digits}" if bare.startswith("-") and digits != "0" else digits
