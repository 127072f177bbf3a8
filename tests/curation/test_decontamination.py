from hypothesis import example, given
from hypothesis import strategies as st

from s1jax.curation.decontamination import Decontamination, EvaluationQuestion, fold
from tests.reference.decontamination import matching

# Two words in two cases: questions share 8 in a row often, and 7 more often.
WORDS = st.sampled_from(["a", "A", "b", "B"])
SPACES = st.sampled_from([" ", "  ", "\n", "\t ", "\u00a0"])


@st.composite
def texts(draw: st.DrawFn, longest: int = 20) -> str:
    words = draw(st.lists(WORDS, min_size=1, max_size=longest))
    return "".join(word + draw(SPACES) for word in words)


@st.composite
def planted(draw: st.DrawFn) -> tuple[list[str], list[str], set[int]]:
    """Evaluation questions; questions of words of their own; and the indices of those with 8 foreign words put in."""
    evaluation = [
        [f"e{i}w{draw(st.integers(0, 5))}" for _ in range(draw(st.integers(8, 30)))]
        for i in range(draw(st.integers(1, 5)))
    ]
    questions, guilty = [], set()
    for index in range(draw(st.integers(1, 12))):
        words = [f"q{draw(st.integers(0, 5))}" for _ in range(draw(st.integers(0, 30)))]
        size = draw(st.sampled_from([0, 7, 8, 9]))
        other = draw(st.sampled_from(evaluation))
        size = min(size, len(other))
        start = draw(st.integers(0, len(other) - size))
        at = draw(st.integers(0, len(words)))
        stolen = [draw(st.sampled_from([str.upper, str.lower]))(word) for word in other[start : start + size]]
        words[at:at] = stolen
        questions.append("".join(word + draw(SPACES) for word in words))
        if size >= 8:
            guilty.add(index)
    return [" ".join(words) for words in evaluation], questions, guilty


def found(question: str, evaluation: list[str]) -> set[int]:
    index = Decontamination(EvaluationQuestion("set", i, text) for i, text in enumerate(evaluation))
    return {match.number for match in index.matches(fold(question))}


@given(question=texts(), evaluation=st.lists(texts(), max_size=4))
@example(question="a b c d e f g h", evaluation=["x A b\nc d e f g h y", "a b c d e f g", "b c d e f g h i"])
@example(question="What is it?", evaluation=["what  is it?", "So what is it? Say what is it, now.", "what is it"])
def test_as_the_slow_method(question: str, evaluation: list[str]) -> None:
    assert found(question, evaluation) == matching(question, evaluation)


@given(planted())
def test_planted_overlaps_are_all_found_and_none_is_invented(case: tuple[list[str], list[str], set[int]]) -> None:
    evaluation, questions, guilty = case
    assert {i for i, question in enumerate(questions) if found(question, evaluation)} == guilty
    assert {i for i, question in enumerate(questions) if matching(question, evaluation)} == guilty


def test_a_match_says_which_words_are_shared() -> None:
    index = Decontamination([EvaluationQuestion("set", 3, "zero One two three four five six seven EIGHT nine")])
    (match,) = index.matches(fold("Now one two three four five six seven eight nine ten"))
    assert match.words == "one two three four five six seven eight"
    assert (match.evaluation_set, match.number) == ("set", 3)
