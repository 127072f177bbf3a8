"""Which questions share words in a row with evaluation questions."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

NGRAM = 8
"""Words in a row that may not be shared."""


class EvaluationQuestion(NamedTuple):
    """A question of an evaluation set, and the number its row is known by."""

    evaluation_set: str
    number: int
    question: str


class Match(NamedTuple):
    """The first words that a question shares with an evaluation question."""

    evaluation_set: str
    number: int
    question: str
    words: str


def fold(text: str) -> str:
    """The text in lower case, its words with one space between them."""
    return " ".join(text.lower().split())


def _ngrams(folded: str) -> Iterator[str]:
    """All runs of 8 words in a folded text; of a shorter one the whole."""
    words = folded.split(" ")
    for start in range(max(1, len(words) - NGRAM + 1)):
        yield " ".join(words[start : start + NGRAM])


class Decontamination:
    """Looks up questions among those of the evaluation sets."""

    def __init__(self, evaluation_questions: Iterable[EvaluationQuestion]):
        """Keep all their 8-grams; a question without words has none."""
        self._owners: dict[str, tuple[EvaluationQuestion, ...]] = {}
        for question in evaluation_questions:
            for ngram in set(_ngrams(fold(question.question))) - {""}:
                self._owners[ngram] = (*self._owners.get(ngram, ()), question)

    def matches(self, folded: str) -> list[Match]:
        """Each evaluation question that this folded question shares an 8-gram with, once."""
        first: dict[EvaluationQuestion, str] = {}
        for ngram in _ngrams(folded):
            for owner in self._owners.get(ngram, ()):
                first.setdefault(owner, ngram)
        return [Match(*owner, ngram) for owner, ngram in first.items()]
