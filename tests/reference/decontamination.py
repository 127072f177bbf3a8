"""Decontamination in the plainest way: every question beside every evaluation question, all its windows in turn."""

import re
from collections.abc import Sequence


def matching(question: str, evaluation_questions: Sequence[str]) -> set[int]:
    """Indices of the evaluation questions that share 8 words in a row, or are the same if either has fewer."""
    words = re.findall(r"\S+", question.lower())
    windows = ["\n" + "\n".join(words[i : i + 8]) + "\n" for i in range(len(words) - 7)]
    found = set()
    for index, other in enumerate(evaluation_questions):
        other_words = re.findall(r"\S+", other.lower())
        text = "\n" + "\n".join(other_words) + "\n"
        shared = words == other_words if len(words) < 8 or len(other_words) < 8 else any(w in text for w in windows)
        if shared:
            found.add(index)
    return found
